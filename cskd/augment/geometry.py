"""Rotate, shear and translate uint8 images, bicubic; what comes from outside is one fill colour.

A shear or a translation moves each line of pixels along itself by a fraction of a pixel, so one dimension of the bicubic
kernel is enough: a third of the time of Pillow's general transform, whose formula this is (Keys's kernel with a = -1,
truncated to whole numbers; Pillow reckons in float64 and differs by one level in fewer than 1 in 100 pixels). Each step is
one correctly rounded float32 or integer operation of numpy, so the pixels are the same on every machine. Rotation is Pillow's.
"""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # [H, W, 3], RGB, contiguous
Fill = tuple[int, int, int]


def rotate(image_HWC: Image, degrees: float, fill: Fill) -> Image:
    """Turn about the centre, counter-clockwise; the size stays."""
    turned = PIL.Image.fromarray(image_HWC).rotate(degrees, PIL.Image.Resampling.BICUBIC, fillcolor=fill)
    return np.array(turned)


def shear_x(image_HWC: Image, factor: float, fill: Fill) -> Image:
    """Row y takes its pixels from `factor * (y + 1/2)` further right."""
    return _slide(image_HWC, factor * (np.arange(image_HWC.shape[0]) + 0.5), 1, fill)


def shear_y(image_HWC: Image, factor: float, fill: Fill) -> Image:
    """Column x takes its pixels from `factor * (x + 1/2)` further down."""
    return _slide(image_HWC, factor * (np.arange(image_HWC.shape[1]) + 0.5), 0, fill)


def translate_x(image_HWC: Image, share: float, fill: Fill) -> Image:
    """Every row takes its pixels from `share` of the width further right."""
    height, width = image_HWC.shape[:2]
    return _slide(image_HWC, np.full(height, share * width), 1, fill)


def translate_y(image_HWC: Image, share: float, fill: Fill) -> Image:
    """Every column takes its pixels from `share` of the height further down."""
    height, width = image_HWC.shape[:2]
    return _slide(image_HWC, np.full(width, share * height), 0, fill)


def _slide(image_HWC: Image, shift_L: NDArray[np.float64], axis: int, fill: Fill) -> Image:
    """Resample each of the L rows (axis 1) or columns (axis 0) at its own positions + shift, in pixels."""
    whole = np.floor(shift_L)
    fraction_L = (shift_L - whole).astype(np.float32)
    lines = _neighbours(image_HWC, whole.astype(np.int64), axis, fill).astype(np.int16)
    height, width = image_HWC.shape[:2]
    if axis == 1:
        t = fraction_L[:, None]
        p0, p1, p2, p3 = (lines[:, 3 * k : 3 * (k + width)] for k in range(4))
    else:
        t = np.repeat(fraction_L, 3)[None]
        p0, p1, p2, p3 = (lines[k : k + height] for k in range(4))
    linear, left = p2 - p0, p0 - p1  # exact in int16
    cubic = p3 - p2 - left
    out = cubic * t  # p1 + t (linear + t (quadratic + t cubic)), quadratic = left - cubic
    out += left - cubic
    out *= t
    out += linear
    out *= t
    out += p1
    np.maximum(out, 0.0, out=out)
    np.minimum(out, 255.0, out=out)
    result = out.astype(np.uint8).reshape(height, width, 3)
    _fill_rims(result if axis == 1 else result.swapaxes(0, 1), shift_L, fill)
    return result


def _neighbours(image_HWC: Image, whole_L: NDArray[np.int64], axis: int, fill: Fill) -> Image:
    """Each line moved by its whole number of pixels, with one neighbour before it and two behind: uint8 [H, (W + 3) * 3]
    for rows, [H + 3, W * 3] for columns. Outside are two copies of the line's last pixel, then the fill colour."""
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
    for first, last in zip(steps, steps[1:], strict=False):  # runs of lines with the same whole shift
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
