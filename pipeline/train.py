"""Stage 2: train the ViT by replaying the cached views; the teacher never runs.

    open      the cache: recipe and teacher facts are its own, a conflicting config is refused
    plan      every epoch's (sample, view) pairs are a pure function, so a resume is one integer
    loop      replay and check views -> mix on the device -> student -> loss against cached targets
    evaluate  every head after each epoch; metrics, resume state, and a plain timm checkpoint

The same command resumes. Launch: `cskd train configs/cifar10.yaml`, or on many GPUs
`torchrun --nproc-per-node 8 --no-python cskd train configs/imagenet_deit_tiny.yaml`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cskd.augment.device import InputMaker
from cskd.ckf import blend_at
from cskd.config import Config, to_yaml
from cskd.devices import autocast, pick_device
from cskd.epoch_table import TargetSpec
from cskd.errors import CacheError, ConfigError, DataError
from cskd.forwards import teacher_images
from cskd.inventory import open_inventory
from cskd.loading.stage2 import Batch, BatchMaker, eval_tasks
from cskd.loading.stream import Stream
from cskd.loading.tasks import RunTasks
from cskd.loading.views import ViewMaker
from cskd.losses import DistillationLoss, HardTargets, MixedLabels, SoftTargets
from cskd.plan import PlanSpec
from cskd.ranks import Ranks, start_ranks, stop_ranks
from cskd.store.cache import Cache, open_cache
from cskd.store.format import RESOLVED
from cskd.student import build_student
from cskd.student.checkpoint import ResumeStates, TrainState, export
from cskd.student.optim import Optimisation, reseed_step
from pipeline.evaluate import HeadScores, score_heads
from pipeline.metrics import MetricsLog
from pipeline.progress import Progress, bound_by

TERMS = ("label", "dist", "patch")  # of the loss, as logged


@dataclass(frozen=True)
class TrainReport:
    """What one run of stage 2 did."""

    output: str
    steps: int
    images: int  # by this run
    seconds: float
    teacher_forwards: int
    top1: dict[str, float]  # of every head, last evaluation, per cent
    bound_by: str
    notes: list[str]


def train(config: Config, verify_replay: bool = True, quiet: bool = False) -> TrainReport:
    """Train, finish or resume the run of a config. Raises CskdError; the last saved state stays."""
    ranks = start_ranks(config.train.device)
    try:
        return _train(config, ranks, verify_replay, quiet or not ranks.first)
    finally:
        stop_ranks()


def _train(config: Config, ranks: Ranks, verify_replay: bool, quiet: bool) -> TrainReport:
    start_clock = time.perf_counter()
    settings = config.train
    if not settings.output:
        raise ConfigError("train.output is empty; say where results go, for example --set train.output=runs/mine")
    output = Path(settings.output)
    device = pick_device(settings.device)
    cache = open_cache(config.cache.path, data=Path(config.data.train) if config.data.train else None)
    refuse_conflicts(config, cache)
    _refuse_unfinished(cache)

    torch.manual_seed(settings.seed)
    student = build_student(config.student, len(cache.classes), cache.recipe.size).to(device)
    student.check_grid(cache.grid)
    criterion = DistillationLoss(config.loss)
    spec = PlanSpec(
        bounds=cache.inventory.blocks,
        bad=cache.quarantined(),
        inventory_id=cache.inventory.id,
        recipe=cache.recipe,
        views=cache.views,
        repeats=settings.repeats,
        seed=settings.seed,
        global_batch=settings.global_batch,
        window=settings.window,
        ranks=ranks.count,
    )
    stop = settings.epochs * spec.steps
    stop = min(stop, settings.max_steps) if settings.max_steps else stop
    optimisation = Optimisation(student, settings, spec.steps)
    states = ResumeStates(output / "resume", keep=settings.keep)
    loaded = states.load(student, optimisation)
    step = loaded.step if loaded else 0
    notes = [*student.notes, *(loaded.warnings if loaded else [])]
    if ranks.first:
        output.mkdir(parents=True, exist_ok=True)
        (output / RESOLVED).write_text(to_yaml(config), encoding="utf-8")
    ranks.barrier()

    val = open_inventory(Path(config.data.val)) if config.data.val else None
    if val is not None and val.classes != cache.classes:
        raise DataError(
            f"{config.data.val} has other classes than the cache; pack it with --classes and the cache's list"
        )
    evaluated = (
        eval_tasks(len(val), max(2, settings.global_batch // ranks.count), ranks.rank, ranks.count) if val else []
    )

    def due(epoch: int) -> bool:
        last = (epoch + 1) * spec.steps >= stop
        return last or (epoch + 1) % settings.eval_every == 0

    tasks = RunTasks(
        cache,
        spec,
        targets=lambda epoch: _targets_of(config, cache, epoch),
        evaluate=lambda epoch: evaluated if due(epoch) else [],
        scratch=output / "scratch",
        start=step,
        stop=stop,
        rank=ranks.rank,
    )
    worker = BatchMaker(
        ViewMaker(cache.inventory, cache.recipe),
        ViewMaker(val, cache.recipe) if val else None,
        settings.eval_crop_pct,
        verify_replay,
    )
    batches = iter(Stream(worker, tasks, settings.workers, settings.prefetch, pin_memory=device.type == "cuda"))
    net: torch.nn.Module = torch.compile(student) if settings.compile else student  # type: ignore[assignment]
    if ranks.count > 1:
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    inputs = InputMaker(student.mean, student.std, device)
    seconds = {"wait for views": 0.0, "student": 0.0, "evaluate": 0.0}
    scores: dict[str, HeadScores] = {}
    first_step, forwards_before = step, teacher_images()

    with (
        MetricsLog(output if ranks.first else None, step // spec.steps, settings.tensorboard) as log,
        Progress("train", stop * spec.global_batch, start=step * spec.global_batch, quiet=quiet) as progress,
    ):
        for epoch in range(step // spec.steps, -(-stop // spec.steps)):
            losses = torch.zeros(4, device=device)
            counted, epoch_clock = 0, time.perf_counter()
            while step < min(stop, (epoch + 1) * spec.steps):
                clock = time.perf_counter()
                batch = next(batches)
                seconds["wait for views"] += time.perf_counter() - clock
                clock = time.perf_counter()
                reseed_step(settings.seed, step, ranks.rank)
                pixels = inputs.mixed(batch)
                with autocast(settings.autocast, device):
                    out = net(pixels, cache.grid if criterion.uses_patches else None)
                loss, terms = criterion(out, _labels(batch, device), _targets(batch, device, config, cache, epoch))
                if not torch.isfinite(loss):
                    raise ConfigError(
                        f"the loss is {loss.item()} at step {step}; lower train.lr or set train.clip_grad"
                    )
                optimisation.update(loss, step)
                step += 1
                losses += torch.stack([loss.detach(), *(terms.get(name, losses.new_zeros(())) for name in TERMS)])
                counted += 1
                seconds["student"] += time.perf_counter() - clock
                progress.update(step * spec.global_batch, loss=partial(_mean_loss, losses, counted))
                if settings.save_every and step % settings.save_every == 0 and ranks.first:
                    states.save(student, optimisation, TrainState(step))
            clock = time.perf_counter()
            if evaluated and due(epoch):
                models = (
                    {"": student} if optimisation.averaged is None else {"": student, "ema.": optimisation.averaged}
                )
                scores = score_heads(models, batches, len(evaluated), inputs, settings.autocast, ranks)
            seconds["evaluate"] += time.perf_counter() - clock
            tasks.retire(epoch)
            mean = (ranks.sum(losses) / ranks.count / max(1, counted)).tolist()
            row: dict[str, Any] = {
                "epoch": epoch,
                "step": step,
                "lr": optimisation.lr,
                "loss": mean[0],
                **{f"loss_{name}": value for name, value in zip(TERMS, mean[1:], strict=True)},
                "seconds": time.perf_counter() - epoch_clock,
                "teacher_forwards": teacher_images() - forwards_before,
            }
            for name, score in scores.items():
                row |= {f"top1.{name}": score.top1, f"top5.{name}": score.top5}
            log.add(row)
            if ranks.first:
                states.save(student, optimisation, TrainState(step))
                export(output, student, optimisation, config, cache.classes, step)
    return TrainReport(
        output=str(output),
        steps=step - first_step,
        images=(step - first_step) * spec.global_batch,
        seconds=time.perf_counter() - start_clock,
        teacher_forwards=teacher_images() - forwards_before,
        top1={name: score.top1 for name, score in scores.items()},
        bound_by=bound_by(seconds, (step - first_step) * spec.global_batch),
        notes=notes,
    )


def render(report: TrainReport, console: Console) -> None:
    """The report for people."""
    rate = report.images / report.seconds if report.seconds else 0.0
    console.print(
        f"{escape(report.output)}: {report.steps} steps, {report.images} images in {report.seconds:.1f} s ({rate:.0f} images/s)"
    )
    console.print("top-1 %: " + "  ".join(f"{name} {top1:.2f}" for name, top1 in report.top1.items()))
    console.print(f"teacher forwards {report.teacher_forwards}")
    for line in (report.bound_by, *report.notes):
        console.print(escape(line))


def _mean_loss(losses: Tensor, counted: int) -> str:
    return f"{float(losses[0]) / counted:.3f}"


def _labels(batch: Batch, device: torch.device) -> MixedLabels:
    return MixedLabels(*(batch[n].to(device, non_blocking=True) for n in ("label", "partner_label", "share")))


def _targets_of(config: Config, cache: Cache, epoch: int) -> TargetSpec:
    """What the epoch table holds: a method without a teacher reads none, a soft one needs a codec with logits."""
    method = config.loss.method
    blend = blend_at(epoch, config.train.epochs, config.loss.decay)
    codecs = cache.codecs.values()
    if method.endswith("soft"):
        soft = [c.name for c in codecs if c.soft]
        if not soft:
            raise ConfigError(
                f"loss.method {method} needs the teacher's logits and {cache.root} holds only {list(cache.codecs)}; "
                "cache with cache.codecs: [envelope, int8], or use a '-hard' method"
            )
        return TargetSpec("soft", soft[0], blend)
    codec = next((c.name for c in codecs if c.exact_hard), next(iter(cache.codecs)))
    kind = {"none": "none", "deit-hard": "global", "cskd-hard": "cells"}[method]
    return TargetSpec(kind, codec, blend)


def _targets(
    batch: Batch, device: torch.device, config: Config, cache: Cache, epoch: int
) -> HardTargets | SoftTargets | None:
    """The cached targets of a batch, as the loss reads them."""
    spec = _targets_of(config, cache, epoch)
    if spec.kind == "none":
        return None
    if spec.kind == "soft":
        stored = {n.removeprefix("target."): t.to(device) for n, t in batch.items() if n.startswith("target.")}
        dense, image = cache.codecs[spec.codec].logits_torch(stored)
        return SoftTargets(image, dense, spec.blend)
    cells = batch.get("cell_class")
    return HardTargets(batch["global_class"].to(device), None if cells is None else cells.to(device))


# Facts of the teacher that a config for training may repeat; weights may lie elsewhere, batch and device don't matter.
_TEACHER_FACTS = ("model", "kwargs", "input_size", "mean", "std", "classes", "dense", "grid")


def refuse_conflicts(config: Config, cache: Cache) -> None:
    """Recipe and teacher are the cache's; a key the config states otherwise is an error, not a silent override."""
    made = cache.manifest["config"]
    for key in sorted(config.given):
        section, _, name = key.partition(".")
        if section == "recipe" or (section == "teacher" and name in _TEACHER_FACTS):
            asked, cached = getattr(getattr(config, section), name), made[section][name]
            if section == "teacher" and name == "model":
                asked, cached = Path(asked).name, Path(cached).name
            if asked != cached:
                raise ConfigError(
                    f"{key} is {asked!r}, the cache {cache.root} was made with {cached!r}; leave it out or set it so"
                )


def _refuse_unfinished(cache: Cache) -> None:
    missing = cache.missing()
    if missing:
        raise CacheError(
            f"{cache.root} lacks {len(missing)} of {cache.blocks * cache.views} units, the first is block {missing[0][0]}, "
            f"view {missing[0][1]}; finish it with `cskd cache-teacher {cache.root / RESOLVED}`"
        )
