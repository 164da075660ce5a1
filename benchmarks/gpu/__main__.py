"""Every figure that only a GPU can give: speed over its ceilings, and checks. Needs no data.

    python -m benchmarks.gpu [speed|check] [--out FOLDER] [--only NAME ...] [--budget SECONDS] [--list] [--tiny]

Each section runs in a forked process with a limit of its own: one that hangs, crashes or runs out of memory loses only
what it had left. A figure is printed, and appended to FOLDER/gpu.jsonl, when it is known; errors go to FOLDER/gpu.log. A
table of all is printed last (under 8,000 characters). Without `speed` or `check` it runs both, in the order of worth; what
the budget leaves no time for is named in the table as not run. Images and weights are made. `--tiny` goes through all of
it in small sizes, on a CPU too.

On a machine with Python 3.12, torch 2.11 and no network, from the root of a checkout with the wheels in .whl/, 6 MB:

    mount -o remount,size=48G /dev/shm
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target .site .whl/*.whl &&
    PYTHONPATH=.site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 python3 -m benchmarks.gpu --out "$OUT" --budget 340

The wheels are those of annotated-types, braceexpand, donfig, google-crc32c, msgspec, numcodecs, simplejpeg, timm, webdataset
and zarr, for CPython 3.12 on x86-64; numpy, pillow, pyyaml, rich, safetensors, torchvision and typer must be installed.
/dev/shm must hold 10 GB. The compiled sides come last: torch.compile takes up to a minute each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # that nothing imported below begins CUDA before the fork
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

MOST_TABLE = 7800  # characters


@dataclass(frozen=True)
class Section:
    """One process: `job` is module:function, and further arguments."""

    name: str
    group: str
    limit: int  # seconds, at most
    job: str
    arguments: tuple[Any, ...] = ()

    def run(self, bench: Any) -> None:
        module, _, function = self.job.partition(":")
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(bench, *self.arguments)


SECTIONS = (
    Section("ceilings", "speed", 30, "ceilings:ceilings"),
    Section("loader", "speed", 60, "ceilings:loader"),
    Section("writer", "speed", 30, "ceilings:writer"),
    Section("regnety", "speed", 80, "stage1:regnety_best"),
    Section("ladder", "speed", 60, "ladder:rungs"),
    Section("ladder-runs", "speed", 120, "ladder:runs"),
    Section("light", "speed", 90, "stage1:light"),
    Section("tiny", "speed", 120, "stage2:sides", ("tiny",)),
    Section("tiny-raw", "speed", 80, "stage2:sides", ("tiny", False, True)),
    Section("tiny-online", "speed", 80, "stage2:online", ("tiny",)),
    Section("same", "check", 70, "checks:hashes"),
    Section("weights", "check", 60, "checks:weights"),
    Section("trace2", "speed", 50, "traces:trace_stage2"),
    Section("others", "speed", 150, "stage1:regnety_others"),
    Section("small", "speed", 120, "stage2:sides", ("small",)),
    Section("base", "speed", 120, "stage2:sides", ("base",)),
    Section("trace1", "speed", 50, "traces:trace_stage1"),
    Section("waits", "check", 40, "checks:syncs"),
    Section("views", "check", 40, "views:device_views"),
    Section("timm", "speed", 70, "stage2:timm_kd"),
    Section("memory", "check", 40, "checks:out_of_memory"),
    Section("compiled", "speed", 130, "stage1:regnety_compiled"),
    Section("tiny-compiled", "speed", 180, "stage2:sides", ("tiny", True)),
    Section("same-compiled", "check", 80, "checks:hashes_compiled"),
    Section("small-compiled", "speed", 180, "stage2:sides", ("small", True)),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", choices=("speed", "check"), help="default: both")
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"))
    parser.add_argument("--work", type=Path, help="folder for data and caches; default: a temporary one")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[s.name for s in SECTIONS])
    parser.add_argument("--budget", type=float, default=340.0, help="seconds in all")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of one section, where its own is longer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = [s for s in SECTIONS if options.group in (None, s.group) and s.name in (options.only or [s.name])]
    if options.list:
        print("\n".join(f"{s.name:<15}{s.group:<7}at most {s.limit} s" for s in chosen))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        return work(next(s for s in SECTIONS if s.name == options.section), options)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        options.work = options.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        )
        options.work.mkdir(parents=True, exist_ok=True)
        first = len(rows_of(options.out))
        for module in ("stage1", "stage2", "checks"):  # once, for all processes
            importlib.import_module(f"benchmarks.gpu.{module}")
        print(f"{machine()}; imported after {time.monotonic() - begun:.1f} s", flush=True)
        for section in chosen:
            left = options.budget - (time.monotonic() - begun)
            if left < min(15.0, section.limit):
                note(options.out, section, "not run", "the budget is spent")
                continue
            clock, limit = time.monotonic(), min(left, section.limit, options.limit)
            ended = in_process(section, options, limit)
            spent = time.monotonic() - clock
            note(options.out, section, f"{spent:.0f} s", ended)
        print(table(machine(), rows_of(options.out)[first:], time.monotonic() - begun), flush=True)
    return 0


def in_process(section: Section, options: argparse.Namespace, limit: float) -> str:
    """Run a section in a fork of this process, which has imported all and begun no CUDA. Returns how it ended."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setsid()
        status = 1
        try:
            status = work(section, options)
        finally:
            os._exit(status)
    deadline = time.monotonic() + limit
    ended = f"stopped after {limit:.0f} s"
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            ended, child_lives = ("" if code == 0 else f"exit {code}, see gpu.log"), False
            break
        time.sleep(0.05)
    else:
        child_lives = True
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its workers, too
    if child_lives:
        os.waitpid(child, 0)
    return ended


