"""Passes that stage 1 makes twice on an object store, where there are no claims: a simulation of the program's own `Walk`s.

    python -m benchmarks.stage1_waste [--runs N]

Workers whose speeds differ evenly by up to `spread` each way take what `cskd.pipeline.passes.Walk` gives them, on a cache whose
missing units are a table in memory. Only time is simulated: a pass takes 1 of a mean worker, 5 % more or less. A worker looks
whether it is there right before, and after each of `passes.LOOKS` parts; one that is given up counts by the parts that were made.
Its record comes 0.2 later, when the next pass has begun. Workers that wait do so for `unit_line.WAIT` passes. Nothing ran on a
real cloud. Three minutes. Prints a table (passes made twice per worker, their share of the work, and the time over that of
workers who never wait or waste), and one JSON line last.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from cskd.machine.launch import Worker
from cskd.pipeline.passes import LOOKS, Pass, Passes, Walk
from cskd.pipeline.unit_line import WAIT

CASES = ((2, 471), (8, 471), (8, 1000), (64, 2000), (8, 15_700), (64, 15_700))  # workers, passes
SPREADS = (0.1, 0.33)
LATE = 0.2  # of a pass: between its last forward and its record


class Waste(NamedTuple):
    """twice: passes per worker that another had made, those given up in part; seconds: until all were there, by those of workers
    who never wait or waste; lists: of all records, per worker; looks: requests for one record, per worker and pass of its share."""

    twice: float
    seconds: float
    lists: float
    looks: float


class Missing:
    """A cache of one view a pass, as far as `missing_passes` looks at it."""

    def __init__(self, passes: int) -> None:
        self.blocks, self.views, self.lists, self.looks = 1, passes, 0, 0
        self.recipe, self.storage = SimpleNamespace(mix_group=1), None
        self.left = set(range(passes))

    def missing(self) -> list[tuple[int, int]]:
        self.lists += 1
        return [(0, view) for view in self.left]

    def lacks(self, view: int) -> bool:
        self.looks += 1
        return view in self.left


def simulated(workers: int, passes: int, known: bool, spread: float, seed: int = 0, absent: int = 0) -> Waste:
    """known: whether the workers are told how many they are. absent: so many of them never come."""
    draw, cache = random.Random(seed), Missing(passes)
    of_cache: Any = cache
    here = range(absent, workers)
    walks = {i: Walk(of_cache, Worker(i, workers if known else 0)) for i in here}
    for i, walk in walks.items():
        walk._rng = np.random.default_rng([seed, i])
    speed = {i: draw.uniform(1 - spread, 1 + spread) for i in here}
    ahead: dict[int, Iterator[Pass]] = {i: iter(()) for i in here}
    events, order = list[tuple[float, int, Iterator[float]]](), itertools.count()
    now = twice = last = 0.0

    def work(i: int) -> Iterator[float]:
        """What a worker does, with the time of each part of it."""
        nonlocal twice
        yield draw.uniform(0, LATE)
        while cache.left:
            coming = next(ahead[i], None)
            if coming is None or not cache.lacks(coming[1][0]):
                found: Passes | None = walks[i].following()
                ahead[i] = iter(found or ())
                coming = next(ahead[i], None)
            if coming is None:
                yield WAIT * speed[i]
                continue
            view, part = coming[1][0], speed[i] * draw.uniform(0.95, 1.05) / LOOKS
            for done in range(1, LOOKS):
                yield part
                if not cache.lacks(view):
                    twice, ahead[i] = twice + done / LOOKS, iter(())
                    break
            else:
                yield part
                heapq.heappush(events, (now + LATE, next(order), record(i, view)))

    def record(i: int, view: int) -> Iterator[float]:
        """Its writer commits a pass."""
        nonlocal twice, last
        if cache.lacks(view):
            cache.left.remove(view)
            walks[i].made += 1
            last = now
        else:
            twice, ahead[i] = twice + 1, iter(())
        yield from ()

    for i in here:
        heapq.heappush(events, (0.0, next(order), work(i)))
    while events and cache.left:
        now, _, who = heapq.heappop(events)
        if (time := next(who, None)) is not None:
            heapq.heappush(events, (now + time, next(order), who))
    ideal = passes / sum(1 / s for s in speed.values())
    return Waste(twice / len(here), last / ideal, cache.lists / len(here), cache.looks / passes)


def table(runs: int) -> dict[str, list[float]]:
    """Print the table. Returns: the figures by case."""
    print("| workers | passes | speeds differ by | told how many they are | not told |")
    print("|" + "---|" * 5)
    figures = {}
    for workers, passes in CASES:
        for spread in SPREADS:
            cells = []
            for known in (True, False):
                found = [simulated(workers, passes, known, spread, seed) for seed in range(runs)]
                mean = Waste(*(sum(column) / runs for column in zip(*found, strict=True)))
                cells.append(f"{mean.twice:.2f} ({100 * mean.twice * workers / passes:.2f} %), {mean.seconds:.3f}")
                figures[f"{workers}/{passes}/{spread}/{'told' if known else 'not'}"] = [round(x, 3) for x in mean]
            print(f"| {workers} | {passes:,} | {100 * spread:.0f} % | {' | '.join(cells)} |", flush=True)
    return figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="of each case, by other speeds")
    options = parser.parse_args(arguments)
    figures = table(options.runs)
    print(json.dumps({"benchmark": "stage1_waste", "cases": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
