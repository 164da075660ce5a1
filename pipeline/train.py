"""Stage 2: train the ViT by replaying the cached views; the teacher never runs.

    open      the cache: recipe and teacher facts are its own, a conflicting config is refused
    plan      every epoch's (sample, view) pairs are a pure function, so a resume is one integer
    loop      replay and check views -> mix on the device -> student -> loss against cached targets
    evaluate  every head after each epoch; metrics, resume state, and a plain timm checkpoint

The same command resumes, with as many ranks as before or another number; SIGTERM saves a state first. Launch: `cskd train configs/cifar10.yaml`, or on many GPUs
`torchrun --nproc-per-node 8 --no-python cskd train configs/imagenet_deit_tiny.yaml`.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from cskd.config import Config
from cskd.config.every import every
from cskd.config.load import to_dict
from cskd.errors import NotFiniteError
from cskd.machine.arithmetic import float32_products
from cskd.machine.launch import launched
from cskd.machine.ranks import running_ranks
from cskd.machine.stops import heeded
from cskd.machine.threads import brief_turns, choose_threads, computing_with
from cskd.pipeline.out_of_memory import explained, nothing_to_lower
from cskd.pipeline.outputs import mirrored_run, sole_run, use_own_node_cache
from cskd.pipeline.run_folder import RunFolder
from cskd.pipeline.run_state import stopped
from cskd.pipeline.saving import Pace
from cskd.pipeline.setup import device_of
from cskd.pipeline.show.metrics import MetricsLog, reached
from cskd.pipeline.show.progress import Progress, print_lines, rate, say, timed_start
from cskd.pipeline.show.trackers import Trackers
from cskd.pipeline.train_step import TrainStep
from cskd.pipeline.training_run import TrainingRun, open_run
from cskd.storage import join
from cskd.teacher.model import teacher_images


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
    reached: str = ""  # the score's last and best top-1, in words


def train(config: Config, verify_replay: bool = True, online: bool = False, quiet: bool = False) -> TrainReport:
    """Train, finish or resume the run of a config. Raises CskdError; the last saved state stays.

    verify_replay: check every view against the digest in the cache. online: no cache, the teacher runs at every step.
    """
    use_own_node_cache(config)
    device, notes = device_of(config, "train")
    quiet = quiet or not launched().speaks
    say(notes, quiet)
    gpu = device.type == "cuda"
    threads = choose_threads(config.train.threads, "train.threads", config.train.workers, gpu=gpu)
    with (
        running_ranks(device) as ranks,
        mirrored_run(config, ranks, device, quiet) as mirror,
        sole_run(config, ranks, device, quiet) as writer,
        computing_with(threads.count),
        brief_turns(gpu),
        # Around `open_run`, too: it tries views on the device in the arithmetic that will make them.
        float32_products(config.train.tf32, device),
        explained(device, nothing_to_lower("train.device")),
    ):
        run = open_run(config, ranks, device, verify_replay, online, quiet, threads, writer)
        run = replace(run, mirror=mirror)
        update = TrainStep(run)
        try:
            with explained(device, update.advice):
                return _train(run, update, quiet)
        except NotFiniteError as e:
            raise stopped(e, run.state, run.states, config.train.lr, config.train.clip_grad) from e


def _train(run: TrainingRun, update: TrainStep, quiet: bool) -> TrainReport:
    config, plan, device, ranks, state = run.config, run.plan, run.device, run.ranks, run.state
    start_clock, forwards_before, step = time.perf_counter(), teacher_images(), run.step
    seconds = dict.fromkeys(("start", "decode", "augment", "teacher", "student", "evaluate"), 0.0)
    tasks, batches = run.batches()
    batches = timed_start(batches, seconds)
    weights = run.export(step) if step >= run.stop else ""
    # A run that is finished has none, and keeps the row of an epoch that `max_steps` cut.
    epochs = range(step // plan.steps, -(-run.stop // plan.steps)) if step < run.stop else range(step, step)

    folder, names = run.output if ranks.first else None, config.train.trackers if epochs else []

    def tell(line: str) -> None:
        run.notes.append(line)
        say([line], quiet)

    log, shown = MetricsLog(folder, epochs.start), RunFolder(run, tell)
    pace = Pace(every(config.train.save_every), ranks, device, step)
    with (
        heeded(),
        tasks,
        closing(Trackers(names, folder, epochs.start, to_dict(config), tell)) as trackers,
        Progress("train", run.stop * plan.global_batch, start=step * plan.global_batch, quiet=quiet) as progress,
    ):
        for epoch in epochs:
            state.begin()
            end = min(run.stop, (epoch + 1) * plan.steps)
            while step < end:
                batch = next(batches)
                for part, spent in zip(("decode", "augment"), batch["seconds"].tolist(), strict=True):
                    seconds[part] += spent
                loss, terms = update(batch, epoch, step, seconds)
                clock = time.perf_counter()
                step += 1
                state.add(loss, terms, step, run.optimisation.skipped)
                shown.first_batch(update)
                seconds["student"] += time.perf_counter() - clock
                progress.update(step * plan.global_batch, loss=state.mean_loss)
                if step < end and pace.due(step):
                    run.save(step)
                    pace.saved()
                    if pace.stop:
                        pace.leave()
            state.check(step, run.student, run.optimisation)
            if run.writer is not None:
                run.writer.check()
            row: dict[str, Any] = {"epoch": epoch, "step": step, "lr": run.optimisation.lr} | state.row()
            row |= run.blend(epoch)
            if changes := state.said(epoch * plan.steps, step):
                row["changed"] = "; ".join(changes)
            state.shown = state.best
            if run.evaluates(epoch):
                clock = time.perf_counter()
                row |= run.evaluate(batches, update.inputs, step, shown.found)
                shown.evaluated(step)
                seconds["evaluate"] += time.perf_counter() - clock
            tasks.retire(epoch)
            log.add(row | {"seconds": state.seconds, "teacher_forwards": state.teacher_forwards})
            trackers.log(log.rows[-1])
            if run.evaluates(epoch):
                progress.say(reached(log.rows, run.score))
            weights = run.export(step)
            if step % plan.steps == 0:  # an epoch that `max_steps` cut goes on when the run does
                state.end(scored=run.scheduled(epoch))
            shown.draw(log.rows)
            run.save(step)  # last: a run that is killed before it comes back here, and does not take the epoch for done
            pace.saved()
            if step < run.stop and pace.due(step, look=True) and pace.stop:
                pace.leave()
        shown.draw(log.rows, last=True)
        last, best = log.rows[-1] if log.rows else {}, reached(log.rows, run.score)
    images = (step - run.step) * plan.global_batch
    return TrainReport(
        output=config.train.output,
        steps=step - run.step,
        images=images,
        seconds=time.perf_counter() - start_clock,
        other_seconds=seconds["start"] + seconds["evaluate"],
        teacher_forwards=ranks.total(teacher_images() - forwards_before, device),
        top1={name.removeprefix("top1."): top1 for name, top1 in last.items() if name.startswith("top1.")},
        score=run.score,
        arithmetic=run.arithmetic,
        bound_by=run.bound_by(seconds, tasks.read_seconds, time.perf_counter() - start_clock, images),
        notes=run.notes,
        weights=weights,
        reached=best,
    )


def render(report: TrainReport, console: Console) -> None:
    """The report for people."""
    stepping = report.seconds - report.other_seconds
    did = (
        f"{report.steps} step{'s' * (report.steps != 1)}, {report.images:,} images in {report.seconds:.1f} s "
        f"({rate(report.images, stepping, 'images')} while stepping), "
        f"teacher forwards {report.teacher_forwards}"
        if report.steps
        else "finished before, nothing to do; for another run set another train.output"
    )
    lines = [f"{report.output}: {did}"]
    if report.top1:
        heads = "  ".join(f"{name} {top1:.2f}" for name, top1 in report.top1.items())
        lines.append(f"top-1 % in {report.arithmetic}, score {report.score}: {heads}")
    if report.reached:
        lines.append(report.reached)
    if report.weights:
        weights = join(report.output, "model.safetensors")
        lines.append(
            f"{weights} ({report.weights}), next to it config.json for timm, README.md, results.png and metrics.csv"
        )
    if report.steps:
        lines.append(report.bound_by)
    print_lines(console, *lines)
