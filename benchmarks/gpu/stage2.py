"""Stage 2: a training step from the cache over a plain supervised one, and over the same step without a loader."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import TokenDistillationTask
from timm.utils.model_ema import ModelEmaV3

import cskd.pipeline.train as spine
from benchmarks.gpu.bench import Bench, StudentRun, peak_mib, release, teacher_keys
from benchmarks.gpu.clocks import Enough, Watch, buffers
from benchmarks.gpu.stage1 import stage2_cache
from cskd.config import Config
from cskd.dataset.inventory import open_inventory
from cskd.loading.targets import mixed_labels
from cskd.machine.arithmetic import autocast
from cskd.machine.ranks import Ranks
from cskd.machine.threads import choose_threads, computing_with
from cskd.method.losses import DistillationLoss, HardTargets, MixedLabels
from cskd.method.terms import needs
from cskd.pipeline.online import UNREADABLE_FILE
from cskd.pipeline.training_run import open_run
from cskd.student import build_student
from cskd.student.optim import Optimisation
from cskd.teacher.build import build_model, load_weights
from cskd.views.mix_pixels import InputMaker

WORKERS_NEVER_STOP = 1.25  # steps of a run over those that are timed: the workers are busy until the clock stops


def step_config(bench: Bench, student: str, method: str, online: bool = False, **train: Any) -> Config:
    """Of a run whose steps are timed. The cache is the light teacher's; online the large one runs, at its fastest."""
    s = bench.sizes
    run = s.students[student]
    stop = int((warm_of(bench, run) + run.steps) * WORKERS_NEVER_STOP)
    model, keys = (s.teacher if online else s.light), teacher_keys("bf16+fold")
    return bench.config(model, s.many, keys, "stage 2", run, method, **{"max_steps": stop, **train})


def warm_of(bench: Bench, run: StudentRun) -> int:
    """Steps of a run with a loader before the clock runs: until all of its buffers are there, and no epoch ends while it
    runs."""
    warm, epoch = max(run.warm, buffers(bench.sizes.workers)) + 2, bench.sizes.many // run.batch
    return warm if warm // epoch == (warm + run.steps) // epoch else -(-warm // epoch) * epoch + 2


def timed(bench: Bench, student: str, config: Config, online: bool, each: Callable[[int], None] | None = None) -> Watch:
    """The loop of `cskd.pipeline.train` itself, until its steps are timed."""
    run = bench.sizes.students[student]
    watch = Watch(warm_of(bench, run), run.steps, each)
    spine.Progress = watch  # type: ignore[assignment, attr-defined]  # the names that the stage looks up
    spine.timed_start = watch.timed_start  # type: ignore[attr-defined]
    if online:  # every image can be decoded: said as an earlier start of the run would
        about = {"inventory": open_inventory(Path(config.data.train)).id, "samples": {}}
        Path(config.train.output).mkdir(parents=True)
        (Path(config.train.output) / UNREADABLE_FILE).write_text(json.dumps(about))
    try:
        spine.train(config, online=online, quiet=True)
    except Enough:
        return watch
    raise RuntimeError(f"the run ended after {len(watch.points)} steps, expected more than {watch.wanted}")


def side(bench: Bench, student: str, name: str, method: str, online: bool = False, **train: Any) -> float:
    """Milliseconds per step of one side; says what its loop waited for."""
    run = bench.sizes.students[student]
    begun = time.perf_counter()
    watch = timed(bench, student, step_config(bench, student, method, online, **train), online)
    loader = watch.loader_rate * bench.sizes.workers
    bound = "loader-bound" if watch.wait_share > 0.1 else "device or host"
    teacher = (
        f"its logits are there, and what was launched before them done, after {watch.teacher_ms:.0f} ms; "
        if online
        else ""
    )
    bench.say(
        name,
        1e3 * watch.seconds,
        "ms/step",
        f"{bound}, waits {100 * watch.wait_share:.0f} %; {watch.new_buffers}; {run.batch / watch.seconds:,.0f} views/s; "
        f"workers can {loader:,.0f}; {peak_mib(bench.device):,.0f} MiB; {teacher}{time.perf_counter() - begun:.0f} s in all",
    )
    return 1e3 * watch.seconds


