"""Threads that work on the teacher's batches, each on one at a time, so that encoding and mixing fill the gaps of a forward.

On a CPU a lane has one core: one batch per core loses nothing at the barriers of a parallel loop, which a batch shared by all
cores does wherever another process wants one of them; and a result does not depend on how many cores there are, as it may
where a sum is split. A network that may keep state on itself between two of its methods runs one batch at a time, on all
cores. On a GPU lanes take turns in launching, each on a stream of its own: while one waits for its results the next one's
forward is under way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch
from torch import nn

from cskd.machine.threads import computing_with

T = TypeVar("T")

MOST_LANES = 8  # lanes of a CPU: each holds a batch's activations
AHEAD = 2  # batches that wait for each lane, so that none runs dry while the main thread waits for images
LOOK = 0.5  # seconds between two looks at whether a lane that waits for its turn is still wanted: another teacher's take seconds


class Dropped(BaseException):
    """Raised inside a lane whose work nobody wants any more."""


class Lanes:
    """A context manager. `submit` never waits; at the end of an interrupted block what is under way ends at its next layer.

    Results do not depend on the number of lanes: a batch is worked on by one of them from end to end. reentrant: forwards may
    run in several threads at once. launch: held around a forward where lanes take turns; those of several teachers share one. The
    threads of arithmetic of the main thread say how many cores there are.
    """

    def __init__(self, device: torch.device, reentrant: bool = True, launch: threading.Lock | None = None) -> None:
        self.count, threads = lanes_of(device, torch.get_num_threads(), reentrant)
        self._in_turn = device.type == "cuda" or not reentrant
        self._device, self._main_threads = device, torch.get_num_threads()
        self._launch = launch or threading.Lock()
        self._dropped = False
        self._own = threading.local()  # of each lane: its stream, and whether it works on a batch
        self._pool = ThreadPoolExecutor(self.count, "lane", initializer=_begin, initargs=(device, threads))

    @property
    def room(self) -> int:
        """Batches that may be under way or wait: enough that no lane runs dry."""
        return self.count * (1 + AHEAD)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._dropping() if kind is not None else contextlib.nullcontext():
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if self._device.type == "cpu":
            torch.set_num_threads(self._main_threads)  # also what threads begun from now on take

    def submit(self, job: Callable[..., T], *arguments: Any) -> Future[T]:
        """`job(*arguments)` in the next lane that is free, without gradients."""
        return self._pool.submit(self._run, job, *arguments)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Around a forward: one lane at a time where they take turns, as on a GPU, where precision is a setting of the whole
        process; then wait for it."""
        with self._turn() if self._in_turn else contextlib.nullcontext():
            self._raise_if_dropped()
            yield
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        while not self._launch.acquire(timeout=LOOK):
            self._raise_if_dropped()
        try:
            yield
        finally:
            self._launch.release()

    def _run(self, job: Callable[..., T], *arguments: Any) -> T:
        self._raise_if_dropped()
        self._own.running = True
        try:
            with torch.no_grad(), self._stream():  # as for the probe: a program is compiled for one of both
                return job(*arguments)
        finally:
            self._own.running = False

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._own.stream)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """A forward may take seconds: a hook of all modules, only there while it is wanted, ends it at the next layer; a compiled
        one runs to its end. (An exception sent to the thread from outside may fall into a callback that swallows it.)"""
        self._dropped = True

        def end(*_: object) -> None:
            if getattr(self._own, "running", False):
                raise Dropped

        hook = nn.modules.module.register_module_forward_pre_hook(end)
        try:
            yield
        finally:
            hook.remove()

    def _raise_if_dropped(self) -> None:
        if self._dropped:
            raise Dropped


def lanes_of(device: torch.device, cores: int, reentrant: bool = True) -> tuple[int, int]:
    """How many lanes, and how many threads of arithmetic each has."""
    if device.type == "cuda":
        return 3, 1  # one that runs, one that is launched, one that encodes
    if device.type != "cpu":
        return 1, cores
    return (min(cores, MOST_LANES), 1) if reentrant else (2, cores)  # of two, one runs and one encodes


def threads_of_a_lane(device: torch.device, reentrant: bool) -> contextlib.AbstractContextManager[None]:
    """In this thread, as many threads of arithmetic as a lane has: what is compared with a lane's results is made alike."""
    if device.type != "cpu":
        return contextlib.nullcontext()
    return computing_with(lanes_of(device, torch.get_num_threads(), reentrant)[1])


def _begin(device: torch.device, threads: int) -> None:
    if device.type == "cuda":  # each thread has its own, the first GPU: to go back to it would begin a context there
        torch.cuda.set_device(device)
    if device.type == "cpu":
        torch.set_num_threads(threads)  # of this thread alone, and of those begun later
