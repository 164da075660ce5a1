"""`results.png` of a run: losses, top-1 of every head, learning rate and blend by epoch, from the rows of metrics alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cskd.pipeline.draw.charts import COLOURS, Axis, Line, chart, telling_low
from cskd.pipeline.draw.pictures import Picture, grid, heading

PANEL = (620, 340)  # pixels
BLENDS = Axis(-0.03, 1.03)
AVERAGED = "ema."  # before the head, of a score of the averaged weights
Row = Mapping[str, Any]


def draw_results(rows: Sequence[Row], title: str = "") -> Picture:
    """The charts of a run, two in a line. rows: of `metrics.jsonl`, with `epoch` from 0; what is no finite number is left out,
    and so is a chart without a point. Raises ValueError where no chart is left."""
    score = next((str(row["score"]) for row in reversed(rows) if "score" in row), "")
    names = list(dict.fromkeys(name for row in rows for name in row))
    # A method without a term logs 0 for it.
    losses = [n for n in names if n == "loss" or (n.startswith("loss_") and any(row.get(n) for row in rows))]
    heads = [name for name in names if name.startswith("top1.")]
    bare = list(dict.fromkeys(_head(name) for name in heads))
    colour = {head: COLOURS[i % len(COLOURS)] for i, head in enumerate(sorted(bare, key=lambda h: h != _head(score)))}
    terms = [_line(rows, n, COLOURS[i % len(COLOURS)], _term(n), heavy=n == "loss") for i, n in enumerate(losses)]
    top1 = [
        _line(rows, n, colour[_head(n)], n[len("top1.") :], n.startswith(f"top1.{AVERAGED}"), n == f"top1.{score}")
        for n in heads
    ]
    blends = [
        _line(rows, n, COLOURS[i % len(COLOURS)], n.removeprefix("blend").removeprefix("."))
        for i, n in enumerate(n for n in names if n == "blend" or n.startswith("blend."))
    ]
    charts = [
        ("loss of training, mean over the epoch", terms, Axis(logarithmic=True)),
        ("top-1 on validation images, %", top1, Axis(telling_low([line.y for line in top1]))),
        ("learning rate at the end of the epoch", [_line(rows, "lr", COLOURS[0], "")], Axis(low=0.0)),
        ("blend: share of a cell's own logits in its target", blends, BLENDS),
    ]
    panels = [
        chart(name, lines, y_axis=axis, size=PANEL) for name, lines, axis in charts if any(len(x.y) for x in lines)
    ]
    if not panels:
        raise ValueError("no row has a number to draw")
    lines = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    width = max(sum(p.width for p in line) for line in lines)
    return grid([*([[heading(title, width, 16)]] if title else []), *lines])


def _line(rows: Sequence[Row], column: str, colour: Any, name: str, dashed: bool = False, heavy: bool = False) -> Line:
    found = {int(row["epoch"]) + 1: float(row[column]) for row in rows if _number(row.get(column))}
    x, y = np.array(sorted(found), np.float64), np.array([found[epoch] for epoch in sorted(found)], np.float64)
    return Line(name, x, y, colour, dashed, heavy)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _head(column: str) -> str:
    """The head of a score, or average of heads, whichever weights it is of."""
    return column.removeprefix("top1.").removeprefix(AVERAGED)


def _term(column: str) -> str:
    return "total" if column == "loss" else column.removeprefix("loss_")
