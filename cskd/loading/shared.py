"""A batch in one piece of memory: a worker writes it where the main process can read it, in memory that is used again.

A tensor on its way out of a worker costs a shared-memory file, a descriptor handed over through a socket, and new pages
from the system: 107 us for a view of 224 pixels, measured on a virtual machine. A batch of a dozen tensors that is one
buffer pays for one file, and a worker that writes its buffers in turn pays for new pages once. The main process keeps what
it has mapped of them, and a descriptor of each, until the stream ends: a buffer is sent once, and from then on only its
number. Where it lends them, to be read by a GPU, they are page-locked once and no copy is made in between.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cskd.machine.side_stream import Mark

# By which a stream ends its workers: they are deaf to what a terminal or a batch system sends to all processes of a run.
ENDS = getattr(signal, "SIGUSR2", None) if hasattr(signal, "pthread_sigmask") else None
_ALIGN = 64  # bytes: a cache line, and enough for every dtype

Span = tuple[str, tuple[int, ...], int]  # numpy dtype, shape, first byte
Layout = tuple[tuple[str, Span], ...]
SlotName = tuple[int, int, int]  # stream, worker, number


class SharedBatch(dict[str, Tensor]):
    """Named tensors that are views of one buffer, uint8 [bytes], in shared memory where a worker makes them.

    It travels as that buffer. Whoever receives it gets a copy of its own (4 us a view), or is lent the worker's buffer: see
    `Stream`. about: small plain data that travels with it. reads: marks after which a reader of a lent buffer is done with it.
    """

    def __init__(self, buffer: Tensor, layout: Layout, slot: _Slot | None = None, about: Any = None) -> None:
        self.buffer, self.layout, self.slot, self.about = buffer, layout, slot, about
        self.reads: list[Mark] = []
        super().__init__(tensors_of(buffer, layout))

    @classmethod
    def empty(cls, specs: Mapping[str, tuple[Any, tuple[int, ...]]], spare: float = 0.0) -> SharedBatch:
        """Tensors of given dtypes and shapes, not initialised. specs: name -> (numpy dtype, shape). In a worker: once a
        task. spare: share by which a new buffer is larger, where sizes differ from task to task."""
        layout: list[tuple[str, Span]] = []
        end = 0
        for name, (dtype, shape) in specs.items():
            layout.append((name, (np.dtype(dtype).str, shape, end)))
            end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
        if _slots is None:
            return cls(torch.empty(end, dtype=torch.uint8), tuple(layout))
        slot = _slots.take(end, spare)
        return cls(slot.buffer[:end], tuple(layout), slot)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.buffer, self.layout, self.about)


def _copied(buffer: Tensor, layout: Layout, about: Any) -> SharedBatch:
    return SharedBatch(buffer.clone(), layout, about=about)


class _Slot:
    """A shared buffer of a worker, uint8 [bytes]. name: (stream, worker, number), which no other slot has.

    It is written in the worker's main thread and sent in its queue's, one after the other by the rule of `use_slots`.
    """

    def __init__(self, name: SlotName) -> None:
        self.name, self.sent = name, False
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def grow(self, size: int) -> None:
        with _not_ended():
            storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]  # as torch's collating does
        self.buffer, self.sent = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,)), False


@contextmanager
def _not_ended() -> Iterator[None]:
    """The signal by which a stream ends its workers waits: a file that has a name for a moment would keep it."""
    if ENDS is None:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {ENDS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Slots:
    """A worker's shared buffers, used in turn."""

    def __init__(self, stream: int, worker: int, slots: int) -> None:
        self._slots = [_Slot((stream, worker, number)) for number in range(slots)]
        self._next = 0

    def take(self, size: int, spare: float = 0.0) -> _Slot:
        slot = self._slots[self._next]
        if len(slot.buffer) < size:
            slot.grow(size + int(size * spare))
        self._next = (self._next + 1) % len(self._slots)
        return slot


_slots: _Slots | None = None


def use_slots(stream: int, worker: int, prefetch: int) -> None:
    """In a worker: make batches in shared buffers from now on, the same ones over and over.

    prefetch: results of this worker that may be under way. DataLoader hands out a task when it has taken the result that
    lay `prefetch` tasks back, so the one before that has been copied, and its buffer, one more than `prefetch`, is free.
    """
    global _slots
    _slots = _Slots(stream, worker, prefetch + 1)


@dataclass
class _Mapped:
    """The buffers of a stream's workers, in the main process. lend_to: the device that reads them where they are, or None."""

    lend_to: torch.device | None
    buffers: dict[SlotName, Tensor] = field(default_factory=dict)
    locked: set[SlotName] = field(default_factory=set)

    def put(self, name: SlotName, buffer: Tensor) -> None:
        """A new buffer; the one that it replaces is read by nobody any more."""
        self._drop(name)
        self.buffers[name] = buffer
        if self.lend_to is not None and self.lend_to.type == "cuda" and _page_lock(buffer, self.lend_to):
            self.locked.add(name)

    def close(self) -> None:
        if self.locked:
            with suppress(RuntimeError):  # a device that has failed reads nothing any more
                torch.cuda.synchronize(self.lend_to)
        for name in list(self.buffers):
            self._drop(name)

    def _drop(self, name: SlotName) -> None:
        buffer = self.buffers.pop(name, None)
        if buffer is not None and name in self.locked:
            self.locked.remove(name)
            _cuda().cudaHostUnregister(buffer.data_ptr())


def _page_lock(buffer: Tensor, device: torch.device) -> bool:
    """Let a GPU read shared memory by itself. Where the system refuses, it stays as it is: batches are copied once more."""
    with torch.cuda.device(device):
        if int(_cuda().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, _PORTABLE)) == 0:
            return True
        with suppress(RuntimeError):  # CUDA keeps the error for whoever asks next: a launch, which forgets it
            torch.zeros(1, device=device)
        return False


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all devices of the process

_streams = itertools.count()
# In the main process, by whichever thread receives: what was sent, by stream.
_mapped: dict[int, _Mapped] = {}


@contextmanager
def mapped_slots(lend_to: torch.device | None = None) -> Iterator[int]:
    """In the main process: the number of a new stream, whose workers' buffers are let go of in the end."""
    stream = next(_streams)
    _mapped[stream] = _Mapped(lend_to)
    try:
        yield stream
    finally:
        _mapped.pop(stream).close()


def _sent(batch: SharedBatch) -> tuple[Any, ...]:
    """What goes through a worker's queue, which keeps the order of its batches: the buffer only where it is new."""
    slot = batch.slot
    if slot is None:
        return batch.__reduce__()
    buffer, slot.sent = None if slot.sent else slot.buffer, True
    return _received, (slot.name, buffer, len(batch.buffer), batch.layout, batch.about)


# Not in `__reduce__`: a copy within the worker is not sent.
ForkingPickler.register(SharedBatch, _sent)


def _received(name: SlotName, buffer: Tensor | None, size: int, layout: Layout, about: Any) -> SharedBatch:
    mapped = _mapped[name[0]]
    if buffer is not None:
        mapped.put(name, buffer)
    filled = mapped.buffers[name][:size]
    return _copied(filled, layout, about) if mapped.lend_to is None else SharedBatch(filled, layout, about=about)


def tensors_of(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors that a buffer, uint8 [bytes] on any device, holds: views of it."""
    return {name: _view(buffer, *place) for name, place in layout}


def _view(buffer: Tensor, dtype: str, shape: tuple[int, ...], first: int) -> Tensor:
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return buffer[first : first + int(np.prod(shape)) * kind.itemsize].view(kind).view(shape)
