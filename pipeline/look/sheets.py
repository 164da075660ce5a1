"""Pictures of `cskd inspect --png`: one sample in panels, or a sheet of many in tiles, drawn by `pictures`.

Shapes: h w teacher grid, S side of a panel in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cskd.codecs.base import BLEND_ONE, quantise_blend
from cskd.errors import CacheError
from cskd.pipeline.draw.pictures import (
    GAP,
    Picture,
    class_map,
    fitted_photo,
    grid,
    heading,
    legend,
    panel,
    photo,
    row,
    scalar_map,
    scale_bar,
    stack,
    veil_map,
)
from cskd.pipeline.draw.wordnet import readable
from cskd.pipeline.look.inspect_sample import CachedView, entropy, margin
from cskd.pipeline.look.inspection import percent
from cskd.pipeline.look.views_shown import Look, look_at
from cskd.store.cache import Cache
from cskd.teacher.arithmetic import BLENDS
from cskd.views.maker import ViewMaker

MOST_TILES = 256
SIDES = ((6, 160), (24, 128), (64, 112), (MOST_TILES, 72))  # tiles of a sheet at most -> side of its panels, pixels
TILE_GAP = 5  # pixels between the panels of a tile
SHAPE = 1.5  # width of a sheet to its height, about
EMPTY = 5.0  # what a share of places without a tile counts for, against a shape that is as many times too wide or high, as a logarithm
TILE_CLASSES = 4  # named under a tile


def sample_picture(cache: Cache, look: Look, side: int = 320) -> Image.Image:
    """One sample in six panels, two rows of three, `side` pixels each, with a legend, or in two where there are no targets of cells; a
    student adds a row. Raises as `Look.seen`."""
    title, panels, below = _panels(cache, look, side, 3)
    more = [] if look.said is None else [_student_panels(look, side)]
    return grid([[title], panels[:3], *([panels[3:]] if panels[3:] else []), *more, [below]])


def sheet(cache: Cache, samples: Sequence[int], view: int, side: int = 224) -> Image.Image:
    """Several samples, one a row of six panels, `side` pixels each, with their legends. Raises as `look_at`, `Look.seen`."""
    if not samples:
        raise CacheError("no samples to draw, expected at least one")
    rows = []
    for look in look_at(cache, samples, view, BLEND_ONE):
        title, panels, below = _panels(cache, look, side, 6)
        rows += [[title], panels, [below]]
    return grid(rows)


def refuse_tiles(count: int) -> None:
    """CacheError for more samples than a sheet takes."""
    if count > MOST_TILES:
        raise CacheError(
            f"--png draws at most {MOST_TILES} samples, {count:,} were asked for; lower --samples, or take --html"
        )


def contact_sheet(cache: Cache, looks: Sequence[Look], title: str) -> Image.Image:
    """Many samples, a tile each: image, view, and over the view the class of each cell, of a student too where there is one.

    Raises:  as `Look.seen`.
    """
    refuse_tiles(len(looks))
    side = next(side for most, side in SIDES if len(looks) <= most)
    maker = ViewMaker(cache.inventory, cache.recipe)
    tiles = [_tile(cache, maker, look, side) for look in looks]
    width, height = max(t.width for t in tiles) + GAP, max(t.height for t in tiles) + GAP
    columns = min(range(1, len(tiles) + 1), key=lambda n: _unsightly(len(tiles), n, width / height))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    wide = columns * width - GAP
    blend = looks[0].blend / BLEND_ONE
    taught = "the class of the image" if looks[0].of_image else f"the class each cell is taught at blend {blend:.4g}"
    parts = ["the image", "the view the teacher saw", taught]
    parts += ["the class the student says"] if looks[0].said is not None else []
    about = heading("Left to right: " + ", ".join(parts), wide, 13, faint=True)
    return grid([[stack([heading(title, wide), about], gap=2)], *rows])


def _unsightly(tiles: int, columns: int, shape: float) -> float:
    """How far a sheet of so many columns is from a good shape, and from having no empty places. shape: width of a tile to its height."""
    rows = -(-tiles // columns)
    return abs(math.log(columns * shape / rows / SHAPE)) + EMPTY * (rows * columns - tiles) / (rows * columns)


def _tile(cache: Cache, maker: ViewMaker, look: Look, side: int) -> Picture:
    """One sample of a sheet, with words under it: labels and mixing, the teacher, the student, and the classes of its cells."""
    words, key, seen = readable(cache.classes), look.key, photo(look.seen, side)
    panels = [
        fitted_photo(maker.image(look.cached.sample), side),
        seen,
        class_map(look.cells, key, side, over=seen, plain=True),
    ]
    share = float((look.cells == look.image_class).mean())
    lines = [
        _label_words(look, words),
        f"teacher: {words[look.image_class]}" + ("" if look.of_image else f", {percent(share)} of cells"),
    ]
    if look.said is not None:
        panels.append(class_map(look.said.classes, key, side, over=seen, plain=True))
        lines[1] += f"; student agrees in {percent(look.agreement)}"
    width, size = len(panels) * (side + TILE_GAP) - TILE_GAP, 13 if side > 100 else 11
    maps: list[NDArray[np.integer]] = [look.cells] if look.said is None else [look.cells, look.said.classes]
    counts = {c: sum(int((m == c).sum()) for m in maps) for c in key.classes}
    often = sorted((c for c in counts if counts[c]), key=lambda c: -counts[c])[:TILE_CLASSES]
    often.sort(key=key.slots.index)
    return stack(
        [
            row(panels, TILE_GAP),
            heading(lines[0], width, size),
            heading(lines[1], width, size, faint=True),
            legend(key, words, 0, width, size - 1, only=often, lines=1),
        ],
        gap=2,
    )


def _label_words(look: Look, words: Sequence[str]) -> str:
    """'cat', or 'cat + dog, CutMix, lambda 0.62': lambda is the share of the first."""
    if look.cached.partner is None:
        return words[look.labels[0]]
    mode = {"mixup": "MixUp", "cutmix": "CutMix"}[look.cached.mode]
    return f"{words[look.labels[0]]} + {words[look.labels[1]]}, {mode}, lambda {look.cached.share:.2f}"


def _student_panels(look: Look, side: int) -> list[Picture]:
    """What a student says of each cell, where that is what the teacher's map shows, and how sure it is."""
    assert look.said is not None
    seen, same = photo(look.seen, side), look.said.classes == look.cells
    at = f"with the teacher at blend {look.blend / BLEND_ONE:.4g}"
    sure = scalar_map(look.said.probability, 0.0, 1.0, side)
    return [
        panel(class_map(look.said.classes, look.key, side, over=seen), "Student: class of each cell", "patch logits"),
        panel(veil_map(same, seen), f"Agreement: {percent(float(same.mean()))} of cells", f"{at}; dark: another class"),
        stack([panel(sure, "Student: probability", "softmax, of its class"), scale_bar("0", "1", side)], gap=2),
    ]


