"""All that the host decides about a batch, in one buffer: one copy to the device, where every step reads its part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = 8  # bytes; parts begin at multiples of it
_DTYPES = {
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.uint8): torch.uint8,
}


@dataclass(frozen=True)
class Slot:
    """Where in the buffer an array lies, and what it is."""

    first: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, words: Tensor) -> Tensor:
        """The array: a view of the buffer `words`, int64 [n], on its device."""
        count = math.prod(self.shape)
        behind = self.first + -(-count * self.dtype.itemsize // _WORD)
        return words[self.first : behind].view(self.dtype)[:count].view(self.shape)


class Writer:
    """Collects arrays; `words` is the buffer of all of them."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.uint8]] = []
        self._next = 0

    def put(self, values: NDArray[Any]) -> Slot:
        """Append an array. Raises KeyError for a dtype that no step reads."""
        slot = Slot(self._next, _DTYPES[values.dtype], values.shape)
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._parts += [raw, np.zeros(-len(raw) % _WORD, np.uint8)]
        self._next += -(-len(raw) // _WORD)
        return slot

    def words(self) -> Tensor:
        """int64 [n] on the CPU."""
        return torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *self._parts]).view(np.int64))
