"""Arrays of small whole numbers as streams of pcodec in a unit's file: numbers of one distribution share a stream.

    stream         uint8 [bytes]     the streams, one after the other
    stream_bytes   uint32 [streams]  of each

An array is int8 where all its numbers fit, else int16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cskd.codecs.base import Arrays
from cskd.codecs.tabled import TabledCodec
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor


class StreamedCodec(TabledCodec):
    """A codec of which some arrays, those of `_columns`, are streams in a file; the others are written as they are."""

    def _columns(self) -> Iterable[tuple[str, NDArray[np.int64]]]:
        """Array and columns of each stream; an array has its axes but the first flattened."""
        raise NotImplementedError

    def _plain(self) -> list[str]:
        streamed = {name for name, _ in self._columns()}
        return [name for name in self.fields if name not in streamed]

    @property
    def packed_dimensions(self) -> dict[str, tuple[str, ...]]:
        plain = {name: self.fields[name].dims for name in self.fields if self.fields[name].dtypes != NUMBERS}
        return plain | {"stream": ("byte",), "stream_bytes": ("stream",)}

    def pack(self, arrays: Arrays) -> Arrays:
        from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

        config = ChunkConfig(compression_level=8, delta_spec=DeltaSpec.no_op(), mode_spec=ModeSpec.classic())
        wide = {
            name: a.astype(np.int16).reshape(len(a), -1)
            for name, a in arrays.items()
            if self.fields[name].dtypes == NUMBERS
        }
        streams = [
            standalone.simple_compress(np.ascontiguousarray(wide[name][:, columns]).ravel(), config)
            for name, columns in self._columns()
        ]
        return {name: arrays[name] for name in self._plain()} | {
            "stream": np.frombuffer(b"".join(streams), np.uint8),
            "stream_bytes": np.array([len(s) for s in streams], np.uint32),
        }

    def unpack(self, packed: Arrays, n: int) -> Arrays:
        from pcodec import standalone

        dimensions = self.packed_dimensions
        if set(packed) != set(dimensions) or any(a.ndim != len(dimensions[name]) for name, a in packed.items()):
            raise CodecError(f"codec '{self.name}' has the arrays {list(dimensions)}, found {sorted(packed)}")
        arrays = {
            name: np.zeros([self._length(dim, n) or 0 for dim in field.dims], np.int16)
            for name, field in self.fields.items()
            if field.dtypes == NUMBERS
        }
        ends = np.cumsum(packed["stream_bytes"], dtype=np.int64)
        data, groups = packed["stream"].tobytes(), list(self._columns())
        if len(ends) != len(groups) or (len(ends) and ends[-1] != len(data)):
            raise CodecError(
                f"codec '{self.name}': {len(ends)} streams of {ends[-1:]} bytes do not fit; run cskd verify"
            )
        for (name, columns), end, length in zip(groups, ends, packed["stream_bytes"], strict=True):
            flat = arrays[name].reshape(n, -1)
            out = np.empty(n * len(columns), np.int16)
            try:
                done = standalone.simple_decompress_into(data[int(end) - int(length) : int(end)], out)
            except (RuntimeError, TypeError) as e:
                raise CodecError(f"codec '{self.name}': a stream is damaged ({e}); run cskd verify") from None
            if not done.finished or done.n_processed != len(out):
                raise CodecError(f"codec '{self.name}': a stream is not of {len(out)} numbers; run cskd verify")
            flat[:, columns] = out.reshape(n, -1)
        return {name: packed[name] for name in self._plain()} | self._narrowed(arrays)

    def concat(self, parts: Any) -> Arrays:
        return self._narrowed(super().concat(parts))

    def take(self, arrays: Arrays, index: NDArray[np.integer[Any]]) -> Arrays:
        return self._narrowed(super().take(arrays, index))

    def _narrowed(self, arrays: Arrays) -> Arrays:
        return {name: narrow(a) if self.fields[name].dtypes == NUMBERS else a for name, a in arrays.items()}


NUMBERS = ("int8", "int16")  # dtypes of an array that becomes streams


def narrow(a: NDArray[Any]) -> NDArray[Any]:
    """int8 where all numbers fit, else int16."""
    small = not a.size or (a.min() >= -128 and a.max() <= 127)
    return a.astype(np.int8 if small else np.int16, copy=False)


def rounded(x: Tensor, up: float) -> Tensor:
    """Whole numbers of int16, towards 0 from what is less than 1 - up above one."""
    return ((x.abs() + up).floor() * x.sign()).clamp(-32767, 32767)


def cosine_axes(grid: tuple[int, int]) -> list[Tensor]:
    """The orthonormal cosine transform (DCT-II) along each axis: float64 [h, h] and [w, w], the mean first."""
    import torch

    axes = []
    for size in grid:
        k, x = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
        axis = torch.cos(torch.pi * (x + 0.5) * k / size) * (2 / size) ** 0.5
        axis[0] /= 2**0.5
        axes.append(axis)
    return axes
