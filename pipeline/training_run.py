"""What a run of stage 2 is made of, opened and checked: views, targets, student, plan, optimiser, and where it stopped.

open_run     by the config, the cache, and the record of an earlier run in the same folder; a conflict is refused here
TrainingRun  what the loop of `cskd.pipeline.train` asks for: network, batches, evaluation, saving
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from cskd.codecs.base import BLEND_ONE
from cskd.config import Config, to_yaml
from cskd.config.pins import TEACHER, pinned, record_pins
from cskd.dataset.inventory import Inventory
from cskd.errors import ConfigError
from cskd.files.durable import put
from cskd.files.writer import Writer
from cskd.loading.feed import fed
from cskd.loading.need import prefetch_of
from cskd.loading.node_scratch import node_scratch
from cskd.loading.plan import PlanSpec
from cskd.loading.raw_batches import DeviceViews, RawBatchMaker
from cskd.loading.shards_ahead import ahead, training_needs, window_note
from cskd.loading.sources import Batch, TargetSource, ViewSource
from cskd.loading.stage2 import BatchMaker, EvalTask, eval_tasks
from cskd.loading.targets import CachedTargets
from cskd.loading.tasks import RunTasks
from cskd.machine.arithmetic import arithmetic
from cskd.machine.launch import restart_notes
from cskd.machine.ranks import Ranks
from cskd.machine.threads import Threads, begun_with
from cskd.method.ckf import blend_at
from cskd.method.terms import AGREEMENT, cells_term, expanded, idle_terms, needs_teacher, refuse_gaps, terms_of
from cskd.pipeline.conflicts import (
    as_begun,
    changed_on_resume,
    micro_batch_begun,
    own_output,
    refuse_other_run,
    run_identity,
)
from cskd.pipeline.evaluate import Found, score_heads
from cskd.pipeline.live_stages import first_layers
from cskd.pipeline.online import open_baseline, open_online
from cskd.pipeline.outputs import LAST, run_output
from cskd.pipeline.precheck import TRAINING, refuse
from cskd.pipeline.run_state import PROGRESS, RunState, named_bests
from cskd.pipeline.setup import Setup, from_images, half_notes, open_cached, with_best
from cskd.pipeline.show.progress import NOTHING_TO_DECODE, Notes, Pool, bound_by, say
from cskd.storage.mirror import Mirror
from cskd.store.cache import Cache
from cskd.store.format import RESOLVED
from cskd.store.replay_check import check_versions
from cskd.student import Student
from cskd.student.best import Best, BestWeights
from cskd.student.checkpoint import ResumeStates, TrainState, export, exported_prefix
from cskd.student.heads import score_head
from cskd.student.optim import Optimisation, average_notes
from cskd.student.projections import Taught
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import InputMaker


@dataclass(frozen=True)
class TrainingRun:
    """What a run is made of, opened and checked."""

    config: Config
    ranks: Ranks
    device: torch.device
    output: Path
    views: ViewSource
    val: Inventory | None
    student: Student
    plan: PlanSpec
    targets: TargetSource
    optimisation: Optimisation
    states: ResumeStates
    identity: dict[str, Any]
    state: RunState
    step: int  # updates done by earlier runs
    stop: int  # updates in all
    micro_batch: int  # views of one forward and backward on this rank
    workers: int  # of the loader
    verify_replay: bool  # check every view against the digest in the cache
    notes: list[str]
    writer: Writer | None = None  # of the output folder; None on all ranks but the first
    mirror: Mirror | None = None  # of an output on an object store

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
        batch = max(1, min(self.micro_batch, share))
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

    def blend(self, epoch: int) -> dict[str, float]:
        """What the row of metrics says of the blends of an epoch, as shares: 'blend' by `loss.decay`, 'blend.linear' and the like of
        terms with a decay of their own; nothing where no term is of cells."""
        loss = self.config.loss
        decays = dict.fromkeys(term.decay for term in expanded(loss) if term.target == "cells" and not term.own)
        return {
            f"blend.{own}" if own else "blend": blend_at(epoch, self.config.train.epochs, own or loss.decay) / BLEND_ONE
            for own in decays
        }

    @property
    def arithmetic(self) -> str:
        """What the student computes in."""
        return arithmetic(self.config.train.autocast, self.device)

    def network(self) -> torch.nn.Module:
        """The student as the loop calls it, compiled where asked for."""
        self.student.freeze_unused(self.config.loss)
        net: torch.nn.Module = torch.compile(self.student) if self.config.train.compile else self.student  # type: ignore[assignment]
        return self.with_projections(net)

    @property
    def reach_varies(self) -> bool:
        """Whether steps may differ in which parameters the loss reaches: what a term of a user's own reads is not known."""
        return any(term.own for term in self.config.loss.terms)

    def averaging(self, net: torch.nn.Module) -> DistributedDataParallel:
        """The network with its gradients averaged over ranks, which wait for one of every parameter that asks for it; where the
        reach varies each step looks for those that it does not reach, which takes a pass over the graph."""
        index = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=index, find_unused_parameters=self.reach_varies)

    def with_projections(self, student: torch.nn.Module) -> torch.nn.Module:
        """The student, or a form of it, with the projections that terms of features have."""
        projections = self.optimisation.projections
        return student if projections is None else Taught(student, projections)

    def batches(self) -> tuple[RunTasks, Iterator[Batch]]:
        """Every batch of the run, training and evaluation, in the order the loop reads them."""
        settings = self.config.train
        tasks = RunTasks(
            self.views,
            self.plan,
            targets=self.targets.spec,
            evaluate=lambda epoch: self.eval_tasks if self.evaluates(epoch) else [],
            scratch=node_scratch(self.output, settings.scratch, self.ranks, self.device),
            ahead=self.workers * prefetch_of(self.workers, settings.prefetch),
            start=self.step,
            stop=self.stop,
            rank=self.ranks.rank,
        )
        views = ViewMaker(self.views.inventory, self.views.recipe, whole=True)
        clean = ViewMaker(self.val, self.views.recipe, whole=True) if self.val else None
        recorded = self.views.recorded() if self.verify_replay else None
        there = settings.augment == "device"
        maker = (RawBatchMaker if there else BatchMaker)(views, clean, settings.eval_crop_pct, recorded)
        make = DeviceViews(views, recorded) if there else None
        evaluated = lambda epoch: (self.val, len(self.eval_tasks)) if self.val and self.evaluates(epoch) else None  # noqa: E731
        coming = ahead(tasks, training_needs(self.views.inventory, self.plan, self.step, self.stop, evaluated))
        return tasks, fed(maker, coming, self.device, self.workers, settings.prefetch, make)

    def pools(self, seconds: dict[str, float], read_seconds: float) -> list[Pool]:
        """Who did what for how long."""
        loader, live = ("decode", "augment"), ("teacher",) if self.targets.runs_teacher else ()
        here = (*live, "student", "evaluate")
        if (
            live and self.device.type == "cuda"
        ):  # to read the teacher's logits waits for the student's work before them, too
            both = "teacher and student"
            seconds, here = seconds | {both: seconds["teacher"] + seconds["student"]}, (both, "evaluate")
        apart = [Pool.of(self.workers, seconds, *loader), Pool.of(1, seconds, *here)] if self.workers else []
        return [*(apart or [Pool.of(1, seconds, *loader, *here)]), Pool(1, {"read": read_seconds})]

    def bound_by(self, seconds: dict[str, float], read_seconds: float, elapsed: float, images: int) -> str:
        """Which of them holds up the rest, see `bound_by`."""
        on_gpu, relief = self.device.type == "cuda", dict(NOTHING_TO_DECODE)
        if on_gpu and self.config.train.augment == "host":
            relief["augment"] = "with train.augment: device the GPU does this"
        pools = self.pools(seconds, read_seconds)
        return bound_by(pools, elapsed, images, cores=self.workers > 0, queued=on_gpu, relief=relief)

    def save(self, step: int) -> None:
        """A state that the same command resumes from. NotFiniteError on every rank where it would not be finite."""
        self.state.check(step, self.student, self.optimisation)
        info = {**self.identity, PROGRESS: self.state.record()}
        if self.writer is not None:
            self.writer.check()
            self.states.save(self.student, self.optimisation, TrainState(step, info), self.state.good)
            BestWeights(self.states.folder).keep(named_bests(self.states))
            if self.mirror is not None:
                self.mirror.put(LAST)
        self.state.saved = step

    def export(self, step: int) -> str:
        """Write what others use. Returns: what model.safetensors holds."""
        if self.writer is None:
            return ""
        self.writer.check()
        classes, best, changed = self.views.inventory.classes, self.state.shown, self.state.said()
        return export(self.output, self.student, self.optimisation, self.config, classes, step, best, changed)

    def evaluate(
        self, batches: Iterator[Batch], inputs: InputMaker, step: int, found: dict[str, Found] | None = None
    ) -> dict[str, Any]:
        """Score every head after `step` updates, and keep the best weights. Returns: what the row of metrics says of it.

        found: as of `score_heads`.
        """
        models, count = self.models, len(self.eval_tasks)
        scores, unreadable = score_heads(models, batches, count, inputs, self.config.train.autocast, self.ranks, found)
        top1 = {f"top1.{name}": score.top1 for name, score in scores.items()}
        top5 = {f"top5.{name}": score.top5 for name, score in scores.items()}
        self.state.shown = self._improved(top1 | top5, step)
        return {**top1, **top5, "unreadable": unreadable, "score": self.score, "arithmetic": self.arithmetic}

    def _improved(self, scores: dict[str, float], step: int) -> Best | None:
        """The best after an evaluation, its weights written where it is a new one."""
        name, best = self.config.train.best, self.state.best
        if name is None or (best is not None and scores[name] <= best.score):
            return best
        best = Best(name, scores[name], step)
        return BestWeights(self.states.folder).put(best, self.models[best.prefix]) if self.ranks.first else best


