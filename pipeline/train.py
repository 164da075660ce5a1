"""Stage 2: train the ViT by replaying the cached views; the teacher never runs.

    open      the cache: recipe and teacher facts are its own, a conflicting config is refused
    plan      every epoch's (sample, view) pairs are a pure function, so a resume is one integer
    loop      replay and check views -> mix on the device -> student -> loss against cached targets
    evaluate  every head after each epoch; metrics, resume state, and a plain timm checkpoint

The same command resumes. Launch: `cskd train configs/cifar10.yaml`, or on many GPUs
`torchrun --nproc-per-node 8 --no-python cskd train configs/imagenet_deit_tiny.yaml`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch.nn.parallel import DistributedDataParallel

from cskd.augment.device import InputMaker
from cskd.config import Config, to_yaml
from cskd.devices import autocast, pick_device, uses_bf16
from cskd.errors import ConfigError, DataError
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
from cskd.student.average import average_notes
from cskd.student.best import Best, BestWeights, score_asked
from cskd.student.checkpoint import ResumeStates, TrainState, export
from cskd.student.finite import NotFiniteError
from cskd.student.optim import Optimisation, reseed_step
from cskd.targets import CachedTargets, LiveTargets, mixed_labels
from pipeline.conflicts import (
    as_begun,
    changed_on_resume,
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
from pipeline.progress import Pool, Progress, bound_by, say
from pipeline.run_state import PROGRESS, RunState, named_bests, stopped

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
    weights: str = ""  # what model.safetensors holds


def train(config: Config, verify_replay: bool = True, online: bool = False, quiet: bool = False) -> TrainReport:
    """Train, finish or resume the run of a config. Raises CskdError; the last saved state stays.

    verify_replay: check every view against the digest in the cache. online: no cache, the teacher runs at every step.
    """
    ranks = start_ranks(config.train.device)
    quiet = quiet or not ranks.first
    try:
        run = _open_run(config, ranks, verify_replay, online, quiet)
        say(run.notes, quiet)
        try:
            return _train(run, verify_replay, quiet)
        except NotFiniteError as e:
            raise stopped(e, run.state, run.states, config.train.lr, config.train.clip_grad) from e
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
    state: RunState
    step: int  # updates done by earlier runs
    stop: int  # updates in all
    notes: list[str]

    def evaluates(self, epoch: int) -> bool:
        """Whether that epoch is followed by an evaluation: those of the schedule, and where `max_steps` stops."""
        stops = (epoch + 1) * self.plan.steps >= self.stop
        return self.val is not None and (stops or self.scheduled(epoch))

    def scheduled(self, epoch: int) -> bool:
        """Whether a run that nothing stops evaluates after that epoch: every `eval_every`, and the last."""
        return (epoch + 1) % self.config.train.eval_every == 0 or epoch + 1 == self.config.train.epochs

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
        """A state that the same command resumes from. NotFiniteError on every rank where it would not be finite."""
        self.state.check(step, self.student, self.optimisation)
        info = {**self.identity, PROGRESS: self.state.record()}
        if self.ranks.first:
            self.states.save(self.student, self.optimisation, TrainState(step, info), self.state.good)
            BestWeights(self.states.folder).keep(named_bests(self.states))
        self.state.saved = step

    def export(self, step: int) -> str:
        """Write what others use. Returns: what model.safetensors holds."""
        if not self.ranks.first:
            return ""
        classes, best, changed = self.views.classes, self.state.shown, self.state.said()
        return export(self.output, self.student, self.optimisation, self.config, classes, step, best, changed)

    def improved(self, row: dict[str, Any]) -> Best | None:
        """The best after an evaluation, its weights written where it is a new one."""
        name, best = self.config.train.best, self.state.best
        if name is None or (best is not None and row[name] <= best.score):
            return best
        best = Best(name, row[name], row["step"])
        return BestWeights(self.states.folder).put(best, self.models[best.prefix]) if self.ranks.first else best


def _train(run: _Run, verify_replay: bool, quiet: bool) -> TrainReport:
    config, plan, device, ranks, state = run.config, run.plan, run.device, run.ranks, run.state
    start_clock, forwards_before, step = time.perf_counter(), teacher_images(), run.step
    criterion = DistillationLoss(config.loss)
    inputs = InputMaker(run.student.mean, run.student.std, device)
    net = _parallel(run)
    tasks, batches = _batches(run, verify_replay)
    seconds = dict.fromkeys(("decode", "augment", "teacher", "student", "evaluate"), 0.0)
    weights = run.export(step) if step >= run.stop else ""
    # A run that is finished has none, and keeps the row of an epoch that `max_steps` cut.
    epochs = range(step // plan.steps, -(-run.stop // plan.steps)) if step < run.stop else range(step, step)

    with (
        tasks,
        MetricsLog(run.output if ranks.first else None, epochs.start, config.train.tensorboard) as log,
        Progress("train", run.stop * plan.global_batch, start=step * plan.global_batch, quiet=quiet) as progress,
    ):
        for epoch in epochs:
            state.begin()
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
                step += 1
                state.add(loss, terms, step)
                seconds["student"] += time.perf_counter() - clock
                progress.update(step * plan.global_batch, loss=state.mean_loss)
                if config.train.save_every and step % config.train.save_every == 0 and step < end:
                    run.save(step)
            state.check(step, run.student, run.optimisation)
            row: dict[str, Any] = {"epoch": epoch, "step": step, "lr": run.optimisation.lr} | state.row()
            if changes := state.said(epoch * plan.steps, step):
                row["changed"] = "; ".join(changes)
            state.shown = state.best
            if run.evaluates(epoch):
                clock = time.perf_counter()
                scores, unreadable = score_heads(
                    run.models, batches, len(run.eval_tasks), inputs, config.train.autocast, ranks
                )
                row |= {f"top1.{name}": score.top1 for name, score in scores.items()}
                row |= {f"top5.{name}": score.top5 for name, score in scores.items()} | {"unreadable": unreadable}
                state.shown = run.improved(row)
                seconds["evaluate"] += time.perf_counter() - clock
            tasks.retire(epoch)
            log.add(row | {"seconds": state.seconds, "teacher_forwards": state.teacher_forwards})
            weights = run.export(step)
            if step % plan.steps == 0:  # an epoch that `max_steps` cut goes on when the run does
                state.end(scored=run.scheduled(epoch))
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
        weights=weights,
    )


def _open_run(config: Config, ranks: Ranks, verify_replay: bool, online: bool, quiet: bool) -> _Run:
    """Views, targets, student, plan and optimiser of a config, and where an earlier run of it stopped."""
    if not config.train.output:
        raise ConfigError("train.output is empty; say where results go, for example --set train.output=runs/mine")
    output, device = Path(config.train.output), pick_device(config.train.device)
    states = ResumeStates(output / "resume", keep=config.train.keep)
    config, kept_notes = as_begun(config, next(iter(states.infos().values()), None))
    settings = config.train
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
    config = _with_best(config, student)
    identity = run_identity(config, views, plan.views, ranks.count, online, device, val)
    loaded = states.load(student, optimisation)
    ranks.refuse_differing(loaded.step if loaded else 0, device)
    stop = min(settings.epochs * plan.steps, settings.max_steps or 1 << 62)
    state = RunState(ranks, device, TERMS, len(views.classes))
    if loaded:
        begun = {name: value for name, value in loaded.info.items() if name != PROGRESS}
        refuse_other_run(begun, identity, output)
        state.restore(loaded.info.get(PROGRESS), loaded.step, plan.steps)
        state.change(changed_on_resume(begun, identity), loaded.step, finished=loaded.step >= stop)
        state.forget_lost_best(BestWeights(states.folder))
    if ranks.first:
        own_output(output)
        write_whole(output / RESOLVED, to_yaml(config).encode())
    ranks.barrier()
    averaging = average_notes(settings.ema, settings.ema_warmup, stop)
    warnings = loaded.warnings if loaded else []
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
        state=state,
        step=loaded.step if loaded else 0,
        stop=stop,
        notes=[*notes, *student.notes, *kept_notes, *averaging, *state.said(), *state.notes, *warnings],
    )


def _with_best(config: Config, student: Student) -> Config:
    """The config with the score by which the best weights are kept by name. ConfigError where no evaluation gives it."""
    train = config.train
    if train.best is None and train.export != "best":
        return config
    if not config.data.val:
        asked = "train.export is best" if train.best is None else f"train.best is {train.best}"
        raise ConfigError(f"{asked} and data.val is empty; set it to a packed validation set, or leave the other out")
    best = score_asked(train.best, student, train.ema is not None, config.loss.method != "none")
    return dataclasses.replace(config, train=dataclasses.replace(train, best=best))


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
        scratch=run.output / "scratch",
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
    if report.weights:
        console.print(escape(f"model.safetensors: {report.weights}"), soft_wrap=True)
    if report.steps:
        console.print(escape(report.bound_by), soft_wrap=True)
