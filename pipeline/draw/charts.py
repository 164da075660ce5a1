"""Line charts: each line is named at its right end, so that no legend has to be matched by colour.

Shapes: N points of a line. Drawn at `SCALE` times the size and reduced, which smooths edges and text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cskd.pipeline.draw.pictures import CLASS_COLOURS, FAINT, INK, PAPER, Paint, Picture, cut, font

SCALE = 2
COLOURS: tuple[Paint, ...] = (INK, *(CLASS_COLOURS[i] for i in (2, 0, 1, 5, 3, 4)))  # yellow is too faint for a line
GRID: Paint = (228, 228, 230)
MARKED = 30  # points, up to which each has a dot
DECADES = 50.0  # from the smallest to the largest number, beyond which the axis is logarithmic
_LETTER = 11  # pixels
_TITLE = 14
_LEAST_LETTER = 8  # of names where there are many lines


@dataclass(frozen=True, eq=False)
class Line:
    """Numbers y over x, float [N] each, in the order of x. low, high: float [N], a band around them."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    colour: Paint
    dashed: bool = False
    heavy: bool = False
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Axis:
    """What is drawn of the y axis; None: as the lines need it, and points below `low` are left out. logarithmic: where they span
    more than `DECADES`."""

    low: float | None = None
    high: float | None = None
    logarithmic: bool = False


