"""A batch is one buffer, whatever is in it: in the workers, on its way, and in the main process."""

from __future__ import annotations

import copy
import functools
import gc
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cskd.config import RecipeConfig
from cskd.errors import CskdError, ImageError, ReadError
from cskd.loading import shared
from cskd.loading.shared import SharedBatch, _sent, _Slots
from cskd.loading.stage1 import Chunk, ChunkMaker
from cskd.loading.stream import Stream

SPECS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "pixels": (np.uint8, (3, 5, 5, 3)),
    "label": (np.int64, (3,)),
    "none": (np.float32, (0, 4)),
    "box": (np.int64, (3, 4)),
    "share": (np.float32, (3,)),
}


def filled(start: int = 0) -> SharedBatch:
    batch = SharedBatch.empty(SPECS)
    for name, (dtype, shape) in SPECS.items():
        batch[name].numpy()[...] = (np.arange(np.prod(shape)) + start).reshape(shape).astype(dtype)
    return batch


def assert_filled(batch: dict[str, torch.Tensor], start: int = 0) -> None:
    assert list(batch) == list(SPECS)
    for name, (dtype, shape) in SPECS.items():
        expected = (np.arange(np.prod(shape)) + start).reshape(shape).astype(dtype)
        assert batch[name].numpy().dtype == dtype
        assert np.array_equal(batch[name].numpy(), expected)


class Filler:
    """A worker that fills a batch, or fails as workers do."""

    def __call__(self, task: int) -> SharedBatch:
        if task == 99:
            raise CskdError("nothing to fill")
        return filled(task)


class Dying:
    """A worker that dies when what it made before has been received."""

    def __call__(self, task: int) -> SharedBatch:
        if task == 99:
            time.sleep(0.5)
            os._exit(1)
        return filled(task)


def test_tensors_do_not_overlap_and_share_one_buffer() -> None:
    batch = filled()
    assert_filled(batch)
    assert {t.untyped_storage().data_ptr() for t in batch.values()} == {batch.buffer.data_ptr()}


def test_a_copy_of_a_batch_is_one_buffer_with_the_same_tensors() -> None:
    copied = copy.deepcopy(filled(7))
    assert_filled(copied, 7)
    assert copied["label"].untyped_storage().data_ptr() == copied.buffer.data_ptr() != filled(7).buffer.data_ptr()


@pytest.mark.parametrize(("workers", "prefetch", "tasks"), [(0, 4, 5), (1, 1, 40), (2, 1, 60), (2, 4, 90)])
def test_a_delivered_batch_is_the_readers_own(workers: int, prefetch: int, tasks: int) -> None:
    """Workers write their buffers over and over, as far ahead as they may; what has been delivered stays as it was."""
    kept = []
    for batch in Stream(Filler(), range(tasks), workers, prefetch):
        kept.append(batch)
        if len(kept) % 10 == 0:
            time.sleep(0.05)  # the workers get ahead
    for task, batch in enumerate(kept):
        assert_filled(batch, task)
        batch["label"] += 1  # and it may be written on
    with pytest.raises(CskdError, match="nothing to fill"):
        list(Stream(Filler(), [0, 99], workers, prefetch))


def test_buffers_are_used_in_turn_and_grow() -> None:
    slots = _Slots(0, 0, 3)
    sizes = (100, 50, 10, 60, 51, 10)
    taken = [slots.take(size).buffer for size in sizes]
    assert all(len(t) >= size and t.is_shared() for t, size in zip(taken, sizes, strict=True))
    places = [t.data_ptr() for t in taken]
    assert places[0] == places[3] and places[2] == places[5]  # used again
    assert len({*places[:3], places[4]}) == 4  # 51 bytes do not fit where 50 were


class Counter:
    """A worker whose batches hold `task` integers, all of them `task`."""

    def __call__(self, task: int) -> SharedBatch:
        batch = SharedBatch.empty({"numbers": (np.int64, (task,))})
        batch["numbers"].numpy()[...] = task
        return batch


