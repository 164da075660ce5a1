"""What the page of `cskd inspect --html` counts over whole units: segments, margins, agreement by class, confusion.

Shapes: N rows of a unit, h w teacher grid, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.codecs.base import quantise_blend
from cskd.codecs.winners import Winners
from cskd.pipeline.draw.confusion import mistakes
from cskd.teacher.arithmetic import BLENDS
from cskd.views.mixing import NONE, ONE

BINS = 20  # of the margins
MATRIX = 24  # classes that a confusion matrix shows
MISTAKES = 14  # pairs of label and teacher's class that are listed
EXTREMES = 12  # classes shown of those with the least agreement, and of those with the most


class Figures:
    """Counts of rows that `add` brings. Classes are numbers, blends those of `BLENDS`."""

    def __init__(self, classes: int) -> None:
        self.classes, self.views, self.units = classes, 0, 0
        self.mixed = 0
        self._segments = Counter[int]()
        self._margins = np.zeros(BINS + 1, np.int64)  # the last: never leaves
        self._cells = np.zeros(classes, np.int64)
        self._agree = np.zeros((len(BLENDS), classes), np.int64)
        self._views = np.zeros(classes, np.int64)
        self._pairs = Counter[tuple[int, int]]()

    def add(
        self, won: Winners, label_N: NDArray[Any], partner_N: NDArray[Any], fields: dict[str, NDArray[Any]]
    ) -> None:
        """Rows of one unit. label, partner: labels of each sample and of the one it is mixed with, its own where it is not."""
        n, per_view = len(label_N), won.n_extra.shape[1] * won.n_extra.shape[2]
        self.views, self.units = self.views + n, self.units + 1
        self.mixed += int((fields["mode"] != NONE).sum())
        self._segments.update(dict(enumerate(np.bincount(1 + won.n_extra.reshape(-1)).tolist())))
        margin = won.margin.reshape(-1)
        self._margins[:BINS] += np.histogram(margin[margin < 1], BINS, (0.0, 1.0))[0]
        self._margins[BINS] += int((margin >= 1).sum())
        self._views += np.bincount(label_N, minlength=self.classes)
        self._cells += np.bincount(label_N, minlength=self.classes) * per_view
        for agree, blend in zip(self._agree, BLENDS, strict=True):
            hard = won.at(quantise_blend(blend))
            fits = (hard == label_N[:, None, None]) | (hard == partner_N[:, None, None])
            agree += np.bincount(label_N, fits.sum((1, 2)), self.classes).astype(np.int64)
        meant = meant_labels(won.first, label_N, partner_N, fields)
        self._pairs.update(zip(meant.tolist(), won.first.tolist(), strict=True))

    def facts(self, shown: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """JSON-able. shown: (label, teacher's class) of the views in the gallery, whose classes a large matrix shows first."""
        seen = np.flatnonzero(self._cells)
        shares = self._agree[:, seen] / np.maximum(1, self._cells[seen])
        order = np.lexsort((-self._views[seen], shares[0]))  # of equal ones the most frequent first
        if len(order) > 2 * EXTREMES:
            order = np.concatenate([order[:EXTREMES], order[-EXTREMES:]])
        return {
            "views": self.views,
            "units": self.units,
            "mixed": self.mixed,
            "segments": [[k, n] for k, n in sorted(self._segments.items()) if n],
            "margins": self._margins.tolist(),
            "blends": list(BLENDS),
            "classes_seen": len(seen),
            "agreement": [
                {"c": int(seen[i]), "n": int(self._views[seen[i]]), "shares": shares[:, i].round(5).tolist()}
                for i in order
            ],
            "right": sum(n for (label, found), n in self._pairs.items() if label == found),
            "mistakes": [list(mistake) for mistake in mistakes(self._pairs, MISTAKES)],
            "matrix": self._matrix(shown),
        }

    def _matrix(self, shown: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The classes of a matrix and its counts [label, teacher's class, views], all other classes as one, -1."""
        classes = sorted({c for pair in self._pairs for c in pair} | {c for pair in shown for c in pair})
        if len(classes) > MATRIX:
            # Both classes of a pair, mistakes that have a picture first, then the most frequent pairs.
            pictured = Counter(shown)
            pairs = sorted(
                self._pairs, key=lambda p: (-(p in pictured and p[0] != p[1]), -pictured[p], -self._pairs[p], p)
            )
            classes = sorted(list(dict.fromkeys(c for pair in pairs for c in pair))[:MATRIX])
        known, counts = set(classes), Counter[tuple[int, int]]()
        for (label, found), n in self._pairs.items():
            counts[label if label in known else -1, found if found in known else -1] += n
        return {"classes": classes, "counts": [[*pair, n] for pair, n in sorted(counts.items())]}


def meant_labels(
    teacher_N: NDArray[Any], label_N: NDArray[Any], partner_N: NDArray[Any], fields: dict[str, NDArray[Any]]
) -> NDArray[np.int64]:
    """The label that a teacher's class is held against, int64 [N]: of a mixed view the one that it names, if it names one of
    the two, else the one with the larger share of the pixels."""
    own = (fields["mode"] == NONE) | (fields["lam"].astype(np.int64) * 2 >= ONE)
    larger = np.where(own, label_N, partner_N)
    named = (teacher_N == label_N) | (teacher_N == partner_N)
    return np.where(named, teacher_N, larger).astype(np.int64)
