"""Codecs with tables, which all units of a cache share, and whole maps in a few bits a number.

Shapes: N samples, B batch, C channels, h w of the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cskd.codecs.base import Arrays, Codec, Field
from cskd.codecs.bits import pack_levels, unpack_levels
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor

# Of a map whose numbers are packed: levels of so many bits, the lowest bit first, channel by channel; a number is
# low + level * step.
MAP_FIELDS = {
    "packed": Field(("uint8",), ("sample", "row", "col", "byte")),
    "low": Field(("float32",), ("sample", "row", "col")),
    "step": Field(("float32",), ("sample", "row", "col")),
}


class TabledCodec(Codec):
    """A codec whose `tables` (see `cskd.store.tables`) must be set before anything else is done."""

    fitted_on: ClassVar[int] = 4  # views that its tables should be fitted on

    def __init__(self, name: str, classes: int, grid: tuple[int, int]) -> None:
        super().__init__(name, classes, grid)
        self._load: Callable[[], Arrays] | None = None
        self._tables: dict[str, Tensor] = {}
        self._on: dict[str, dict[str, Tensor]] = {}  # by device

    def use_tables(self, load: Callable[[], Arrays]) -> None:
        """Have `load` give the tables when they are asked for first."""
        self._load, self._tables, self._on = load, {}, {}

    def tables(self, device: object = "cpu") -> dict[str, Tensor]:
        """What all units share, on a device. CodecError where it is not there, or not of this codec."""
        import torch

        if not self._tables:
            if self._load is None:
                raise CodecError(f"codec '{self.name}' needs its tables, which are in its cache; open that")
            arrays = self._load()
            self._check_tables(arrays)
            self._tables = {name: torch.from_numpy(a) for name, a in arrays.items()}
        key = str(device)
        if key not in self._on:
            self._on[key] = {name: t.to(key) for name, t in self._derived(self._tables).items()}
        return self._on[key]

    def _derived(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tables with what decoding makes of them."""
        return tables

    def _check_tables(self, arrays: Arrays) -> None:
        """CodecError unless the tables are of this codec."""
        raise NotImplementedError


def exact(x: Tensor) -> Tensor:
    """What is multiplied to be stored: on CUDA in float64. Whether float32 is rounded to TF32 there is a setting of the whole
    process, which another thread's forward may have on."""
    return x.double() if x.is_cuda else x


def pack_map(x_BChw: Tensor, bits: int) -> Arrays:
    """Float32 maps as the arrays of `MAP_FIELDS`."""
    packed, low, step = pack_levels(x_BChw.permute(0, 2, 3, 1), bits)
    return {"packed": packed.numpy(), "low": low.numpy(), "step": step.numpy()}


def unpack_map(tensors: dict[str, Tensor], channels: int, bits: int) -> Tensor:
    """The maps of `pack_map`, on the device of the tensors: float32 [B, C, h, w]."""
    x = unpack_levels(tensors["packed"], tensors["low"], tensors["step"], channels, bits)
    return x.permute(0, 3, 1, 2)


def checked_map(codec: Codec, x: Tensor | None, shape: tuple[int, ...], what: str) -> Tensor:
    """A batch of maps, detached. CodecError, which begins with `what`, unless they are finite float32 of this shape."""
    if x is None or tuple(x.shape) != shape or str(x.dtype) != "torch.float32":
        found = "none" if x is None else f"{x.dtype} {tuple(x.shape)}"
        raise CodecError(f"{what} {found}, codec '{codec.name}' expected float32 {shape}")
    if not bool(x.isfinite().all()):
        i = int((~x.isfinite().flatten(1).all(1)).nonzero()[0])
        raise CodecError(
            f"{what.split()[0]} of sample {i} of the batch hold NaN or an infinity; check image and teacher"
        )
    return x.detach()


def finite(codec: Codec, arrays: Arrays) -> None:
    """CodecError unless all numbers of a codec's tables are."""
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise CodecError(f"codec '{codec.name}': its tables hold NaN or an infinity; run cskd verify")
