"""The files of `cskd launch` on a real SLURM and a real Ray, next to one process alone.

    python -m benchmarks.launch [--only slurm ray] [--folder FOLDER]

    alone   one process makes the cache
    slurm   munged, slurmctld and two slurmd on loopback. Of an array of three one task is queued again by `scontrol requeue`,
            one gets the signal that comes before the end of its time. Stage 2, torchrun on both nodes, begins after the array
    ray     a pool of three actors, two of which are killed; then stage 2

The cache of each has to have the same content root. What is not installed here is left out, and said. Takes three minutes on
2 cores. Prints one JSON line last; exits 1 when a root differs, or anything did not come to its end.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

from benchmarks.launch import on_ray, on_slurm
from benchmarks.launch.bench import UNITS, Bench

CLUSTERS = {"slurm": on_slurm, "ray": on_ray}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CLUSTERS), help="these")
    parser.add_argument("--folder", type=Path, help="keep everything here; default: a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cskd-launch-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        return _run(folder, options.only or list(CLUSTERS))


def _run(folder: Path, clusters: list[str]) -> int:
    print(f"{platform.platform()}, Python {platform.python_version()}")
    bench = Bench(folder)
    print(f"alone   content {bench.root}, {UNITS} units", flush=True)
    found: dict[str, object] = {"alone": bench.root}
    wrong = 0
    for name in clusters:
        if why := CLUSTERS[name].missing():
            print(f"{name:7} left out: {why}")
            continue
        result = CLUSTERS[name].run(bench, folder)
        log = result.pop("log")
        good = (
            result["content_root"] == bench.root
            and result["trained"]
            and result.get("stage2", "COMPLETED") == "COMPLETED"
        )
        print(f"{name:7} content {result['content_root']}, {'as alone' if good else 'WRONG'}")
        for key, value in result.items():
            print(f"        {key}: {value}")
        if not good:
            print(log)
        wrong += not good
        found[name] = result
    print(json.dumps(found | {"wrong": wrong}))
    return 1 if wrong else 0