def open_run(
    config: Config,
    ranks: Ranks,
    device: torch.device,
    verify_replay: bool,
    online: bool,
    quiet: bool,
    threads: Threads,
    writer: Writer | None,
) -> TrainingRun:
    """Views, targets, student, plan and optimiser of a config, and where an earlier run of it stopped."""
    output, notes = run_output(config), Notes(quiet)
    states = ResumeStates(output / "resume", keep=config.train.keep)
    config = _pinned(config, ranks, online, quiet)
    record = next(iter(states.infos().values()), None)
    config, as_before = as_begun(config, record)
    settings = config.train
    alone = from_images(config, record)
    views, targets = _open_views(config, device, ranks, verify_replay, online, alone, quiet, notes)
    setup = Setup(config, views, device, threads, ranks.count, online, targets.maps, micro_batch_begun(record))
    found = refuse(TRAINING, setup)
    student, plan, val, optimisation = setup.student, setup.plan, setup.val, setup.optimisation
    notes.add([*found.notes, *window_note(views.inventory, plan), *as_before, *half_notes(settings.autocast, device)])
    config = with_best(config, student)
    identity = run_identity(config, views, plan.views, ranks.count, online, device, val, setup.micro_batch)
    refuse_gaps(config.loss, settings.epochs)
    notes.add(idle_terms(config.loss, settings.epochs))
    if record is not None:  # before its tensors: another student's shapes would be all that can be said of it
        refuse_other_run({k: v for k, v in record.items() if k != PROGRESS}, identity, output, student.distilled)
    loaded = states.load(student, optimisation)
    ranks.refuse_differing(loaded.step if loaded else 0, device)
    stop = min(settings.epochs * plan.steps, settings.max_steps or 1 << 62)
    terms = (*terms_of(config.loss), *([AGREEMENT] if cells_term(config.loss) else []))
    scaled, weight = optimisation.scaler is not None, plan.share(ranks.rank).weight
    state = RunState(ranks, device, terms, len(views.inventory.classes), scaled, weight)
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
        if loaded.step < stop:
            notes.add([f"the run in {output} goes on after step {loaded.step:,} of {stop:,}"])
    torch.set_num_threads(threads.count)
    if ranks.first:
        own_output(output)
        put(output / RESOLVED, to_yaml(config).encode())
    ranks.barrier()
    notes.add(
        [
            *restart_notes(),
            *average_notes(settings.ema, settings.ema_warmup, stop),
            *state.said(),
            *state.notes,
            str(threads),
        ]
    )
    notes.say()
    return TrainingRun(
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
        micro_batch=setup.micro_batch,
        workers=threads.workers,
        verify_replay=verify_replay,
        notes=notes.all,
        writer=writer,
    )


