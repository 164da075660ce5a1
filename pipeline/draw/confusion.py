"""Which classes are taken for which: counts, the CSV that keeps them, and their picture.

Shapes: K classes, P pairs of label and prediction that occur.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cskd.pipeline.draw.pictures import FAINT, INK, PAPER, Paint, Picture, cut, font, grid, heading, stack

SIDE_BY_SIDE = 12  # classes up to which matrices stand next to each other
NAMED = 30  # classes up to which a matrix has names and numbers
LISTED = 24  # pairs of a list of the most confused
COLUMNS = ("weights", "step", "label", "predicted", "images")
_HIT: Paint = (0, 90, 150)  # a whole row on the diagonal, of Okabe and Ito's blue
_MISS: Paint = (200, 75, 0)  # and of their vermilion off it
_WIDE = 760  # pixels of the picture of many classes
Pairs = Mapping[tuple[int, int], int]


@dataclass(frozen=True)
class Confusion:
    """Images by (label, prediction), of some weights. weights: 'best' or 'last'; step: updates that they have had."""

    weights: str
    step: int
    pairs: Pairs

    @classmethod
    def of(cls, weights: str, step: int, label_N: NDArray[np.int64], predicted_N: NDArray[np.int64]) -> Confusion:
        """Count; int64 [N] each. Images with a label below 0, which could not be read, are left out."""
        read = label_N >= 0
        found, counts = np.unique(np.stack([label_N[read], predicted_N[read]]), axis=1, return_counts=True)
        return cls(weights, step, {(int(a), int(b)): int(n) for (a, b), n in zip(found.T, counts, strict=True)})

    @property
    def images(self) -> int:
        return sum(self.pairs.values())

    @property
    def top1(self) -> float:
        """Per cent."""
        return 100 * sum(n for (a, b), n in self.pairs.items() if a == b) / max(1, self.images)


def mistakes(pairs: Pairs, most: int) -> list[tuple[int, int, int]]:
    """(label, prediction, images) of the most frequent pairs that differ, at most so many."""
    return [(*pair, n) for pair, n in Counter(pairs).most_common() if pair[0] != pair[1]][:most]


def to_csv(confusions: Sequence[Confusion], classes: Sequence[str]) -> bytes:
    """A table with the columns `COLUMNS`, a row for each pair that occurs; classes by name."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in confusions:
        writer.writerows((one.weights, one.step, classes[a], classes[b], n) for (a, b), n in sorted(one.pairs.items()))
    return table.getvalue().encode()


def from_csv(data: bytes, classes: Sequence[str]) -> list[Confusion]:
    """What `to_csv` wrote. ValueError for anything else."""
    number = {name: c for c, name in enumerate(classes)}
    found: dict[tuple[str, int], dict[tuple[int, int], int]] = {}
    try:
        for row in csv.DictReader(io.StringIO(data.decode(), newline="")):
            pairs = found.setdefault((row["weights"], int(row["step"])), {})
            pairs[number[row["label"]], number[row["predicted"]]] = int(row["images"])
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise ValueError(f"it is no confusion table ({type(e).__name__}: {e})") from None
    return [Confusion(weights, step, pairs) for (weights, step), pairs in found.items()]


def draw_confusion(confusions: Sequence[Confusion], names: Sequence[str]) -> Picture:
    """All of them in one picture: matrices with names up to `NAMED` classes, else lists of pairs next to a plain matrix."""
    if not confusions:
        raise ValueError("there are no confusions to draw")
    first, last = confusions[0], confusions[-1]
    if first is not last and (first.pairs, first.step) == (last.pairs, last.step):
        confusions = [Confusion(f"{first.weights} and {last.weights}", first.step, first.pairs)]
    drawn = [_named(one, names) if len(names) <= NAMED else _listed(one, names) for one in confusions]
    return grid([drawn] if len(names) <= SIDE_BY_SIDE else [[one] for one in drawn])


def _title(one: Confusion) -> str:
    return f"{one.weights} weights (step {one.step:,}): top-1 {one.top1:.2f} % of {one.images:,} images"


def _matrix(one: Confusion, classes: int) -> NDArray[np.float64]:
    """Share of a label's images that have each prediction: float64 [K, K]; rows of labels without images are 0."""
    counts = np.zeros((classes, classes))
    for (a, b), n in one.pairs.items():
        counts[a, b] = n
    return np.asarray(counts / np.maximum(1, counts.sum(1, keepdims=True)))


def _colours(shares: NDArray[np.float64], on_diagonal: NDArray[np.bool_], most: float = 1.0) -> NDArray[np.uint8]:
    """White for 0, blue for hits, vermilion for misses; misses by their root, so that few of many are seen: uint8 [..., 3].

    most: the share that is full vermilion.
    """
    strength = np.where(on_diagonal, shares, np.sqrt(np.minimum(1.0, shares / most)))[..., None]
    full = np.where(on_diagonal[..., None], np.array(_HIT, np.float64), np.array(_MISS, np.float64))
    return np.asarray((np.array(PAPER) * (1 - strength) + full * strength).round(), np.uint8)


