"""Crop, resize, pad and flip of a batch as two products with integer matrices, one for each dimension.

Source: torch's uint8 bicubic with antialiasing on the CPU (`HelperInterpBase::_compute_index_ranges_int16_weights` and
the loops that use it in aten/src/ATen/native/cpu): columns first, rounded to uint8, then rows; 16-bit weights from
float64, sums in int32. The weights are reckoned here on the host in the same float64 operations; the sums are whole
numbers of 2 ** -precision. They are of pixels less 128, which halves the largest, so that float32 holds all of them
where a crop is up to four times as large as the view. A dimension that keeps its size has weights of exactly one, a flip
reverses the columns of its matrix, padding are rows and columns of zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cskd.views.on_device.buffer import Slot, Writer
from cskd.views.recipe import ViewParams

# Shapes: n views of a bucket, H W its largest crop, S pixels of a view, K weights of a pixel, P pixels of all images

_MAX_PIXELS = 1 << 25  # of a bucket, padding included: 100 MB of uint8, 400 MB of float32
_MAX_WASTE = 2.0  # how many times its crops' pixels a bucket may hold
_MAX_PRECISION, _WEIGHT_BITS = 22, 15
_FLOAT32 = 1 << 24  # whole numbers up to here are exact in float32
_MIDDLE = 128  # which pixels are counted from


class Weights(NamedTuple):
    """Of one dimension: pixel i of a view is the sum of weights[i, k] * pixel first[i] + k, in 1 / 2 ** precision."""

    first: NDArray[np.int64]  # [S]
    weights: NDArray[np.int16]  # [S, K]
    precision: int
    offset: NDArray[np.float64]  # [S], what rounding the sum of pixels less 128 to one of pixels adds to it
    small: bool  # whether float32 holds every sum of some of the products with pixels less 128, and all sums of pixels up to 255

    @classmethod
    def of(cls, first: NDArray[np.int64], weights: NDArray[np.int16], precision: int) -> Weights:
        """Those that a bucket needs, with what follows from them."""
        one, middle = 1 << precision, _MIDDLE * weights.sum(1, dtype=np.int64)
        largest = _MIDDLE * int(np.abs(weights, dtype=np.int32).sum(1).max())
        return cls(first, weights, precision, middle / one + 0.5, max(largest, (_MIDDLE << 1) * one) <= _FLOAT32)

    def flipped(self) -> Weights:
        return self._replace(first=self.first[::-1], weights=self.weights[::-1], offset=self.offset[::-1])


@functools.lru_cache(maxsize=8192)  # about 7 KB each; sides of crops are a few hundred different numbers
def resize_weights(length: int, size: int) -> Weights:
    """The weights by which `length` pixels become `size`, as torch reckons them for uint8."""
    first, scaled, precision = scaled_weights(length, size)
    return Weights.of(first, np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int16), precision)


def scaled_weights(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """`Weights` before they are rounded to whole numbers, halves away from zero."""
    scale = length / size
    support = 2.0 * max(scale, 1.0)
    inverse = 1.0 / scale if scale >= 1.0 else 1.0
    count = math.ceil(support) * 2 + 1
    centre = scale * (np.arange(size) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    behind = np.minimum((centre + support + 0.5).astype(np.int64), length)
    k = np.arange(count)
    weights = _keys((k + first[:, None] - centre[:, None] + 0.5) * inverse)
    weights[k >= (behind - first)[:, None]] = 0.0
    total = np.zeros(size)
    for column in weights.T:  # in this order
        total += column
    weights /= total[:, None]
    heaviest, precision = float(weights.max()), 0
    while precision < _MAX_PRECISION and int(0.5 + heaviest * (1 << (precision + 1))) < 1 << _WEIGHT_BITS:
        precision += 1
    return first, weights * (1 << precision), precision


def _keys(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys's cubic kernel with a = -1/2."""
    x = np.abs(x)
    near, far = ((1.5 * x - 2.5) * x) * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@dataclass(frozen=True)
class Side:
    """One dimension of a bucket. pixels: int64 [n], of each crop; first: int64 [n, S]; weights: int16 [n, S, K]; unit, that of
    the weights: float64 [n, 1, 1]; offset: float64 [n, S]; longest: the largest of `pixels`; small: see `Weights`."""

    pixels: Slot
    first: Slot
    weights: Slot
    unit: Slot
    offset: Slot
    longest: int
    small: bool

    @classmethod
    def put(cls, writer: Writer, lengths: list[int], each: list[Weights]) -> Side:
        """Weights of one bucket, those with fewer filled up by zeros."""
        size, count = len(each[0].first), max(w.weights.shape[1] for w in each)
        weights = np.zeros((len(each), size, count), np.int16)
        for row, w in zip(weights, each, strict=True):
            row[:, : w.weights.shape[1]] = w.weights
        return cls(
            writer.put(np.array(lengths)),
            writer.put(np.stack([w.first for w in each])),
            writer.put(weights),
            writer.put(np.ldexp(1.0, [-w.precision for w in each])[:, None, None]),
            writer.put(np.stack([w.offset for w in each])),
            max(lengths),
            all(w.small for w in each),
        )

    def matrix(self, words: Tensor, exact: torch.dtype) -> Tensor:
        """The weights: [n, S, longest]."""
        values = self.weights.of(words) * self.unit.of(words).to(exact)
        n, size, count = values.shape
        steps = torch.arange(count, device=words.device)
        where = (self.first.of(words)[:, :, None] + steps).clamp_(
            max=self.longest - 1
        )  # zeros lie behind the last pixel
        return values.new_zeros((n, size, self.longest)).scatter_add_(2, where, values)


