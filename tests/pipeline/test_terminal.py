"""Maps of `cskd inspect` in a terminal: each cell has the colour of its class, on any grid, in any terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from cskd.pipeline.draw.pictures import CLASS_COLOURS, OTHER
from cskd.pipeline.look.inspection import (
    ClassFacts,
    EpochAgreement,
    MixingFacts,
    SampleFacts,
    StudentCells,
    StudentFacts,
)
from cskd.pipeline.look.terminal import MAPS, render_samples, render_student, shows_colours

MAP_START, MAP_STOP = "targets at blend", "cells"
BACKGROUND = re.compile(r"\x1b\[([\d;]*)m([^\x1b]*)")
NAMES = [f"class {i}" for i in range(14)]


def sample(h: int, w: int, student: bool = False, classes: int = 14) -> SampleFacts:
    """A view whose cells have classes in turn, all at full brightness where they have not the image's class."""
    cells = [[NAMES[(i * w + j) % classes] for j in range(w)] for i in range(h)]
    colours = ["#{:02x}{:02x}{:02x}".format(*(CLASS_COLOURS[i] if i < 11 else OTHER)) for i in range(14)]
    share = {name: float(np.mean([c == name for row in cells for c in row])) for name in NAMES[:classes]}
    facts = [
        ClassFacts(
            name,
            name,
            "ABCDEFGHIJK"[i : i + 1],
            colours[i],
            ["image"] if i == 0 else [],
            share[name],
            0.0 if student else None,
        )
        for i, name in enumerate(NAMES[:classes])
    ]
    said = StudentCells([row[::-1] for row in cells], [[0.5] * w for _ in range(h)], 0.25) if student else None
    return SampleFacts(
        sample=3,
        key="key/3",
        view=0,
        seed="0" * 16,
        label=NAMES[0],
        mixing=MixingFacts("unmixed", 1.0),
        replay="equal",
        codec="envelope",
        blend=0.5,
        image_class=NAMES[0],
        cells=cells,
        margin=[[float(c == NAMES[0]) for c in row] for row in cells],
        classes=facts,
        student=said,
    )


def shown(*samples: SampleFacts, **options: Any) -> str:
    out = io.StringIO()
    render_samples(samples, Console(file=out, **{"width": 80, "_environ": {}, **options}))
    return out.getvalue()


COLOURED: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor"}


def painted(line: str) -> list[tuple[int, ...]]:
    """The colours of the columns of a line: of both halves of a column where it is divided."""
    found: list[tuple[int, ...]] = []
    for codes, text in BACKGROUND.findall(line):
        ground = re.search(r"48;2;(\d+);(\d+);(\d+)", codes)
        ink = re.search(r"38;2;(\d+);(\d+);(\d+)", codes)
        one = ink if "▀" in text else ground
        if one is not None:
            found += [tuple(map(int, one.groups()))] * cell_len(text)
    return found


def rgb(name: str, facts: SampleFacts) -> tuple[int, ...]:
    return tuple(bytes.fromhex(next(c.colour for c in facts.classes if c.name == name)[1:]))


