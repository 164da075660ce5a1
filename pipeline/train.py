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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch.nn.parallel import DistributedDataParallel

from cskd.config import Config, to_yaml
from cskd.dataset.inventory import Inventory
from cskd.errors import CacheError, ConfigError
from cskd.files.scratch import new_scratch
from cskd.files.writer import Writer
from cskd.loading.live import LiveViews
from cskd.loading.plan import PlanSpec
from cskd.loading.stage2 import Batch, BatchMaker, EvalTask, eval_tasks
from cskd.loading.stream import Stream
from cskd.loading.targets import CachedTargets, LiveTargets, NoTargets, mixed_labels
from cskd.loading.tasks import RunTasks
from cskd.machine.devices import arithmetic, autocast, pick_device, uses_bf16
from cskd.machine.ranks import Ranks, start_ranks, stop_ranks
from cskd.machine.threads import Threads, begun_with, choose_threads, computing_with
from cskd.method.losses import DistillationLoss
from cskd.pipeline.baseline import open_baseline
from cskd.pipeline.conflicts import (
    as_begun,
    changed_on_resume,
    own_output,
    refuse_conflicts,
    refuse_other_code,
    refuse_other_run,
    run_identity,
    usable_views,
)
from cskd.pipeline.evaluate import score_heads
from cskd.pipeline.online import open_online
from cskd.pipeline.outputs import sole_run
from cskd.pipeline.precheck import open_plan, open_val, student_notes, view_notes, with_best
from cskd.pipeline.run_state import PROGRESS, RunState, named_bests, stopped
from cskd.pipeline.show.metrics import MetricsLog
from cskd.pipeline.show.progress import Notes, Pool, Progress, bound_by, timed_start
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import write_whole
from cskd.store.format import RESOLVED
from cskd.store.golden import check_versions
from cskd.student import Student, build_student
from cskd.student.average import average_notes
from cskd.student.best import Best, BestWeights
from cskd.student.checkpoint import ResumeStates, TrainState, export, exported_prefix
from cskd.student.finite import NotFiniteError
from cskd.student.heads import score_head
from cskd.student.optim import Optimisation, reseed_step
from cskd.teacher.forwards import teacher_images
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import InputMaker

TERMS = ("label", "dist", "patch")  # of the loss, as logged


@dataclass(frozen=True)
class TrainReport:
    """What one run of stage 2 did."""

    output: str
    steps: int
    images: int  # by this run
    seconds: float
    other_seconds: float  # of them: until the first batch came, and of evaluation
    teacher_forwards: int  # on all ranks
    top1: dict[str, float]  # of every head, last evaluation, per cent
    score: str  # which of them is the student's: what timm computes from the exported weights
    arithmetic: str  # of the evaluation
    bound_by: str
    notes: list[str]
    weights: str = ""  # what model.safetensors holds


def train(config: Config, verify_replay: bool = True, online: bool = False, quiet: bool = False) -> TrainReport:
    """Train, finish or resume the run of a config. Raises CskdError; the last saved state stays.

    verify_replay: check every view against the digest in the cache. online: no cache, the teacher runs at every step.
    """
    ranks = start_ranks(config.train.device)
    quiet = quiet or not ranks.first
    threads = choose_threads(config.train.threads, "train.threads", config.train.workers)
    try:
        folder = sole_run(config, ranks, pick_device(config.train.device), quiet)
        with computing_with(threads.count), folder as writer:
            run = _open_run(config, ranks, verify_replay, online, quiet, threads, writer)
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
    targets: CachedTargets | LiveTargets | NoTargets
    optimisation: Optimisation
    states: ResumeStates
    identity: dict[str, Any]
    state: RunState
    step: int  # updates done by earlier runs
    stop: int  # updates in all
    notes: list[str]
    writer: Writer | None = None  # of the output folder; None on all ranks but the first

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

    @property
    def score(self) -> str:
        """The evaluated head, or average of heads, that is the run's score: what timm computes from model.safetensors."""
        return exported_prefix(self.config, self.state.shown) + score_head(self.student.trained)

    def save(self, step: int) -> None:
        """A state that the same command resumes from. NotFiniteError on every rank where it would not be finite."""
        self.state.check(step, self.student, self.optimisation)
        info = {**self.identity, PROGRESS: self.state.record()}
        if self.writer is not None:
            self.writer.check()
            self.states.save(self.student, self.optimisation, TrainState(step, info), self.state.good)
            BestWeights(self.states.folder).keep(named_bests(self.states))
        self.state.saved = step

    def export(self, step: int) -> str:
        """Write what others use. Returns: what model.safetensors holds."""
        if self.writer is None:
            return ""
        self.writer.check()
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
    seconds = dict.fromkeys(("start", "decode", "augment", "teacher", "student", "evaluate"), 0.0)
    tasks, batches = _batches(run, verify_replay)
    batches = timed_start(batches, seconds)
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
            if run.writer is not None:
                run.writer.check()
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
                row |= {"score": run.score, "arithmetic": _arithmetic(run)}
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
        other_seconds=seconds["start"] + seconds["evaluate"],
        teacher_forwards=ranks.total(teacher_images() - forwards_before, device),
        top1={name.removeprefix("top1."): top1 for name, top1 in last.items() if name.startswith("top1.")},
        score=run.score,
        arithmetic=_arithmetic(run),
        bound_by=bound_by(_pools(run, seconds, tasks.read_seconds), time.perf_counter() - start_clock, images),
        notes=run.notes,
        weights=weights,
    )


