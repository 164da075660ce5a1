"""Operations that move pixels: shear and translation as in `geometry`, rotation as in Pillow.

Every step is one operation of IEEE arithmetic on whole tensors, in the order of the CPU's path: nothing is fused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cskd.views.geometry import Fill
from cskd.views.on_device.buffer import Slot, Writer
from cskd.views.randaugment import Op

# Shapes: B views of a batch, n of them with an operation of this kind, S pixels of a side, L lines (S, too)

_ALONG_ROWS = ("ShearX", "TranslateX")
SLIDES = (*_ALONG_ROWS, "ShearY", "TranslateY")
TURNS = ("Rotate",)


@dataclass(frozen=True)
class Slides:
    """One shear or translation of n views.

    rows: int64 [n], first `across` views whose rows move, then those whose columns do; slope and shift: float64 [n],
    line l takes its pixels from slope * (l + 1/2) + shift further on; fill: uint8 [n, 3].
    """

    rows: Slot
    slope: Slot
    shift: Slot
    fill: Slot
    across: int

    @classmethod
    def put(cls, writer: Writer, ops: Sequence[tuple[int, Op]], fills: Sequence[Fill], size: int) -> Slides:
        """Of (row of the batch, operation), and what each view of the batch shows outside."""
        ordered = sorted(ops, key=lambda pair: (pair[1].name not in _ALONG_ROWS, pair[0]))
        sheared = [op.name.startswith("Shear") for _, op in ordered]
        arguments = np.array([op.argument for _, op in ordered], np.float64)
        return cls(
            writer.put(np.array([row for row, _ in ordered])),
            writer.put(np.where(sheared, arguments, 0.0)),
            writer.put(np.where(sheared, 0.0, arguments * size)),
            writer.put(np.array([fills[row] for row, _ in ordered], np.uint8)),
            sum(op.name in _ALONG_ROWS for _, op in ordered),
        )

    def run(self, views: Tensor, words: Tensor) -> None:
        """In place: uint8 [B, S, S, 3]."""
        rows = self.rows.of(words)
        images = views.index_select(0, rows)
        lines = torch.cat([images[: self.across], images[self.across :].transpose(1, 2)])  # [n, L, S, 3]
        size = views.shape[1]
        i = torch.arange(size, device=views.device)
        shift = (i.double() + 0.5) * self.slope.of(words)[:, None] + self.shift.of(words)[:, None]  # [n, L]
        floor = shift.floor()
        whole, fraction = floor.to(torch.int64), (shift - floor).float()[:, :, None, None]
        near = (torch.arange(-1, size + 2, device=views.device) + whole[:, :, None]).clamp_(0, size - 1)
        window = lines.gather(2, near[..., None].expand(-1, -1, -1, 3)).float()  # [n, L, S + 3, 3]
        first = (-1 - whole < (-0.5 - shift).ceil()).to(torch.int64) - 1  # position of the first pixel from inside
        last = size - 1 - (size - 1 - whole >= (size - 0.5 - shift).ceil()).to(torch.int64)
        position = i + whole[:, :, None]
        outside = (position < first[:, :, None]) | (position > last[:, :, None])
        moved = torch.where(outside[..., None], self.fill.of(words)[:, None, None], _between(window, fraction))
        moved = torch.cat([moved[: self.across], moved[self.across :].transpose(1, 2)])
        views.index_copy_(0, rows, moved)


def _between(window: Tensor, t: Tensor) -> Tensor:
    """`geometry`'s cubic at t of the way between the middle two of four: [n, L, S + 3, 3] to uint8 [n, L, S, 3]."""
    slope = window[:, :, 1:] - window[:, :, :-1]
    near, mid, far = slope[:, :, :-2], slope[:, :, 1:-1], slope[:, :, 2:]
    third = near + far
    product = third * t
    product -= third.add_(near)
    product *= t
    product += near + mid
    product *= t
    product += window[:, :, 1:-2]
    return product.clamp_(0.0, 255.0).to(torch.uint8)


@dataclass(frozen=True)
class Turns:
    """One rotation of n views. rows: int64 [n]; matrix: float64 [n, 2, 3], x and y in the image by x, y and 1 of the
    result; fill: uint8 [n, 3]."""

    rows: Slot
    matrix: Slot
    fill: Slot

    @classmethod
    def put(cls, writer: Writer, ops: Sequence[tuple[int, Op]], fills: Sequence[Fill], size: int) -> Turns:
        """Of (row of the batch, operation), and what each view of the batch shows outside."""
        rows = [row for row, _ in ops]
        return cls(
            writer.put(np.array(rows)),
            writer.put(np.array([turn_matrix(op.argument or 0.0, size) for _, op in ops])),
            writer.put(np.array([fills[row] for row in rows], np.uint8)),
        )

    def run(self, views: Tensor, words: Tensor) -> None:
        """In place: uint8 [B, S, S, 3]."""
        rows = self.rows.of(words)
        size = views.shape[1]
        centres = torch.arange(size, device=views.device).double() + 0.5
        of_x, of_y, of_1 = self.matrix.of(words)[..., None, None].unbind(2)  # [n, 2, 1, 1]
        place = of_x * centres + of_y * centres[:, None] + of_1  # [n, 2 (x, y), S, S]
        inside = ((place >= 0.0) & (place < size)).all(1)
        place -= 0.5
        whole = place.floor()
        t = (place - whole)[..., None]
        steps = torch.arange(-1, 3, dtype=torch.int32, device=views.device).view(4, 1, 1)
        index = torch.int32 if views.numel() < 1 << 31 else torch.int64
        columns, lines = (whole.to(index)[:, :, None] + steps).clamp_(0, size - 1).unbind(1)  # [n, 4, S, S]
        lines += rows.view(-1, 1, 1, 1) * size
        source = lines[:, None] * size + columns[:, :, None]  # [n, 4 of columns, 4 of lines, S, S]
        near = views.view(-1, 3).index_select(0, source.view(-1)).view(*source.shape, 3).to(torch.int16)
        across = _cubic(near, t[:, :1])
        turned = _cubic(across, t[:, 1]).clamp_(0.0, 255.0).to(torch.uint8)
        views.index_copy_(0, rows, torch.where(inside[..., None], turned, self.fill.of(words)[:, None, None]))


def _cubic(near: Tensor, t: Tensor) -> Tensor:
    """Pillow's BICUBIC of [n, 4, ..] at t of the way from the second to the third, float64, in its order of operations.
    Of whole numbers all before the first product with t are, too: int16 moves a quarter of the bytes."""
    p0, p1, p2, p3 = near.unbind(1)
    third = (p0 - p1).mul_(2).add_(p2).sub_(p3)
    fourth = (p1 - p0).sub_(p2).add_(p3)
    return (fourth * t).add_(third).mul_(t).add_(p2 - p0).mul_(t).add_(p1)


def turn_matrix(degrees: float, size: int) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Where a pixel of the turned image lies in the image, as Pillow's `Image.rotate` has it for a square of `size`."""
    angle, centre = -math.radians(degrees % 360.0), size / 2
    cos, sin, minus = round(math.cos(angle), 15), round(math.sin(angle), 15), round(-math.sin(angle), 15)
    x, y = (first * -centre + second * -centre + centre for first, second in ((cos, sin), (minus, cos)))
    return (cos, sin, x), (minus, cos, y)
