"""Drawing: class maps, scalar maps, captions, legends and grids as Pillow images. Knows no cache and no teacher.

Classes have the colours of Okabe and Ito (2008), numbers those of cividis (Nunez et al., 2018), which people with any
kind of colour vision can tell apart; every class has a letter, too.

Shapes: h w teacher grid, S side of a panel in pixels.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Paint = tuple[int, int, int]
Picture = Image.Image

CLASS_COLOURS: tuple[Paint, ...] = (
    (0, 114, 178),  # blue
    (230, 159, 0),  # orange
    (0, 158, 115),  # green
    (213, 94, 0),  # vermilion
    (86, 180, 233),  # sky
    (204, 121, 167),  # purple
    (240, 228, 66),  # yellow
)
OTHER: Paint = (178, 178, 178)  # all classes that have no colour of their own
PAPER: Paint = (255, 255, 255)
INK: Paint = (28, 28, 30)
FAINT: Paint = (110, 110, 115)
CIVIDIS = np.array(
    [
        (0, 34, 78),
        (18, 53, 112),
        (59, 73, 108),
        (87, 93, 109),
        (112, 113, 115),
        (138, 134, 120),
        (165, 156, 116),
        (195, 179, 105),
        (254, 232, 56),
    ],
    np.float64,
)
GAP = 14  # pixels between panels
LETTER_CELL = 14  # cells smaller than this, pixels, carry no letter
NUMBER_CELL = 26  # and no number below this


@dataclass(frozen=True)
class ClassKey:
    """Which classes of a picture have a colour and a letter of their own, the same in every panel."""

    classes: tuple[int, ...]

    def colour(self, c: int) -> Paint:
        return CLASS_COLOURS[self.classes.index(c)] if c in self.classes else OTHER

    def letter(self, c: int) -> str:
        return chr(ord("A") + self.classes.index(c)) if c in self.classes else ""


def class_key(maps: Sequence[NDArray[np.integer]], first: Sequence[int] = ()) -> ClassKey:
    """The key of a picture: `first` those of these classes that occur, then the others by the number of their cells."""
    classes, counts = np.unique(np.concatenate([np.ravel(m) for m in maps]), return_counts=True)
    often = [int(c) for c in classes[np.argsort(-counts, kind="stable")]]
    ordered = dict.fromkeys([*(c for c in first if c in often), *often])
    return ClassKey(tuple(ordered)[: len(CLASS_COLOURS)])


def class_map(map_hw: NDArray[np.integer], key: ClassKey, side: int, over: Picture | None = None) -> Picture:
    """One colour a class, a letter in each cell, lines where the class changes: RGB [S, S].

    over: an RGB image that shows through, brought to the panel's size.
    """
    colours = np.array([[key.colour(int(c)) for c in row] for row in map_hw], np.uint8)
    picture = _under(_enlarge(colours, side), over)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1, i, j in _cells(map_hw.shape, side):
        c = int(map_hw[i, j])
        if j + 1 < map_hw.shape[1] and map_hw[i, j + 1] != c:
            draw.line([(x1, y0), (x1, y1)], PAPER, 2)
        if i + 1 < map_hw.shape[0] and map_hw[i + 1, j] != c:
            draw.line([(x0, y1), (x1, y1)], PAPER, 2)
    for x0, y0, x1, y1, i, j in _cells(map_hw.shape, side):
        c = int(map_hw[i, j])
        if min(x1 - x0, y1 - y0) >= LETTER_CELL:
            size = int(np.clip(min(x1 - x0, y1 - y0) * 0.42, 9, 20))
            _centred(draw, (x0, y0, x1, y1), key.letter(c), size, key.colour(c), outlined=over is not None)
    return picture


def scalar_map(values_hw: NDArray[np.floating], low: float, high: float, side: int) -> Picture:
    """Numbers from low (dark blue) to high (yellow) with the value in each cell: RGB [S, S]."""
    share = np.clip((values_hw - low) / max(high - low, 1e-12), 0.0, 1.0)
    colours = _cividis(share)
    picture = _enlarge(colours, side)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1, i, j in _cells(values_hw.shape, side):
        if min(x1 - x0, y1 - y0) >= NUMBER_CELL:
            text = f"{values_hw[i, j]:.1f}" if high > 1.0 else f"{values_hw[i, j]:.2f}".removeprefix("0")
            text = text.removesuffix(".00")
            r, g, b = (int(v) for v in colours[i, j])
            size = int(np.clip(min(x1 - x0, y1 - y0) * 0.34, 9, 15))
            _centred(draw, (x0, y0, x1, y1), text, size, (r, g, b), outlined=False)
    return picture


def panel(picture: Picture, title: str, note: str = "") -> Picture:
    """A picture with a title and a note under it, each cut to its width."""
    size = int(np.clip(picture.width // 17, 12, 18))
    big, small = font(size), font(size - 3)
    lines = [(title, big, INK), (note, small, FAINT)]
    height = sum(_line_height(f) for _, f, _ in lines)
    out = Image.new("RGB", (picture.width, picture.height + 5 + height), PAPER)
    out.paste(picture, (0, 0))
    draw = ImageDraw.Draw(out)
    y = picture.height + 5
    for text, face, colour in lines:
        draw.text((0, y), cut(text, face, picture.width), colour, face)
        y += _line_height(face)
    return out


def legend(key: ClassKey, names: Mapping[int, str], others: int, width: int, size: int = 15) -> Picture:
    """Swatch, letter and name of every class of the key, on as many lines of `width` pixels as it takes.

    names: of the key's classes at least; others: how many classes have no colour of their own.
    """
    face, square = font(size), size + 5
    items = [(key.colour(c), key.letter(c), names[c]) for c in key.classes]
    if others:
        items.append((OTHER, "", f"{others} other class{'es' if others > 1 else ''}"))
    places, x, y = [], 0, 0
    texts = [cut(name, face, width - square - 8) for *_, name in items]
    for text in texts:
        wide = square + 8 + int(face.getlength(text))
        if x and x + wide > width:
            x, y = 0, y + square + 6
        places.append((x, y))
        x += wide + 22
    out = Image.new("RGB", (width, y + square), PAPER)
    draw = ImageDraw.Draw(out)
    for (colour, letter, _), text, (x, y) in zip(items, texts, places, strict=True):
        draw.rectangle((x, y, x + square - 1, y + square - 1), colour)
        _centred(draw, (x, y, x + square, y + square), letter, size - 3, colour, outlined=False)
        draw.text((x + square + 8, y + square / 2), text, INK, face, anchor="lm")
    return out


def scale_bar(low: str, high: str, width: int, size: int = 13) -> Picture:
    """The colours of `scalar_map` from low to high, with their meaning at both ends."""
    face = font(size)
    left, right = int(face.getlength(low)) + 8, int(face.getlength(high)) + 8
    span = max(1, width - left - right)
    out = Image.new("RGB", (width, size + 5), PAPER)
    colours = _cividis(np.linspace(0, 1, span))
    out.paste(Image.fromarray(np.broadcast_to(colours, (size + 1, span, 3)).copy()), (left, 2))
    draw = ImageDraw.Draw(out)
    draw.text((0, out.height / 2), low, FAINT, face, anchor="lm")
    draw.text((width, out.height / 2), high, FAINT, face, anchor="rm")
    return out


def heading(text: str, width: int, size: int = 18) -> Picture:
    """One line of text, cut to `width` pixels."""
    face = font(size)
    out = Image.new("RGB", (width, _line_height(face)), PAPER)
    ImageDraw.Draw(out).text((0, 0), cut(text, face, width), INK, face)
    return out


def grid(rows: Sequence[Sequence[Picture]], gap: int = GAP) -> Picture:
    """Rows of pictures, left-aligned, with `gap` pixels between them and round them."""
    widths = [sum(p.width + gap for p in row) + gap for row in rows]
    heights = [max(p.height for p in row) for row in rows]
    out = Image.new("RGB", (max(widths), sum(h + gap for h in heights) + gap), PAPER)
    y = gap
    for row, height in zip(rows, heights, strict=True):
        x = gap
        for picture in row:
            out.paste(picture, (x, y))
            x += picture.width + gap
        y += height + gap
    return out


def stack(pictures: Sequence[Picture], gap: int = 6) -> Picture:
    """Pictures on top of each other, left-aligned, `gap` pixels between them and none round them."""
    out = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap), PAPER)
    y = 0
    for picture in pictures:
        out.paste(picture, (0, y))
        y += picture.height + gap
    return out


def photo(pixels_HWC: NDArray[np.uint8], side: int) -> Picture:
    """An image at the panel's size."""
    resample = Image.Resampling.LANCZOS if pixels_HWC.shape[0] >= 64 else Image.Resampling.NEAREST
    return Image.fromarray(pixels_HWC).resize((side, side), resample)