@pytest.mark.parametrize(
    ("h", "w", "width", "cell"),
    [
        (1, 1, 40, (6, 3)),
        (2, 3, 40, (6, 3)),
        (7, 7, 40, (4, 2)),
        (7, 7, 24, (2, 1)),
        (9, 2, 40, (4, 2)),
        (14, 14, 40, (2, 1)),
        (3, 19, 40, (2, 1)),
        (24, 24, 40, (1, 0)),
        (7, 30, 40, (1, 0)),
        (1, 38, 40, (1, 0)),
    ],
)
def test_each_cell_has_the_colour_of_its_class_and_fits(h: int, w: int, width: int, cell: tuple[int, int]) -> None:
    facts = sample(h, w)
    lines = shown(facts, width=width, **COLOURED).splitlines()
    rows = [painted(line) for line in lines]
    wide, high = cell
    rows = [row for row in rows if len(row) == wide * w][: high * h or -(-h // 2)]
    assert len(rows) == (high * h or -(-h // 2))
    for y, row in enumerate(rows):
        i = y // high if high else 2 * y
        assert row == [rgb(c, facts) for c in facts.cells[i] for _ in range(wide)]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines[lines.index(next(x for x in lines if "48;2" in x)) :]]
    assert max(map(cell_len, plain)) <= width
    assert any(c.letter in line for line in plain for c in facts.classes if c.letter) or high == 0


def test_two_maps_stand_next_to_each_other_where_they_fit_and_else_one_below_the_other() -> None:
    facts = sample(7, 7, student=True)
    for width, columns in ((80, 2 * 28), (40, 28)):
        rows = [r for r in map(painted, shown(facts, width=width, **COLOURED).splitlines()) if len(r) >= 28]
        assert {len(row) for row in rows} == {columns} and len(rows) == 14 * (1 if width == 80 else 2)
    assert "student, agrees in 25 %" in shown(facts, **COLOURED)


def test_a_map_that_fits_nowhere_says_what_draws_it() -> None:
    text = shown(sample(3, 60), width=40, **COLOURED)
    assert "3 x 60 cells does not fit 40 columns: --png FILE draws it" in text and "class 1" in text


def test_a_cell_is_darker_where_it_is_as_shown_at_fewer_blends() -> None:
    facts = sample(1, 2, classes=2)
    facts = SampleFacts(**{**facts.__dict__, "margin": [[0.5, 0.75]]})
    row = next(r for r in map(painted, shown(facts, **COLOURED).splitlines()) if len(r) == 12)
    for at, strength in ((0, 0.5), (6, 0.25)):
        assert row[at] == tuple(round(v * (0.5 + 0.5 * strength)) for v in rgb(facts.cells[0][at // 6], facts))


@pytest.mark.parametrize(
    ("options", "colours"),
    [
        (COLOURED, True),
        ({"force_terminal": True, "color_system": "256"}, True),
        ({"force_terminal": True, "color_system": "standard"}, False),
        ({"force_terminal": True, "color_system": "truecolor", "no_color": True}, False),
        ({"force_terminal": True, "color_system": "auto", "_environ": {"TERM": "dumb"}}, False),
        ({"force_terminal": True, "color_system": "auto", "_environ": {"TERM": "xterm-256color"}}, True),
        (
            {"force_terminal": True, "color_system": "auto", "_environ": {"TERM": "xterm-256color", "NO_COLOR": "1"}},
            False,
        ),
        ({}, False),
    ],
)
def test_colours_are_for_terminals_that_have_them(options: dict[str, Any], colours: bool) -> None:
    text = shown(sample(2, 2), **options)
    assert ("\x1b[" in text) == colours == shows_colours(Console(file=io.StringIO(), **{"_environ": {}, **options}))
    assert "cells: class 0 (the image's) 25 %, class 1 25 %" in text or colours


def test_a_narrow_terminal_without_colours_gets_letters_and_a_pipe_names() -> None:
    narrow = shown(sample(14, 14), width=40, force_terminal=True, color_system=None)
    grid = [line for line in narrow.splitlines() if re.fullmatch(r"  (\S )+\S", line)]
    assert len(grid) == 14 and max(map(len, grid)) <= 40 and grid[0].split()[:2] == ["A", "B"] and "·" in grid[0]
    piped = shown(sample(14, 14), width=40)
    assert "class 0   class 1   class 2" in piped


def test_of_many_samples_each_has_a_line() -> None:
    text = shown(*[sample(2, 2, student=True)] * (MAPS + 1))
    lines = text.splitlines()
    assert len(lines) == MAPS + 2 and all("student agrees in 25 %" in line for line in lines[:-1])
    assert "--png" in lines[-1]


def test_a_long_run_has_a_curve_of_some_epochs_the_last_among_them() -> None:
    rows = [EpochAgreement(e, e / 400, 0.1 if e in (30, 300) else None) for e in range(1, 301)]
    facts = StudentFacts("runs/x", "live", 300, 300, [14, 14], 0.75, 16, rows, ["a note"])
    out = io.StringIO()
    render_student(facts, Console(file=out, width=60))
    lines = [line for line in out.getvalue().splitlines() if "#" in line]
    epochs = [int(line.split()[0]) for line in lines]
    assert 12 <= len(epochs) <= 24 and epochs == sorted(epochs) and epochs[-1] == 300 and 30 in epochs
    assert len(lines[-1]) <= 60 and lines[-1].count("#") > 10 * lines[0].count("#")
    assert "(a note)" in out.getvalue() and "75.0 % of the cells of 16 views" in out.getvalue()
