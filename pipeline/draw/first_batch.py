"""`train_batch0.png` of a run: views as the student saw them, mixed, with the targets that it was taught.

Shapes: B views, S side of a view, h w teacher grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cskd.pipeline.draw.pictures import (
    FAINT,
    INK,
    OTHER,
    PAPER,
    ClassKey,
    Paint,
    Picture,
    class_map,
    cut,
    font,
    grid,
    heading,
    photo,
)

SHOWN = 16  # views
SIDE, WIDE = 156, 208  # of a photo with its cells next to it, and of one without, pixels
KEPT = 2  # other classes of the cells that have a colour of their own
_ABSENT = -1  # in a key: a view that is not mixed has no partner, and its colour is nobody's
_LINE = 19  # pixels


@dataclass(frozen=True, eq=False)
class SeenBatch:
    """Views and their targets. None: the method has no such targets."""

    pixels: NDArray[np.uint8]  # [B, S, S, 3]
    label: NDArray[np.int64]  # [B]
    partner: NDArray[np.int64]  # [B], label of what the view is mixed with, its own where it is not mixed
    share: NDArray[np.float64]  # [B], lambda, share of `label`
    mixed: NDArray[np.bool_]  # [B]
    image_class: NDArray[np.int64] | None = None  # [B], the teacher's for the whole image
    cells: NDArray[np.int64] | None = None  # [B, h, w], what each cell is taught


def draw_batch(batch: SeenBatch, names: Sequence[str], title: str) -> Picture:
    """The first views of a batch: label pair with lambda, the teacher's class, and over the image the class of each cell."""
    tiles = [_tile(batch, i, names) for i in range(min(SHOWN, len(batch.label)))]
    columns = min(len(tiles), 4 if batch.cells is not None else 6)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    width = sum(tile.width + 14 for tile in rows[0]) - 14
    return grid([[heading(title, width, 16)], *rows])


def _tile(batch: SeenBatch, i: int, names: Sequence[str]) -> Picture:
    side = SIDE if batch.cells is not None else WIDE
    seen = photo(batch.pixels[i], side)
    label, partner = int(batch.label[i]), int(batch.partner[i])
    mixed = bool(batch.mixed[i])
    share = float(batch.share[i])
    # In the palette's order: the label is blue, what it is mixed with orange.
    known = [label, partner if mixed and partner != label else _ABSENT]
    cells = None if batch.cells is None else batch.cells[i]
    counts = Counter[int]() if cells is None else Counter(cells.ravel().tolist())
    others = [c for c, _ in counts.most_common() if c not in known]
    key = ClassKey((*known, *others[:KEPT]))
    width = side if cells is None else 2 * side + 4
    apart = (side + 4, 0) if cells is not None else (0, _LINE)  # from one label of a pair to the other
    lines = 1 + (mixed and cells is None) + (batch.image_class is not None) + (0 if cells is None else 2)
    tile = Image.new("RGB", (width, side + 6 + lines * _LINE), PAPER)
    tile.paste(seen, (0, 0))
    if cells is not None:
        tile.paste(class_map(cells, key, side, over=seen), (side + 4, 0))
    draw, y = ImageDraw.Draw(tile), side + 6
    pair = [(label, f"{share:.2f} {names[label]}"), (partner, f"{1 - share:.2f} {names[partner]}")]
    for n, (c, text) in enumerate(pair if mixed else [(label, names[label])]):
        _entry(draw, (n * apart[0], y + n * apart[1]), key.colour(c), "", text, side - 4 if mixed else width)
    y += _LINE + mixed * apart[1]
    if batch.image_class is not None:
        found = int(batch.image_class[i])
        _entry(draw, (0, y), key.colour(found), "", f"teacher: {names[found]}", width)
        y += _LINE
    if cells is None:
        return tile
    # The classes of the cells with their numbers, two in a line, four at most.
    shown = [c for c in key.classes if counts[c]]
    shown = shown if len(shown) == len(counts) else shown[:3]
    entries = [(key.colour(c), key.letter(c), f"{counts[c]} {names[c]}") for c in shown]
    if rest := sum(counts.values()) - sum(counts[c] for c in shown):
        entries.append((OTHER, "", f"{rest} other{'s' * (rest > 1)}"))
    for n, (colour, letter, text) in enumerate(entries):
        x = n % 2 * (side + 4)
        _entry(draw, (x, y + n // 2 * _LINE), colour, letter, text, side - 4, faint=True)
    return tile


def _entry(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    colour: Paint,
    letter: str,
    text: str,
    width: int,
    faint: bool = False,
) -> None:
    """A swatch and a text, in `width` pixels."""
    x, y = at
    face = font(12)
    draw.rectangle((x, y + 2, x + 12, y + 14), colour)
    if letter:
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 125
        draw.text((x + 6.5, y + 8.5), letter, INK if bright else PAPER, font(10), anchor="mm")
    draw.text((x + 18, y + 8), cut(text, face, width - 18), FAINT if faint else INK, face, anchor="lm")
