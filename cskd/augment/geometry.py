"""Rotate, shear and translate uint8 images, bicubic; what comes from outside is one fill colour.

A shear or a translation moves each line of pixels along itself by a fraction of a pixel, so one dimension of the
bicubic kernel is enough: a third of the time of Pillow's general transform, whose formula this is (Keys's kernel with
a = -1, truncated to whole numbers; Pillow reckons in float64 and differs by one level in fewer than 1 in 100 pixels).
Each step is one correctly rounded float32 or integer operation, so the pixels are the same on every machine; torch does
them, twice as fast as numpy on one thread.
Rotation needs both dimensions and is Pillow's.
"""

from __future__ import annotations

import itertools

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

Image = NDArray[np.uint8]  # [H, W, 3], RGB, contiguous
Fill = tuple[int, int, int]

_BLOCK = 112  # rows at a time, so that the float32 temporaries of a large view stay in the cache, too


def rotate(image_HWC: Image, degrees: float, fill: Fill) -> Image:
    """Turn about the centre, counter-clockwise; the size stays."""
    turned = PIL.Image.fromarray(image_HWC).rotate(degrees, PIL.Image.Resampling.BICUBIC, fillcolor=fill)
    return np.array(turned)


def shear_x(image_HWC: Image, factor: float, fill: Fill) -> Image:
    """Row y takes its pixels from `factor * (y + 1/2)` further right."""
    return _slide(image_HWC, factor * _centres(image_HWC.shape[0]), 1, fill)


def shear_y(image_HWC: Image, factor: float, fill: Fill) -> Image:
    """Column x takes its pixels from `factor * (x + 1/2)` further down."""
    return _slide(image_HWC, factor * _centres(image_HWC.shape[1]), 0, fill)


def translate_x(image_HWC: Image, share: float, fill: Fill) -> Image:
    """Every row takes its pixels from `share` of the width further right."""
    height, width = image_HWC.shape[:2]
    return _slide(image_HWC, np.full(height, share * width), 1, fill)


def translate_y(image_HWC: Image, share: float, fill: Fill) -> Image:
    """Every column takes its pixels from `share` of the height further down."""
    height, width = image_HWC.shape[:2]
    return _slide(image_HWC, np.full(width, share * height), 0, fill)


def _centres(n: int) -> NDArray[np.float64]:
    return np.arange(n, dtype=np.float64) + 0.5


def _slide(image_HWC: Image, shift_L: NDArray[np.float64], axis: int, fill: Fill) -> Image:
    """Resample each of the L rows (axis 1) or columns (axis 0) at its own positions + shift, in pixels."""
    height, width = image_HWC.shape[:2]
    whole_L = np.floor(shift_L)
    fraction_L = torch.from_numpy((shift_L - whole_L).astype(np.float32))
    fraction = fraction_L[:, None] if axis == 1 else fraction_L.repeat_interleave(3)[None]
    lines = torch.from_numpy(_neighbours(image_HWC, whole_L.astype(np.int64), axis, fill))
    result = np.empty_like(image_HWC)
    out = torch.from_numpy(result).view(height, -1)
    for top in range(0, height, _BLOCK):
        bottom = min(top + _BLOCK, height)
        if axis == 1:
            block = lines[top:bottom].float()
            taps = [block[:, 3 * k : 3 * (k + width)] for k in range(4)]
            out[top:bottom] = _cubic(taps, fraction[top:bottom])
        else:
            block = lines[top : bottom + 3].float()
            taps = [block[k : k + bottom - top] for k in range(4)]
            out[top:bottom] = _cubic(taps, fraction)
    _fill_rims(result if axis == 1 else result.swapaxes(0, 1), shift_L, fill)
    return result


def _cubic(taps: list[Tensor], fraction: Tensor) -> Tensor:
    """Keys's cubic through four neighbours, at `fraction` of the way from the second to the third: float32 in 0..255,
    to be truncated."""
    p0, p1, p2, p3 = taps
    left = p0 - p1  # differences of whole numbers up to 255: exact
    third = torch.sub(p3, p2).sub_(left)
    second = left.sub_(third)
    out = third.mul_(fraction).add_(second)  # p1 + t (p2 - p0 + t (left - third + t third))
    out.mul_(fraction).add_(torch.sub(p2, p0, out=second))
    return out.mul_(fraction).add_(p1).clamp_(0.0, 255.0)


def _neighbours(image_HWC: Image, whole_L: NDArray[np.int64], axis: int, fill: Fill) -> Image:
    """Each line moved by its whole number of pixels, with one neighbour before it and two behind.

    Returns: uint8 [H, (W + 3) * 3] for rows, [H + 3, W * 3] for columns. What lies outside the image is two copies of
             the line's last pixel, as in Pillow, then the fill colour, which the kernel leaves as it is.
    """
    height, width = image_HWC.shape[:2]
    n = image_HWC.shape[axis]
    pad = int(max(2, 1 - whole_L.min(), whole_L.max() + 2))
    padded = np.empty((height + 2 * pad * (1 - axis), width + 2 * pad * axis, 3), np.uint8)
    padded.reshape(len(padded), -1)[:] = np.tile(np.array(fill, np.uint8), padded.shape[1])
    source = padded if axis == 1 else padded.swapaxes(0, 1)  # [L, n + 2 pad, 3]
    image = image_HWC if axis == 1 else image_HWC.swapaxes(0, 1)
    source[:, pad : pad + n] = image
    source[:, pad - 2 : pad] = image[:, :1]
    source[:, pad + n : pad + n + 2] = image[:, -1:]
    moved = np.empty((height + 3 * (1 - axis), width + 3 * axis, 3), np.uint8)
    target = moved if axis == 1 else moved.swapaxes(0, 1)
    steps = [0, *(np.flatnonzero(np.diff(whole_L)) + 1).tolist(), len(whole_L)]
    for first, last in itertools.pairwise(steps):  # lines with the same whole shift
        start = pad - 1 + int(whole_L[first])
        target[first:last] = source[first:last, start : start + n + 3]
    return moved.reshape(len(moved), -1)


def _fill_rims(lines_LN3: Image, shift_L: NDArray[np.float64], fill: Fill) -> None:
    """Set the pixels from outside that the two copied pixels have reached: at most four at each end of a line."""
    n = lines_LN3.shape[1]
    first = np.ceil(-0.5 - shift_L).astype(np.int64)[:, None]  # the first position that comes from inside
    behind = np.ceil(n - 0.5 - shift_L).astype(np.int64)[:, None]  # the first one after the last of those
    at = np.concatenate([first + np.arange(-4, 0), behind + np.arange(4)], axis=1)
    line, k = np.nonzero((at >= 0) & (at < n))
    lines_LN3[line, at[line, k]] = fill
