"""Stage 2: train the ViT by replaying the cached views; the teacher never runs.

    open      the cache: recipe and teacher facts are its own, a conflicting config is refused
    plan      every epoch's (sample, view) pairs are a pure function, so a resume is one integer
    loop      replay and check views -> mix on the device -> student -> loss against cached targets
    evaluate  every head after each epoch; metrics, resume state, and a plain timm checkpoint

The same command resumes. Launch: `cskd train configs/cifar10.yaml`, or on many GPUs
`torchrun --nproc-per-node 8 --no-python cskd train configs/imagenet_deit_tiny.yaml`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
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
from cskd.config import Config, to_yaml
from cskd.devices import autocast, pick_device, uses_bf16
from cskd.errors import ConfigError, DataError
from cskd.files.scratch import new_scratch
from cskd.files.writer import Writer
from cskd.forwards import teacher_images
from cskd.golden import check_versions
from cskd.inventory import Inventory, open_inventory
from cskd.live import LiveViews
from cskd.loading.stage2 import Batch, BatchMaker, EvalTask, eval_tasks
from cskd.loading.stream import Stream
from cskd.loading.tasks import RunTasks
from cskd.loading.views import ViewMaker
from cskd.losses import DistillationLoss
from cskd.plan import PlanSpec
from cskd.ranks import Ranks, start_ranks, stop_ranks
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import write_whole
from cskd.store.format import RESOLVED
from cskd.student import Student, build_student
from cskd.student.checkpoint import ResumeStates, TrainState, export
from cskd.student.optim import Optimisation, reseed_step
from cskd.targets import CachedTargets, LiveTargets, mixed_labels
from pipeline.conflicts import (
    own_output,
    refuse_conflicts,
    refuse_other_code,
    refuse_other_run,
    run_identity,
    usable_views,
)
from pipeline.evaluate import score_heads
from pipeline.metrics import MetricsLog
from pipeline.online import open_online
from pipeline.outputs import sole_run
from pipeline.progress import Pool, Progress, bound_by, say

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


def train(config: Config, verify_replay: bool = True, online: bool = False, quiet: bool = False) -> TrainReport:
    """Train, finish or resume the run of a config. Raises CskdError; the last saved state stays.

    verify_replay: check every view against the digest in the cache. online: no cache, the teacher runs at every step.
    """
    ranks = start_ranks(config.train.device)
    quiet = quiet or not ranks.first
    try:
        with sole_run(config, ranks, pick_device(config.train.device), quiet) as writer:
            run = _open_run(config, ranks, verify_replay, online, quiet, writer)
            say(run.notes, quiet)
            return _train(run, verify_replay, quiet)
    finally:
        stop_ranks()


@dataclass(frozen=True)
class _Run:
    """What a run is made of, opened and checked."""

    config: Config
    ranks: Ranks
    device: torch.device
    output: Path
    views: Cache | LiveViews
    val: Inventory | None
    student: Student
    plan: PlanSpec
    targets: CachedTargets | LiveTargets
    optimisation: Optimisation
    states: ResumeStates
    identity: dict[str, Any]
    step: int  # updates done by earlier runs
    stop: int  # updates in all
    notes: list[str]
    writer: Writer | None = None  # of the output folder; None on all ranks but the first

    def evaluates(self, epoch: int) -> bool:
        """Whether that epoch is followed by an evaluation: every `eval_every`, and the last."""
        last = (epoch + 1) * self.plan.steps >= self.stop
        return self.val is not None and (last or (epoch + 1) % self.config.train.eval_every == 0)

    @property
    def eval_tasks(self) -> list[EvalTask]:
        """This rank's share of an evaluation."""
        if self.val is None:
            return []
        share = len(self.val) // self.ranks.count  # every rank has a batch: the scores are summed by all together
        batch = max(1, min(self.plan.global_batch // self.ranks.count, share))
        return eval_tasks(len(self.val), batch, self.ranks.rank, self.ranks.count)

    @property
    def models(self) -> dict[str, Student]:
        """The students that are evaluated: the live one, and the averaged one where there is one."""
        averaged = self.optimisation.averaged
        return {"": self.student} | ({"ema.": averaged} if averaged is not None else {})

    def save(self, step: int) -> None:
        """A state that the same command resumes from."""
        if self.writer is not None:
            self.writer.check()
            self.states.save(self.student, self.optimisation, TrainState(step, self.identity))


def _train(run: _Run, verify_replay: bool, quiet: bool) -> TrainReport:
    config, plan, device, ranks = run.config, run.plan, run.device, run.ranks
    start_clock, forwards_before, step = time.perf_counter(), teacher_images(), run.step
    criterion = DistillationLoss(config.loss)
    inputs = InputMaker(run.student.mean, run.student.std, device)
    net = _parallel(run)
    tasks, batches = _batches(run, verify_replay)
    seconds = dict.fromkeys(("decode", "augment", "teacher", "student", "evaluate"), 0.0)

    with (
        tasks,
        MetricsLog(run.output if ranks.first else None, step // plan.steps, config.train.tensorboard) as log,
        Progress("train", run.stop * plan.global_batch, start=step * plan.global_batch, quiet=quiet) as progress,
    ):
        for epoch in range(step // plan.steps, -(-run.stop // plan.steps)):
            losses, counted = torch.zeros(1 + len(TERMS), device=device), 0
            epoch_clock = time.perf_counter()
            end = min(run.stop, (epoch + 1) * plan.steps)
            while step < end:
                batch = next(batches)
                for part, spent in zip(("decode", "augment"), batch["seconds"].tolist(), strict=True):
                    seconds[part] += spent
                clock = time.perf_counter()
                targets = run.targets.of(batch, epoch, device)
                seconds["teacher"] += time.perf_counter() - clock
                clock = time.perf_counter()
                reseed_step(config.train.seed, step, ranks.rank)
                with autocast(config.train.autocast, device):
                    out = net(inputs.mixed(batch), run.views.grid if criterion.uses_patches else None)
                loss, terms = criterion(out, mixed_labels(batch, device), targets)
                run.optimisation.update(loss, step)
                step, counted = step + 1, counted + 1
                losses += torch.stack([loss.detach(), *(terms.get(name, losses.new_zeros(())) for name in TERMS)])
                seconds["student"] += time.perf_counter() - clock
                progress.update(step * plan.global_batch, loss=partial(_mean_loss, losses, counted))
                if config.train.save_every and step % config.train.save_every == 0 and step < end:
                    run.save(step)
            mean = (ranks.sum(losses) / ranks.count / max(1, counted)).tolist()
            if not math.isfinite(mean[0]):
                raise ConfigError(f"the loss of epoch {epoch} is {mean[0]}; lower train.lr or set train.clip_grad")
            row = {"epoch": epoch, "step": step, "lr": run.optimisation.lr, "loss": mean[0]}
            row |= {f"loss_{name}": value for name, value in zip(TERMS, mean[1:], strict=True)}
            if run.evaluates(epoch):
                clock = time.perf_counter()
                scores, unreadable = score_heads(
                    run.models, batches, len(run.eval_tasks), inputs, config.train.autocast, ranks
                )
                row |= {f"top1.{name}": score.top1 for name, score in scores.items()}
                row |= {f"top5.{name}": score.top5 for name, score in scores.items()} | {"unreadable": unreadable}
                seconds["evaluate"] += time.perf_counter() - clock
            tasks.retire(epoch)
            log.add(
                row
                | {"seconds": time.perf_counter() - epoch_clock, "teacher_forwards": teacher_images() - forwards_before}
            )
            if ranks.first:
                export(run.output, run.student, run.optimisation, config, run.views.classes, step)
            run.save(step)  # last: a run that is killed before it comes back here, and does not take the epoch for done
        last = log.rows[-1] if log.rows else {}
    images = (step - run.step) * plan.global_batch
    return TrainReport(
        output=str(run.output),
        steps=step - run.step,
        images=images,
        seconds=time.perf_counter() - start_clock,
        teacher_forwards=teacher_images() - forwards_before,
        top1={name.removeprefix("top1."): top1 for name, top1 in last.items() if name.startswith("top1.")},
        bound_by=bound_by(_pools(run, seconds, tasks.read_seconds), time.perf_counter() - start_clock, images),
        notes=run.notes,
    )


def _open_run(
    config: Config, ranks: Ranks, verify_replay: bool, online: bool, quiet: bool, writer: Writer | None
) -> _Run:
    """Views, targets, student, plan and optimiser of a config, and where an earlier run of it stopped."""
    settings = config.train
    output, device = Path(settings.output), pick_device(settings.device)
    views, targets, notes = _open_views(config, device, ranks, verify_replay, online, quiet)
    val = open_inventory(Path(config.data.val)) if config.data.val else None
    if val is not None and val.classes != views.classes:
        raise DataError(
            f"{config.data.val} has other classes than the images trained on; pack it with --classes and their list"
        )
    if val is not None and len(val) < ranks.count:
        raise DataError(f"{config.data.val} has {len(val)} images for {ranks.count} ranks; expected one a rank or more")

    torch.manual_seed(settings.seed)
    student = build_student(config.student, len(views.classes), views.recipe.size).to(device)
    student.check_grid(views.grid)
    if device.type == "cpu" and uses_bf16(settings.autocast, device):
        student.unfuse_attention()
    plan = PlanSpec.over(
        views,
        views=settings.views,
        repeats=settings.repeats,
        seed=settings.seed,
        global_batch=settings.global_batch,
        window=settings.window,
        ranks=ranks.count,
    )
    optimisation = Optimisation(student, settings, plan.steps)
    states = ResumeStates(output / "resume", keep=settings.keep)
    identity = run_identity(config, views, plan.views, ranks.count, online, device)
    loaded = states.load(student, optimisation)
    ranks.refuse_differing(loaded.step if loaded else 0, device)
    if loaded:
        refuse_other_run(loaded.info, json.loads(json.dumps(identity)), output)
    if ranks.first:
        own_output(output)
        write_whole(output / RESOLVED, to_yaml(config).encode())
    ranks.barrier()
    stop = settings.epochs * plan.steps
    return _Run(
        config=config,
        ranks=ranks,
        device=device,
        output=output,
        views=views,
        val=val,
        student=student.train(),
        plan=plan,
        targets=targets,
        optimisation=optimisation,
        states=states,
        identity=identity,
        step=loaded.step if loaded else 0,
        stop=min(stop, settings.max_steps) if settings.max_steps else stop,
        notes=[*notes, *student.notes, *(loaded.warnings if loaded else [])],
        writer=writer,
    )


def _open_views(
    config: Config, device: torch.device, ranks: Ranks, verify_replay: bool, online: bool, quiet: bool
) -> tuple[Cache | LiveViews, CachedTargets | LiveTargets, list[str]]:
    """What is fed and what is taught, and notes: from a checked cache, or with a teacher that runs live."""
    if online:
        live = open_online(config, device, ranks, quiet)
        return live.views, live.targets, live.notes
    cache = open_cache(config.cache.path, data=Path(config.data.train) if config.data.train else None)
    refuse_conflicts(config, cache)
    refuse_other_code(cache)
    usable_views(cache, config.train.views)
    note = check_versions(cache) if verify_replay else None
    return cache, CachedTargets(cache, config.loss, config.train.epochs), [note] if note else []


def _parallel(run: _Run) -> torch.nn.Module:
    """The student as the loop calls it: compiled where asked for, its gradients averaged over ranks."""
    net: torch.nn.Module = torch.compile(run.student) if run.config.train.compile else run.student  # type: ignore[assignment]
    if run.ranks.count == 1:
        return net
    return DistributedDataParallel(net, device_ids=[run.device.index] if run.device.type == "cuda" else None)


def _batches(run: _Run, verify_replay: bool) -> tuple[RunTasks, Iterator[Batch]]:
    """Every batch of the run, training and evaluation, in the order the loop reads them."""
    settings = run.config.train
    tasks = RunTasks(
        run.views,
        run.plan,
        targets=run.targets.spec,
        evaluate=lambda epoch: run.eval_tasks if run.evaluates(epoch) else [],
        scratch=new_scratch(run.output, run.ranks.rank),
        ahead=settings.workers * settings.prefetch,
        start=run.step,
        stop=run.stop,
        rank=run.ranks.rank,
    )
    views = ViewMaker(run.views.inventory, run.views.recipe)
    clean = ViewMaker(run.val, run.views.recipe) if run.val else None
    recorded = run.views.recorded() if verify_replay and isinstance(run.views, Cache) else None
    maker = BatchMaker(views, clean, settings.eval_crop_pct, recorded)
    pin = run.device.type == "cuda"
    return tasks, iter(Stream(maker, tasks, settings.workers, settings.prefetch, pin_memory=pin))


def _pools(run: _Run, seconds: dict[str, float], read_seconds: float) -> list[Pool]:
    """Who did what for how long."""

    def of(*names: str) -> dict[str, float]:
        return {name: seconds[name] for name in names}

    loader, live = ("decode", "augment"), ("teacher",) if isinstance(run.targets, LiveTargets) else ()
    here = (*live, "student", "evaluate")
    workers = run.config.train.workers
    pools = [Pool(workers, of(*loader)), Pool(1, of(*here))] if workers else [Pool(1, of(*loader, *here))]
    return [*pools, Pool(1, {"read": read_seconds})]


def _mean_loss(losses: Tensor, counted: int) -> str:
    return f"{float(losses[0]) / counted:.3f}"


def render(report: TrainReport, console: Console) -> None:
    """The report for people."""
    rate = report.images / report.seconds if report.seconds else 0.0
    did = (
        f"{report.steps} steps, {report.images:,} images in {report.seconds:.1f} s ({rate:.0f} images/s), "
        f"teacher forwards {report.teacher_forwards}"
        if report.steps
        else "finished before, nothing to do; for another run set another train.output"
    )
    console.print(f"{escape(report.output)}: {did}", soft_wrap=True)
    if report.top1:
        console.print(
            "top-1 %: " + "  ".join(f"{name} {top1:.2f}" for name, top1 in report.top1.items()), soft_wrap=True
        )
    if report.steps:
        console.print(escape(report.bound_by), soft_wrap=True)