def png(picture: Picture) -> bytes:
    """The file of a picture; the same bytes for the same picture and version of Pillow."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own typeface, so that a picture is the same everywhere."""
    face = ImageFont.load_default(size)
    assert isinstance(face, ImageFont.FreeTypeFont)
    return face


def cut(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of it as fits into `width` pixels and an ellipsis.

    The typeface has Latin letters only: accents are dropped, anything else becomes '?'.
    """
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in letters)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _cividis(share: NDArray[np.floating]) -> NDArray[np.uint8]:
    """[...] in [0, 1] -> uint8 [..., 3]."""
    at = np.linspace(0, 1, len(CIVIDIS))
    return np.stack([np.interp(share, at, CIVIDIS[:, k]) for k in range(3)], axis=-1).round().astype(np.uint8)


def _enlarge(colours_hw3: NDArray[np.uint8], side: int) -> Picture:
    h, w = colours_hw3.shape[:2]
    rows, columns = np.arange(side) * h // side, np.arange(side) * w // side
    return Image.fromarray(colours_hw3[rows][:, columns])


def _cells(shape: tuple[int, ...], side: int) -> list[tuple[int, int, int, int, int, int]]:
    """(left, top, right, bottom, i, j) of every cell: the rectangles that `_enlarge` fills."""
    h, w = shape
    edges = [-(-np.arange(n + 1) * side // n) for n in (h, w)]
    return [
        (int(edges[1][j]), int(edges[0][i]), int(edges[1][j + 1]), int(edges[0][i + 1]), i, j)
        for i in range(h)
        for j in range(w)
    ]


def _under(colours: Picture, image: Picture | None) -> Picture:
    if image is None:
        return colours
    return Image.blend(colours, image.convert("RGB").resize(colours.size), 0.5)


def _centred(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str, size: int, ground: Paint, outlined: bool
) -> None:
    """Text in the middle of a box, dark on bright grounds and bright on dark ones."""
    bright = 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 125
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    if outlined:
        draw.text(middle, text, PAPER, font(size), anchor="mm", stroke_width=2, stroke_fill=INK)
    else:
        draw.text(middle, text, INK if bright else PAPER, font(size), anchor="mm")


def _line_height(face: ImageFont.FreeTypeFont) -> int:
    ascent, descent = face.getmetrics()
    return ascent + descent + 2
