"""Stage 1 over the bare forward of the same network: `cache_teacher` on JPEGs, and the network alone."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

import cskd.pipeline.cache_teacher as spine
from benchmarks.gpu.bench import Bench, computing, peak_mib, release, teacher_keys
from benchmarks.gpu.clocks import Watch, buffers, seconds_of
from cskd.teacher.build import build_model
from cskd.teacher.fold import fold_norms


def bare(bench: Bench, model: str, arithmetic: str, own_bf16: bool = False) -> float:
    """Images per second of the network's plain forward in an arithmetic, the batch on the device.

    own_bf16: weights and input in bf16, in place of autocast.
    """
    s = bench.sizes
    net: Any = build_model(model, {"num_classes": s.classes})
    net.load_state_dict(load_file(bench.weights(model)))
    net = net.to(bench.device).eval().to(memory_format=torch.channels_last)
    x = torch.randn(s.teacher_batch, 3, s.pixels, s.pixels, device=bench.device)
    x = x.contiguous(memory_format=torch.channels_last)
    if "fold" in arithmetic:
        with torch.no_grad(), computing("float32", bench.device):
            fold_norms(net, x[:2])
    if own_bf16:
        net, x = net.bfloat16(), x.bfloat16()
    run: Any = torch.compile(net, dynamic=False) if "compile" in arithmetic else net
    with torch.no_grad(), computing("tf32" if own_bf16 else arithmetic, bench.device):
        calls = 3 * s.calls  # seconds, not a burst: under a long load the clocks of a GPU are lower
        return s.teacher_batch / seconds_of(lambda: run(x), calls, bench.device)


WORKERS = {"bf16+fold+compile": 12, "bf16+fold": 10, "bf16": 8, "fp16": 8, "tf32": 6, "float32": 2}  # that keep up


def stage1(
    bench: Bench, model: str, arithmetic: str, workers: int = 0, images: int = 0, cache: str = "", row: str = ""
) -> float:
    """Views per second of the second half of stage 1's loop; says what it is bound by, and its peak on the device.

    workers: 0 for all; images: 0 for as many as fill all buffers of the workers twice. row: its
    name among the figures.
    """
    watch, keys, s = Watch(), teacher_keys(arithmetic), bench.sizes
    workers = min(s.workers, workers or s.workers)
    images = images or 2 * buffers(workers) * s.teacher_batch
    spine.Progress = watch  # type: ignore[assignment, attr-defined]  # the name that the stage looks up
    config = bench.config(model, images, keys, cache or f"{model} {arithmetic}", cache_workers=workers)
    report = spine.cache_teacher(config, quiet=True)
    rate, whole = watch.second_half(), report.images / report.loop_seconds
    bench.say(
        row or f"{arithmetic} stage 1",
        rate,
        "views/s",
        f"{peak_mib(bench.device):,.0f} MiB; {watch.new_buffers}; {report.bound_by}; {whole:,.0f} over all "
        f"{report.images:,} in {report.loop_seconds:.1f} s, {report.seconds:.0f} s with start",
    )
    return rate


def compare(bench: Bench, model: str, arithmetic: str, workers: int = 0, images: int = 0, cache: str = "") -> None:
    """Both, and their ratio. Arguments of `stage1`."""
    if bench.device.type == "cpu" and arithmetic.startswith("tf32"):
        bench.say(arithmetic, "not here", note="needs CUDA")
        return

    def both() -> None:
        alone = bare(bench, model, arithmetic)
        bench.say(f"{arithmetic} bare forward", alone, "images/s", f"{peak_mib(bench.device):,.0f} MiB")
        release()
        rate = stage1(bench, model, arithmetic, workers, images, cache)
        bench.say(f"{arithmetic} stage 1 / bare", rate / alone, "", "goal >= 0.95")

    bench.attempt(arithmetic, both)


def regnety_best(bench: Bench) -> None:
    """The fastest that is not compiled: goal 3,500 views/s."""
    compare(bench, bench.sizes.teacher, "bf16+fold", WORKERS["bf16+fold"])

    def own() -> None:
        rate = bare(bench, bench.sizes.teacher, "bf16+fold", own_bf16=True)
        bench.say("bf16+fold bare, weights in bf16", rate, "images/s")

    bench.attempt("bf16+fold bare, weights in bf16", own)


def regnety_others(bench: Bench) -> None:
    """The other arithmetics, slower ones with fewer workers and images."""
    for arithmetic in ("bf16", "tf32", "fp16", "float32"):
        compare(bench, bench.sizes.teacher, arithmetic, WORKERS[arithmetic])


def regnety_compiled(bench: Bench) -> None:
    compare(bench, bench.sizes.teacher, "bf16+fold+compile", WORKERS["bf16+fold+compile"])


def light(bench: Bench) -> None:
    """A network that the loader holds up. What it caches is what stage 2 trains on."""
    compare(bench, bench.sizes.light, "bf16+fold", images=bench.sizes.many, cache="stage 2")


def stage2_cache(bench: Bench) -> None:
    """That cache, made now where the section that times it made none."""
    if not (bench.cache("stage 2") / "sealed.json").exists():
        stage1(bench, bench.sizes.light, "bf16+fold", images=bench.sizes.many, cache="stage 2")
