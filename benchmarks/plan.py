"""Does `cskd plan` tell the truth? It plans a small run, makes it, and compares the times.

    python -m benchmarks.plan [--config NAME] [--images N] [--set KEY=VALUE ...] [--seconds S]

CIFAR-10 images, a ResNet-56 teacher and a small ViT (`cifar10`), or ImageNet images, MobileNetV2 and DeiT-Ti (`imagenet_sample`):
stage 1, a student from the cache, and a student online. Goal: within 20 %. The machine should be quiet: what else runs on it
between the plan and the run counts as an error of the plan. Needs $CSKD_DATA (else `shared` beside the checkout). A few minutes on
2 cores. Prints the machine, a table, and one JSON line last; exits 1 where a time is off by more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.2
SOURCES = {
    "cifar10": {"train": "cifar10-train.tar.gz", "val": "cifar10-val.tar.gz"},
    "imagenet_sample": {"train": "imagenet-sample.tar", "val": "imagenet-sample.tar"},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=SOURCES, default="cifar10")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--seconds", type=float, default=8.0, help="as of cskd plan")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    shared = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared"))
    missing = [name for name in SOURCES[options.config].values() if not (shared / "data" / name).is_file()]
    if missing:
        print(
            f"benchmarks/plan.py: no {missing[0]} in {shared / 'data'}; set CSKD_DATA to the folder above it",
            file=sys.stderr,
        )
        return 1
    os.environ["CSKD_DATA"] = str(shared)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(options.config, options.images, options.seconds, options.set, shared, Path(folder))
    off = [row for row in rows.values() if abs(row["planned"] / row["real"] - 1) > GOAL]
    print(json.dumps({"benchmark": "plan", "config": options.config, "rows": rows, "off": len(off)}))
    return int(bool(off))


def compare(
    name: str, images: int, seconds: float, overrides: list[str], shared: Path, folder: Path
) -> dict[str, dict[str, float]]:
    """Seconds planned and real of each part."""
    import torch

    from cskd.config import load_config
    from cskd.pipeline.cache_teacher import cache_teacher
    from cskd.pipeline.pack import pack_data
    from cskd.pipeline.planning.plan import plan
    from cskd.pipeline.train import train

    for part, source in SOURCES[name].items():
        pack_data(shared / "data" / source, folder / part, limit=images if part == "train" else images // 4, quiet=True)
    paths = {"data.train": "train", "data.val": "val", "cache.path": "cache"}
    sets = [f"{key}={folder / path}" for key, path in paths.items()]
    config = load_config(ROOT / "configs" / f"{name}.yaml", [*sets, *overrides])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    print(f"{os.cpu_count()} CPUs, load {load:.1f}, torch {torch.__version__}, {name}, {images:,} images", flush=True)
    report = plan(config, seconds=seconds, quiet=True)

    def run(output: str, job: Callable[..., Any], **how: Any) -> float:
        clock = time.perf_counter()
        job(replace(config, train=replace(config.train, output=str(folder / output))), quiet=True, **how)
        return time.perf_counter() - clock

    planned = {
        "stage 1": report.hours.stage1,
        "student, cache": report.hours.cached,
        "student, online": report.hours.online,
    }
    jobs: dict[str, Callable[[], float]] = {
        "stage 1": lambda: run("none", cache_teacher),
        "student, cache": lambda: run("cached", train),
        "student, online": lambda: run("online", train, online=True),
    }
    print(f"{'':<18}{'planned s':>12}{'real s':>10}{'ratio':>8}    (planned in {report.seconds:.0f} s)")
    rows = {}
    for part, job in jobs.items():
        rows[part] = {"planned": 3600 * planned[part], "real": job()}
        ratio = rows[part]["planned"] / rows[part]["real"]
        print(f"{part:<18}{rows[part]['planned']:>12.1f}{rows[part]['real']:>10.1f}{ratio:>8.2f}", flush=True)
    for line in (*report.verdict, f"stage 1: {report.stage1_bound_by}", f"student: {report.student_bound_by}"):
        print(line)
    return rows


if __name__ == "__main__":
    sys.exit(main())