def bare(bench: Bench, student: str, name: str, method: str, **train: Any) -> float:
    """Milliseconds per step of the same student, loss and optimiser, on a batch that lies on the device."""
    run, device = bench.sizes.students[student], bench.device
    config = step_config(bench, student, method, **train)
    grid = (-(-bench.sizes.pixels // 32),) * 2
    torch.manual_seed(0)
    own = build_student(config.student, bench.sizes.classes, bench.sizes.pixels).to(device).train()
    own.freeze_unused(config.loss)
    optimisation, criterion = Optimisation(own, config.train, 1000), DistillationLoss(config.loss)
    net: Any = torch.compile(own) if config.train.compile else own
    x = torch.randn(run.batch, 3, bench.sizes.pixels, bench.sizes.pixels, device=device)
    y = torch.randint(bench.sizes.classes, (run.batch,), device=device)
    labels, targets = MixedLabels(y, y, torch.ones(run.batch, device=device)), None
    if needs(config.loss).hard != "none":
        targets = HardTargets(y, y[:, None, None].expand(-1, *grid).contiguous())
    clock = 0.0
    for step in range(run.warm + run.steps):
        with autocast(config.train.autocast, device):
            out = net(x, grid if criterion.uses_patches else None)
        loss, _ = criterion(out, labels, targets)
        optimisation.update(loss, step)
        if step + 1 == run.warm:
            loss.item()
            clock = time.perf_counter()
    loss.item()
    ms = 1e3 * (time.perf_counter() - clock) / run.steps
    bench.say(name, ms, "ms/step", f"{1e3 * run.batch / ms:,.0f} views/s; {peak_mib(device):,.0f} MiB")
    return ms


def sides(bench: Bench, student: str, compiled: bool = False, raw: bool = False) -> None:
    """All sides of a student, and the ratios of those that came through. raw: of the two whose views the host makes, on shards
    of raw pixels."""
    bench.raw = raw
    bench.attempt("cache", stage2_cache, bench)
    ms: dict[str, float] = {}
    jobs: tuple[tuple[str, Callable[..., float], str, dict[str, Any]], ...] = (
        ("cached, views on the device", side, "cskd-hard", {"augment": "device"}),
        ("supervised, views on the device", side, "none", {"augment": "device"}),
        ("cached", side, "cskd-hard", {}),
        ("supervised", side, "none", {}),
        ("bare cskd-hard", bare, "cskd-hard", {}),
        *(() if compiled else (("bare none", bare, "none", {}),)),
    )
    for name, run, method, more in [job for job in jobs if not raw or (job[1] is side and not job[3])]:
        found = bench.attempt(name, run, bench, student, name, method, compile=compiled, **more)
        ms |= {} if found is None else {name: found}
    for a, b, goal in (
        ("cached", "supervised", "goal <= 1.02"),
        ("cached, views on the device", "supervised, views on the device", "goal <= 1.02"),
        ("cached, views on the device", "bare cskd-hard", ""),
        ("supervised, views on the device", "bare none", ""),
        ("cached, views on the device", "cached", ""),
    ):
        if a in ms and b in ms:
            bench.say(f"{a} / {b}", ms[a] / ms[b], "", goal)


def online(bench: Bench, student: str) -> None:
    """The large teacher at every step, at its fastest."""
    bench.attempt("online", side, bench, student, "online", "cskd-hard", online=True)


def timm_kd(bench: Bench) -> None:
    """timm's TokenDistillationTask, hard, with its teacher under autocast, on our loader: timm's online step."""
    bench.attempt("cache", stage2_cache, bench)
    s, device, run = bench.sizes, bench.device, bench.sizes.students["tiny"]
    config = step_config(bench, "tiny", "none")
    model: Any = timm.create_model(run.model, num_classes=s.classes, img_size=s.pixels, **s.student_kwargs).to(device)
    model.set_distilled_training(True)
    teacher: Any = build_model(s.teacher, {"num_classes": s.classes})
    load_weights(teacher, bench.weights(s.teacher))
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    task: Any = TokenDistillationTask(
        model, teacher, SoftTargetCrossEntropy(), distill_type="hard", device=device, verbose=False
    )
    task.train()
    fused: dict[str, Any] = {"fused": True} if device.type == "cuda" else {}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, **fused)
    average = ModelEmaV3(model, decay=config.train.ema or 0.0, use_warmup=False)
    with computing_with(choose_threads(None, "train.threads", s.workers).count):
        threads = choose_threads(None, "train.threads", s.workers)
        opened = open_run(config, Ranks(), device, True, False, True, threads, None)
        tasks, batches = opened.batches()
        inputs, clock = InputMaker(opened.student.mean, opened.student.std, device), 0.0
        with tasks:
            warm = warm_of(bench, run)
            for step in range(warm + run.steps):
                batch = next(batches)
                pixels, labels = inputs.mixed(batch), mixed_labels(batch, device)
                target = torch.full((run.batch, s.classes), 0.1 / s.classes, device=device)
                target.scatter_add_(1, labels.label[:, None], 0.9 * labels.lam[:, None])
                target.scatter_add_(1, labels.partner[:, None], 0.9 * (1 - labels.lam)[:, None])
                with autocast("bf16", device):
                    loss = task(pixels, target)["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update(model, step=step)
                if step + 1 == warm:
                    loss.item()
                    clock = time.perf_counter()
            loss.item()
        ms = 1e3 * (time.perf_counter() - clock) / run.steps
    bench.say(
        "online by timm, tiny",
        ms,
        "ms/step",
        f"{1e3 * run.batch / ms:,.0f} views/s; {peak_mib(device):,.0f} MiB; no terms of patches",
    )
    release()
