"""Where the device's time goes: the kernels of three cached steps of DeiT-Ti, and of about a second of stage 1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import cskd.pipeline.cache_teacher as stage1_spine
from benchmarks.gpu.bench import Bench, teacher_keys
from benchmarks.gpu.clocks import Watch, buffers
from benchmarks.gpu.stage1 import WORKERS, stage2_cache
from benchmarks.gpu.stage2 import step_config, timed, warm_of

TOP = 12  # kernels that are named
STEPS = 3  # that are traced


class Trace:
    """Profiles from the end of one update of a loop to the end of another; of the device, where there is one."""

    def __init__(self, bench: Bench, name: str, first: int, stop: int) -> None:
        self.bench, self.name, self.first, self.stop = bench, name, first, stop
        self.cuda = bench.device.type == "cuda"
        self.profile = profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU])

    def __call__(self, step: int) -> None:
        if step == self.first:
            self.profile.start()
        if step == self.stop:
            if self.cuda:
                torch.cuda.synchronize()
            self.profile.stop()
            self._say()

    def _say(self) -> None:
        wanted = "CUDA" if self.cuda else "CPU"
        events: list[Any] = [
            e for e in self.profile.events() or [] if e.device_type.name == wanted and not annotation(e)
        ]
        spans = [(e.time_range.start, e.time_range.end) for e in events]
        busy, gaps, whole = busy_and_gaps(spans)
        self.bench.say(
            f"{self.name} device busy",
            100 * busy / max(1e-9, whole),
            "%",
            f"of {whole / 1e3:.1f} ms; {sum(gap > 100 for gap in gaps)} gaps over 0.1 ms, the longest "
            + ", ".join(f"{gap / 1e3:.2f}" for gap in sorted(gaps, reverse=True)[:5])
            + " ms",
        )
        spent: dict[str, tuple[float, int]] = {}
        for event, (start, end) in zip(events, spans, strict=True):
            total, count = spent.get(event.name, (0.0, 0))
            spent[event.name] = total + end - start, count + 1
        top = sorted(spent.items(), key=lambda item: -item[1][0])[:TOP]
        for i, (name, (total, count)) in enumerate(top, 1):
            self.bench.say(
                f"{self.name} kernel {i}",
                100 * total / max(1e-9, whole),
                "%",
                f"{total / 1e3:.2f} ms, {count} x {name[:90]}",
            )


def annotation(event: Any) -> bool:
    """Whether an event is a name given to a stretch of time, not work."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(("Optimizer.", "ProfilerStep"))


def busy_and_gaps(spans: Iterable[tuple[float, float]]) -> tuple[float, list[float], float]:
    """Time in which at least one span is under way, the gaps, and the time from the first begin to the last end."""
    busy, gaps, begun, end = 0.0, [], None, 0.0
    for start, stop in sorted(spans):
        if begun is None:
            begun = end = start
        if start > end:
            gaps.append(start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, gaps, end - (begun or 0.0)


def trace_stage2(bench: Bench) -> None:
    """Cached steps, after the warm-up."""
    stage2_cache(bench)
    run = bench.sizes.students["tiny"]
    warm = warm_of(bench, run)
    trace = Trace(bench, "tiny cached", warm + 1, warm + 1 + min(STEPS, run.steps - 1))
    timed(bench, "tiny", step_config(bench, "tiny", "cskd-hard"), False, trace)


def trace_stage1(bench: Bench) -> None:
    """Chunks from the middle of the loop: at three views of 256 images each, five are a second at 3,800 views/s."""
    s, keys, workers = bench.sizes, teacher_keys("bf16+fold"), min(bench.sizes.workers, WORKERS["bf16+fold"])
    chunks = buffers(workers) + 10
    trace = Trace(bench, "stage 1", chunks - 9, chunks - 4)
    stage1_spine.Progress = Watch(each=trace)  # type: ignore[assignment, attr-defined]
    config = bench.config(s.teacher, chunks * s.teacher_batch, keys, "trace", cache_workers=workers)
    stage1_spine.cache_teacher(config, quiet=True)
