"""Tasks in, results out, in order, over any number of worker processes. One pool lives as long as the stage does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from cskd.errors import CskdError, ReadError, shortened
from cskd.loading.need import GB, PREFETCH, SHM, prefetch_of
from cskd.loading.shared import ENDS, SharedBatch, mapped_slots, use_slots
from cskd.machine import stops

_DEAF_TO = (signal.SIGINT, *stops.ASKS)  # the fork server and what it starts
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Worker(Protocol[T_contra, R_co]):
    """What runs in the workers: a picklable object that turns one task into one result."""

    def __call__(self, task: T_contra) -> R_co: ...


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a worker, so that the user sees its one line and not the worker's traceback."""

    error: CskdError


class _Tasks(Dataset[Any]):
    def __init__(self, worker: Worker[Any, Any]) -> None:
        self.worker = worker

    def __getitem__(self, task: Any) -> Any:
        try:
            return self.worker(task)
        except CskdError as e:
            return _Failure(e)


def _as_it_is(result: Any) -> Any:
    return result


class Stream(Generic[T, R]):
    """`worker(task)` for every task, in order. Tasks are drawn lazily, a few ahead of the result that is read.

    workers: processes (0 = in this one); prefetch: results a worker keeps ready (see `prefetch_of`); start: 'forkserver' by
    default, since a forked copy of a process with threads can hang. lend_to: None, results are the reader's own; a device:
    each is a SharedBatch, or has one as its field `batch`, in its worker's own buffer, page-locked for that device. It may be
    written again from when the result `workers` places after it is asked for; the stream then waits for the marks in its
    `reads`.
    """

    def __init__(
        self,
        worker: Worker[T, R],
        tasks: Iterable[T],
        workers: int,
        prefetch: int = PREFETCH,
        lend_to: torch.device | None = None,
        start: str = "forkserver",
    ) -> None:
        self._worker, self._tasks, self._workers = worker, tasks, workers
        self._prefetch, self._lend_to, self._start = prefetch_of(workers, prefetch), lend_to, start

    def __iter__(self) -> Iterator[R]:
        if self._workers:
            _start_deaf_to_interrupts()
        with mapped_slots(self._lend_to) as stream:
            yield from self._results(stream)

    def _results(self, stream: int) -> Iterator[R]:
        loader: DataLoader[Any] = DataLoader(
            _Tasks(self._worker),
            sampler=self._tasks,
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            multiprocessing_context=self._start if self._workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_begin_worker, stream, self._prefetch) if self._workers else None,
        )
        with _apart_from_main(self._worker):
            results = iter(loader)
        lent, lends = deque[SharedBatch](), self._lend_to is not None and self._workers > 0
        try:
            while True:
                # A result that is taken hands out the task that is `prefetch` tasks on for its worker, whose buffer held
                # what that worker sent before this result: `workers` places back.
                while lends and len(lent) >= self._workers:
                    for mark in lent.popleft().reads:
                        mark.synchronize()
                try:
                    result = next(results)
                except StopIteration:
                    return
                except RuntimeError as e:
                    codes = [worker.exitcode for worker in getattr(results, "_workers", ())]
                    if (died := why_died(str(e), codes)) is None:
                        raise
                    raise ReadError(died) from e
                if isinstance(result, _Failure):
                    raise result.error
                if lends:
                    lent.append(result if isinstance(result, SharedBatch) else result.batch)
                yield result
        finally:
            for worker in getattr(results, "_workers", ()):  # torch gives each five seconds to finish what nobody reads
                end_worker(worker)
            if (shut_down := getattr(results, "_shutdown_workers", None)) is not None:
                shut_down()  # now, not when it is collected


def why_died(text: str, exit_codes: Sequence[int | None]) -> str | None:
    """What a user should know of workers that ended before their time; None where none did.

    Args:    text of the RuntimeError that torch's loader raised; exit_codes of the workers, negative for the signal that ended
             one, None of those that live.
    """
    no_room = "allocate shared memory" in text or "No space left on device" in text
    signals = {-code for code in exit_codes if code is not None and code < 0}
    if signal.SIGBUS in signals or "Bus error" in text or no_room:
        room = f"{SHM} is full"
        if SHM.is_dir():
            usage = shutil.disk_usage(SHM)
            room = f"{SHM} ({usage.total / GB:.2f} GB, {usage.free / GB:.2f} free now) has no room for the batches under way"
        return (
            f"a loader worker ended{'' if no_room else ' by SIGBUS'}: {room}; in a container start it with a larger --shm-size, "
            "else set a smaller train.prefetch or fewer workers (train.workers, cache.workers), and run the same command again"
        )
    if "DataLoader worker" not in text or text.startswith("Caught "):  # then it lives, and tells of a bug
        return None
    if signal.SIGKILL in signals or "Killed" in text:
        return (
            "a loader worker was killed (SIGKILL), as the system does where the memory of the machine or of the container runs "
            "out; give it more memory, or fewer workers (train.workers, cache.workers), and run the same command again"
        )
    by = next((signal.Signals(number).name for number in sorted(signals) if number in set(signal.Signals)), "")
    said = f"ended by {by}" if by else shortened(" ".join(text.splitlines()[-1].split()), 100)
    return (
        f"a worker process died ({said}), expected it to live as long as the run; often memory ran out: run the same command "
        "again, with fewer workers (train.workers, cache.workers)"
    )


@contextmanager
def _apart_from_main(worker: Worker[Any, Any]) -> Iterator[None]:
    """Start workers that do not import the main script again, as they do by default: a script that calls `cskd.train` without
    `if __name__ == "__main__"` would do so in each of them. Nothing of ours is in there, unless the worker itself is."""
    main = sys.modules["__main__"]
    hidden = {} if type(worker).__module__ == "__main__" else {"__spec__": None, "__file__": None}
    before = {name: getattr(main, name) for name in hidden if hasattr(main, name)}
    for name in before:
        setattr(main, name, hidden[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(main, name, value)


def _begin_worker(stream: int, prefetch: int, worker: int) -> None:
    """In a worker: end with the main process, and in silence.

    A killed main process can't end its workers, and torch's own watch sees the fork server, which they keep alive.
    """
    use_slots(stream, worker, prefetch)
    end_with_main()
    for kind in stops.ASKS:  # torch's loader has set handlers of its own
        signal.signal(kind, signal.SIG_IGN)
    if ENDS is not None:
        signal.signal(ENDS, lambda *_: os._exit(0))  # torch takes a child that a signal ended for one that died
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, ConnectionError | EOFError):  # main ended in the middle of a result
            show(kind, error, trace)

    sys.excepthook = hook


def end_with_main() -> None:
    """Have this process end at once, and in silence, when the one that started it has ended."""
    main = multiprocessing.parent_process()

    def wait() -> None:
        if main is not None:
            main.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_worker(worker: Any) -> None:
    """End a loader process at once, by the one signal that it hears."""
    with contextlib.suppress(ProcessLookupError, ValueError):  # it has ended, or was closed
        if ENDS is None or worker.exitcode is not None:
            worker.terminate()
        else:
            os.kill(worker.pid, ENDS)


def _start_deaf_to_interrupts() -> None:
    """Start the fork server so that it and its children ignore Ctrl-C, which the terminal sends to all, and what a batch system
    sends to all: main still needs the batches to come until it has saved a state, and ends them.

    It imports what the workers need, so that they share the memory of it and start at once.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    forkserver.set_forkserver_preload(["cskd.loading.stage1", "cskd.loading.raw_batches"])
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in _DEAF_TO}  # inherited by what is started now
    try:
        forkserver.ensure_running()
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
