"""The figures of an analysis, from its numbers alone; see `benchmarks.results.analysis`.

Made to be read at a width of 900 pixels: 9 inches wide, so that a point of type is 1.4 pixels. Colours are those of Okabe and
Ito (2008), numbers' those of cividis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", ":"]  # of the eighth run and on: the same colours again
GREY = "#777777"
WIDTH, DPI = 9.0, 150  # inches
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.titlesize": 11,
}
HEADS = {  # of metrics.jsonl -> name in a legend, and its colour: the same in every panel
    "class": ("class token", COLOURS[0]),
    "distillation": ("distillation token", COLOURS[1]),
    "patches": ("mean of patch tokens", COLOURS[2]),
    "class+distillation": ("class + distillation", COLOURS[3]),
    "all": ("all three", COLOURS[6]),
    "class+patches": ("class + patches", COLOURS[4]),
    "distillation+patches": ("distillation + patches", COLOURS[5]),
}
UNTRAINED = ".untrained"


def draw(out: Path, facts: dict[str, Any]) -> list[str]:
    """Write every figure that the numbers allow into a folder. Returns: their file names. OSError where it can't."""
    runs = {name.replace("$", r"\$"): run for name, run in facts["runs"].items()}  # not as mathematics
    taught = {name: run for name, run in runs.items() if "agreement" in run}
    with matplotlib.rc_context(STYLE):
        figures = {}
        if taught:
            figures["agreement.png"] = agreement_figure(taught, facts["teacher"], facts["images"])
            figures["agreement_cells.png"] = cells_figure(taught, facts["images"])
        figures["attention_distance.png"] = attention_figure(runs, facts["images"])
        if any(run["accuracy"]["epoch"] for run in runs.values()):
            figures["accuracy.png"] = accuracy_figure(runs)
        for name, figure in figures.items():
            figure.savefig(out / name, dpi=DPI)
    return list(figures)


