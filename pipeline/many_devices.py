"""`cskd cache-teacher --devices`: stage 1 with a process a device, one progress, one exit code.

begin    the first device alone, up to where its work begins: what can be refused is refused once, and the teacher is checked once
share    then the others; each claims passes, beginning elsewhere, and takes what is missing (`cskd.pipeline.unit_line`)
end      an error that a user can mend ends all. A process that dies ends alone: the others take up its work, from its drafts
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, NoReturn

from cskd.config import Config
from cskd.errors import ConfigError, CskdError, fitted, one_line, said
from cskd.machine import stops
from cskd.machine.devices import device_list
from cskd.machine.ending import GRACE, logged
from cskd.machine.launch import DEVICE_OF, launched
from cskd.pipeline.cache_teacher import CacheReport, cache_teacher
from cskd.pipeline.show.progress import Progress, say

TELL_SECONDS = 0.25  # between two words of a process on how far it is
SPARE = 4.0  # of the seconds that an interrupted command has: for what is left to do when its processes have ended


def cache_teacher_on(config: Config, devices: str, quiet: bool = False) -> CacheReport:
    """`cache_teacher` on each of `devices` (see `cskd.machine.devices.device_list`), in the place of `cache.device`.

    Raises:  ConfigError for devices that are not here; the first error of a process, with its device.
    """
    names = device_list(devices)
    if (launch := launched()).local_count > 1:
        raise ConfigError(
            f"--devices starts a process a device, and {launch.by} has started {launch.local_count} here; leave --devices out, "
            "or start one per machine"
        )
    if len(names) == 1:
        return cache_teacher(_on(config, names[0] if names[0].startswith("cuda") else "cpu"), quiet)
    with contextlib.ExitStack() as stack:
        return _Workers(config, names, quiet, stack).run()


@dataclass(eq=False)
class _Worker:
    """A process: how far it is, and what it ended with."""

    device: str
    process: SpawnProcess
    wire: Connection
    made: int = 0  # views
    seen: int = 0  # views that it knows of, those of others included
    report: CacheReport | None = None
    failure: str = ""  # why it ended without a report
    fatal: bool = False  # it would end the others too
    ended: bool = False


class _Workers:
    def __init__(self, config: Config, names: list[str], quiet: bool, stack: contextlib.ExitStack) -> None:
        self._config, self._names, self._quiet, self._stack = config, names, quiet, stack
        self._workers: list[_Worker] = []
        self._total = 0
        self._told: list[str] = []  # devices whose end was said

    def run(self) -> CacheReport:
        begun, first = time.perf_counter(), self._start(0)
        while not self._total and not first.ended:
            self._listen()
        self._refuse()
        start = first.seen - first.made
        with Progress("cache-teacher", self._total, "views", start=start, quiet=self._quiet) as progress:
            if first.seen < self._total:
                for number in range(1, len(self._names)):
                    self._start(number)
            while not all(worker.ended for worker in self._workers):
                self._listen()
                self._refuse()
                made = start + sum(worker.made for worker in self._workers)
                at_work = sum(not worker.ended for worker in self._workers)
                progress.update(
                    max(made, *(worker.seen for worker in self._workers)), devices=f"{at_work} of {len(self._names)}"
                )
        for worker in self._workers:
            worker.process.join(GRACE)
        return self._report(time.perf_counter() - begun)

    def _start(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        device = self._names[number]
        ours, theirs = context.Pipe()
        part = (number, len(self._names))
        process = context.Process(
            target=_work, args=(self._config, device, part, self._quiet or number > 0, theirs), name=device
        )
        # Held back until the process has its handlers: it takes seconds to load torch, and Ctrl-C reaches it, too.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        theirs.close()
        worker = _Worker(device, process, ours)
        self._stack.callback(self._end, worker)
        self._workers.append(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        """Called for each when all is over or something was raised: those that live are asked to end, together, then awaited."""
        for other in self._workers:
            if other.process.is_alive():
                other.process.terminate()
        worker.process.join(GRACE - SPARE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.wire.close()

    def _listen(self) -> None:
        """Take what the processes say, for a second at most."""
        living = {worker.wire: worker for worker in self._workers if not worker.ended}
        for wire in wait(list(living), 1.0):
            worker = living[wire]  # type: ignore[index]
            try:
                kind, what = worker.wire.recv()
            except (EOFError, OSError):
                self._died(worker)
                continue
            if kind == "at":
                worker.made, worker.seen, self._total = what
            elif kind == "report":
                worker.report, worker.ended = what, True
            else:
                worker.failure, worker.fatal, worker.ended = what, kind == "error", True

    def _died(self, worker: _Worker) -> None:
        worker.process.join(GRACE)
        code, worker.ended = worker.process.exitcode, True
        ended = f"exit code {code}"
        if code is not None and code < 0:
            ended = f"killed by {signal.Signals(-code).name}" + (
                ", by hand or for want of memory" if code == -9 else ""
            )
        worker.failure = f"its process {worker.process.pid} ended: {ended}"

    def _refuse(self) -> None:
        """Raise the first error that ends all, or when nobody is left; say what ended alone."""
        failed = [worker for worker in self._workers if worker.failure]
        for worker in failed:
            if worker.fatal or len(failed) == len(self._workers):
                again = "" if worker.fatal else "; the same command goes on"
                raise CskdError(fitted(f"{worker.device}: {worker.failure}{again}"))
        for worker in failed:
            if worker.failure and not worker.fatal and worker.device not in self._told:
                self._told.append(worker.device)
                say([f"{worker.device}: {worker.failure}; the others take up its work"], self._quiet)

    def _report(self, seconds: float) -> CacheReport:
        """All reports as one."""
        reports = [worker.report for worker in self._workers if worker.report is not None]
        notes = [note for report in reports for note in report.notes]
        notes += [f"{worker.device}: {worker.failure}" for worker in self._workers if worker.failure]
        return replace(
            reports[0],
            units=sum(report.units for report in reports),
            images=sum(report.images for report in reports),
            seconds=seconds,
            loop_seconds=max(report.loop_seconds for report in reports),
            bound_by="; ".join(f"{w.device}: {w.report.bound_by}" for w in self._workers if w.report is not None),
            notes=list(dict.fromkeys(notes)),
        )


def _on(config: Config, device: str) -> Config:
    return replace(config, cache=replace(config.cache, device=device))


def _work(config: Config, device: str, part: tuple[int, int], quiet: bool, wire: Connection) -> None:
    """In a process of its own: stage 1 on one device, and words over `wire` on how far it is."""
    for number in (signal.SIGINT, *stops.ASKS):
        signal.signal(number, _unwind)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    os.environ[DEVICE_OF] = f"{part[0]}/{part[1]}"
    on, _, index = device.partition(":")
    if on == "cuda":
        # It sees its own GPU alone, so that no library puts anything on another one.
        listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = listed[int(index)] if listed else index
    last = 0.0

    def tell(made: int, seen: int, total: int) -> None:
        nonlocal last
        if not last or time.monotonic() - last >= TELL_SECONDS or seen == total:
            last = time.monotonic()
            wire.send(("at", (made, seen, total)))

    try:
        word: tuple[str, Any] = ("report", cache_teacher(_on(config, on), quiet, tell))
    except CskdError as e:
        word = ("error", str(e))
    except OSError as e:
        word = ("error", said(e))
    except Exception as e:
        word = ("bug", f"unexpected {one_line(e, 100)}; {logged(e)}")
    with contextlib.suppress(OSError):
        wire.send(word)


def _unwind(signum: int, frame: FrameType | None) -> NoReturn:
    """The first signal unwinds, which keeps what is in of a pass; then a process has GRACE seconds less SPARE, whatever comes."""
    for kind in (signal.SIGINT, *stops.ASKS):
        # Ctrl-C reaches all, and the first process ends the others, too. SIG_IGN would complain of one that has just come.
        signal.signal(kind, lambda *_: None)
    late = threading.Timer(GRACE - SPARE, os._exit, (128 + signum,))
    late.daemon = True
    late.start()
    sys.exit(128 + signum)


def _end_with_parent() -> None:
    """A command that was killed leaves no process that goes on for days unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
