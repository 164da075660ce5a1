"""What each way to speed up a teacher's forward on a CPU gains: folding, folding with fused activations, torch.compile.

    python -m benchmarks.fold [--rounds R] [--models mobilenetv2_100,resnet50] [--threads T]

Timed: `Teacher.forward_dense` on one batch of 16 images of 224 pixels, random weights, in float32 and, where the processor has
it, in bf16. Sides: plain; fold; fold+fuse (what `teacher.fold: true` does on a CPU); compile; fold+compile. Sides take
turns; a ratio is that of medians, over plain float32. `start` is the seconds until the first batch was done, compiling
included. Prints a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from unittest import mock

import torch

from cskd.config import from_dict
from cskd.machine.arithmetic import half
from cskd.machine.devices import keep_freed_memory
from cskd.teacher.model import Teacher, load_teacher

SIDES: dict[str, dict[str, bool]] = {
    "plain": {"fold": False, "compile": False},
    "fold": {"fold": True, "compile": False},
    "fold+fuse": {"fold": True, "compile": False},
    "compile": {"fold": False, "compile": True},
    "fold+compile": {"fold": True, "compile": True},
}
BATCH, SIDE, CLASSES = 16, 224, [str(i) for i in range(1000)]


@dataclass
class Timed:
    """A teacher, the seconds until its first batch was done, and of each later batch."""

    teacher: Teacher
    start: float
    seconds: list[float] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default="mobilenetv2_100,resnet50,regnety_016,efficientnet_b0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    arithmetic = ["float32"] + (["bf16"] if half("auto", torch.device("cpu")) == "bf16" else [])
    rows = [
        {"model": model, **row} for model in args.models.split(",") for row in compare(model, arithmetic, args.rounds)
    ]
    print(f"{'model':18} {'arithmetic':10} {'side':13} {'ms/image':>8} {'of plain':>8} {'start s':>8}")
    for row in rows:
        print("{model:18} {precision:10} {side:13} {ms:8.2f} {ratio:8.2f} {start:8.1f}".format(**row))
    print(json.dumps({"torch": torch.__version__, "threads": args.threads, "rows": rows}))
    return 0


def compare(model: str, arithmetic: list[str], rounds: int) -> list[dict[str, object]]:
    """One row per arithmetic and side."""
    pixels = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    timed = {(a, side): begin(model, a, side, pixels) for a in arithmetic for side in SIDES}
    for _ in range(rounds):
        for side in timed.values():
            begun = time.perf_counter()
            side.teacher.forward_dense(pixels)
            side.seconds.append(time.perf_counter() - begun)
    median = {key: statistics.median(side.seconds) for key, side in timed.items()}
    return [
        {
            "precision": a,
            "side": side,
            "ms": 1000 * median[a, side] / BATCH,
            "ratio": median[a, side] / median["none", "plain"],
            "start": timed[a, side].start,
        }
        for a, side in timed
    ]


def begin(model: str, precision: str, side: str, pixels: torch.Tensor) -> Timed:
    """Load the teacher of a side and run it once."""
    begun = time.perf_counter()
    config = from_dict({"teacher": {"model": model, "batch": BATCH, "precision": precision, **SIDES[side]}}).teacher
    unfused = mock.patch("cskd.teacher.model._fusable", return_value=False)
    torch.manual_seed(0)
    if side == "fold+fuse":
        teacher = load_teacher(config, CLASSES, torch.device("cpu"), SIDE)
    else:
        with unfused:
            teacher = load_teacher(config, CLASSES, torch.device("cpu"), SIDE)
    teacher.forward_dense(pixels)
    return Timed(teacher, time.perf_counter() - begun)


if __name__ == "__main__":
    raise SystemExit(main())
