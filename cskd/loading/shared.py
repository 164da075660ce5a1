"""A batch in one piece of memory: what a worker writes there, the main process reads without a copy.

A tensor on its way out of a worker costs a shared-memory file, a descriptor handed over through a socket, and, if it was
not in shared memory before, a copy. A batch of a dozen tensors that is one buffer pays once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_ALIGN = 64  # bytes: a cache line, and enough for every dtype

Place = tuple[str, tuple[int, ...], int]  # numpy dtype, shape, first byte
Layout = tuple[tuple[str, Place], ...]


class SharedBatch(dict[str, Tensor]):
    """Named tensors that are views of one buffer, uint8 [bytes], in shared memory where a worker makes them.

    It pickles, and is pinned, as that buffer.
    """

    def __init__(self, buffer: Tensor, layout: Layout) -> None:
        self.buffer, self.layout = buffer, layout
        super().__init__((name, _view(buffer, *place)) for name, place in layout)

    @classmethod
    def empty(cls, specs: Mapping[str, tuple[Any, tuple[int, ...]]]) -> SharedBatch:
        """Tensors of given dtypes and shapes, not initialised. specs: name -> (numpy dtype, shape)."""
        layout: list[tuple[str, Place]] = []
        end = 0
        for name, (dtype, shape) in specs.items():
            layout.append((name, (np.dtype(dtype).str, shape, end)))
            end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
        if get_worker_info() is None:
            return cls(torch.empty(end, dtype=torch.uint8), tuple(layout))
        storage = torch.UntypedStorage._new_shared(end)  # type: ignore[no-untyped-call]  # as torch's own collating does
        return cls(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (end,), (1,)), tuple(layout))

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedBatch, (self.buffer, self.layout)

    def pin_memory(self) -> SharedBatch:
        """A copy in memory from which a GPU can read by itself; what DataLoader calls."""
        return SharedBatch(self.buffer.pin_memory(), self.layout)


def _view(buffer: Tensor, dtype: str, shape: tuple[int, ...], first: int) -> Tensor:
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return buffer[first : first + int(np.prod(shape)) * kind.itemsize].view(kind).view(shape)
