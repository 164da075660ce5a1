"""Batches on their way to a device: lent buffers are written again only when they were read, and errors wait for their turn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from cskd.errors import CskdError, ReplayError
from cskd.loading import shared
from cskd.loading.feed import DeviceBatch, Feed, on_device
from cskd.loading.shared import SharedBatch
from cskd.loading.stream import Stream
from cskd.machine.side_stream import SideStream

CPU = torch.device("cpu")


class Filler:
    """A worker whose batches are 2,000 times the number of their task."""

    def __call__(self, task: int) -> SharedBatch:
        batch = SharedBatch.empty({"numbers": (np.int64, (2000,)), "seconds": (np.float64, (2,))})
        batch["numbers"].numpy()[...] = task
        batch["seconds"].numpy()[...] = task
        return batch


@dataclass
class LateMark:
    side: LateSide
    place: int

    def synchronize(self) -> None:
        self.side.run(self.place)


class LateSide(SideStream):
    """A device as late as one may be: it does nothing before somebody waits for it. careless: not even then."""

    def __init__(self, careless: bool = False) -> None:
        super().__init__(CPU)
        self.work: list[Callable[[], None]] = []
        self.done, self.careless = 0, careless

    def mark(self) -> LateMark:
        return LateMark(self, len(self.work))

    def run(self, place: int, at_last: bool = False) -> None:
        while self.done < place and (at_last or not self.careless):
            self.work[self.done]()
            self.done += 1

    def copy(self, batch: SharedBatch, device: torch.device) -> DeviceBatch:
        there = DeviceBatch({name: torch.zeros_like(tensor) for name, tensor in batch.items()})

        def work() -> None:
            for name, tensor in there.items():
                tensor.copy_(batch[name])

        self.work.append(work)
        return there


def delivered(side: LateSide, tasks: int, workers: int, prefetch: int) -> list[int]:
    """The tasks that the batches of a stream hold when the device has at last done all of its work."""
    kept: list[DeviceBatch] = []
    for batch in Feed[DeviceBatch](
        Stream(Filler(), range(tasks), workers, prefetch, lend_to=CPU), side, move=side.copy
    ):
        kept.append(batch)
        if len(kept) % 5 == 0:
            time.sleep(0.05)  # the workers get ahead
    side.run(len(side.work), at_last=True)
    return [int(batch["numbers"][0]) if len(batch["numbers"].unique()) == 1 else -1 for batch in kept]


@pytest.mark.parametrize(("workers", "prefetch", "tasks"), [(1, 1, 30), (2, 1, 40), (2, 4, 60)])
def test_a_buffer_is_written_again_only_when_the_device_has_read_it(workers: int, prefetch: int, tasks: int) -> None:
    assert delivered(LateSide(), tasks, workers, prefetch) == list(range(tasks))


def test_this_would_notice_a_buffer_that_is_written_too_early() -> None:
    assert delivered(LateSide(careless=True), 40, 2, 1) != list(range(40))


class CudaRuntime:
    """Counts what is page-locked, in place of CUDA."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.locked, self.calls = code, dict[int, int](), 0

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 1 and place not in self.locked
        self.calls += 1
        if not self.code:
            self.locked[place] = size
        return self.code

    def cudaHostUnregister(self, place: int) -> int:  # noqa: N802
        del self.locked[place]
        return 0


class Growing:
    """A worker whose batches are of `task` numbers."""

    def __call__(self, task: int) -> SharedBatch:
        batch = SharedBatch.empty({"numbers": (np.int64, (task,))})
        batch["numbers"].numpy()[...] = task
        return batch


@pytest.mark.parametrize("code", [0, 801])
def test_a_buffer_is_page_locked_once_and_let_go_of_when_it_has_grown(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = CudaRuntime(code)
    monkeypatch.setattr(shared, "_cuda", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    tasks = [1000] * 12 + [2000] * 12
    results = iter(Stream(Growing(), tasks, 1, 2, lend_to=torch.device("cuda")))
    for task, batch in zip(tasks, results, strict=False):
        assert batch["numbers"].tolist() == [task] * task
    assert runtime.calls == 6  # three buffers, two sizes
    assert sorted(runtime.locked.values()) == ([] if code else [16000] * 3)
    assert next(results, None) is None and not runtime.locked


def test_spare_room_keeps_a_buffer_where_sizes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_slots", shared._Slots(0, 0, 1))
    batches = [SharedBatch.empty({"n": (np.uint8, (size,))}, spare=0.125) for size in (800, 896, 64, 1100)]
    places = [batch.buffer.data_ptr() for batch in batches]
    assert places[0] == places[1] == places[2] and [len(batch["n"]) for batch in batches] == [800, 896, 64, 1100]
    assert len(batches[3].buffer) == 1152 and batches[3].slot is not None and len(batches[3].slot.buffer) == 1296


def in_order(say: list[str]) -> tuple[Iterator[SharedBatch], Callable[[DeviceBatch, SideStream], DeviceBatch]]:
    """Three batches and an error, and what makes a device batch of one; both say what they do."""

    def results() -> Iterator[SharedBatch]:
        for task in range(3):
            yield Filler()(task)
        raise CskdError("the fourth is broken")

    def make(batch: DeviceBatch, side: SideStream) -> DeviceBatch:
        task = int(batch["numbers"][0])
        say.append(f"make {task}")
        batch.check = lambda: say.append(f"check {task}")
        return batch

    return results(), make


def test_the_next_batch_is_launched_before_one_is_handed_on_and_an_error_waits_for_its_turn() -> None:
    said: list[str] = []
    results, make = in_order(said)
    with pytest.raises(CskdError, match="the fourth is broken"):
        for batch in Feed[DeviceBatch](results, SideStream(CPU), make):
            said.append(f"use {int(batch['numbers'][0])}")
    assert " ".join(said) == "make 0 make 1 check 0 use 0 make 2 check 1 use 1 check 2 use 2"


def test_a_batch_that_is_found_wrong_is_not_handed_on() -> None:
    def make(batch: DeviceBatch, side: SideStream) -> DeviceBatch:
        def check() -> None:
            if int(batch["numbers"][0]) == 1:
                raise ReplayError("view 1 is another")

        batch.check = check
        return batch

    used = []
    with pytest.raises(ReplayError, match="view 1 is another"):
        for batch in Feed[DeviceBatch]((Filler()(task) for task in range(3)), SideStream(CPU), make):
            used.append(int(batch["numbers"][0]))
    assert used == [0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has streams")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_on_a_gpu_are_those_of_the_workers_and_nothing_waits(workers: int) -> None:
    device = torch.device("cuda", 0)
    side, burden = SideStream(device), torch.randn(4000, 4000, device=device)
    sums: list[Any] = []
    stream = Stream(Filler(), range(40), workers, 2, lend_to=device)
    for task, batch in enumerate(Feed[DeviceBatch](stream, side)):
        assert batch["seconds"].tolist() == [task] * 2 and batch["seconds"].device.type == "cpu"
        assert batch["numbers"].is_cuda
        burden = burden @ burden  # the device is behind
        sums.append(batch["numbers"].sum())
    assert [int(total) for total in sums] == [2000 * task for task in range(40)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has pinned memory")
def test_shared_memory_is_page_locked_for_a_gpu() -> None:
    device, seen = torch.device("cuda", 0), []
    for batch in Stream(Filler(), range(6), 1, 1, lend_to=device):
        assert batch.buffer.is_pinned()
        seen.append(int(on_device(batch, device)["numbers"].sum()))
    assert seen == [2000 * task for task in range(6)] and not shared._mapped
