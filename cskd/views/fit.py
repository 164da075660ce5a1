"""How images, views, a teacher's cells and a student's patches fit together: what nobody sees, and cells that do not meet.

Plain arithmetic, before any work is done. Sizes are pixels, of a square or (height, width); grids are (rows, columns).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from cskd.config.schema import RecipeConfig
from cskd.errors import ConfigError

Grid = tuple[int, int]


def multiples(pixels: int, step: int) -> str:
    """The nearest multiples of `step`, in words: '192 or 208' for 200 and 16."""
    below = pixels // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def unseen(size: Grid, patch: Grid) -> str | None:
    """What whole patches leave of an image, in words; None where they cover it."""
    rows, columns = size[0] % patch[0], size[1] % patch[1]
    left = [f"{n} {what}" for n, what in ((rows, "rows"), (columns, "columns")) if n]
    return f"the last {' and '.join(left)} of pixels" if left else None


def windows(fine: Grid, coarse: Grid) -> str | None:
    """How cells of a fine grid are averaged to a coarser one, in words; None where each takes a block of its own.

    As `adaptive_avg_pool2d` does it: window i of n over N cells is floor(i N / n) .. ceil((i + 1) N / n) - 1.
    """
    if fine[0] % coarse[0] == 0 and fine[1] % coarse[1] == 0:
        return None
    sides = {-(-(i + 1) * N // n) - i * N // n for N, n in zip(fine, coarse, strict=True) for i in range(n)}
    low, high = min(sides), max(sides)
    return f"by windows of {low if low == high else f'{low} to {high}'} per side that overlap"


def patch_notes(patches: Grid, cells: Grid) -> list[str]:
    """What a user should know of a student's patches that are pooled to a teacher's cells."""
    how = windows(patches, cells)
    if how is None:
        return []
    nearest = [_divisor(n, cell) for n, cell in zip(patches, cells, strict=True)]
    return [
        f"the student's {_by(patches)} patches are averaged to the teacher's {_by(cells)} cells {how}: a cell and its patches "
        f"are not the same part of the image; a teacher's grid of {nearest[0]} x {nearest[1]} would meet them"
    ]


def teacher_notes(view: int, size: int, own: Grid, grid: Grid, stated: int | None) -> list[str]:
    """What a user should know of where a teacher's cells lie.

    Args:    view and size: pixels of a view, and of the teacher's square input; own: its map's cells; grid: those that are
             kept; stated: its stride in pixels, where it says one.
    """
    notes = []
    if view != size:
        how = "enlarged" if size > view else "reduced"
        notes.append(f"views of {view} x {view} pixels are {how} to the teacher's {size} x {size} (teacher.input_size)")
    strides = [_stride(size, cells, stated) for cells in own]
    if any(cells > 1 and cells * (stride or 0) != size for cells, stride in zip(own, strides, strict=True)):
        stride = strides[0]
        padded = stride is not None and own[0] == -(-size // stride)
        apart = f", {stride} pixels apart," if stride else ""
        tiled = f"; an input of {multiples(size, stride)} would be tiled (teacher.input_size)" if stride else ""
        cure = tiled if padded else ""
        notes.append(
            f"the teacher's {_by(own)} cells{apart} do not tile its input of {size} pixels: a cell and the student's patches of "
            f"it are not the same part of the image{cure}"
        )
    if pooled := windows(own, grid):
        notes.append(f"the teacher's {_by(own)} cells are averaged to teacher.grid {_by(grid)} {pooled}")
    if grid[0] != grid[1]:
        notes.append(f"the teacher's grid is {_by(grid)} for square images: its cells are not square")
    return notes


def refuse_views(recipe: RecipeConfig) -> None:
    """ConfigError for a recipe by which views may hold nothing of their image, or are never cut out of it."""
    if recipe.crop == "padded" and recipe.padding >= recipe.size:
        raise ConfigError(
            f"recipe.padding is {recipe.padding} and recipe.size {recipe.size}: some views would be padding alone; set a "
            f"padding below {recipe.size}, CIFAR's is 4 of 32"
        )
    if recipe.crop == "resized" and recipe.scale[0] > 1:
        raise ConfigError(
            f"recipe.scale is {recipe.scale}, shares of an image's area, and no cut is larger than its image: every view would be "
            "the whole one; set a first share of at most 1, DeiT's are [0.08, 1.0]"
        )


def image_notes(sizes: Sequence[Grid], recipe: RecipeConfig) -> list[str]:
    """What a user should know of views of images of these sizes, a few from all over the data set."""
    side = recipe.size
    if not sizes:
        return []
    short = statistics.median_low([min(size) for size in sizes])
    other = [size for size in sizes if size != (side, side)]
    if recipe.crop == "padded" and other:
        return [
            f"recipe.crop padded resizes images that are not {side} x {side} pixels, whatever their shape: {len(other)} of "
            f"{len(sizes)} looked at, one of {_by(other[0])}"
        ]
    if short < side:
        return [
            f"views of {side} x {side} pixels are enlarged: of {len(sizes)} images looked at half have a short side of at most "
            f"{short} pixels (recipe.size)"
        ]
    return []


def evaluation_notes(crop_pct: float, recipe: RecipeConfig) -> list[str]:
    """What a user should know of what evaluation shows of an image, next to training."""
    if recipe.crop == "resized" or crop_pct == 1.0:
        return []
    return [
        f"training shows whole images (recipe.crop {recipe.crop}), evaluation the middle {100 * crop_pct:g} % of the short side; "
        "train.eval_crop_pct: 1.0 shows it whole, too"
    ]


def _stride(size: int, cells: int, stated: int | None) -> int | None:
    """Pixels from one cell to the next; None where it can't be told."""
    if stated and cells in (size // stated, -(-size // stated)):
        return stated
    if size % cells == 0:
        return size // cells
    return next((step for step in (2**k for k in range(1, 12)) if -(-size // step) == cells), None)


def _divisor(n: int, near: int) -> int:
    """The divisor of n that is nearest to `near`; of two the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - near))


def _by(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"
