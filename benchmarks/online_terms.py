"""A loss from caches, and the same loss with its teachers live: batch by batch, term by term, for the same student.

Hard terms must be equal to the last bit. What is decoded for soft terms may be off by what the codec states: the largest error is
given as a share of it. Shapes: B batch, K classes, C channels, h w teacher grid.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from cskd.codecs.measured import Measured, together
from cskd.config import Config
from cskd.loading.targets import LiveTeachers, mixed_labels
from cskd.machine.devices import pick_device
from cskd.machine.ranks import running_ranks
from cskd.machine.threads import choose_threads, computing_with
from cskd.method.ckf import ckf_blend
from cskd.method.losses import (
    BothTargets,
    DistillationLoss,
    FeatureTargets,
    HardTargets,
    OfOne,
    SoftTargets,
    logit_targets,
)
from cskd.pipeline.outputs import sole_run
from cskd.pipeline.recorded_teacher import recorded_teacher
from cskd.pipeline.train_step import TrainStep
from cskd.pipeline.training_run import open_run
from cskd.store.cache import Cache, open_cache

ROUNDING = 1e-3  # of a codec's step: the decoded numbers are rounded to float32


@dataclass
class Compared:
    """What came of all batches."""

    steps: int = 0
    hard_targets: int = 0  # classes of images and cells
    hard_targets_differing: int = 0
    hard_losses: int = 0  # values of hard terms
    hard_losses_differing: int = 0
    soft_losses: dict[str, float] = field(default_factory=dict)  # of each soft term the largest |cached / live - 1|
    share_of_stated: float | None = None  # of the largest error of any decoded number; None: the codec states no bound
    kl: float | None = None  # of the cells' (else the image's) softmax from the teacher's at the run's blends, mean
    kl_stored: float | None = None  # as stage 1 measured it at five blends, and `cskd inspect` shows

    @property
    def ok(self) -> bool:
        """Whether it is as promised."""
        return not (self.hard_targets_differing or self.hard_losses_differing) and (self.share_of_stated or 0) <= 1

    facts = property(asdict)


def compare(config: Config, soft: str = "", levels: int = 0) -> Compared:
    """Train the student of a config from its caches, and at every batch ask their teachers too, with the student as it is.

    Args:    soft the codec whose error is looked at, by its name in the first cache; levels how many steps it has from the
             smallest to the largest number, 0 where it states no bound.
    """
    device, found = pick_device("cpu"), Compared()
    threads = choose_threads(config.train.threads, "train.threads", config.train.workers)
    worst: defaultdict[str, float] = defaultdict(float)
    shares, kls = [0.0], []
    with (
        running_ranks(device) as ranks,
        sole_run(config, ranks, device, True) as writer,
        computing_with(threads.count),
        contextlib.ExitStack() as stack,
    ):
        run = open_run(config, ranks, device, True, False, True, threads, writer)
        caches = {name: open_cache(p) for name, p in {"": config.cache.path, **config.train.caches}.items()}
        teachers = {name: recorded_teacher(cache, device) for name, cache in caches.items()}
        live = LiveTeachers(teachers, config.loss, config.train.epochs)
        update, criterion, spent = TrainStep(run), DistillationLoss(config.loss), defaultdict[str, float](float)
        tasks, batches = run.batches()
        stack.enter_context(tasks)
        for step in range(run.stop):
            batch, epoch = next(batches), step // run.plan.steps
            cached_targets, live_targets = run.targets.of(batch, epoch, device), live.of(batch, epoch, device)
            cached_of = cached_targets if isinstance(cached_targets, Mapping) else {"": cached_targets}
            assert isinstance(live_targets, Mapping)
            for name, targets in cached_of.items():
                _count_hard(found, targets, live_targets[name])
            if soft:
                share, kl = _soft(cached_of[""], live_targets[""], levels)
                shares.append(share)
                kls.append(kl)
            with torch.no_grad():
                net = run.with_projections(run.student)
                out = net(update.inputs.mixed(batch), run.views.grid if criterion.uses_patches else None)
                both = (cached_targets, live_targets)
                values = [criterion(out, mixed_labels(batch, device), of, epoch)[1] for of in both]
            soft_terms = {term.title for term in config.loss.terms if term.kind != "ce"}
            for name in values[0]:
                one, other = float(values[0][name]), float(values[1][name])
                if name in soft_terms:
                    worst[name] = max(worst[name], abs(one / other - 1) if other else abs(one))
                else:
                    found.hard_losses += 1
                    found.hard_losses_differing += one != other
            update(batch, epoch, step, spent)
            found.steps += 1
    found.soft_losses = dict(worst)
    if soft:
        found.share_of_stated = max(shares) / (1 + ROUNDING) if levels else None
        found.kl, found.kl_stored = sum(kls) / len(kls), _stored(caches[""], soft)
    return found


def _count_hard(found: Compared, cached: OfOne, live: OfOne) -> None:
    one, other = (_hard(targets) for targets in (cached, live))
    for a, b in ((getattr(one, name, None), getattr(other, name, None)) for name in ("global_class", "cell_class")):
        if a is not None and b is not None:
            found.hard_targets += a.numel()
            found.hard_targets_differing += int((a != b).sum())


def _hard(targets: OfOne) -> HardTargets | None:
    logits = logit_targets(targets)
    return logits.hard if isinstance(logits, BothTargets) else logits if isinstance(logits, HardTargets) else None


def _soft(cached: OfOne, live: OfOne, levels: int) -> tuple[float, float]:
    """The largest error of what is decoded, as a share of half a step of `levels`, and the KL of its softmax."""
    pairs: list[tuple[Tensor, Tensor]] = []
    maps = [of.features for of in (cached, live) if isinstance(of, FeatureTargets) and of.features is not None]
    if len(maps) == 2:
        pairs.append((maps[0], maps[1]))
    one, other = (_logits(targets) for targets in (cached, live))
    if one.dense_logits is None or other.dense_logits is None:
        raise TypeError("no logits of cells")
    of_image = bool((one.dense_logits == one.global_logits[:, :, None, None]).all())
    if not pairs:
        pairs = [(one.global_logits, other.global_logits)] if of_image else [(one.dense_logits, other.dense_logits)]
    share = 0.0
    for decoded, true in pairs if levels else []:
        half_step = (true.amax(1, keepdim=True) - true.amin(1, keepdim=True)) / (2 * levels)
        share = max(share, float(((decoded - true).abs() / half_step.clamp_min(1e-30)).max()))
    blend = 0.0 if of_image else (one.blend or 0) / 65536
    p, q = (
        ckf_blend(t.dense_logits, t.global_logits, blend).log_softmax(1)
        for t in (other, one)
        if t.dense_logits is not None
    )
    return share, float((p.exp() * (p - q)).sum(1).mean().clamp_min(0))


def _logits(targets: OfOne) -> SoftTargets:
    logits = logit_targets(targets)
    soft = logits.soft if isinstance(logits, BothTargets) else logits
    if not isinstance(soft, SoftTargets):
        raise TypeError(f"targets are {type(targets).__name__}, expected some with logits")
    return soft


def _stored(cache: Cache, codec: str) -> float | None:
    """The mean KL that stage 1 measured of a codec."""
    units = [(b, v) for b in range(cache.blocks) for v in range(cache.views)]
    commits = [commit for b, v in units if (commit := cache.commit_of(b, v)) is not None]
    error = together(commit.errors[codec] for commit in commits if codec in commit.errors)
    return error.kl if isinstance(error, Measured) else None
