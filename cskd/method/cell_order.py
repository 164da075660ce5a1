"""Which of a network's tokens are cells, and whether they stand in the rows and columns of the image: for teacher and student."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_PREFIX = 16  # tokens before the grid that are looked for where the model does not say how many
CLEARLY = 0.5  # share of the largest change in a cell that one's own must have


class Displaced(NamedTuple):
    """A place of the image, and the cell of the features that changes with it."""

    place: tuple[int, int]  # row, column
    cell: tuple[int, int]


def grid_of(tokens: int, stated: object, size: tuple[int, int], least: int = 0) -> tuple[int, tuple[int, int]] | None:
    """Tokens before the cells, and the cells' rows and columns, which are to each other as height and width are; None where the
    tokens are no such grid of `least` cells or more.

    stated: how many stand before them, where the model says so in whole numbers; size: height and width in pixels.
    """
    for prefix in [stated] if isinstance(stated, int) else range(MOST_PREFIX + 1):
        height = math.isqrt(max(0, tokens - prefix) * size[0] // size[1])
        for rows in (height, height + 1):
            columns = (tokens - prefix) // rows if rows else 0
            if rows * columns == tokens - prefix >= least and abs(columns * size[0] - rows * size[1]) < max(size):
                return prefix, (rows, columns)
    return None


def displaced(maps: Callable[[Tensor], Tensor], image: Tensor, before: Tensor) -> Displaced | None:
    """The first of three corners and the middle that, changed in the image, clearly changes another cell than its own; None where
    none does. Attention that looks everywhere alike shows no order, and passes.

    Args:    maps gives [B, rows, columns, C] of images [B, 3, H, W]; image [1, 3, H, W]; before: its map.
    """
    (rows, columns), (height, width) = before.shape[1:3], image.shape[2:]
    places = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2)]
    changed = image.repeat(len(places), 1, 1, 1)
    for one, (row, column) in zip(changed, places, strict=True):
        down, across = (
            slice(at * side // n, (at + 1) * side // n)
            for at, side, n in ((row, height, rows), (column, width, columns))
        )
        part = one[:, down, across]
        part.copy_(-3 * part.flip(1, 2))
    moved = (maps(changed) - before).float().norm(dim=3)
    for (row, column), map_hw in zip(places, moved, strict=True):
        own = map_hw[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].max()
        if own < CLEARLY * map_hw.max():
            most = int(torch.argmax(map_hw))
            return Displaced((row, column), (most // columns, most % columns))
    return None
