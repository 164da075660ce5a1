"""Operations that keep pixels in their places: tables of 256 values, blends of an image with its grey or smooth self.

Where a table depends on the argument alone, `colour` makes it on the host, of the 256 levels: the CPU path's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cskd.views import Image, colour
from cskd.views.on_device.buffer import Slot, Writer
from cskd.views.randaugment import Op

# Shapes: B views of a batch, n of them with an operation of this kind, S pixels of a side, C 3 channels

_LEVELS = np.arange(256, dtype=np.uint8)
_BY_ARGUMENT: Mapping[str, Callable[[float], Image]] = {
    "Posterize": lambda bits: colour.posterize(_LEVELS, int(bits)),
    "Solarize": lambda threshold: colour.solarize(_LEVELS, int(threshold)),
    "SolarizeAdd": lambda add: colour.solarize_add(_LEVELS, int(add)),
    "Brightness": lambda factor: colour.brightness(_LEVELS, factor),
    "Invert": lambda _: colour.invert(_LEVELS),
}
TABLES = (*_BY_ARGUMENT, "Contrast", "AutoContrast", "Equalize")
BLENDS = ("Color", "Sharpness")
_RED, _GREEN, _BLUE = colour.LUMA_65536


@dataclass(frozen=True)
class Tables:
    """One operation of n views by tables. rows: int64 [n], first views whose tables are given: uint8 [given, 256]; then
    those of Contrast, of factor float32 [contrasts], then AutoContrast's, then Equalize's; counts: how many of each."""

    rows: Slot
    tables: Slot
    factor: Slot
    counts: tuple[int, int, int, int]

    @classmethod
    def put(cls, writer: Writer, ops: Sequence[tuple[int, Op]]) -> Tables:
        """Of (row of the batch, operation)."""
        given = [(row, _BY_ARGUMENT[op.name](op.argument or 0)) for row, op in ops if op.name in _BY_ARGUMENT]
        rest = [[(row, op.argument) for row, op in ops if op.name == name] for name in TABLES[len(_BY_ARGUMENT) :]]
        rows = [row for row, _ in given] + [row for group in rest for row, _ in group]
        return cls(
            writer.put(np.array(rows)),
            writer.put(np.stack([table for _, table in given]) if given else np.empty((0, 256), np.uint8)),
            writer.put(np.array([factor for _, factor in rest[0]], np.float32)),
            (len(given), *(len(group) for group in rest)),  # type: ignore[arg-type]
        )

    def run(self, views: Tensor, words: Tensor) -> None:
        """In place: uint8 [B, S, S, 3]."""
        rows = self.rows.of(words)
        images = views.index_select(0, rows)
        _, contrast, stretch, flat = torch.split(images, list(self.counts))
        made = [self.tables.of(words)[:, None].expand(-1, 3, -1)]
        if len(contrast):
            made.append(_contrast_tables(contrast, self.factor.of(words))[:, None].expand(-1, 3, -1))
        if len(stretch):
            made.append(_stretching_tables(stretch))
        if len(flat):
            made.append(_flattening_tables(flat))
        tables = torch.cat(made)
        offsets = torch.arange(len(rows) * 3, device=views.device).view(-1, 1, 1, 3) * 256
        views.index_copy_(0, rows, tables.view(-1).index_select(0, (images + offsets).view(-1)).view(images.shape))


def _contrast_tables(images: Tensor, factor: Tensor) -> Tensor:
    """uint8 [n, 256]: the blend of each level with the image's mean grey."""
    pixels = images.shape[1] * images.shape[2]
    total = _gray(images).sum((1, 2), dtype=torch.int64)
    mean = (2 * total + pixels) // (2 * pixels)  # rounded, halves up; colour.contrast's, as those are exact in float64
    return _blend(mean.float()[:, None], torch.arange(256, device=images.device).float(), factor[:, None])


def _stretching_tables(images: Tensor) -> Tensor:
    """uint8 [n, 3, 256] of `colour.auto_contrast`."""
    low, high = (extreme.to(torch.int64)[:, :, None] for extreme in (images.amin((1, 2)), images.amax((1, 2))))
    levels = torch.arange(256, device=images.device)
    span = (high - low).clamp_(min=1).double()
    scale = torch.full_like(span, 255.0) / span  # see the table in __init__
    stretched = (levels.double() * scale - low.double() * scale).clamp_(0.0, 255.0).to(torch.uint8)
    same = (high <= low) | ((low == 0) & (high == 255))
    return torch.where(same, levels.to(torch.uint8), stretched)


def _flattening_tables(images: Tensor) -> Tensor:
    """uint8 [n, 3, 256] of `colour.equalize`."""
    n, size = images.shape[:2]
    bins = torch.arange(n * 3, device=images.device).view(n, 1, 1, 3) * 256 + images
    counts = torch.zeros(n * 3 * 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add_(0, bins.view(-1), torch.ones_like(bins).view(-1)).view(n, 3, 256)
    lightest = counts.gather(2, images.amax((1, 2)).to(torch.int64)[:, :, None])
    step = (size * size - lightest) // 255
    below = counts.cumsum(2) - counts
    flat = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step == 0, torch.arange(256, device=images.device), flat).to(torch.uint8)


@dataclass(frozen=True)
class Blends:
    """One blend of n views. rows: int64 [n], first `colors` views to blend with their grey, then those with their
    smooth selves; factor: float32 [n]."""

    rows: Slot
    factor: Slot
    colors: int

    @classmethod
    def put(cls, writer: Writer, ops: Sequence[tuple[int, Op]]) -> Blends:
        """Of (row of the batch, operation)."""
        ordered = sorted(ops, key=lambda pair: (pair[1].name != "Color", pair[0]))
        return cls(
            writer.put(np.array([row for row, _ in ordered])),
            writer.put(np.array([op.argument for _, op in ordered], np.float32)),
            sum(op.name == "Color" for _, op in ordered),
        )

    def run(self, views: Tensor, words: Tensor) -> None:
        """In place: uint8 [B, S, S, 3]."""
        rows = self.rows.of(words)
        images = views.index_select(0, rows)
        low = torch.empty(images.shape, dtype=torch.float32, device=views.device)
        if self.colors:
            low[: self.colors] = _gray(images[: self.colors])[..., None]
        if self.colors < len(images):
            _smooth(images[self.colors :], low[self.colors :])
        views.index_copy_(0, rows, _blend(low, images.float(), self.factor.of(words)[:, None, None, None]))


def _blend(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
    """`colour.blend`: three float32 operations, each rounded by itself."""
    return ((high - low).mul_(factor).add_(low)).clamp_(0.0, 255.0).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    """`colour.gray_of` of uint8 [n, S, S, 3]: int32 [n, S, S]."""
    red, green, blue = images.to(torch.int32).unbind(3)
    return (red * _RED + green * _GREEN + blue * _BLUE + 32768) >> 16


def _smooth(images: Tensor, out: Tensor) -> None:
    """The 3x3 mean of `colour.sharpness`, in float32; the outermost pixels are copies."""
    out.copy_(images)
    if images.shape[1] > 2:
        wide = images.to(torch.int32)
        across = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
        total = across[:, :-2] + across[:, 1:-1] + across[:, 2:] + wide[:, 1:-1, 1:-1] * 4 + 6
        out[:, 1:-1, 1:-1] = total // 13
