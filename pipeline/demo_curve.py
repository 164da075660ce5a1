"""Learning curves as a picture: a line and a band for each method over its seeds, the teacher as a dashed line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cskd.errors import ConfigError
from cskd.pipeline.look.pictures import CLASS_COLOURS, FAINT, INK, Paint

# Of Okabe and Ito, as in `cskd.pipeline.look.pictures`, with a marker each: black, orange, blue, then those that are left.
LINES: tuple[tuple[Paint, str], ...] = (
    (INK, "o"),
    (CLASS_COLOURS[2], "s"),
    (CLASS_COLOURS[0], "^"),
    (CLASS_COLOURS[1], "D"),
    (CLASS_COLOURS[5], "v"),
)


@dataclass(frozen=True)
class Curve:
    """Top-1 of one method, per cent. epochs: int [E], from 1; top1: float [S, E] of S seeds."""

    epochs: NDArray[np.int64]
    top1: NDArray[np.float64]


def refuse_without_matplotlib() -> None:
    """Raises ConfigError, before the minutes of work that the picture stands at the end of."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "the demo's learning curves are drawn by matplotlib, which is not installed; pip install 'cskd[demo]'"
        )


def draw_curves(path: Path, curves: Mapping[str, Curve], teacher_top1: float | None, title: str) -> None:
    """Write a PNG: the mean over the seeds as a line, smallest to largest as a band, accuracy in per cent against epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    highest = max(float(c.top1.max()) for c in curves.values())
    if teacher_top1 is not None:
        axes.axhline(
            teacher_top1, color=_rgb(FAINT), linestyle="--", linewidth=1.4, label=f"teacher {teacher_top1:.1f}"
        )
        highest = max(highest, teacher_top1)
    for (name, curve), (colour, marker) in zip(curves.items(), LINES, strict=False):
        mean, rgb = curve.top1.mean(0), _rgb(colour)
        axes.fill_between(curve.epochs, curve.top1.min(0), curve.top1.max(0), color=rgb, alpha=0.18, linewidth=0)
        axes.plot(curve.epochs, mean, color=rgb, marker=marker, markersize=4, label=f"{name} {mean[-1]:.1f}")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 on images not trained on, %")
    axes.set_ylim(_bottom(curves), min(100.0, highest + 2))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, format="png", backend="agg", metadata={"Software": None})


def _bottom(curves: Mapping[str, Curve]) -> float:
    """Where the axis begins: the first evaluations are far below what tells the methods apart."""
    third = [float(c.top1[:, c.top1.shape[1] // 3 :].min()) for c in curves.values()]
    return max(0.0, 5.0 * math.floor(min(third) / 5) - 5)


def _rgb(colour: Paint) -> tuple[float, float, float]:
    r, g, b = (value / 255 for value in colour)
    return r, g, b