def _named(one: Confusion, names: Sequence[str]) -> Picture:
    """The matrix with the name of each class and per cents in its cells."""
    k = len(names)
    shares = _matrix(one, k)
    cell = int(np.clip(900 // k, 26, 46))
    face, small = font(13), font(12 if cell >= 32 else 10)
    wide = int(min(150, max(face.getlength(cut(name, face, 150)) for name in names))) + 1
    left, top = wide + 34, wide + 34
    width = max(left + k * cell + 4, 540)
    out = Image.new("RGB", (width, top + k * cell + 30), PAPER)
    draw = ImageDraw.Draw(out)
    colours = _colours(shares, np.eye(k, dtype=bool))
    for a in range(k):
        y = top + a * cell
        draw.text((left - 8, y + cell / 2), cut(names[a], face, wide), INK, face, anchor="rm")
        for b in range(k):
            x, (red, green, blue) = left + b * cell, (int(v) for v in colours[a, b])
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), (red, green, blue) if shares[a, b] else (246, 246, 247))
            if shares[a, b] >= 0.005:
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
                text = f"{100 * shares[a, b]:.0f}"
                draw.text((x + cell / 2 - 1, y + cell / 2), text, PAPER if dark else INK, small, anchor="mm")
    for b, name in enumerate(names):
        text = cut(name, face, wide)
        word = Image.new("RGB", (int(face.getlength(text)) + 2, 18), PAPER)
        ImageDraw.Draw(word).text((0, 9), text, INK, face, anchor="lm")
        turned = word.rotate(90, expand=True)
        out.paste(turned, (left + b * cell + (cell - 18) // 2 - 1, top - 8 - turned.height))
    draw.text((left + k * cell / 2, 2), "predicted", FAINT, face, anchor="mt")
    label = Image.new("RGB", (40, 18), PAPER)
    ImageDraw.Draw(label).text((20, 9), "label", FAINT, face, anchor="mm")
    out.paste(label.rotate(90, expand=True), (2, int(top + k * cell / 2 - 20)))
    note = "per cent of each label's images"
    draw.text((left, top + k * cell + 8), note, FAINT, face)
    return stack([heading(_title(one), width, 16), out], gap=10)


def _listed(one: Confusion, names: Sequence[str]) -> Picture:
    """The most confused pairs in words, and next to them the whole matrix, without names."""
    face, k = font(13), len(names)
    of_label = Counter[int]()
    for (a, _), n in one.pairs.items():
        of_label[a] += n
    pairs = mistakes(one.pairs, LISTED)
    largest = max((n / of_label[a] for a, _, n in pairs), default=1.0)
    height = 24 * (LISTED + 1) + 4
    words = Image.new("RGB", (_WIDE, height), PAPER)
    draw = ImageDraw.Draw(words)
    for x, text, anchor in ((0, "label", "la"), (300, "taken for", "la"), (_WIDE, "images of the label", "ra")):
        draw.text((x, 0), text, FAINT, face, anchor=anchor)
    for n, (a, b, images) in enumerate(pairs, 1):
        y = 24 * n
        draw.text((0, y), cut(names[a], face, 285), INK, face)
        draw.text((300, y), cut(names[b], face, 285), INK, face)
        share = images / of_label[a]
        draw.rectangle((600, y + 2, 600 + int(60 * share / largest), y + 13), _MISS)
        draw.text((_WIDE, y), f"{images:,} of {of_label[a]:,}", INK, face, anchor="ra")
    if not pairs:
        draw.text((0, 24), "no image is taken for another class", INK, face)
    shares = _matrix(one, k)
    side = height - 24
    # Each pixel shows the largest share of the pairs that it stands for, so that no cell is lost.
    at = np.arange(side) * k // side
    if k > side:
        begin = np.unique(np.arange(side) * k // side)
        pooled = np.maximum.reduceat(np.maximum.reduceat(shares, begin, axis=0), begin, axis=1)
        hit = np.eye(side, dtype=bool)
        pixels = _colours(pooled, hit, largest)
    else:
        pixels = _colours(shares, np.eye(k, dtype=bool), largest)[at][:, at]
    map_ = Image.new("RGB", (side + 2, side + 2), FAINT)
    map_.paste(Image.fromarray(pixels), (1, 1))
    below = heading(f"all {k:,} classes: labels downwards, predictions to the right", side, 13)
    return stack([heading(_title(one), _WIDE + side, 16), grid([[words, stack([map_, below], 4)]], 12)], gap=4)
