"""Train the students of docs/RESULTS.md and keep a tally. The same command goes on after any interruption.

    python -m benchmarks.results.sweep [--only few,few-plain] [--processes 2] [--minutes 110] [--device cuda]
    python -m benchmarks.results.sweep --list

Every run is one `cskd train` in a process of its own; what one left when it was killed goes on. A finished run is evaluated
again from its checkpoint alone, as `cskd eval` does, and gives one line of the tally. Images, teachers and caches that are
missing are made first, in $CSKD_RESULTS, else runs/results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import ROOT, data, results_folder, teacher
from benchmarks.results.students import SECOND, StudentRun, all_runs
from cskd.config import LossConfig
from cskd.errors import CskdError, PathError
from cskd.loading.targets import codec_for, stage_codecs
from cskd.machine.devices import pick_device
from cskd.method.terms import needs
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.store.cache import Cache, open_cache

HELD = 3  # exit status of a run whose folder another process writes
ON_CUDA = {"train": 2, "cache": 12}  # processes that decode
TALLY = ROOT / "docs" / "results" / "tally.jsonl"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names of runs, with wildcards, comma between: few/*,all/none/*")
    parser.add_argument(
        "--processes", type=int, help="runs side by side; default: one per core, per three beside a GPU"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so many; runs go on the next time"
    )
    parser.add_argument("--tally", type=Path, default=TALLY, help="where a line is added for each finished run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--list", action="store_true", help="list the runs, which are finished, and their commands")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run by name, in this process; its line on stdout
    args = parser.parse_args(arguments)
    args.device = str(pick_device(args.device))
    args.processes = args.processes or max(1, (os.cpu_count() or 1) // (3 if args.device.startswith("cuda") else 1))
    patterns = [p if "/" in p or p == "*" else f"{p}/*" for p in args.only.split(",")]
    runs = [run for run in all_runs() if any(fnmatch(run.name, p) for p in patterns)]
    try:
        if args.run:
            print(json.dumps(finish(next(run for run in runs if run.name == args.run), args.device)))
            return 0
        done = finished(args.tally)
        if args.list:
            print("\n".join(f"{'done' if r.name in done else '    '} {r.name:32} {r.command}" for r in runs))
            return 0
        pending = [run for run in runs if run.name not in done]
        if not pending:
            print(f"all {len(runs)} runs are in {args.tally}; --list lists them")
            return 0
        if not prepare(pending, args.device):
            return 1
    except CskdError as e:
        print(f"benchmarks/results/sweep.py: {e}", file=sys.stderr)
        return HELD if isinstance(e, PathError) and args.run else 1
    return Sweep(pending, args).work()


def prepare(pending: list[StudentRun], device: str) -> bool:
    """Make the images, teachers and caches that the runs need and that are not there. Returns: whether that went well."""
    if data.main([]):
        return False
    caches = {(run.config, *(s for s in run.overrides if s.startswith("cache."))): run for run in pending}
    for run in caches.values():
        config = run.load(_machine("cache", device))
        further = [
            run.load(
                (*_machine("cache", device), *SECOND[name], f"teacher.weights={weights(name)}", f"cache.path={path}")
            )
            for name, path in config.train.caches.items()
        ]
        for one in (config, *further):
            name = Path(str(one.teacher.weights)).parent.name
            if not Path(str(one.teacher.weights)).exists() and teacher.main([name, "--device", device]):
                return False
            cache_teacher(one)
    return True


def weights(name: str) -> Path:
    """Those of the teacher of a further cache, which sees the few images."""
    return results_folder() / "teachers" / f"few_{name}" / "teacher.safetensors"


class Sweep:
    """Several runs at a time, each in a process of its own; `tally` gets a line when one is finished."""

    def __init__(self, pending: list[StudentRun], args: argparse.Namespace) -> None:
        self.pending, self.args = pending, args
        self.end = time.monotonic() + 60 * args.minutes
        self.environ = os.environ | ({"OMP_NUM_THREADS": "1"} if args.processes > 1 else {})
        self.finished = self.failed = 0
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[str]] = set()

    def work(self) -> int:
        """Exit status: 1 where a run failed."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with ThreadPoolExecutor(self.args.processes) as pool:
            try:
                list(pool.map(self._train, self.pending))
            except KeyboardInterrupt:
                self.end = 0.0  # no run starts any more
                for child in list(self._children):
                    child.terminate()
        left = len(self.pending) - self.finished - self.failed
        print(f"{self.finished} runs finished, {self.failed} failed, {left} left; the same command goes on")
        return int(self.failed > 0)

    def _train(self, run: StudentRun) -> None:
        if time.monotonic() >= self.end:
            return
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        log = run.folder.with_suffix(".log")
        command = [sys.executable, "-m", "benchmarks.results.sweep", "--run", run.name, "--device", self.args.device]
        with log.open("w") as errors:
            child = subprocess.Popen(
                command, cwd=ROOT, env=self.environ, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            self._children.add(child)
            left = self.end - time.monotonic()
            try:
                out, _ = child.communicate(timeout=max(1.0, left) if left < threading.TIMEOUT_MAX else None)
            except subprocess.TimeoutExpired:
                child.terminate()
                child.wait()
            self._children.discard(child)
        if child.returncode == HELD or (time.monotonic() >= self.end and child.returncode):
            return  # another sweep is at it; or stopped: what it has is kept, and it goes on the next time
        with self._lock:
            if child.returncode:
                self.failed += 1
                print(f"{run.name} failed: {log.read_text().strip().splitlines()[-1:]}; see {log}", flush=True)
                return
            self.finished += 1
            row = json.loads(out.splitlines()[-1])
            self.args.tally.parent.mkdir(parents=True, exist_ok=True)
            with self.args.tally.open("a") as tally:
                tally.write(json.dumps(row) + "\n")
            print(
                f"{self.finished} of {len(self.pending)}: {run.name} {row['score']} {row['top1'][row['score']]:.2f} %, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )


def finished(tally: Path) -> set[str]:
    """Names of the runs that have a line."""
    return {row["name"] for row in read_tally(tally)}


def read_tally(tally: Path) -> list[dict[str, Any]]:
    """The lines of a tally, the last of each run, in the order in which runs were finished first."""
    lines = tally.read_text().splitlines() if tally.exists() else []
    return list({row["name"]: row for row in map(json.loads, lines)}.values())


def finish(run: StudentRun, device: str) -> dict[str, Any]:
    """Train one student, or go on with it, and evaluate its checkpoint in float32: a line of the tally."""
    config = run.load(_machine("train", device))
    report = train(config, online=run.online, quiet=True)
    evaluated = evaluate_checkpoint(run.folder, Path(config.data.val), 256, 0, None, device, quiet=True)
    rows = read_metrics(run.folder)
    curve = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items() if _kept(k)} for r in rows]
    cache = open_cache(config.cache.path)
    opened = {"": cache} | {name: open_cache(path) for name, path in config.train.caches.items()}
    views = config.train.views or cache.views
    return {
        "name": run.name,
        **{k: v for k, v in asdict(run).items() if k in ("question", "method", "seed", "online")},
        "command": run.command,
        "score": evaluated.score,
        "top1": {name: head.top1 for name, head in evaluated.heads.items()},
        "arithmetic": evaluated.arithmetic,
        "epochs": config.train.epochs,
        "views": views,
        "target_bytes": sum(_bytes_read(config.loss, name, one, views) for name, one in opened.items()),
        "curve": curve,
        "seconds": sum(row["seconds"] for row in rows),
        "teacher_forwards": report.teacher_forwards,
        "weights_sha256": hashlib.sha256((run.folder / "model.safetensors").read_bytes()).hexdigest(),
        "cache": cache.content_root(),
        "device": torch.cuda.get_device_name() if evaluated.device.startswith("cuda") else evaluated.device,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def _machine(section: str, device: str) -> tuple[str, ...]:
    """Overrides for a device: beside a GPU, processes decode."""
    workers = (f"{section}.workers={ON_CUDA[section]}",) if device.startswith("cuda") else ()
    return (f"{section}.device={device}", *workers)


def _bytes_read(loss: LossConfig, name: str, cache: Cache, views: int) -> int:
    """Of the unit files that a loss reads of one of its caches."""
    hard, soft = codec_for(loss, cache.codecs, str(cache.root), name)
    codecs = {hard if needs(loss, name).hard != "none" else soft, soft}
    codecs |= set(stage_codecs(loss, cache.codecs, str(cache.root), name).values())
    commits = [cache.commit_of(b, v) for b in range(cache.blocks) for v in range(views)]
    return sum(file.size for commit in commits if commit for file in commit.files if file.codec in codecs)


def _kept(key: str) -> bool:
    """The columns of metrics.jsonl that tables and figures are made of."""
    return key in ("epoch", "loss", "seconds") or key.startswith("top1.")


if __name__ == "__main__":
    raise SystemExit(main())
