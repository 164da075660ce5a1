"""Progress of long work, on stderr: a bar on a terminal, plain lines at growing intervals elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from cskd.errors import counted, printable

REDRAW_SECONDS = 0.25  # between two drawings of the bar
WINDOW_SECONDS = 60.0  # over which the rate is taken: long enough to be steady, short enough to follow a change
LONGEST_SILENCE = 600.0  # seconds between two plain lines of a run of hours

Shown = str | Callable[[], str]
T = TypeVar("T")


class Progress:
    """How much of `total` is done, how fast, and how long the rest takes.

        with Progress("train", total=50_000, unit="images", start=1_024) as progress:
            progress.update(2_048, loss=lambda: f"{loss.item():.3f}")

    Args:    what, the name of the work; total in `unit`s, 0 where nobody knows it; start, where a resumed run goes on (not counted in the rate);
             quiet, show nothing; every, seconds before the first plain line; console and clock, for tests.
    A field is text, or a function called only when the line is shown, so that a value on a device is rarely waited for.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "images",
        *,
        start: int = 0,
        quiet: bool = False,
        every: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.start = what, total, unit, start
        self._quiet, self._every, self._clock = quiet, every, clock
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None
        self._begun = self._shown = clock()
        self._done = start
        self._recent: deque[tuple[float, int]] = deque([(self._begun, start)])

    def __enter__(self) -> Self:
        self._begun = self._shown = self._clock()
        self._recent = deque([(self._begun, self.start)])
        if not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            # Redrawn by `update` only: no thread next to the work. No markup: names may hold brackets.
            line = TextColumn("{task.fields[line]}", markup=False)
            name = TextColumn("{task.description}", markup=False)
            self._bar = RichProgress(name, BarColumn(20), line, console=self._console, auto_refresh=False)
            self._bar.start()
            self._bar.add_task(self.what, total=self.total or None, completed=self.start, line="")
            self._bar.refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if not self._quiet and kind is None and self._done > self.start:
            seconds = self._clock() - self._begun
            made = self._done - self.start
            self._print(f"{made:,} {self.unit} in {duration(seconds)}, {rate(made, seconds, self.unit)}")

    def update(self, done: int, **fields: Shown) -> None:
        """`done` units of the total are finished; shown when it is time, with `fields` after the figures."""
        self._done = done
        if self._quiet:
            return
        now = self._clock()
        if now - self._recent[-1][0] >= REDRAW_SECONDS:
            self._recent.append((now, done))
            while len(self._recent) > 2 and now - self._recent[1][0] >= WINDOW_SECONDS:
                self._recent.popleft()
        if now - self._shown < (REDRAW_SECONDS if self._bar is not None else self._interval(now)):
            return
        self._shown = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, line=self._line(now, done, fields), refresh=True)
        else:
            self._print(self._line(now, done, fields))

    def say(self, text: str) -> None:
        """A line of its own, which stays: what was reached, not how far the work is."""
        if not self._quiet:
            self._print(text)

    def _interval(self, now: float) -> float:
        """Seconds between plain lines: a tenth of the time so far, so that a log of days stays readable."""
        return max(self._every, min(LONGEST_SILENCE, 0.1 * (now - self._begun)))

    def _line(self, now: float, done: int, fields: Mapping[str, Shown]) -> str:
        seconds, made = now - self._recent[0][0], done - self._recent[0][1]
        whole = f" of {self.total:,} {self.unit} ({done / self.total:.0%})" if self.total else f" {self.unit}"
        parts = [f"{done:,}{whole}", rate(made, seconds, self.unit)]
        if made > 0 and done < self.total:
            parts.append(f"{duration((self.total - done) * seconds / made)} left")
        parts += [f"{name} {value if isinstance(value, str) else value()}" for name, value in fields.items()]
        return ", ".join(parts)

    def _print(self, text: str) -> None:
        self._console.print(f"{self.what}: {text}", markup=False, highlight=False, soft_wrap=True)


def say(notes: Iterable[str], quiet: bool = False, console: Console | None = None) -> None:
    """Print on stderr, at once, what a user should know before long work begins: one line each."""
    console = console or Console(stderr=True)
    for note in () if quiet else notes:
        console.print(f"note: {printable(note)}", markup=False, highlight=False, soft_wrap=True)


