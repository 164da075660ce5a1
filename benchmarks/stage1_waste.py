"""Passes that stage 1 makes twice on an object store, where there are no claims: a simulation of the program's own `Walk`s.

    python -m benchmarks.stage1_waste [--runs N]

Workers whose speeds differ evenly by up to `spread` each way take what `cskd.pipeline.passes.Walk` gives them, on a cache whose
missing units are a table in memory. Only time is simulated: a pass takes 1 of a mean worker, 5 % more or less, a worker looks
whether it is there right before, and its record comes 0.2 later, when the next pass has begun. Workers that wait do so for
`unit_line.WAIT` passes. Nothing ran on a real cloud. A minute. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from cskd.machine.launch import Worker
from cskd.pipeline.passes import Pass, Passes, Walk
from cskd.pipeline.unit_line import WAIT

CASES = ((2, 471), (8, 471), (8, 1000), (64, 2000), (8, 15_700), (64, 15_700))  # workers, passes
SPREADS = (0.1, 0.33)
LATE = 0.2  # of a pass: between its last forward and its record


class Waste(NamedTuple):
    """twice: passes a worker, that another had made; seconds: until all were there, by those of workers who never wait or
    waste; looks: lists of all records a worker."""

    twice: float
    seconds: float
    looks: float


class Missing:
    """A cache of one view a pass, as far as `missing_passes` looks at it."""

    def __init__(self, passes: int) -> None:
        self.blocks, self.views, self.looks = 1, passes, 0
        self.recipe, self.storage = SimpleNamespace(mix_group=1), None
        self.left = set(range(passes))

    def missing(self) -> list[tuple[int, int]]:
        self.looks += 1
        return [(0, view) for view in self.left]


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
    events: list[tuple[float, int, int]] = [(draw.uniform(0, LATE), i, -1) for i in here]  # when, who, a record or none
    heapq.heapify(events)
    twice, last = 0, 0.0
    while events and cache.left:
        now, i, view = heapq.heappop(events)
        if view >= 0:
            if view in cache.left:
                cache.left.remove(view)
                last = now
            else:
                twice, ahead[i] = twice + 1, iter(())
            continue
        coming = next(ahead[i], None)
        if coming is None or coming[1][0] not in cache.left:
            found: Passes | None = walks[i].following()
            if not found:
                heapq.heappush(events, (now + WAIT * speed[i], i, -1))
                continue
            ahead[i] = iter(found)
            coming = next(ahead[i])
        then = now + speed[i] * draw.uniform(0.95, 1.05)
        heapq.heappush(events, (then + LATE, i, coming[1][0]))
        heapq.heappush(events, (then, i, -1))
    ideal = passes / sum(1 / s for s in speed.values())
    return Waste(twice / len(here), last / ideal, cache.looks / len(here))


def table(runs: int) -> dict[str, list[float]]:
    """Print the table. Returns: the figures by case."""
    print("| workers | passes | speeds differ by | told how many: made twice a worker, time | not told |")
    print("|" + "---|" * 5)
    figures = {}
    for workers, passes in CASES:
        for spread in SPREADS:
            cells = []
            for known in (True, False):
                found = [simulated(workers, passes, known, spread, seed) for seed in range(runs)]
                twice, seconds, looks = (sum(column) / runs for column in zip(*found, strict=True))
                cells.append(f"{twice:.2f} ({100 * twice * workers / passes:.2f} % of the work), {seconds:.3f}")
                case = f"{workers}/{passes}/{spread}/{'told' if known else 'not'}"
                figures[case] = [round(x, 3) for x in (twice, seconds, looks)]
            print(f"| {workers} | {passes:,} | {100 * spread:.0f} % | {cells[0]} | {cells[1]} |", flush=True)
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
