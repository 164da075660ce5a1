"""What a cache and a training run survive: killed processes, failing writes, damaged and swapped files, racing writers.

    python -m benchmarks.faults [--quick] [--only PART ...] [--tally FILE]

    kills        kill -9 of stage 1 with workers at random moments, then the same call again: an undisturbed run's content
    deaths       death, EIO and ENOSPC at every call that changes the disk while a unit, or a new cache's frame, is made
    flips        single bits, over every kind of file of a cache: found by `verify`, the unit named; some of them repaired
    truncations  files cut short
    swaps        valid files exchanged between units, views and caches
    images       single bits of images in the shards
    races        four processes on one unit: one record counts, and the content is that of one process
    training     kill -9 of training at random moments, some twice in an epoch: the weights of an undisturbed run
    cli_kills    kill -9 of the real command line, with worker processes, then the same command again
    cli_damage   damaged and lost files: the real `cskd verify` and `cskd repair`
    cli_races    four processes of the real command line on one unit
    hostile      inputs that were made to hurt (benchmarks/hostile/)

Made on tiny images, in forked children of this process where the real command line is not named. `--tally FILE` adds this
run's counts to those of earlier ones, and `--scale 0.1` makes a tenth of the full counts, so that they can be split over
several runs. Prints one JSON line last. Exits 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.children import in_child
from benchmarks.faults.bench import Bench
from benchmarks.faults.damage import flips, images, swaps, truncations
from benchmarks.faults.kills import cli_damage, cli_kills, cli_races, kills, races, training
from benchmarks.faults.points import deaths


def hostile(bench: Bench, count: int) -> Counter[str]:
    from benchmarks.hostile.run import run

    return run(count, bench.rng.randrange(2**32), bench.folder / "hostile")


# part -> what makes it, its full and its quick count
PARTS: dict[str, tuple[Callable[[Bench, int], Counter[str]], int, int]] = {
    "kills": (kills, 300, 6),
    "deaths": (deaths, 10_000, 8),  # more than there are: all of them
    "flips": (flips, 10_000, 75),
    "truncations": (truncations, 1_000, 20),
    "swaps": (swaps, 200, 12),
    "images": (images, 1_000, 10),
    "races": (races, 100, 4),
    "training": (training, 50, 3),
    "cli_kills": (cli_kills, 30, 0),
    "cli_damage": (cli_damage, 20, 0),
    "cli_races": (cli_races, 10, 0),
    "hostile": (hostile, 20_000, 300),
}
# In the last line, if only as 0
ALWAYS = ("kills", "kills_wrong", "flips", "flips_missed", "hostile", "hostile_failed")
WRONG = ("_wrong", "_missed", "_failed")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small counts, under a minute")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts")
    parser.add_argument("--scale", type=float, default=1.0, help="this share of the full counts")
    parser.add_argument("--tally", type=Path, help="JSON file that counts are added to")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and places; default: the clock")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else time.time_ns()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread; seed {seed}"
    )
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), random.Random(seed))
        for name, (part, full, quick) in PARTS.items():
            count = quick if options.quick else round(full * options.scale)
            if count == 0 or (options.only and name not in options.only):
                continue
            clock, before = time.perf_counter(), cpu_seconds()
            counts = in_turn(bench, part, count)
            took = f"{time.perf_counter() - clock:.0f} s ({cpu_seconds() - before:.0f} s CPU)"
            print(f"{name:<12}{took:>18}  " + "  ".join(f"{k} {n}" for k, n in sorted(counts.items())), flush=True)
            total.update(counts)
            if options.tally:
                add_to(options.tally, counts)
    if options.tally:
        total = Counter(json.loads(options.tally.read_text()))
    wrong = sum(n for name, n in total.items() if name.endswith(WRONG))
    print(
        json.dumps({"benchmark": "faults", "wrong": wrong, **dict.fromkeys(ALWAYS, 0), **dict(sorted(total.items()))})
    )
    return int(wrong > 0)


def cpu_seconds() -> float:
    """Of the children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_turn(bench: Bench, part: Callable[[Bench, int], Counter[str]], count: int) -> Counter[str]:
    """One part, in a child, so that no thread it starts is there when the next one forks."""
    state = bench.rng.randrange(2**32)

    def run() -> dict[str, int]:
        bench.rng.seed(state)
        return {name: int(n) for name, n in part(bench, count).items()}

    status, answer = in_child(run)
    if answer is None or "value" not in answer:
        raise RuntimeError(f"{part.__name__} ended with {status}, {answer}")
    return Counter(answer["value"])


def add_to(tally: Path, counts: Counter[str]) -> None:
    """After every part, so that a run that is cut keeps what it has."""
    earlier = Counter(json.loads(tally.read_text()) if tally.exists() else {})
    earlier.update(counts)
    tally.write_text(json.dumps(earlier, indent=1, sort_keys=True) + "\n")