def chart(
    title: str,
    lines: Sequence[Line],
    x_name: str = "epoch",
    y_axis: Axis = Axis(),
    levels: Sequence[tuple[str, float]] = (),
    size: tuple[int, int] = (620, 340),
) -> Picture:
    """A chart, RGB of `size` (width, height) pixels. x: whole numbers. levels: names and heights of dashed lines across.

    Lines without a point are left out; raises ValueError where there is none with one, or a number is not finite.
    """
    drawn = [line for line in lines if len(line.y)]
    if not drawn:
        raise ValueError(f"the chart {title!r} has no points")
    width, height = (SCALE * side for side in size)
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture, "RGBA")
    scale = _Scale(drawn, [value for _, value in levels], y_axis)
    ticks = scale.ticks(max(2, size[1] // 55))
    texts = _texts(ticks)
    face, title_face = font(SCALE * _LETTER), font(SCALE * _TITLE)
    names = [(f"{name} {_short(value)}", value, FAINT) for name, value in levels]
    names += [(f"{line.name} {_short(float(line.y[-1]))}", float(line.y[-1]), line.colour) for line in drawn]
    top, bottom = SCALE * 34, height - SCALE * 40
    letter = max(_LEAST_LETTER, min(_LETTER, int((bottom - top) / SCALE / len(names) / 1.25)))
    small = font(SCALE * letter)
    widest = min(int(max(small.getlength(text) for text, *_ in names)) + 1, width // 3)
    left = SCALE * 12 + int(max(face.getlength(text) for text in texts))
    right = width - widest - SCALE * 18
    place = _Place(scale, (left, top, right, bottom))

    draw.text((SCALE * 4, SCALE * 6), cut(title, title_face, width - SCALE * 8), INK, title_face)
    for tick, text in zip(ticks, texts, strict=True):
        y = place.y(tick)
        draw.line([(left, y), (right, y)], GRID, SCALE)
        draw.text((left - SCALE * 6, y), text, FAINT, face, anchor="rm")
    draw.line([(left, bottom), (right, bottom)], FAINT, SCALE)
    for x_tick in _whole_ticks(scale.first, scale.last, max(2, (right - left) // (SCALE * 60))):
        x = place.x(x_tick)
        draw.line([(x, bottom), (x, bottom + SCALE * 4)], FAINT, SCALE)
        draw.text((x, bottom + SCALE * 7), f"{x_tick:,}", FAINT, face, anchor="mt")
    draw.text(((left + right) / 2, height - SCALE * 4), x_name, FAINT, face, anchor="mb")
    for _, value in levels:
        _dashes(draw, [(left, place.y(value)), (right, place.y(value))], FAINT, SCALE)
    for line in sorted(drawn, key=lambda one: one.heavy):
        if line.low is not None and line.high is not None:
            on = line.high >= scale.low
            edge = place.points(line.x[on], line.high[on]) + place.points(line.x[on], line.low[on])[::-1]
            if len(edge) > 2:
                draw.polygon(edge, (*line.colour, 45))
        shown = line.y >= scale.low
        points, thick = place.points(line.x[shown], line.y[shown]), SCALE * (3 if line.heavy else 2) - 1
        if line.dashed:
            _dashes(draw, points, line.colour, thick)
        elif len(points) > 1:
            draw.line(points, line.colour, thick, joint="curve")
        for x, y in points if len(points) <= MARKED else ():
            r = SCALE * (3.2 if line.heavy else 2.4)
            draw.ellipse((x - r, y - r, x + r, y + r), PAPER if line.dashed else line.colour, line.colour, SCALE)
    step = int(letter * SCALE * 1.2)
    for (text, value, colour), y in zip(
        names, _apart([place.y(v) for _, v, _ in names], step, top, bottom), strict=True
    ):
        if abs(y - place.y(value)) > SCALE * 2:  # moved: a thin line leads to it
            draw.line([(right + SCALE * 2, place.y(value)), (right + SCALE * 9, y)], (*colour, 120), SCALE)
        draw.text((right + SCALE * 11, y), cut(text, small, widest), _readable(colour), small, anchor="lm")
    return picture.reduce(SCALE)


def telling_low(lines: Sequence[NDArray[np.float64]]) -> float | None:
    """Where an axis of per cents begins: the first evaluations are far below what tells the lines apart. None: without a line.

    lines: float [N] each, by epoch.
    """
    lowest = [float(line[len(line) // 3 :].min()) for line in lines if len(line)]
    return max(0.0, 5.0 * math.floor(min(lowest) / 5) - 5) if lowest else None


class _Scale:
    """The ranges of both axes."""

    def __init__(self, lines: Sequence[Line], levels: Sequence[float], axis: Axis) -> None:
        every = [np.asarray(levels, np.float64)]
        for line in lines:
            every += [part for part in (line.y, line.low, line.high) if part is not None]
        values = np.concatenate(every)
        xs = np.concatenate([line.x for line in lines])
        if not (np.isfinite(values).all() and np.isfinite(xs).all()):
            raise ValueError("a number of the chart is not finite")
        self.first, self.last = int(xs.min()), int(xs.max())
        low, high = float(values.min()), float(values.max())
        self.log = axis.logarithmic and low > 0 and high / low > DECADES
        pad = 0.0 if self.log else 0.06 * ((high - low) or abs(high) or 1.0)
        self.low = low - pad if axis.low is None or self.log else axis.low
        self.high = high + pad if axis.high is None or self.log else axis.high
        if low >= 0:
            self.low = max(0.0, self.low)
        if self.low >= self.high:
            self.high = self.low + 1.0

    def share(self, value: float) -> float:
        """0 at the lower end, 1 at the upper one."""
        a, b, v = (math.log(n) for n in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return min(1.0, max(0.0, (v - a) / (b - a)))

    def ticks(self, most: int) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            few = len(decades) <= 3
            found = [m * 10.0**k for k in decades for m in ((1, 2, 5) if few else (1,))]
            return [tick for tick in found if self.low <= tick <= self.high * 1.0001] or [self.low, self.high]
        step = _nice((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Place:
    scale: _Scale
    box: tuple[int, int, int, int]

    def x(self, value: float) -> float:
        left, _, right, _ = self.box
        first, last = self.scale.first, self.scale.last
        if first == last:
            return (left + right) / 2
        inner = SCALE * 8
        return left + inner + (value - first) / (last - first) * (right - left - 2 * inner)

    def y(self, value: float) -> float:
        _, top, _, bottom = self.box
        return bottom - self.scale.share(value) * (bottom - top)

    def points(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[float, float]]:
        return [(self.x(a), self.y(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _whole_ticks(first: int, last: int, most: int) -> list[int]:
    """Whole numbers, at most about `most`: the first one, and multiples of a step that reads well."""
    if last - first + 1 <= most:
        return list(range(first, last + 1))
    step = max(1, round(_nice((last - first) / most)))
    return [first, *(n for n in range(step * (first // step + 1), last + 1, step) if n - first > step // 2)]


def _texts(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many decimals as they need; very small and very large ones as powers."""
    largest = max(abs(tick) for tick in ticks)
    if largest and not 2e-3 <= largest < 1e6:
        return ["0" if tick == 0 else _power(f"{tick:.1e}".replace(".0e", "e")) for tick in ticks]
    texts = [f"{tick:.6f}".rstrip("0").rstrip(".") for tick in ticks]
    decimals = max(len(text.partition(".")[2]) for text in texts)
    logarithmic = len(ticks) > 2 and not math.isclose(ticks[1] - ticks[0], ticks[2] - ticks[1], rel_tol=1e-6)
    return texts if logarithmic else [f"{tick:,.{decimals}f}" for tick in ticks]


def _short(value: float) -> str:
    """A number as a name at a line's end has it: three or four digits."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return _power(f"{value:.2e}")
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _power(text: str) -> str:
    """1e-05 as 1e-5."""
    return text.replace("e-0", "e-").replace("e+0", "e")


def _apart(places: Sequence[float], step: int, top: int, bottom: int) -> list[float]:
    """Heights of names, each as near to its place as fits with `step` pixels from one to the next, in the same order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    step = min(step, (bottom - top) // max(1, len(places) - 1)) if len(places) > 1 else step
    # Neighbours that overlap become one group around the mean of their places, which may meet the next group.
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _start(groups[-1], places, step, top, bottom) < (
            _start(groups[-2], places, step, top, bottom) + step * len(groups[-2])
        ):
            last = groups.pop()
            groups[-1] += last
    found = [0.0] * len(places)
    for group in groups:
        start = _start(group, places, step, top, bottom)
        for n, i in enumerate(group):
            found[i] = start + n * step
    return found


def _start(group: Sequence[int], places: Sequence[float], step: int, top: int, bottom: int) -> float:
    """Height of the first name of a group that is centred on its places, inside of the chart."""
    tall = step * (len(group) - 1)
    middle = sum(places[i] for i in group) / len(group)
    return min(max(middle - tall / 2, top), bottom - tall)


def _readable(colour: Paint) -> Paint:
    """A colour dark enough for text on white."""
    r, g, b = (int(v * 0.8) for v in colour)
    return r, g, b


def _dashes(
    draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: Paint, thick: int, dash: float = SCALE * 6
) -> None:
    """A dashed line along points."""
    gone = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        long = math.hypot(x1 - x0, y1 - y0)
        at = 0.0
        while at < long:
            ahead = min(long, at + dash - gone % dash)
            if int(gone // dash) % 2 == 0:
                a, b = at / long, ahead / long
                draw.line(
                    [(x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))], colour, thick
                )
            gone += ahead - at
            at = ahead + 1e-9
