"""Rotate, shear and translate uint8 images, bicubic; what comes from outside is one fill colour.

A shear or a translation moves each line of pixels along itself by a fraction of a pixel, so one dimension of the
bicubic kernel is enough: a third of the time of Pillow's general transform, whose formula this is (Keys's kernel with
a = -1, truncated to whole numbers; Pillow reckons in float64 and differs by one level in fewer than 1 in 100 pixels).
Each step is one correctly rounded float32 or integer operation, so the pixels are the same on every machine.
Rotation needs both dimensions and is Pillow's.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from cskd.views import Image

Fill = tuple[int, int, int]


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
    """Resample each of the L rows (axis 1) or columns (axis 0) at its own positions + shift, in pixels.

    The kernel runs where the pixels lie, at the whole positions of the source that any line shows; then each line is moved.
    """
    n, whole_L = image_HWC.shape[axis], np.floor(shift_L).astype(np.int64)
    left, right = int(whole_L.min()), int(whole_L.max()) + n  # positions left .. right - 1 are shown
    height, width = (len(shift_L), right - left) if axis == 1 else (right - left, len(shift_L))
    shown = _filled(height, width, fill)
    first, behind = max(left, -1), min(right, n)  # those that come from inside: from half a pixel before the first one
    if first < behind:
        inside_Lm3 = _lines(shown, axis)[:, first - left : behind - left]
        inside_Lm3[...] = _between(image_HWC, first, behind, shift_L - whole_L, axis)  # truncates
        if first == -1:  # outside for fractions below a half, as the last position is for those above
            inside_Lm3[-1 - whole_L < np.ceil(-0.5 - shift_L), 0] = fill
        if behind == n:
            inside_Lm3[n - 1 - whole_L >= np.ceil(n - 0.5 - shift_L), -1] = fill
    return shown if right - left == n else _windows(shown, whole_L - left, n, axis)


def _lines(image_HWC: NDArray[Any], axis: int) -> NDArray[Any]:
    """Its rows (axis 1) or columns (axis 0) as [L, n, 3], a view."""
    return image_HWC if axis == 1 else image_HWC.swapaxes(0, 1)


def _filled(height: int, width: int, fill: Fill) -> Image:
    filled = np.empty((height, width, 3), np.uint8)
    filled.reshape(height, -1)[:] = np.tile(np.array(fill, np.uint8), width)  # far faster than three values at a time
    return filled


def _windows(shown: Image, start_L: NDArray[np.int64], n: int, axis: int) -> Image:
    """The n pixels of each row (axis 1) or column (axis 0) that begin at its start."""
    if axis == 1:
        rows = shown.reshape(len(shown), -1)
        windows = np.lib.stride_tricks.sliding_window_view(rows, 3 * n, 1)
        return windows[np.arange(len(rows)), 3 * start_L].reshape(len(rows), n, 3)
    moved = np.empty((n, len(start_L), 3), np.uint8)
    steps = [0, *(np.flatnonzero(np.diff(start_L)) + 1).tolist(), len(start_L)]
    for (a, b), start in zip(itertools.pairwise(steps), start_L[steps[:-1]].tolist(), strict=True):
        moved[:, a:b] = shown[start : start + n, a:b]  # columns with the same start
    return moved


def _between(
    image_HWC: Image, first: int, behind: int, fraction_L: NDArray[np.float64], axis: int
) -> NDArray[np.float32]:
    """The kernel's values at `fraction` of the way from each position first .. behind - 1 to the next one.

    Returns: float32 [L, behind - first, 3] in 0..255, to be truncated. What lies outside the image is two copies of the
             line's first or last pixel, as in Pillow.
    """
    lines_Ln3 = _lines(image_HWC, axis)
    count, n = lines_Ln3.shape[:2]
    m = behind - first + 3  # with one neighbour before and two behind
    shape, step = ((count, m, 3), 3) if axis == 1 else ((m, count, 3), 3 * count)
    size = 3 * count * m
    flat = np.zeros(size + 9 * axis, np.float32)  # rows run into each other: the last one looks 9 numbers further
    padded_Lm3 = _lines(flat[:size].reshape(shape), axis)
    before, after = max(0, 1 - first), m - max(0, behind + 2 - n)
    padded_Lm3[:, before:after] = lines_Ln3[:, first - 1 + before : first - 1 + after]
    padded_Lm3[:, :before], padded_Lm3[:, after:] = lines_Ln3[:, :1], lines_Ln3[:, -1:]
    t = torch.from_numpy(fraction_L.astype(np.float32))
    rows = _cubic(flat, step, t[:, None] if axis == 1 else t.repeat_interleave(3)[None])
    return _lines(rows.reshape(-1, *shape[1:]), axis)[:, : m - 3]


def _cubic(flat: NDArray[np.float32], step: int, t: Tensor) -> NDArray[np.float32]:
    """Keys's cubic through the four neighbours i, i + step, .. at t (a column, or a row) of the way from the second to the
    third: p1 + t (p2 - p0 + t (-(p1 - p0) - third + t third)), third = (p3 - p2) + (p1 - p0).

    Sums of whole arrays are numpy's and products with a column or row torch's, each of which is the faster one there.
    """
    slope = flat[step:] - flat[:-step]  # differences of whole numbers up to 255: exact
    near = slope[: -2 * step]
    third = near + slope[2 * step :]
    product = torch.from_numpy(third).view((len(t), -1) if t.shape[1] == 1 else (-1, t.shape[1])) * t
    out = product.view(-1).numpy()  # shares memory
    third += near
    out -= third
    product.mul_(t)
    out += np.add(near, slope[step:-step], out=third)
    product.mul_(t)
    out += flat[step : -2 * step]
    product.clamp_(0.0, 255.0)
    return out
