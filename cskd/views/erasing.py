"""Random erasing with noise of one value per pixel and channel, in uint8.

Source: arXiv 1708.04896, with the ranges of timm's `RandomErasing(mode='pixel')`. timm draws N(0, 1) after normalising;
here the same noise is rounded to the uint8 it would be the normalised form of: mean + std * N(0, 1), clipped to 0..255
(3 to 4 % of the values, with ImageNet's mean and std).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cskd.seeds import GAMMA, Draws, mix64_array
from cskd.views import Image

_AREA = (0.02, 1.0 / 3.0)  # share of the view, divided by the number of rectangles
_LOG_ASPECT = (math.log(0.3), math.log(1.0 / 0.3))  # height / width
_TRIES = 10
_QUANTILES = 65536  # of the noise's distribution: one for each value of a 16-bit draw


@dataclass(frozen=True)
class Erasure:
    """A rectangle of the view, pixels, and the 64-bit state from which its noise is expanded."""

    top: int
    left: int
    height: int
    width: int
    noise: int


def draw_erasures(seed: int, size: int, prob: float, max_count: int) -> tuple[Erasure, ...]:
    """The rectangles erased from a view of `size` pixels: with probability `prob` 1 to max_count of them, else none."""
    if Draws(seed, "erase.apply").uniform() >= prob:
        return ()
    count = 1 + Draws(seed, "erase.count").integer(max_count)
    boxes, noise = Draws(seed, "erase.box"), Draws(seed, "erase.noise")
    erasures = []
    for _ in range(count):
        for _ in range(_TRIES):
            area = size * size * boxes.uniform(*_AREA) / count
            aspect = math.exp(boxes.uniform(*_LOG_ASPECT))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < size and width < size:
                top, left = boxes.integer(size - height + 1), boxes.integer(size - width + 1)
                erasures.append(Erasure(top, left, height, width, noise.bits()))
                break
    return tuple(erasures)


def erase(image_HWC: Image, erasure: Erasure, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Overwrite the rectangle with its noise, in place; mean and std of RGB in [0, 1]."""
    shape = (erasure.height, erasure.width, 3)
    draws = _draws16(erasure.noise, math.prod(shape)).reshape(shape)
    target = image_HWC[erasure.top : erasure.top + erasure.height, erasure.left : erasure.left + erasure.width]
    for channel, table in enumerate(noise_tables(mean, std)):
        target[..., channel] = table[draws[..., channel]]


def _draws16(state: int, n: int) -> NDArray[np.uint16]:
    """n 16-bit draws, four from each 64-bit value of the counter-based stream that starts at `state`."""
    counters = np.arange(1, n // 4 + 2, dtype=np.uint64)
    bits = mix64_array(np.uint64(state) + counters * np.uint64(GAMMA))
    return bits.astype("<u8", copy=False).view("<u2")[:n]  # little-endian on every machine


@functools.lru_cache(maxsize=4)
def noise_tables(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[NDArray[np.uint8], ...]:
    """Quantiles of the noise of each channel: uint8 [65536] each, ascending.

    Value k fills the quantiles up to the probability of a normal draw that rounds to k or less, so the table is the
    distribution to 1 / 65536, from 255 probabilities a channel.
    """
    tables = []
    for m, s in zip(mean, std, strict=True):
        below = [0.5 * math.erfc((m - (k + 0.5) / 255.0) / (s * math.sqrt(2.0))) for k in range(255)]
        ends = np.array([round(p * _QUANTILES) for p in below] + [_QUANTILES])
        tables.append(np.repeat(np.arange(256, dtype=np.uint8), np.diff(ends, prepend=0)))
    return tuple(tables)
