"""Hostile inputs: whatever a file holds, the program reads it or refuses it in one line. Nothing hangs, grows or escapes.

    python -m benchmarks.hostile [--count N] [--only KIND ...] [--seed S] [--tally FILE] [--no-curated] [--no-cli]

Curated ones (`curated_*.py`), each with what must come of it, some through the real command line; and
mutations of valid small files of every kind that cskd reads (`mutations.py`), by the code that the commands
use. A reading fails the program when it raises anything but a CskdError or an OSError of one line, takes over 10 s, needs over
2 GB more than before, changes a file outside its own folder, or where its counts do not add up. Forked children do the reading, so
that a crash of a C library is seen as one; 2 GB are also the most that they can get of the system.

Prints one JSON line last: `hostile` (inputs read), `hostile_failed`, `curated`, `curated_failed`. Exits 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.children import end_child, start_child
from benchmarks.hostile.base import Case, make_base
from benchmarks.hostile.cli import cli_cases
from benchmarks.hostile.curated_data import data_cases
from benchmarks.hostile.curated_images import image_cases
from benchmarks.hostile.curated_inventory import column_cases, inventory_cases
from benchmarks.hostile.curated_state import state_cases
from benchmarks.hostile.curated_text import text_cases
from benchmarks.hostile.mutations import Kind, drop_own, make_kinds
from cskd.errors import CskdError

LIMIT_SECONDS, LIMIT_MB, BATCH = 10, 2048, 200
CANARY = "the canary lives"
FULL, SAMPLED = 5000, 10  # mutated inputs from which on all curated ones are read; one in so many of them before
Counts = Counter[str]


class Hung(BaseException):
    """A reading took longer than LIMIT_SECONDS."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="mutated inputs in all")
    parser.add_argument("--only", nargs="+", help="these kinds, and curated inputs whose name begins so")
    parser.add_argument("--seed", type=int, default=None, help="default: the clock")
    parser.add_argument("--tally", type=Path, help="JSON file that counts are added to")
    parser.add_argument("--no-curated", action="store_true")
    parser.add_argument(
        "--no-cli", action="store_true", help="none through the real command line, which takes seconds each"
    )
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else time.time_ns()
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        total = run(
            options.count,
            seed,
            Path(folder) / "hostile",
            only=options.only,
            with_curated=not options.no_curated,
            with_cli=not options.no_cli,
            show=True,
        )
    seconds = time.perf_counter() - clock
    if options.tally:
        total += Counter(json.loads(options.tally.read_text()) if options.tally.exists() else {})
        options.tally.write_text(json.dumps(total) + "\n")
    zero = {"hostile": 0, "hostile_failed": 0, "curated": 0, "curated_failed": 0}
    machine = f"{os.cpu_count()} CPUs, {resource.getpagesize() * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    print(
        json.dumps(
            {"benchmark": "hostile", "machine": machine, "seed": seed, "seconds": round(seconds), **zero, **total}
        )
    )
    return int(total["hostile_failed"] > 0)


