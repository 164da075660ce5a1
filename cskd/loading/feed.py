"""From a worker's buffer to the device, one batch ahead: while one is worked on, the next is copied on a stream of its own.

On the device a batch is again one piece of memory: one copy, out of page-locked memory, whatever it holds. The thread that
launches the student launches this, too, before it gets a batch to work on; nothing here waits for the device, but the check
of views that were made a step before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from cskd.errors import CskdError
from cskd.loading.need import PREFETCH
from cskd.loading.shared import SharedBatch, tensors_of
from cskd.loading.stream import Stream, Worker
from cskd.machine.side_stream import Mark, SideStream, enter

_HOST = ("seconds",)  # what the main process reads itself
_GRAIN = 1 << 25  # bytes: larger sizes, which may differ from batch to batch, are rounded up: memory is used again


class DeviceBatch(dict[str, Tensor]):
    """Named tensors on a device. about: as of `SharedBatch`; ready: the mark after which they are there; check: waits until
    it can be told whether they are right, and raises where they are not."""

    def __init__(self, tensors: dict[str, Tensor], about: Any = None) -> None:
        super().__init__(tensors)
        self.about = about
        self.ready: Mark | None = None
        self.check: Callable[[], None] | None = None

    def enter(self) -> None:
        """Before work on the tensors is launched on the current stream of their device."""
        if self.ready is not None:
            enter(self.ready, self.values())


def on_device(batch: SharedBatch, device: torch.device) -> DeviceBatch:
    """A batch copied to `device` on its current stream. Out of a page-locked buffer, nobody waits for it."""
    if device.type == "cpu":
        return DeviceBatch(batch, batch.about)
    size = len(batch.buffer)
    room = size if size < _GRAIN else -(-size // _GRAIN) * _GRAIN
    there = torch.empty(room, dtype=torch.uint8, device=device)[:size]
    there.copy_(batch.buffer if batch.buffer.is_pinned() else batch.buffer.pin_memory(), non_blocking=True)
    host = {name: batch[name].clone() for name in _HOST if name in batch}
    return DeviceBatch(tensors_of(there, batch.layout) | host, batch.about)


R = TypeVar("R")


class Feed(Generic[R]):
    """Results of a `Stream` on their device, in order: batches, or what has one as its field `batch`.

    make: what is launched for a batch after it was copied; it gives the batch to hand on. An error of a result is raised in
    its turn, when those before it have been worked on.
    """

    def __init__(
        self,
        results: Iterable[Any],
        side: SideStream,
        make: Callable[[DeviceBatch, SideStream], DeviceBatch] | None = None,
        move: Callable[[SharedBatch, torch.device], DeviceBatch] = on_device,
    ) -> None:
        self._results, self._side, self._make, self._move = results, side, make, move

    def __iter__(self) -> Iterator[R]:
        results: Any = iter(self._results)
        with closing(results):
            coming = self._begun(results)
            while coming is not None:
                if isinstance(coming, CskdError):
                    raise coming
                now, coming = coming, self._begun(results)
                batch = _batch_of(now)
                if batch.check is not None:
                    batch.check()
                batch.enter()
                yield now
                del now, batch  # its memory is free for the batch after the next one

    def _begun(self, results: Iterator[Any]) -> Any:
        """The next result, its work launched; an error that waits for its turn; None after the last."""
        try:
            result = next(results)
        except StopIteration:
            return None
        except CskdError as e:
            return e
        batch = _batch_of(result)
        with self._side.launching():
            try:
                moved = self._move(batch, self._side.device)
            finally:
                batch.reads.append(self._side.mark())
            made = moved if self._make is None else self._make(moved, self._side)
        made.ready = self._side.mark()
        return made if result is batch else replace(result, batch=made)


def _batch_of(result: Any) -> Any:
    return result if isinstance(result, dict) else result.batch


def fed(
    worker: Worker[Any, Any],
    tasks: Iterable[Any],
    device: torch.device,
    workers: int,
    prefetch: int = PREFETCH,
    make: Callable[[DeviceBatch, SideStream], DeviceBatch] | None = None,
) -> Iterator[Any]:
    """The results of a stream where they are needed: on a GPU, one ahead of those that are worked on; else, without `make`, as
    they come. See `Stream` and `Feed`."""
    cuda = device.type == "cuda"
    stream = Stream(worker, tasks, workers, prefetch, lend_to=device if cuda else None)
    return iter(Feed(stream, SideStream(device), make)) if cuda or make is not None else iter(stream)
