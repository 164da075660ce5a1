"""What only a device can show: the same bits twice, cached against online, the cells that an arithmetic changes."""

from __future__ import annotations

import hashlib
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cskd.pipeline.cache_teacher as stage1_spine
import cskd.pipeline.train as stage2_spine
from benchmarks.gpu.bench import Bench, StudentRun, release, teacher_keys
from benchmarks.gpu.clocks import Watch
from cskd.config import Config
from cskd.dataset.inventory import open_inventory
from cskd.pipeline.care.recompute import recompute
from cskd.pipeline.measure_precision import first_views
from cskd.store.cache import open_cache
from cskd.teacher.model import load_teacher
from cskd.teacher.precision import measure
from cskd.views.maker import ViewMaker

ROOT = Path(__file__).resolve().parents[2]
ARITHMETICS = ("float32", "tf32", "bf16+fold", "fp16", "bf16+fold+compile")
REPLAYED = 128  # views of `recompute`


def hashes(bench: Bench) -> None:
    """Stage 1 twice in each arithmetic: one content, and the share of cells that differs from IEEE's float32."""
    for arithmetic in ARITHMETICS[:-1]:
        bench.attempt(arithmetic, _twice, bench, arithmetic)
    bench.attempt("GPU against CPU", _against_cpu, bench)


def hashes_compiled(bench: Bench) -> None:
    bench.attempt(ARITHMETICS[-1], _twice, bench, ARITHMETICS[-1])


def _config(bench: Bench, arithmetic: str, cache: str, **train: Any) -> Config:
    s, keys = bench.sizes, teacher_keys(arithmetic)
    if arithmetic == "tf32" and bench.device.type == "cpu":
        raise RuntimeError(f"no {arithmetic} on {bench.device.type}")
    run = StudentRun(s.students["tiny"].model, min(128, s.check // 2), 0, 0)
    return bench.config(s.small, s.check, {**keys, "batch": min(64, s.check)}, cache, run, **train)


def _cached(config: Config) -> Any:
    stage1_spine.Progress = Watch()  # type: ignore[assignment, attr-defined]  # counts nothing here
    return stage1_spine.cache_teacher(config, quiet=True)


def _twice(bench: Bench, arithmetic: str) -> None:
    roots = []
    for turn in "ab":
        report = _cached(_config(bench, arithmetic, f"{arithmetic} {turn}"))
        roots.append(report.content_root)
        release()
    same = "same" if roots[0] == roots[1] else "DIFFER"
    bench.say(f"{arithmetic} content twice", same, note=f"{roots[0][:12]} {roots[1][:12]}")
    facts = open_cache(bench.work / f"cache {arithmetic} a").manifest.precision or {}
    share = facts.get("cells_differ")
    words = f"backbone {facts.get('backbone')}, {facts.get('views')} views, by blend {facts.get('by_blend')}"
    bench.say(f"{arithmetic} cells that differ", "not measured" if share is None else 100 * share, "%", words)


def _against_cpu(bench: Bench) -> None:
    """Hard targets of the float32 cache on the device and on the CPU; by `recompute`, and forward against forward."""
    config = _config(bench, "float32", "float32 a")
    for device in dict.fromkeys((str(bench.device), "cpu")):
        bench.attempt(f"recompute on {device}", _recomputed, bench, config, device)
    inventory = open_inventory(Path(config.data.train))
    maker = ViewMaker(inventory, config.recipe)
    there, here = (
        load_teacher(config.teacher, inventory.classes, torch.device(device), config.recipe.size)
        for device in (bench.device, "cpu")
    )
    views = first_views(maker, 64, 2)
    found = measure(there, here, views)
    bench.say(
        "float32 cells: device against CPU",
        100 * (found.share or 0.0),
        "%",
        f"{found.views} views, by blend {found.differ}",
    )


def _recomputed(bench: Bench, config: Config, device: str) -> None:
    again = recompute(open_cache(config.cache.path), REPLAYED, device, True)
    bench.say(
        f"recompute on {device}",
        again.differing,
        f"of {again.lookups:,} hard targets differ",
        f"margin {again.largest_margin:.2g} at most; probe {again.probe or 'equal'}",
    )


def weights(bench: Bench) -> None:
    """Cached against online: the weights after some steps. Twice cached shows what the student's kernels change."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic kernels ask for
    for words, deterministic in (("", False), (", deterministic kernels", True)):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        cached, again, online = (
            bench.attempt(f"{name}{words}", _trained, bench, name) for name in ("cached", "cached again", "online")
        )
        for name, sha in (("cached again", again), ("online", online)):
            if cached and sha:
                same = "same" if sha == cached else "DIFFER"
                bench.say(f"cached and {name}{words}", same, note=f"{cached} {sha}")


def _trained(bench: Bench, name: str) -> str:
    config = _config(bench, "float32", "weights", max_steps=12)
    if not (Path(config.cache.path) / "sealed.json").exists():
        _cached(config)
    stage2_spine.Progress = Watch()  # type: ignore[assignment, attr-defined]
    report = stage2_spine.train(config, online=name == "online", quiet=True)
    return hashlib.sha256((Path(report.output) / "model.safetensors").read_bytes()).hexdigest()[:12]


def syncs(bench: Bench) -> None:
    """Lines of ours below which the host waits for the device, in steps of both stages."""
    config = _config(bench, "bf16+fold", "syncs", max_steps=16, global_batch=bench.sizes.check // 16)  # one epoch
    bench.attempt("stage 1", _count_syncs, bench, "stage 1", lambda: _cached(config), (1, 3))
    bench.attempt("stage 2", _count_syncs, bench, "stage 2", lambda: stage2_spine.train(config, quiet=True), (4, 12))


def _count_syncs(bench: Bench, name: str, job: Callable[[], object], between: tuple[int, int]) -> None:
    seen: Counter[str] = Counter()
    cuda = bench.device.type == "cuda"

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            ours = [
                f
                for f in traceback.extract_stack()
                if f.filename.startswith(str(ROOT)) and not f.filename.startswith(str(ROOT / "benchmarks"))
            ]
            if ours:
                seen[f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}"] += 1

    def each(step: int) -> None:
        if cuda and step in between:
            torch.cuda.set_sync_debug_mode("warn" if step == between[0] else "default")

    watch = Watch(each=each)
    stage1_spine.Progress = stage2_spine.Progress = watch  # type: ignore[assignment, attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        job()
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    bench.say(
        f"{name} host waits",
        sum(seen.values()),
        f"in {between[1] - between[0]} steps",
        ", ".join(f"{line} x{n}" for line, n in seen.most_common(12)),
    )


def out_of_memory(bench: Bench) -> None:
    """What a user reads where memory runs out: this process may have little of the device's."""
    if bench.device.type != "cuda":
        bench.say("out of memory", "not here", note="needs CUDA")
        return
    cached, config = (_config(bench, "bf16+fold", name) for name in ("before", "without memory"))
    _cached(cached)
    large = replace(config.student, model=bench.sizes.students["base"].model)
    config = replace(config, teacher=replace(config.teacher, batch=4096), student=large)
    release()
    torch.cuda.set_per_process_memory_fraction(0.02)
    bench.attempt("stage 1", _cached, config)
    bench.attempt("stage 2", stage2_spine.train, replace(config, cache=cached.cache), quiet=True)
