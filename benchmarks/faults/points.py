"""Death and errors at every call that changes the disk, one after the other, of a stage 1 that makes one unit or begins a cache.

With strace the kernel itself fails the call: SIGKILL as it is entered, EIO or ENOSPC as its result, and writes that claim to
have been done and were not. The calls are those of an undisturbed run that name a file of the cache. strace counts the calls
of each thread apart, so the thread that writes makes some idle ones first, and the number of a call says whose it is. Without
strace the module that puts files in place is given an `os` whose calls fail (fsync, replace, link, and the writes of files).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cskd.files.durable
from benchmarks.children import KILLED, end_child, in_child, start_child
from benchmarks.faults.bench import Bench
from cskd.pipeline.cache_teacher import cache_teacher

CALLS = (
    "write,pwrite64,sendfile,copy_file_range,ftruncate,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,"
)
CALLS += "unlinkat,mkdir,mkdirat,rmdir"
ERRORS = ("SIGKILL", "EIO", "ENOSPC")
WRITERS = ("write",)  # how the names of threads begin that write into the cache
IDLE = 64  # calls of each kind: more than the main thread makes
LIE = "lie"  # a write that says it was done
ANY_TRACER = 0x59616D61  # prctl's PR_SET_PTRACER
SKIP = ("/units/", "/commits/", "/claims", "/.sealed.json")  # of the run that begins a cache: the other run has them


@dataclass(frozen=True)
class Point:
    """The call number `at`, from 1, of system call `call` of its thread; `size` that it returned."""

    call: str
    at: int
    size: int


def deaths(bench: Bench, count: int) -> Counter[str]:
    """Every fault at every point, or `count` of them drawn by chance where there are more."""
    if not shutil.which("strace"):
        print("deaths: no strace here; the calls of the module that puts files in place fail instead", flush=True)
        return shimmed(bench, count)
    counts = Counter(deaths=0, deaths_wrong=0)
    planned: list[tuple[str, Point, str]] = []
    for scene in ("unit", "frame"):
        points = find_points(bench, scene)
        counts[f"deaths_points_{scene}"] = len(points)
        planned += [(scene, point, kind) for point in points for kind in ERRORS]
        planned += [(scene, point, LIE) for point in points if "write" in point.call and scene == "unit"]
    for scene, point, kind in planned if count >= len(planned) else bench.rng.sample(planned, count):
        counts.update(one_fault(bench, scene, point, kind))
    return counts


def one_fault(bench: Bench, scene: str, point: Point, kind: str) -> Counter[str]:
    """Stage 1 with one fault. It must say so or be none the worse; the cache holds nothing damaged; then to the end."""
    cache = place(bench, scene)
    what = {"SIGKILL": "signal=SIGKILL", LIE: f"retval={point.size}"}.get(kind, f"error={kind}")
    status, answer, log = traced(bench, cache, f"inject={point.call}:{what}:when={point.at}")
    done = answer is not None and "value" in answer
    struck = status == KILLED if kind == "SIGKILL" else any("INJECTED" in line and str(cache) in line for line in log)
    counts = Counter(deaths=1, **{f"deaths_{kind}": 1}, deaths_said=not done, deaths_without_effect=done)
    if not struck:
        print(f"deaths: {kind} did not strike {scene} {point}", file=sys.stderr)
        return Counter(deaths_wrong=1)
    good = bench.sound(cache) if done else scene == "frame" or in_child(lambda: bench.errors(cache))[1] == {"value": []}
    good = bench.judged(good, cache, (scene, point, kind, answer)) and bench.resumed(cache)
    counts.update(deaths_wrong=not good)
    return counts


def place(bench: Bench, scene: str) -> Path:
    return bench.fresh("faulty", without=(1, 1) if scene == "unit" else None)


def find_points(bench: Bench, scene: str) -> list[Point]:
    """The calls of an undisturbed run, in order."""
    cache = place(bench, scene)
    status, answer, log = traced(bench, cache, "trace=" + CALLS)
    if answer != {"value": bench.root}:
        raise RuntimeError(f"strace did not let a child do its work: {status} {answer}; see `strace -p`")
    seen: Counter[tuple[str, str]] = Counter()
    points = []
    for line in log:
        found = re.match(r"(\d+) +(\w+)\(", line)
        if found:
            thread, call = found.groups()
            seen[thread, call] += 1
            if str(cache) in line and (scene == "unit" or not any(part in line for part in SKIP)):
                result = re.search(r"= (\d+)$", line)
                points.append(Point(call, seen[thread, call], int(result[1]) if result else 0))
    if len(set(points)) < len(points):
        raise RuntimeError("two threads make calls of the same number; give the new one idle calls too (WRITERS)")
    return points


def traced(bench: Bench, cache: Path, rule: str) -> tuple[int, Any, list[str]]:
    """Stage 1 in a child under strace: exit status, answer, and strace's lines."""
    log = bench.folder / "strace.log"

    def stage() -> str:
        ctypes.CDLL(None).prctl(ANY_TRACER, ctypes.c_ulong(-1), 0, 0, 0)
        deadline = time.monotonic() + 20
        while "TracerPid:\t0" in Path("/proc/self/status").read_text():
            if time.monotonic() > deadline:
                raise OSError("strace did not attach")
            time.sleep(0.002)
        run = threading.Thread.run

        def traced_run(thread: threading.Thread) -> None:
            idle_calls(thread)
            run(thread)

        setattr(threading.Thread, "run", traced_run)  # noqa: B010
        return cache_teacher(bench.config(cache), quiet=True).content_root

    child = start_child(stage)
    command = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "trace=" + CALLS, "-e", rule, "-p", str(child[0])]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    status, answer = end_child(child)
    tracer.wait(timeout=60)
    return status, answer, [line for line in log.read_text(errors="replace").splitlines() if line[:1].isdigit()]


def idle_calls(thread: threading.Thread) -> None:
    """IDLE calls of each kind that do nothing, if the thread is one that writes."""
    if not thread.name.startswith(WRITERS):
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    nowhere = "/proc/no such file"
    calls: tuple[Callable[[], object], ...] = (
        lambda: os.write(nothing, b""),
        lambda: os.sendfile(nothing, nothing, 0, 0),
        lambda: os.fsync(nothing),
        lambda: os.rename(nowhere, nowhere),
        lambda: os.link(nowhere, nowhere),
        lambda: os.unlink(nowhere),
        lambda: os.mkdir("/proc"),
        lambda: os.rmdir(nowhere),
    )
    for call in calls * IDLE:
        with contextlib.suppress(OSError):
            call()
    os.close(nothing)


def shimmed(bench: Bench, count: int) -> Counter[str]:
    """The same within the program, at the calls of the module that puts files in place."""

    def run(at: int | None, kind: str) -> tuple[int, Any]:
        def stage() -> int:
            shim = FaultyOs(at, kind)
            for name, function in (("os", shim), ("open", shim.open_file)):
                setattr(cskd.files.durable, name, function)
            cache_teacher(bench.config(cache), quiet=True)
            return shim.calls

        cache = place(bench, "unit")
        return in_child(stage)

    calls = int(run(None, "")[1]["value"])
    planned = [(at, kind) for at in range(calls) for kind in ERRORS]
    counts: Counter[str] = Counter(deaths_points_unit=calls)
    for at, kind in planned if count >= len(planned) else bench.rng.sample(planned, count):
        _, answer = run(at, kind)
        said = answer is None or "error" in answer
        good = said and bench.resumed(bench.folder / "faulty")
        counts.update(Counter(deaths=1, **{f"deaths_{kind}": 1}, deaths_said=said, deaths_wrong=not good))
    return counts


class FaultyOs:
    """Stands for the module `os`, and for `open`, in `cskd.files.durable`: call number `at` that changes the disk fails."""

    def __init__(self, at: int | None, kind: str) -> None:
        self.at, self.kind, self.calls = at, kind, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(real) if name in ("fsync", "replace", "link") else real

    def open_file(self, *args: Any) -> Any:
        file = open(*args)  # noqa: SIM115 (closed by Writer)
        write = self._counted(file.write)

        class Writer:
            """The file, whose writes are counted."""

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return write if name == "write" else getattr(file, name)

        return Writer()

    def _counted(self, real: Any) -> Any:
        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.at:
                if self.kind == "SIGKILL":
                    os.kill(os.getpid(), 9)
                raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))
            return real(*args)

        return call