def agreement_figure(runs: dict[str, Any], teacher: dict[str, Any], images: int) -> Figure:
    """A column for each class that may be followed, a row for all cells and one for those where the teacher's two differ."""
    columns = {"local": "teacher's local class", "global": "teacher's global class", "label": "label"}
    rows = {"all": "all cells", "differ": f"where local ≠ global: {100 * teacher['cells_differ']:.1f} %"}
    rows = {
        part: text for part, text in rows.items() if any(part in row for r in runs.values() for row in r["agreement"])
    }
    figure = Figure(figsize=(WIDTH, 1.5 + 2.5 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    for (part, text), line in zip(rows.items(), panels, strict=True):
        for (name, title), ax in zip(columns.items(), line, strict=True):
            for run, (colour, style) in zip(runs.values(), _looks(len(runs)), strict=True):
                points = [(row["epoch"], 100 * row[part][name]) for row in run["agreement"] if part in row]
                ax.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=_marker(points))
            if name == "label":
                for own, dashes in (("local", (0, (1, 1))), ("global", (0, (4, 2)))):
                    _reference(ax, 100 * teacher["label"][part][own], dashes, f"teacher's {own} class")
            if part == next(iter(rows)):
                ax.set_title(f"equal to the {title}")
            _whole_epochs(ax)
        line[0].set_ylabel(f"agreement (%)\n{text}")
        line[0].set_ylim(0, 1.04 * line[0].get_ylim()[1])
    for ax in panels[-1]:
        ax.set_xlabel("epoch")
    _legend(figure, _run_handles(runs), 4)
    figure.suptitle(f"Whom the student's patch predictions follow ({images:,} clean validation images)")
    return figure


def cells_figure(runs: dict[str, Any], images: int) -> Figure:
    """A row for each run, a column for each state: the share of images whose cell has the local class."""
    wide = max(len(run["cells"]) for run in runs.values())
    figure = Figure(figsize=(WIDTH, 0.8 + 2.6 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), wide, squeeze=False)
    maps = [100 * np.array(at["local"]) for run in runs.values() for at in run["cells"]]
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    high = max(high, low + 1)
    drawn: AxesImage | None = None
    for (name, run), line in zip(runs.items(), panels, strict=True):
        for ax in line[len(run["cells"]) :]:
            ax.set_visible(False)
        for at, ax in zip(run["cells"], line, strict=False):
            shares = 100 * np.array(at["local"])
            drawn = ax.imshow(shares, cmap="cividis", vmin=low, vmax=high)
            ax.grid(False)
            for side in ("left", "bottom"):
                ax.spines[side].set_visible(False)
            ax.tick_params(length=0)
            h, w = shares.shape
            ax.set_xticks(range(w))
            ax.set_yticks(range(h))
            ax.set_title(f"{name}, epoch {at['epoch']}")
            if w <= 8:
                for y in range(h):
                    for x in range(w):
                        dark = shares[y, x] < (low + high) / 2
                        colour = "white" if dark else "black"
                        ax.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", color=colour, fontsize=7.5)
        line[0].set_ylabel("row of cells")
    for ax in panels[-1]:
        ax.set_xlabel("column of cells")
    assert drawn is not None
    figure.colorbar(drawn, ax=panels, label="predicts the teacher's local class (%)", shrink=0.9, aspect=30)
    figure.suptitle(f"Where the patch predictions agree with the teacher's local class ({images:,} images)")
    return figure


def attention_figure(runs: dict[str, Any], images: int) -> Figure:
    """A panel for each run: a dot for each head, a line for their mean."""
    figure, panels = _panels(len(runs), 4 if len(runs) > 3 else 3, 3.0)
    for (name, run), ax, (colour, _) in zip(runs.items(), panels, _looks(len(runs)), strict=False):
        about = run["attention"]
        layers = np.arange(1, len(about["mean"]) + 1)
        heads = np.array(about["heads"])
        spread = (np.arange(heads.shape[1]) - (heads.shape[1] - 1) / 2) * 0.06  # heads that agree stay apart
        ax.scatter(layers[:, None] + spread, heads, s=16, color=colour, alpha=0.55, linewidths=0)
        ax.plot(layers, about["mean"], color=colour)
        ax.axhline(about["uniform"], color=GREY, linewidth=1.1, linestyle=(0, (4, 2)))
        ax.set_title(f"{name}, epoch {about['epoch']}")
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _first_of_rows(panels, "mean attention distance (px)")
    farthest = max(max(np.max(run["attention"]["heads"]), run["attention"]["uniform"]) for run in runs.values())
    panels[0].set_ylim(0, 1.08 * farthest)
    handles: list[Any] = [
        _line("black", "-", "mean of the heads"),
        _line("black", "", "one head", marker="o"),
        _line(GREY, (0, (4, 2)), "equal weights on all patches"),
    ]
    _legend(figure, handles, 3)
    figure.suptitle(f"How far patch tokens look ({images:,} clean validation images)")
    return figure


def accuracy_figure(runs: dict[str, Any]) -> Figure:
    """A panel for each run: a line for each head or average; dashed where it is not trained."""
    figure, panels = _panels(len(runs), 3, 3.0)
    seen: dict[str, Any] = {}
    for (name, run), ax in zip(runs.items(), panels, strict=False):
        about = run["accuracy"]
        for head, scores in about["heads"].items():
            trained, known = not head.endswith(UNTRAINED), head.removesuffix(UNTRAINED)
            text, colour = HEADS.get(known, (known, COLOURS[5]))
            points = [(e, s) for e, s in zip(about["epoch"], scores, strict=True) if s is not None]
            style = "-" if trained else ":"
            ax.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=_marker(points))
            seen.setdefault(head, _line(colour, style, text if trained else f"{text}, not trained"))
        ax.set_title(f"{name} ({'averaged' if run['weights'] == 'ema' else 'live'} weights)")
        ax.set_xlabel("epoch")
        _whole_epochs(ax)
    _first_of_rows(panels, "top-1 (%)")
    _legend(figure, list(seen.values()), 3)
    figure.suptitle("Accuracy of each head and average through training (all of data.val)")
    return figure


def _panels(count: int, most: int, height: float) -> tuple[Figure, list[Axes]]:
    """`count` panels with the same axes, at most so many in a row; `height` inches each."""
    columns = min(count, most)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH * 0.7, 1.3 + height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=False, sharey=True, squeeze=False).flatten().tolist()
    for ax in panels[count:]:
        ax.set_visible(False)
    return figure, panels[:count]


def _first_of_rows(panels: Sequence[Axes], label: str) -> None:
    for ax in panels:
        place = ax.get_subplotspec()
        if place is not None and place.is_first_col():
            ax.set_ylabel(label)


def _reference(ax: Axes, level: float, style: Any, text: str) -> None:
    """A grey line at a level, with its name on it: below where it lies high, above where it lies low."""
    ax.axhline(level, color=GREY, linewidth=1.1, linestyle=style)
    high = level > 50
    place: dict[str, Any] = {"textcoords": "offset points", "xytext": (-2, -3 if high else 3)}
    place["va"] = "top" if high else "bottom"
    ax.annotate(
        text, (1, level), xycoords=("axes fraction", "data"), ha="right", color="#555555", fontsize=8.5, **place
    )


def _looks(count: int) -> list[tuple[str, str]]:
    """Colour and line style of each run."""
    return [(COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]) for i in range(count)]


def _run_handles(runs: dict[str, Any]) -> list[Any]:
    return [_line(colour, style, name) for name, (colour, style) in zip(runs, _looks(len(runs)), strict=True)]


def _line(colour: str, style: Any, label: str, marker: str = "") -> Any:
    return Line2D([], [], color=colour, linestyle=style, label=label, marker=marker)


def _marker(points: Sequence[Any]) -> str:
    """Dots where there are few."""
    return "o" if len(points) <= 12 else ""


def _legend(figure: Figure, handles: list[Any], columns: int) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def _whole_epochs(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
