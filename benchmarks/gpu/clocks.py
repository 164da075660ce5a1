"""Clocks of `benchmarks.gpu`, and when they may start: a loop's first batches are not what a long run is like."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.train_step import wait_for_device
from cskd.loading import shared
from cskd.loading.need import PREFETCH, prefetch_of


def buffers(workers: int) -> int:
    """Of a loader. Each is page-locked when its first batch comes, which takes the main thread's time and, it may be, the
    device's: figures of a long run are those of later batches."""
    return workers * (prefetch_of(workers, PREFETCH) + 1)


NEW_BUFFERS: list[float] = []  # seconds that it took to take each of them in, by this process


def count_buffers() -> None:
    """From now on."""
    plain = shared._Mapped.put

    def put(mapped: shared._Mapped, name: shared.SlotName, buffer: torch.Tensor) -> None:
        clock = time.perf_counter()
        plain(mapped, name, buffer)
        NEW_BUFFERS.append(time.perf_counter() - clock)

    mock.patch.object(shared._Mapped, "put", put).start()


class Enough(Exception):  # noqa: N818  # not an error
    """Raised out of a training loop whose steps are timed: the rest of the run says nothing."""


class Watch:
    """Stands where a stage has its progress line. Notes when how much was done; in stage 2 what the loop waited for.

    warm, steps: of stage 2, where the first is waited for and the last one ends the run. each: called with every step's
    number.
    """

    def __init__(self, warm: int = 0, steps: int = 0, each: Callable[[int], None] | None = None) -> None:
        self.points: list[tuple[float, int]] = []
        self._taken_in: list[int] = []  # buffers, at each of them
        self.waited = self.seconds = self.wait_share = self.loader_rate = self.teacher_ms = 0.0
        self._warm, self._steps, self._each, self._seen = warm, steps, each, 0
        self._parts: dict[str, float] = {}
        self._before: dict[str, float] = {}

    def __call__(self, *_: object, **__: object) -> Watch:
        return self

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, loss: Callable[[], str] | None = None) -> None:
        """After every chunk of stage 1, every step of stage 2."""
        self._seen += 1
        if self._each:
            self._each(self._seen)
        if loss and self._seen in (self._warm, self.wanted):
            wait_for_device()
        self.points.append((time.perf_counter(), done))
        self._taken_in.append(len(NEW_BUFFERS))
        if loss and self._seen == self._warm:
            self.waited, self._before = 0.0, dict(self._parts)
        if loss and self._steps and self._seen == self.wanted:
            self._finish()
            raise Enough

    @property
    def wanted(self) -> int:
        """Steps until the clock has stopped."""
        return self._warm + self._steps

    def timed_start(self, results: Iterator[Any], seconds: dict[str, float]) -> Iterator[Any]:
        """In place of the loop's own: the time that the loop waits for each batch."""
        self._parts = seconds
        while True:
            clock = time.perf_counter()
            try:
                result = next(results)
            except StopIteration:
                return
            self.waited += time.perf_counter() - clock
            yield result

    def _finish(self) -> None:
        (begun, before), (end, after) = self.points[self._warm - 1], self.points[-1]
        spent = {name: value - self._before[name] for name, value in self._parts.items()}
        self.seconds = (end - begun) / self._steps
        self.wait_share = self.waited / (end - begun)
        self.loader_rate = (after - before) / max(1e-9, spent["decode"] + spent["augment"])  # of one worker
        self.teacher_ms = 1e3 * spent["teacher"] / self._steps

    def second_half(self) -> float:
        """Units per second of the second half; of a long run without the last point, after the last commit."""
        return second_half(self._clocked)

    @property
    def _clocked(self) -> list[tuple[float, int]]:
        return self.points[:-1] if not self._warm and len(self.points) > 12 else self.points

    @property
    def new_buffers(self) -> str:
        """Those that came while the clock ran, in words; of a stage without a warm-up, in its second half."""
        first = self._warm - 1 if self._warm else half_of(self._clocked)
        came = NEW_BUFFERS[self._taken_in[first] : self._taken_in[len(self._clocked) - 1]]
        return f"{len(came)} new buffers" + (f" of {1e3 * sum(came) / len(came):.0f} ms" if came else "")


def half_of(points: list[tuple[float, int]]) -> int:
    """The first point with half of the work done, or the last but one."""
    half = next(i for i, (_, done) in enumerate(points) if 2 * done >= points[-1][1])
    return min(half, max(0, len(points) - 2))


def second_half(points: list[tuple[float, int]]) -> float:
    """Units per second from there to the last point."""
    (begun, before), (end, after) = points[half_of(points)], points[-1]
    return (after - before) / max(1e-9, end - begun)


def seconds_of(job: Callable[[], object], calls: int, device: torch.device, warm: int = 5) -> float:
    """Seconds per call on the device, by its own clock; the first calls are not counted."""
    for _ in range(warm):
        job()
    if device.type != "cuda":
        clock = time.perf_counter()
        for _ in range(calls):
            job()
        return (time.perf_counter() - clock) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        job()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls
