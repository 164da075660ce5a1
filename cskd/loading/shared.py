"""A batch in one piece of memory: a worker writes it where the main process can read it, in memory that is used again.

A tensor on its way out of a worker costs a shared-memory file, a descriptor handed over through a socket, and new pages
from the system: 107 us for a view of 224 pixels, measured on a virtual machine. A batch of a dozen tensors that is one
buffer pays for one file, and a worker that writes its buffers in turn pays for new pages once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64  # bytes: a cache line, and enough for every dtype

Place = tuple[str, tuple[int, ...], int]  # numpy dtype, shape, first byte
Layout = tuple[tuple[str, Place], ...]


class SharedBatch(dict[str, Tensor]):
    """Named tensors that are views of one buffer, uint8 [bytes], in shared memory where a worker makes them.

    It travels, and is pinned, as that buffer. Whoever receives it gets a copy of its own (4 us a view).
    """

    def __init__(self, buffer: Tensor, layout: Layout) -> None:
        self.buffer, self.layout = buffer, layout
        super().__init__((name, _view(buffer, *place)) for name, place in layout)

    @classmethod
    def empty(cls, specs: Mapping[str, tuple[Any, tuple[int, ...]]]) -> SharedBatch:
        """Tensors of given dtypes and shapes, not initialised. specs: name -> (numpy dtype, shape). In a worker: once a
        task."""
        layout: list[tuple[str, Place]] = []
        end = 0
        for name, (dtype, shape) in specs.items():
            layout.append((name, (np.dtype(dtype).str, shape, end)))
            end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
        return cls(_slots.take(end) if _slots else torch.empty(end, dtype=torch.uint8), tuple(layout))

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.buffer, self.layout)

    def pin_memory(self) -> SharedBatch:
        """A copy in memory from which a GPU can read by itself; what DataLoader calls."""
        return SharedBatch(self.buffer.pin_memory(), self.layout)


class _Slots:
    """A worker's shared buffers, used in turn."""

    def __init__(self, count: int) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * count
        self._next = 0

    def take(self, size: int) -> Tensor:
        buffer = self._buffers[self._next]
        if len(buffer) < size:
            storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]  # as torch's collating does
            buffer = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))
            self._buffers[self._next] = buffer
        self._next = (self._next + 1) % len(self._buffers)
        return buffer[:size]


_slots: _Slots | None = None


def use_slots(prefetch: int) -> None:
    """In a worker: make batches in shared buffers from now on, the same ones over and over.

    prefetch: results of this worker that may be under way. DataLoader hands out a task when it has taken the result that
    lay `prefetch` tasks back, so the one before that has been copied, and its buffer, one more than `prefetch`, is free.
    """
    global _slots
    _slots = _Slots(prefetch + 1)


def _received(buffer: Tensor, layout: Layout) -> SharedBatch:
    return SharedBatch(buffer.clone(), layout)


def _view(buffer: Tensor, dtype: str, shape: tuple[int, ...], first: int) -> Tensor:
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return buffer[first : first + int(np.prod(shape)) * kind.itemsize].view(kind).view(shape)
