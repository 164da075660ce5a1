"""Line charts and the results of a run, whatever the number of epochs and columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cskd.pipeline.draw.charts import COLOURS, SCALE, Axis, Line, _apart, _Scale, _texts, _whole_ticks, chart
from cskd.pipeline.draw.results import draw_results

HEADS = ("class", "distillation", "patches", "class+distillation", "all")


def rows(epochs: int, heads: tuple[str, ...] = HEADS, averaged: bool = True) -> list[dict[str, Any]]:
    made = []
    for e in range(epochs):
        row: dict[str, Any] = {"epoch": e, "lr": 1e-3 / (e + 1), "loss": 4.0 / (e + 1), "loss_label": 2.0 / (e + 1)}
        for i, head in enumerate(heads):
            row[f"top1.{head}"] = 50 - 40 / (e + 1) + i
            if averaged:
                row[f"top1.ema.{head}"] = 49 - 40 / (e + 1) + i
        made.append(row | {"blend": 1 - e / epochs, "score": "class", "changed": "text"})
    return made


def ink(picture: Any) -> int:
    return int((np.asarray(picture).min(2) < 250).sum())


@pytest.mark.parametrize(("epochs", "heads"), [(1, HEADS[:1]), (2, HEADS), (300, HEADS)])
def test_results_are_drawn_for_any_number_of_epochs_and_columns(epochs: int, heads: tuple[str, ...]) -> None:
    picture = draw_results(rows(epochs, heads), "title")
    assert picture.size[0] > 1200 and ink(picture) > 3000


def test_a_chart_without_a_number_is_left_out_and_one_row_of_text_is_refused() -> None:
    whole = draw_results(rows(3))
    without = draw_results([{k: v for k, v in row.items() if k not in ("blend", "lr")} for row in rows(3)])
    assert without.height < whole.height
    odd = rows(3)
    odd[1] |= {"loss": float("nan"), "blend": None, "top1.class": "?", "lr": True}
    assert draw_results(odd).size == whole.size
    with pytest.raises(ValueError, match="no row has a number"):
        draw_results([{"epoch": 0, "loss": float("inf"), "score": "class"}])


def test_results_show_the_gap_between_evaluations_as_one_line() -> None:
    """A run that evaluates each fifth epoch has numbers in each fifth row."""
    sparse = [row if e % 5 == 4 else {k: row[k] for k in ("epoch", "lr")} for e, row in enumerate(rows(20))]
    assert ink(draw_results(sparse)) > ink(draw_results([row for row in sparse if row["epoch"] < 5]))


@pytest.mark.parametrize("places", [[10.0, 10.0, 10.0], [0.0, 300.0], [5.0, 6.0, 150.0, 151.0, 152.0], [290.0] * 10])
def test_names_keep_their_order_and_do_not_overlap(places: list[float]) -> None:
    found = _apart(places, 20, 0, 300)
    order = sorted(range(len(places)), key=lambda i: (places[i], found[i]))
    steps = np.diff([found[i] for i in order])
    assert (steps >= 20 - 1e-9).all() and min(found) >= 0 and max(found) <= 300


@pytest.mark.parametrize("span", [(0.0, 1.0), (3.0, 3.0), (0.0, 0.0), (1e-6, 1e-3), (-5.0, 5.0), (0.1, 1e6)])
def test_ticks_lie_on_the_axis_and_read_as_what_they_are(span: tuple[float, float]) -> None:
    line = Line("x", np.array([1.0, 2.0]), np.array(span), COLOURS[0])
    scale = _Scale([line], [], Axis(logarithmic=True))
    ticks = scale.ticks(5)
    assert 2 <= len(ticks) <= 12 and all(scale.low - 1e-9 <= tick <= scale.high * (1 + 1e-3) for tick in ticks)
    assert [float(text.replace(",", "")) for text in _texts(ticks)] == pytest.approx(ticks, rel=0.06, abs=1e-9)


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 2), (1, 300), (7, 1_000_000)])
def test_epochs_on_the_axis_are_whole_and_few(first: int, last: int) -> None:
    ticks = _whole_ticks(first, last, 8)
    assert ticks[0] == first and ticks == sorted(set(ticks)) and len(ticks) <= 12 and ticks[-1] <= last


def test_points_below_the_axis_are_left_out_and_bad_numbers_refused() -> None:
    x = np.arange(1.0, 5.0)
    left = []  # dark pixels where the line from the first to the second epoch is
    for first in (0.0, 46.0):
        low = chart("t", [Line("a", x, np.array([first, 50, 51, 52]), COLOURS[0])], y_axis=Axis(low=45.0))
        left.append(int((np.asarray(low)[40:295, 50:180].max(2) < 80).sum()))
    assert left[0] == 0 < left[1]
    with pytest.raises(ValueError, match="not finite"):
        chart("t", [Line("a", x, np.array([0.0, np.nan, 1, 2]), COLOURS[0])])
    with pytest.raises(ValueError, match="no points"):
        chart("t", [])
    assert low.size == (620, 340) and SCALE > 1