def _pinned(config: Config, ranks: Ranks, online: bool, quiet: bool) -> Config:
    """The config with a commit in each address of the hub that the run reads: the first rank decides which, and writes it down
    where the others, and a resume, read it."""
    keys, output = ("cache.path", "student.init", *(TEACHER if online else ())), run_output(config)
    if ranks.first:
        config, pins = pinned(config, keys, output, lambda line: say([line], quiet))
        record_pins(output, pins)
    ranks.barrier()
    return config if ranks.first else pinned(config, keys, output)[0]


def _open_views(
    config: Config,
    device: torch.device,
    ranks: Ranks,
    verify_replay: bool,
    online: bool,
    alone: bool,
    quiet: bool,
    notes: Notes,
) -> tuple[ViewSource, TargetSource]:
    """What is fed and what is taught: from a checked cache, with a teacher that runs live, or from images alone.

    Method none needs no targets: it reads a cache only where cache.path names one that is there. alone: see `from_images`.
    """
    if alone or (online and not needs_teacher(config.loss)):
        source, nothing, about = open_baseline(config, ranks, online, quiet)
        notes.add(about)
        return source, nothing
    if online:
        return open_online(config, device, ranks, quiet, notes)
    if not config.cache.path:
        raise ConfigError(
            f"cache.path is empty and loss.method {config.loss.method} reads a teacher's targets; set cache.path, run the "
            "teacher with --online, or train a baseline with --set loss.method=none"
        )
    cache = open_cached(config)
    first = cache if isinstance(cache, Cache) else cache.first
    notes.add(first.manifest.notes or [])
    notes.add(check_versions(first) if verify_replay else [])
    live = first_layers(first, config.loss, device, notes)
    return cache, CachedTargets(cache, config.loss, config.train.epochs, live)