def work(section: Section, options: argparse.Namespace) -> int:
    """In the process of a section."""
    log = os.open(options.out / "gpu.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 2)
    os.write(2, f"--- {section.name}\n".encode())
    import torch

    if torch.cuda._is_in_bad_fork() and not options.section:  # something did begin CUDA: start afresh
        os.execv(
            sys.executable, [sys.executable, "-m", "benchmarks.gpu", "--section", section.name, *passed_on(options)]
        )
    from benchmarks.gpu.bench import begin

    bench = begin(options.out, options.work, options.tiny, options.device)
    bench.section = section.name
    try:
        section.run(bench)
    except BaseException as e:
        traceback.print_exc()
        bench.say("section", "FAILED", note=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
        return 1
    return 0


def passed_on(options: argparse.Namespace) -> list[str]:
    """What the process of a section reads of the command line."""
    tiny = ["--tiny"] * options.tiny
    return ["--out", str(options.out), "--work", str(options.work), "--device", options.device, *tiny]


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of gpu.jsonl; a last line that a killed process left unfinished is passed over."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (out / "gpu.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def note(out: Path, section: Section, value: str, words: str) -> None:
    """A row about a section itself."""
    row = {"section": section.name, "name": "section took", "value": value, "unit": "", "note": words}
    with (out / "gpu.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(f"{section.name} {value} {words}", flush=True)


def machine() -> str:
    """Device, driver, torch and date, in one line."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        device = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        device = "no GPU"
    today = datetime.now(UTC).date()
    shm = os.statvfs("/dev/shm")
    return (
        f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} cores, "
        f"/dev/shm {shm.f_blocks * shm.f_frsize / 2**30:.0f} GiB, {today}"
    )


def table(about: str, rows: list[dict[str, Any]], seconds: float) -> str:
    """All figures, a line each, with as much of their notes as there is room for."""
    from benchmarks.gpu.bench import line_of

    rows = [row for row in rows if row["name"] != "section took" or row["note"]]
    head = f"\n{about}; {seconds:.0f} s in all"
    for most in (300, 200, 150, 100, 80, 60, 50, 40, 30, 20, 10, 0):
        text = "\n".join([head, *(line_of({**row, "note": row["note"][:most]}) for row in rows)])
        if len(text) <= MOST_TABLE:
            break
    return text[:MOST_TABLE]


if __name__ == "__main__":
    sys.exit(main())