def print_lines(console: Console, *lines: str) -> None:
    """A report for people: each line as it is, whatever names from other people's files are in it."""
    for line in lines:
        console.print(escape(printable(line)), soft_wrap=True)


class Notes:
    """What a user should know, each line once; kept for the report in `all`, and said when what can be refused at once was."""

    def __init__(self, quiet: bool = False) -> None:
        self.all: list[str] = []
        self.quiet, self._said = quiet, 0

    def add(self, notes: Iterable[str]) -> None:
        """Those of them that are new."""
        self.all += [note for note in dict.fromkeys(notes) if note not in self.all]

    def say(self) -> None:
        """Before long work: print what was not said yet."""
        say(self.all[self._said :], self.quiet)
        self._said = len(self.all)


NOTHING_TO_DECODE = {"decode": "shards packed with `cskd pack --raw` leave nothing to decode"}


@dataclass(frozen=True)
class Pool:
    """Parts of the work that the same `workers` threads or processes do in turn; seconds of each, summed over them all."""

    workers: int
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, workers: int, seconds: Mapping[str, float], *parts: str) -> Self:
        """Of all seconds those of some parts."""
        return cls(workers, {part: seconds[part] for part in parts})

    @property
    def busy(self) -> float:
        """Seconds that each of the workers was at work."""
        return sum(self.seconds.values()) / self.workers


def bound_by(
    pools: Sequence[Pool],
    elapsed: float,
    units: int,
    unit: str = "images",
    *,
    cores: bool = False,
    queued: bool = False,
    relief: Mapping[str, str] = NOTHING_TO_DECODE,
) -> str:
    """Which part of the work holds up the rest, in one line, and how many units per second each part alone would do.

    The pools work side by side, so that the busiest one decides; of its parts the longest is named. Batches that overlap add
    up to more seconds than have passed: busy is at most all of these.

    bound_by([Pool(2, {"decode": 0.8, "augment": 0.4}), Pool(1, {"teacher": 1.2, "encode": 0.1})], 1.5, 600)
    -> 'bound by teacher (busy 1.3 s of 1.5 s): teacher 500 images/s · decode 1,500 images/s · augment 3,000 images/s · ...'

    cores: say too how many the first pool, the loader, needs to keep up with the busiest other one, and what relieves it
    of the part that is named, where it holds up the rest. queued: that one's seconds
    are those in which its work was handed to a device, all of them only where the device holds the work up.
    """
    parts = [(s / pool.workers, name) for pool in pools for name, s in pool.seconds.items() if s > 0]
    if not parts:
        return "bound by nothing: no time was spent"
    pool = max(pools, key=lambda p: p.busy)
    longest = max(pool.seconds, key=lambda name: pool.seconds[name])
    each = " · ".join(f"{name} {rate(units, s, unit)}" for s, name in sorted(parts, reverse=True))
    line = f"bound by {longest} (busy {duration(min(pool.busy, elapsed))} of {duration(elapsed)}): {each}"
    if not cores or len(pools) < 2 or not (rest := max(p.busy for p in pools[1:])):
        return line
    needed, at_most = sum(pools[0].seconds.values()) / rest, " at most" if queued and pool is pools[0] else ""
    cores_needed, had = counted(max(1, math.ceil(needed)), "core"), counted(pools[0].workers, "worker")
    less = f"; {relief[longest]}" if pool is pools[0] and longest in relief else ""
    return f"{line}; to keep up, the loader needs {cores_needed}{at_most}, it had {had}{less}"


def timed_start(results: Iterator[T], seconds: dict[str, float]) -> Iterator[T]:
    """The results as they come; how long the first took, with the start of whoever makes them, goes to `seconds`."""
    clock = time.perf_counter()
    for i, result in enumerate(results):
        if i == 0:
            seconds["start"] = time.perf_counter() - clock
        yield result


def duration(seconds: float) -> str:
    """Seconds as people say them, two units at most: '0.8 s', '1 min 3 s', '2 h 5 min', '3 d 4 h'."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // small} {small_name}"
    return f"{whole} s"


def rate(count: int, seconds: float, unit: str) -> str:
    """So many in so long, as people say it: '1,500 images/s', '0.38 images/s'."""
    each = count / seconds if seconds > 0 else 0.0
    return f"{each:,.0f} {unit}/s" if each >= 10 or each == 0 else f"{each:.2f} {unit}/s"