def _panels(cache: Cache, look: Look, side: int, columns: int) -> tuple[Picture, list[Picture], Picture]:
    """Heading, six panels (two of a cache without targets of cells) and legend of one sample; heading and legend are as wide as
    `columns` panels."""
    cached, key, words = look.cached, look.key, readable(cache.classes)
    seen = photo(look.seen, side)
    maps = [look.won.at(quantise_blend(blend))[0] for blend in BLENDS]
    mixed = cached.mode
    if cached.partner is not None:
        mixed = f"{cached.mode} with {words[look.labels[1]]}, own share {cached.share:.2f}"
    values, bar, title, note, top = _values(cache, cached, side)
    saw = panel(seen, "What the teacher saw", mixed)
    of_image = [saw, panel(class_map(maps[2], key, side), "Target", "of the image alone: its top-1")]
    panels = (
        of_image
        if look.of_image
        else [
            saw,
            panel(class_map(maps[0], key, side, over=seen), "Top-1 of each cell", "local logits, over the image"),
            stack([panel(scalar_map(values, 0.0, top, side), title, note), bar], gap=2),
            panel(class_map(maps[0], key, side), "CKF target, blend 1", "local: each cell for itself"),
            panel(class_map(maps[1], key, side), "CKF target, blend 0.5", "half local, half global"),
            panel(class_map(maps[2], key, side), "CKF target, blend 0", "global: the image's top-1"),
        ]
    )
    marks = {look.image_class: ["image's top-1"]}
    for label, mark in zip(look.labels, ("label", "partner's label"), strict=False):
        marks.setdefault(label, []).append(mark)
    names = {c: f"{words[c]} ({', '.join(marks[c])})" if c in marks else words[c] for c in key.classes}
    width = columns * side + (columns - 1) * GAP
    drawn = [*maps, *([] if look.said is None else [look.said.classes])]
    occur = {int(c) for m in drawn for c in np.unique(m)}
    own = [c for c in key.classes if c in occur or c in marks]
    head = heading(f"{words[cached.label]}:  {cached.key}, view {cached.view}  (replay: equal)", width)
    return head, panels, legend(key, names, len(occur - set(key.classes)), width, only=own)


def _values(cache: Cache, cached: CachedView, side: int) -> tuple[NDArray[np.float64], Image.Image, str, str, float]:
    """The panel of numbers: entropy where a codec holds logits, else the margin. Map, scale, title, note, upper end."""
    soft = [name for name, codec in cache.codecs.items() if codec.soft and codec.cells]
    if soft:
        values = entropy(cache.codecs[soft[0]], cached.targets[soft[0]])
        top = float(np.log(len(cache.classes)))
        bar = scale_bar("0 sure", f"{top:.1f} knows nothing", side)
        return values, bar, "Entropy of each cell", f"nats, from {soft[0]}", top
    name = cache.hard_codec
    values = margin(cache.codecs[name], cached.targets[name])
    bar = scale_bar("0 leaves", "1 agrees", side)
    return values, bar, "Margin of the image's top-1", "blend up to which a cell keeps it", 1.0