def run(
    count: int,
    seed: int,
    folder: Path,
    only: list[str] | None = None,
    with_curated: bool = True,
    with_cli: bool | None = None,
    show: bool = False,
) -> Counter[str]:
    """Read the curated inputs and `count` mutated ones; `folder` must not exist yet and is removed.

    Where `count` is small, but not 0, one in SAMPLED of the curated inputs.

    Args:    only: kinds, and beginnings of names of curated ones. with_cli: default, only where `count` is FULL or more.
    Returns: hostile (all inputs read), hostile_failed, curated, curated_failed.
    """
    torch.set_num_threads(1)  # a thread that lives while this process is forked would leave its locks held
    total: Counter[str] = Counter()
    base = make_base(folder / "valid")
    (folder / "canary").write_text(CANARY)
    try:
        if with_curated:
            cases = image_cases() + data_cases(base) + text_cases(base) + state_cases(base)
            cases += inventory_cases(base) + column_cases(base)
            cases = cases if only or count >= FULL or not count else cases[::SAMPLED]
            cases += cli_cases(base) if (count >= FULL if with_cli is None else with_cli) else []
            for case in cases:
                if only and not case.name.startswith(tuple(only)):
                    continue
                failed = in_child(partial(run_case, case, folder), folder, case.name)
                total += Counter(curated=1, curated_failed=failed["failed"])
            if show:
                print(f"{'curated':<18}inputs {total['curated']}  failed {total['curated_failed']}", flush=True)
        kinds = {name: kind for name, kind in make_kinds(base).items() if not only or name in only}
        for name, kind in kinds.items() if count else ():
            counts = run_kind(name, kind, -(-count // len(kinds)), seed, folder)
            if show:
                print(f"{name:<18}" + "  ".join(f"{k} {n}" for k, n in sorted(counts.items())), flush=True)
            total["hostile"] += counts["read"] + counts["refused"] + counts["failed"]
            total["hostile_failed"] += counts["failed"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    total["hostile"] += total["curated"]
    total["hostile_failed"] += total["curated_failed"]
    return total


def run_kind(name: str, kind: Kind, count: int, seed: int, folder: Path) -> Counts:
    """Read `count` mutations of a kind in children; what they counted, and one failure for each that died."""
    counts: Counter[str] = Counter()
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        counts += in_child(partial(read_batch, name, kind, numbers, seed, folder), folder, f"{name} {first} of {seed}")
    return counts


def in_child(function: Callable[[], Counts], folder: Path, what: str) -> Counts:
    """What `function` counts in a forked child that can get 2 GB more than it has; one failure where it died."""

    def limited() -> Counts:
        pages = Path("/proc/self/statm").read_text().split()
        most = int(pages[0]) * resource.getpagesize() + (LIMIT_MB << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.signal(signal.SIGALRM, _hung)
        before = int(pages[1]) * resource.getpagesize() >> 10
        found = function()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > LIMIT_MB << 10:
            found["failed"] += 1
            print(f"a child grew by {grown >> 10} MB", file=sys.stderr)
        drop_own()
        return found

    child = start_child(limited)
    status, answer = end_child(child)
    found = (answer or {}).get("value")
    if found is None:
        print(f"{what}: a child died with {status}, {answer}", file=sys.stderr)
    for left in folder.glob(f"*-{child[0]}"):
        shutil.rmtree(left, ignore_errors=True)
    return Counter(failed=1) if found is None else Counter(found)


def read_batch(name: str, kind: Kind, numbers: range, seed: int, folder: Path) -> Counts:
    counts: Counter[str] = Counter()
    for i in numbers:
        rng = random.Random(f"{seed} {name} {i}")
        data = kind.change(rng.choice(kind.valid), rng)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            counts[_read(f"{name} {i} of seed {seed}", lambda: kind.read(Path(work), data))] += 1  # noqa: B023
        if not _canary_lives(folder):
            counts["failed"] += 1
            print(f"{name} {i} of seed {seed}: the canary was changed", file=sys.stderr)
    return counts


def run_case(case: Case, folder: Path) -> Counts:
    """Make one curated input, read it, and compare with what must come of it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        case.make(work)
        before = _snapshot(work, case.writes), sorted(p.name for p in folder.iterdir())
        outcome = _read(f"curated {case.name}", lambda: case.read(work), case.seconds or LIMIT_SECONDS)
        after = _snapshot(work, case.writes), sorted(p.name for p in folder.iterdir())
        if before != after:
            outcome = "failed"
            print(f"curated {case.name}: changed {before[1]} {_difference(before[0], after[0])}", file=sys.stderr)
    if outcome in ("read", "refused") and case.expected not in ("either", outcome):
        print(f"curated {case.name}: {outcome}, expected {case.expected}", file=sys.stderr)
        outcome = "failed"
    if not _canary_lives(folder):
        outcome = "failed"
        print(f"curated {case.name}: the canary was changed", file=sys.stderr)
    return Counter({outcome: 1})


def _read(what: str, read: Callable[[], object], seconds: int | None = None) -> str:
    """read, refused or failed."""
    clock, seconds = time.perf_counter(), seconds or LIMIT_SECONDS
    signal.alarm(seconds)
    try:
        read()
        outcome = "read"
    except (CskdError, OSError) as e:
        outcome = "refused" if str(e) and "\n" not in str(e) else "failed"
        if outcome == "failed":
            print(f"{what}: not one line: {e!r}", file=sys.stderr)
    except BaseException:
        outcome = "failed"
        print(f"{what}:\n{traceback.format_exc(limit=-4)}", file=sys.stderr)
    finally:
        signal.alarm(0)
    if time.perf_counter() - clock > seconds:
        outcome = "failed"
        print(f"{what}: took over {seconds} s", file=sys.stderr)
    return outcome


def _hung(signum: int, frame: object) -> None:
    raise Hung(f"over {LIMIT_SECONDS} s")


def _canary_lives(folder: Path) -> bool:
    if (folder / "canary").read_text() == CANARY:
        return True
    (folder / "canary").write_text(CANARY)
    return False


def _snapshot(work: Path, writes: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Size and time of everything in a folder, links not followed, but what the command may write."""
    found = {}
    for path in work.rglob("*"):
        name = str(path.relative_to(work))
        if not name.startswith(writes):
            about = path.lstat()
            found[name] = (about.st_size if not path.is_dir() else 0, about.st_mtime_ns if not path.is_dir() else 0)
    return found


def _difference(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))[:5]
