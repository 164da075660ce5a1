"""Learning curves as a picture: a line and a band for each method over its seeds, the teacher as a dashed line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cskd.pipeline.draw.charts import COLOURS, Axis, Line, chart, telling_low


@dataclass(frozen=True)
class Curve:
    """Top-1 of one method, per cent. epochs: int [E], from 1; top1: float [S, E] of S seeds."""

    epochs: NDArray[np.int64]
    top1: NDArray[np.float64]


def draw_curves(path: Path, curves: Mapping[str, Curve], teacher_top1: float | None, title: str) -> None:
    """Write a PNG: the mean over the seeds as a line, smallest to largest as a band, accuracy in per cent against epochs."""
    lines = [
        Line(name, c.epochs.astype(np.float64), c.top1.mean(0), colour, low=c.top1.min(0), high=c.top1.max(0))
        for (name, c), colour in zip(curves.items(), COLOURS, strict=False)
    ]
    levels = [] if teacher_top1 is None else [("teacher", teacher_top1)]
    highest = max([float(c.top1.max()) for c in curves.values()] + [top1 for _, top1 in levels])
    axis = Axis(telling_low([low for line in lines if (low := line.low) is not None]), min(100.0, highest + 2))
    name = f"top-1 on images not trained on, %: {title}"
    chart(name, lines, y_axis=axis, levels=levels, size=(860, 480)).save(path, format="PNG")
