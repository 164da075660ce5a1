"""Crop, resize, pad and flip of a batch as two products with integer matrices, one for each dimension.

Source: torch's uint8 bicubic with antialiasing on the CPU (`HelperInterpBase::_compute_index_ranges_int16_weights` and
the loops that use it in aten/src/ATen/native/cpu): columns first, rounded to uint8, then rows; 16-bit weights from
float64, sums in int32. The weights are reckoned here on the host in the same float64 operations; the sums are whole
numbers. A dimension that keeps its size has weights of exactly one, a flip reverses the columns of its matrix, padding
are rows and columns of zeros.
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

_MAX_PIXELS = 1 << 24  # of a bucket, padding included: 50 MB of uint8, 200 MB of float32
_MAX_WASTE = 2.0  # how many times its crops' pixels a bucket may hold
_MAX_PRECISION, _WEIGHT_BITS = 22, 15
_LIMB = 8  # bits of the lower half of a weight
_MAX_FLOAT32_WEIGHTS = 257  # 257 * 255 * 255 is below 2 ** 24: sums of so many products are exact in float32


class Weights(NamedTuple):
    """Of one dimension: pixel i of a view is the sum of weights[i, k] * pixel first[i] + k, in 1 / 2 ** precision."""

    first: NDArray[np.int64]  # [S]
    weights: NDArray[np.int16]  # [S, K]
    precision: int


@functools.lru_cache(maxsize=8192)  # about 5 KB each; sides of crops are a few hundred different numbers
def resize_weights(length: int, size: int) -> Weights:
    """The weights by which `length` pixels become `size`, as torch reckons them for uint8."""
    first, scaled, precision = scaled_weights(length, size)
    return Weights(first, np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int16), precision)


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
    """One dimension of a bucket. pixels: int64 [n], of each crop; first: int64 [n, S]; weights: int16 [n, S, K];
    precision, and half = 2 ** (precision - 1): int32 [n]; longest: the largest of `pixels`."""

    pixels: Slot
    first: Slot
    weights: Slot
    precision: Slot
    half: Slot
    longest: int

    @classmethod
    def put(cls, writer: Writer, lengths: list[int], each: list[Weights]) -> Side:
        """Weights of one bucket, those with fewer filled up by zeros."""
        size, count = len(each[0].first), max(w.weights.shape[1] for w in each)
        weights = np.zeros((len(each), size, count), np.int16)
        for row, w in zip(weights, each, strict=True):
            row[:, : w.weights.shape[1]] = w.weights
        precision = np.array([w.precision for w in each], np.int32)
        return cls(
            writer.put(np.array(lengths)),
            writer.put(np.stack([w.first for w in each])),
            writer.put(weights),
            writer.put(precision),
            writer.put(np.int32(1) << (precision - 1)),
            max(lengths),
        )

    def matrix(self, words: Tensor, exact: torch.dtype) -> Tensor:
        """The weights as whole numbers: [n, S, longest] in float64, [n, 2 * S, longest] as two halves in float32."""
        weights = self.weights.of(words)
        n, size, count = weights.shape
        steps = torch.arange(count, device=words.device)
        where = (self.first.of(words)[:, :, None] + steps).clamp_(
            max=self.longest - 1
        )  # zeros lie behind the last pixel
        halves = [weights] if exact == torch.float64 else [weights >> _LIMB, weights & ((1 << _LIMB) - 1)]
        values = torch.stack(halves, 1).to(exact)
        dense = torch.zeros((n, len(halves), size, self.longest), dtype=exact, device=words.device)
        dense.scatter_add_(3, where[:, None].expand(values.shape), values)
        return dense.view(n, -1, self.longest)

    def rounded(self, words: Tensor, sums: Tensor) -> Tensor:
        """Sums [n, halves, ..] to pixels 0..255, int32 [n, ..]."""
        total = sums[:, 0].to(torch.int32)
        if sums.shape[1] == 2:
            total = (total << _LIMB) + sums[:, 1].to(torch.int32)
        half, precision = (slot.of(words).view(-1, *[1] * (total.dim() - 1)) for slot in (self.half, self.precision))
        return ((total + half) >> precision).clamp_(0, 255)


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
        n, height, width = len(y), y.shape[1], x.shape[1]
        exact = _exact_dtype(max(self.across.weights.shape[2], self.down.weights.shape[2]), words.device)
        lines = crops.view(n, height, width, 3).permute(0, 1, 3, 2).to(exact, memory_format=torch.contiguous_format)
        sums = torch.bmm(lines.view(n, height * 3, width), self.across.matrix(words, exact).mT)
        narrow = self.across.rounded(words, sums.view(n, height * 3, -1, self.size).transpose(1, 2))
        columns = narrow.to(exact).view(n, height, 3 * self.size)
        sums = torch.bmm(self.down.matrix(words, exact), columns)
        views = self.down.rounded(words, sums.view(n, -1, self.size, 3, self.size))
        return views.permute(0, 1, 3, 2).to(torch.uint8, memory_format=torch.contiguous_format)


def _exact_dtype(weights: int, device: torch.device) -> torch.dtype:
    """In which products of whole numbers and their sums are exact, whatever their order, fused or not.

    float32 holds those of halves of weights; where its matrix products may be less than float32's (TF32), float64.
    """
    backends: Any = torch.backends
    precision = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision
    exact = precision in ("ieee", "none") and weights <= _MAX_FLOAT32_WEIGHTS
    return torch.float32 if exact else torch.float64


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
            across = Weights(across.first[::-1], across.weights[::-1], across.precision)
        return cls(corner, width, high, wide, across, down)


def _window(w: Weights, begin: int) -> Weights:
    """The window of a view that begins at pixel `begin`; zeros outside the view."""
    size = len(w.first)
    i = np.arange(begin, begin + size)
    inside = (i >= 0) & (i < size)
    i = np.clip(i, 0, size - 1)
    weights = np.where(inside[:, None], w.weights[i], np.int16(0))
    return Weights(np.where(inside, w.first[i], 0), weights, w.precision)


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