@dataclass(frozen=True)
class Bucket:
    """Views whose crops have similar sizes. rows: int64 [n], of the batch; corner: int64 [n], the crop's first pixel
    among those of all images; stride: int64 [n], from a line of the image to the next."""

    rows: Slot
    corner: Slot
    stride: Slot
    across: Side
    down: Side
    size: int

    @classmethod
    def put(cls, writer: Writer, rows: list[int], sources: Sequence[Source]) -> Bucket:
        """Of the views `rows`, whose crops are `sources[row]`."""
        chosen = [sources[row] for row in rows]
        return cls(
            writer.put(np.array(rows)),
            writer.put(np.array([s.corner for s in chosen])),
            writer.put(np.array([s.stride for s in chosen])),
            Side.put(writer, [s.width for s in chosen], [s.across for s in chosen]),
            Side.put(writer, [s.height for s in chosen], [s.down for s in chosen]),
            len(chosen[0].down.first),
        )

    def run(self, pixels_P3: Tensor, words: Tensor) -> Tensor:
        """The views: uint8 [n, S, S, 3]."""
        side_y, side_x = (side.pixels.of(words)[:, None] - 1 for side in (self.down, self.across))
        y = torch.minimum(torch.arange(self.down.longest, device=words.device), side_y)
        x = torch.minimum(torch.arange(self.across.longest, device=words.device), side_x)
        starts = self.corner.of(words)[:, None] + y * self.stride.of(words)[:, None]
        crops = pixels_P3.index_select(0, (starts[:, :, None] + x[:, None, :]).view(-1))
        crops = crops.bitwise_xor_(_MIDDLE).view(torch.int8)  # less 128
        n, height, width = len(y), y.shape[1], x.shape[1]
        exact = _exact_dtype(self.across.small and self.down.small, words.device)
        lines = crops.view(n, height, width, 3).permute(0, 1, 3, 2).to(exact, memory_format=torch.contiguous_format)
        sums = torch.bmm(lines.view(n, height * 3, width), self.across.matrix(words, exact).mT)
        sums += (self.across.offset.of(words) - _MIDDLE).to(exact)[:, None]
        columns = sums.floor_().clamp_(-_MIDDLE, _MIDDLE - 1).view(n, height, 3 * self.size)
        sums = torch.bmm(self.down.matrix(words, exact), columns)
        sums += self.down.offset.of(words).to(exact)[..., None]
        views = sums.clamp_(0.0, 255.5).view(n, -1, 3, self.size)
        return views.permute(0, 1, 3, 2).to(torch.uint8, memory_format=torch.contiguous_format)


def _exact_dtype(small: bool, device: torch.device) -> torch.dtype:
    """In which products of whole numbers and their sums are exact, whatever their order, fused or not.

    float32 holds those of `small` weights; where its matrix products may be less than float32's (TF32), float64.
    """
    backends: Any = torch.backends
    precision = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision
    return torch.float32 if small and precision in ("ieee", "none") else torch.float64


@dataclass(frozen=True)
class Source:
    """What one view shows: a crop of the pixels of all images, and the weights of its columns and rows."""

    corner: int
    stride: int
    height: int
    width: int
    across: Weights
    down: Weights

    @classmethod
    def of(cls, params: ViewParams, first: int, height: int, width: int) -> Source:
        """Of an image of height x width pixels, the first of which is pixel `first` of all.

        Raises:  ValueError for a padded crop of another size than the view's.
        """
        crop, size = params.crop, params.size
        if not params.padding:
            corner, high, wide = first + crop.top * width + crop.left, crop.height, crop.width
            down, across = resize_weights(high, size), resize_weights(wide, size)
        else:
            if (crop.height, crop.width) != (size, size):
                raise ValueError(f"padded crop is {crop.height} x {crop.width} pixels, expected the view's {size}")
            corner, high, wide = first, height, width
            down = _window(resize_weights(height, size), crop.top - params.padding)
            across = _window(resize_weights(width, size), crop.left - params.padding)
        if params.flip:
            across = across.flipped()
        return cls(corner, width, high, wide, across, down)


def _window(w: Weights, begin: int) -> Weights:
    """The window of a view that begins at pixel `begin`; zeros outside the view."""
    size = len(w.first)
    i = np.arange(begin, begin + size)
    inside = (i >= 0) & (i < size)
    i = np.clip(i, 0, size - 1)
    weights = np.where(inside[:, None], w.weights[i], np.int16(0))
    return Weights.of(np.where(inside, w.first[i], 0), weights, w.precision)


def buckets(sources: Sequence[Source]) -> Iterator[list[int]]:
    """Views in groups of similar crops, each of which is padded to its largest one. Yields rows of the batch."""
    rows: list[int] = []
    height = width = area = 0
    for row in sorted(range(len(sources)), key=lambda i: (sources[i].height * sources[i].width, i)):
        s = sources[row]
        high, wide, sum_ = max(height, s.height), max(width, s.width), area + s.height * s.width
        padded = (len(rows) + 1) * high * wide
        if rows and (padded > _MAX_PIXELS or padded > _MAX_WASTE * sum_):
            yield rows
            rows, high, wide, sum_ = [], s.height, s.width, s.height * s.width
        rows.append(row)
        height, width, area = high, wide, sum_
    if rows:
        yield rows
