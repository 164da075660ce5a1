"""Drawing: class maps, scalar maps, captions, legends and grids as Pillow images. Knows no cache and no teacher.

Classes have the colours of Okabe and Ito (2008) and four more, numbers those of cividis (Nunez et al., 2018), which people with
any kind of colour vision can tell apart; every class has a letter, too. Pictures, terminal and page share them.

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
    (0, 158, 115),  # green
    (230, 159, 0),  # orange
    (213, 94, 0),  # vermilion
    (86, 180, 233),  # sky
    (204, 121, 167),  # purple
    (240, 228, 66),  # yellow
    (88, 70, 170),  # violet
    (140, 86, 60),  # brown
    (130, 190, 90),  # lime
    (240, 110, 140),  # rose
)
OTHER: Paint = (178, 178, 178)  # all classes that have no colour of their own
PAPER: Paint = (255, 255, 255)
UNUSED = -1
MAT: Paint = (238, 238, 240)  # round an image that is no square
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
PLAIN_CELL = 22  # the same in a small picture among many
NUMBER_CELL = 26  # and no number below this


@dataclass(frozen=True)
class ClassKey:
    """Which classes of a picture have a colour and a letter of their own, the same in every panel.

    slots: in the order of the colours, UNUSED where a colour is kept free.
    """

    slots: tuple[int, ...]

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(c for c in self.slots if c != UNUSED)

    def colour(self, c: int) -> Paint:
        return CLASS_COLOURS[self.slots.index(c)] if c in self.slots else OTHER

    def letter(self, c: int) -> str:
        return chr(ord("A") + self.slots.index(c)) if c in self.slots else ""


def class_key(maps: Sequence[NDArray[np.integer]], first: Sequence[int] = ()) -> ClassKey:
    """The key of a picture: `first` these slots, whether they occur or not, then the other classes by the number of their cells."""
    classes, counts = np.unique(np.concatenate([np.ravel(m) for m in maps]), return_counts=True)
    often = [int(c) for c in classes[np.argsort(-counts, kind="stable")] if c not in first]
    return ClassKey((*first, *often)[: len(CLASS_COLOURS)])


def class_map(
    map_hw: NDArray[np.integer], key: ClassKey, side: int, over: Picture | None = None, plain: bool = False
) -> Picture:
    """One colour a class, a letter in each cell, lines where the class changes: RGB [S, S].

    over: an RGB image that shows through, brought to the panel's size; plain: finer lines, and letters in large cells only.
    """
    colours = np.array([[key.colour(int(c)) for c in row] for row in map_hw], np.uint8)
    picture = _under(_enlarge(colours, side), over)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1, i, j in _cells(map_hw.shape, side):
        c = int(map_hw[i, j])
        if j + 1 < map_hw.shape[1] and map_hw[i, j + 1] != c:
            draw.line([(x1, y0), (x1, y1)], PAPER, 1 if plain else 2)
        if i + 1 < map_hw.shape[0] and map_hw[i + 1, j] != c:
            draw.line([(x0, y1), (x1, y1)], PAPER, 1 if plain else 2)
    for x0, y0, x1, y1, i, j in _cells(map_hw.shape, side):
        c = int(map_hw[i, j])
        if min(x1 - x0, y1 - y0) >= (PLAIN_CELL if plain else LETTER_CELL):
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


def veil_map(clear_hw: NDArray[np.bool_], over: Picture) -> Picture:
    """An image that shows through where a cell is clear, and is dark elsewhere: RGB of the image's size."""
    veil = _enlarge(np.where(clear_hw, 0, 255).astype(np.uint8)[..., None].repeat(3, -1), over.width).convert("L")
    return Image.composite(Image.blend(over, Image.new("RGB", over.size, INK), 0.82), over, veil)


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


def legend(
    key: ClassKey,
    names: Mapping[int, str] | Sequence[str],
    others: int,
    width: int,
    size: int = 15,
    only: Sequence[int] | None = None,
    lines: int | None = None,
) -> Picture:
    """Swatch, letter and name of classes of the key, on as many lines of `width` pixels as it takes, or `lines` of them.

    names: of the key's classes at least; others: how many classes have no colour of their own; only: these classes, by default
    all of the key.
    """
    face, square = font(size), size + 5
    items = [(key.colour(c), key.letter(c), names[c]) for c in (key.classes if only is None else only)]
    if others:
        items.append((OTHER, "", f"{others} other class{'es' if others > 1 else ''}"))
    places, x, y = [], 0, 0
    texts = [cut(name, face, width - square - 8) for *_, name in items]
    for text in texts:
        wide = square + 8 + int(face.getlength(text))
        if x and x + wide > width:
            if lines is not None and y // (square + 6) + 1 == lines:
                break
            x, y = 0, y + square + 6
        places.append((x, y))
        x += wide + (22 if lines is None else 12)
    out = Image.new("RGB", (width, y + square), PAPER)
    draw = ImageDraw.Draw(out)
    for (colour, letter, _), text, (x, y) in zip(items, texts, places, strict=False):
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


def heading(text: str, width: int, size: int = 18, faint: bool = False) -> Picture:
    """One line of text, cut to `width` pixels."""
    face = font(size)
    out = Image.new("RGB", (width, _line_height(face)), PAPER)
    ImageDraw.Draw(out).text((0, 0), cut(text, face, width), FAINT if faint else INK, face)
    return out


def row(pictures: Sequence[Picture], gap: int) -> Picture:
    """Pictures next to each other, top-aligned, `gap` pixels between them and none round them."""
    out = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, max(p.height for p in pictures)), PAPER)
    x = 0
    for picture in pictures:
        out.paste(picture, (x, 0))
        x += picture.width + gap
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


def fitted_photo(pixels_HWC: NDArray[np.uint8], side: int) -> Picture:
    """A whole image of any shape in the middle of a square panel."""
    height, width = pixels_HWC.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    resample = Image.Resampling.LANCZOS if max(height, width) >= 64 else Image.Resampling.NEAREST
    out = Image.new("RGB", (side, side), MAT)
    out.paste(Image.fromarray(pixels_HWC).resize(size, resample), ((side - size[0]) // 2, (side - size[1]) // 2))
    return out


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
    bright = is_bright(ground)
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    if outlined:
        draw.text(middle, text, PAPER, font(size), anchor="mm", stroke_width=2, stroke_fill=INK)
    else:
        draw.text(middle, text, INK if bright else PAPER, font(size), anchor="mm")


def is_bright(ground: Paint) -> bool:
    """Whether dark text is easier to read on it than bright text."""
    return 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 125


def _line_height(face: ImageFont.FreeTypeFont) -> int:
    ascent, descent = face.getmetrics()
    return ascent + descent + 2