def _open_run(
    config: Config,
    ranks: Ranks,
    verify_replay: bool,
    online: bool,
    quiet: bool,
    threads: Threads,
    writer: Writer | None,
) -> _Run:
    """Views, targets, student, plan and optimiser of a config, and where an earlier run of it stopped."""
    output, device, notes = Path(config.train.output), pick_device(config.train.device), Notes(quiet)
    states = ResumeStates(output / "resume", keep=config.train.keep)
    config, as_before = as_begun(config, next(iter(states.infos().values()), None))
    settings = config.train
    views, targets = _open_views(config, device, ranks, verify_replay, online, quiet, notes)
    val = open_val(config, views.classes, ranks.count)
    torch.manual_seed(settings.seed)
    student = build_student(config.student, len(views.classes), views.recipe.size).to(device)
    student.taught_by(config.loss)
    notes.add([*student.notes, *student_notes(student, views.grid, config.loss), *view_notes(config, views.recipe)])
    notes.add(as_before)
    if device.type == "cpu" and uses_bf16(settings.autocast, device):
        student.unfuse_attention()
    plan = open_plan(settings, views, ranks.count)
    optimisation = Optimisation(student, settings, plan.steps)
    config = with_best(config, student)
    identity = run_identity(config, views, plan.views, ranks.count, online, device, val)
    loaded = states.load(student, optimisation)
    ranks.refuse_differing(loaded.step if loaded else 0, device)
    stop = min(settings.epochs * plan.steps, settings.max_steps or 1 << 62)
    state = RunState(ranks, device, TERMS, len(views.classes))
    if loaded:
        begun = {name: value for name, value in loaded.info.items() if name != PROGRESS}
        notes.add(loaded.warnings)
        refuse_other_run(begun, identity, output, student.distilled)
        if device.type == "cpu":
            threads, unknown = begun_with(begun.get("threads"), threads, settings.threads is not None)
            notes.add(unknown if "threads" not in begun else [])
    if device.type == "cpu":
        identity["threads"] = threads.count
    if loaded:
        state.restore(loaded.info.get(PROGRESS), loaded.step, plan.steps)
        state.change(changed_on_resume(begun, identity), loaded.step, finished=loaded.step >= stop)
        state.forget_lost_best(BestWeights(states.folder))
    torch.set_num_threads(threads.count)
    if ranks.first:
        own_output(output)
        write_whole(output / RESOLVED, to_yaml(config).encode())
    ranks.barrier()
    notes.add([*average_notes(settings.ema, settings.ema_warmup, stop), *state.said(), *state.notes, str(threads)])
    notes.say()
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
        notes=notes.all,
        writer=writer,
    )


def _open_views(
    config: Config, device: torch.device, ranks: Ranks, verify_replay: bool, online: bool, quiet: bool, notes: Notes
) -> tuple[Cache | LiveViews, CachedTargets | LiveTargets | NoTargets]:
    """What is fed and what is taught: from a checked cache, with a teacher that runs live, or from images alone.

    Method none needs no targets: it reads a cache only where cache.path names one.
    """
    baseline = config.loss.method == "none"
    if baseline and (online or not config.cache.path):
        source, nothing, about = open_baseline(config, ranks, online, quiet)
        notes.add(about)
        return source, nothing
    if online:
        live = open_online(config, device, ranks, quiet, notes)
        return live.views, live.targets
    if not config.cache.path:
        raise ConfigError(
            f"cache.path is empty and loss.method {config.loss.method} reads a teacher's targets; set cache.path, run the "
            "teacher with --online, or train a baseline with --set loss.method=none"
        )
    if baseline and not Path(config.cache.path).exists():
        raise CacheError(
            f"no cache at {config.cache.path}; make it with `cskd cache-teacher CONFIG`, or train the baseline without a "
            "cache: --set cache.path="
        )
    cache = open_cache(config.cache.path, data=Path(config.data.train) if config.data.train else None)
    cache.inventory.check_shards()
    refuse_conflicts(config, cache)
    refuse_other_code(cache)
    usable_views(cache, config.train.views)
    notes.add(cache.manifest.get("notes", []))
    if verify_replay and (note := check_versions(cache)):
        notes.add([note])
    return cache, CachedTargets(cache, config.loss, config.train.epochs)


def _parallel(run: _Run) -> torch.nn.Module:
    """The student as the loop calls it: compiled where asked for, its gradients averaged over ranks."""
    run.student.freeze_unused(run.config.loss)
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


def _arithmetic(run: _Run) -> str:
    return arithmetic(run.config.train.autocast, run.device)


def render(report: TrainReport, console: Console) -> None:
    """The report for people."""
    stepping = report.seconds - report.other_seconds
    rate = report.images / stepping if stepping > 0 else 0.0
    did = (
        f"{report.steps} steps, {report.images:,} images in {report.seconds:.1f} s ({rate:.0f} images/s while stepping), "
        f"teacher forwards {report.teacher_forwards}"
        if report.steps
        else "finished before, nothing to do; for another run set another train.output"
    )
    console.print(f"{escape(report.output)}: {did}", soft_wrap=True)
    if report.top1:
        console.print(
            f"top-1 % in {report.arithmetic}, score {report.score}: "
            + "  ".join(f"{name} {top1:.2f}" for name, top1 in report.top1.items()),
            soft_wrap=True,
        )
    if report.weights:
        console.print(escape(f"model.safetensors: {report.weights}"), soft_wrap=True)
    if report.steps:
        console.print(escape(report.bound_by), soft_wrap=True)