def assert_counted(batch: SharedBatch, task: int) -> None:
    assert batch["numbers"].tolist() == [task] * task


def watch_buffers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """(name, bytes) of each buffer that this process is sent from now on."""
    sent, receive = [], shared._received

    @functools.wraps(receive)  # a forked worker has it too, and pickles it by its name
    def received(name: Any, buffer: torch.Tensor | None, *rest: Any) -> SharedBatch:
        if buffer is not None:
            sent.append((name, len(buffer)))
        return receive(name, buffer, *rest)

    monkeypatch.setattr(shared, "_received", received)
    return sent


@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_a_buffer_is_sent_once_and_again_where_it_has_grown(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = watch_buffers(monkeypatch)
    tasks = [1000] * 20 + [10, 2000, 30, 40] * 8
    for task, batch in zip(tasks, Stream(Counter(), tasks, 1, 2, start=start), strict=True):
        assert_counted(batch, task)
    sizes = [size for _, size in sent]
    assert sizes == [8000] * 3 + [16000] * 3  # three buffers: two results may lie ready while one is made
    assert {name for name, _ in sent[:3]} == {name for name, _ in sent[3:]}


@pytest.mark.slow
def test_streams_at_once_do_not_read_each_others_buffers() -> None:
    one = Stream(Counter(), range(50), 2, 1)
    runs = [iter(one), iter(Stream(Counter(), range(100, 150), 1, 1)), iter(one)]
    for task in range(50):
        for batch, first in zip([next(run) for run in runs], (0, 100, 0), strict=True):
            assert_counted(batch, first + task)


def shared_mappings() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_text().count("/torch_") if maps.exists() else 0


@pytest.mark.slow
def test_a_stream_that_has_ended_leaves_no_buffer_mapped() -> None:
    gc.collect()  # streams of other tests, whose tracebacks kept them
    before = shared_mappings()
    results = iter(Stream(Filler(), range(40), 2, 2))
    next(results)
    assert len(shared._mapped) == 1
    results.close()  # type: ignore[attr-defined]
    assert len(list(Stream(Filler(), range(40), 2, 2))) == 40
    with pytest.raises(CskdError, match="nothing to fill"):
        list(Stream(Filler(), [0, 0, 0, 99], 2, 2))
    with pytest.raises(ReadError, match="a worker process died"):
        list(Stream(Dying(), [0, 0, 0, 99], 1, 2))
    assert not shared._mapped and shared_mappings() == before


def test_a_copy_of_a_batch_does_not_count_as_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_slots", _Slots(0, 0, 1))
    batch = filled(5)
    assert_filled(copy.deepcopy(batch), 5)
    buffers = [_sent(batch)[1][1] for _ in range(2)]
    assert buffers[0] is not None and buffers[1] is None


class OneBad:
    """Makes views of ones, of all images but the second."""

    recipe = RecipeConfig(size=4)
    inventory = SimpleNamespace(key_hash=np.arange(3, dtype=np.uint64))

    def image(self, sample: int) -> int:
        if sample == 1:
            raise ImageError("not an image")
        return sample

    def view(self, image: int, seed: int) -> Any:
        return np.ones((4, 4, 3), np.uint8)


def test_views_of_a_bad_image_are_zeros_in_memory_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_slots", _Slots(0, 0, 1))
    task = Chunk(0, (0, 1), 0, np.arange(3))
    SharedBatch.empty({"before": (np.uint8, (2 * 3 * 4 * 4 * 3,))})["before"].fill_(255)
    made = ChunkMaker(OneBad(), "id")(task)  # type: ignore[arg-type]
    assert isinstance(made.batch, SharedBatch) and made.batch.slot is not None and list(made.bad) == [1]
    assert torch.equal(made.pixels.amax((0, 2, 3, 4)), torch.tensor([1, 0, 1], dtype=torch.uint8))
    assert made.pixels.min() == 0 and made.pixels[:, [0, 2]].min() == 1
