"""What the student is taught: the label's term, the distillation token's and the patch tokens'.

A loss is a weighted sum of terms. A method stands for a few:

    total = (1 - alpha) * CE(class head, label) + alpha * distillation term + patch_weight * patch term

'none' is the label alone; 'deit-*' the first two; 'cskd-*' all three; 'terms' those of `loss.terms`, which are added to the others.
Shapes: B batch, K classes, h w teacher grid (7 7).
Source: arXiv 2307.08500, section 3; DeiT, arXiv 2012.12877, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cskd.codecs.base import BLEND_ONE
from cskd.config.schema import LossConfig, LossTerm
from cskd.errors import StudentError
from cskd.method.ckf import ckf_blend
from cskd.method.features import feature_loss
from cskd.method.terms import AGREEMENT, TOKEN, counts, expanded, own_terms


class StudentOutput(NamedTuple):
    """Logits of a student's heads, float32."""

    cls_logits: Tensor  # [B, K]
    dist_logits: Tensor | None = None  # [B, K]; None for a ViT without a distillation token
    patch_logits: Tensor | None = None  # [B, K, h, w], pooled to the teacher grid; None when none was asked for
    tokens: Tensor | None = None  # [B, H, W, C], the last patch tokens on the student's grid; None when not asked for
    projected: Mapping[str, Tensor] | None = None  # by name of a term of features, see `cskd.student.projections`
    token_logits: Mapping[str, Tensor] | None = None  # [B, K] each, by names of `student.tokens`; None without them
    blocks: Mapping[int, Tensor] | None = None  # [B, H, W, C] of each block that was asked for, before the final norm


def output_tensors(output: object) -> Iterator[Tensor]:
    """All of what a student gives, a `StudentOutput` or a part of one."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple):
        for one in output.values() if isinstance(output, Mapping) else output:
            yield from output_tensors(one)


@dataclass(frozen=True)
class MixedLabels:
    """Labels of mixed images: lam * label + (1 - lam) * partner."""

    label: Tensor  # int64 [B]
    partner: Tensor  # int64 [B]; the label itself where an image is not mixed
    lam: Tensor  # float32 [B], share of `label`; 1 where an image is not mixed


@dataclass(frozen=True)
class HardTargets:
    """Classes the teacher chose."""

    global_class: Tensor  # int64 [B], argmax of the teacher's ordinary output
    cell_class: Tensor | None = None  # int64 [B, h, w], the CKF target; 'cskd-hard' needs it
    more: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # by decay, where terms have one of their own: the same at its blend


@dataclass(frozen=True)
class SoftTargets:
    """Logits of the teacher."""

    global_logits: Tensor  # float32 [B, K]
    dense_logits: Tensor | None = None  # float32 [B, K, h, w]; 'cskd-soft' needs it
    blend: int | None = None  # 0..65536 (see `cskd.method.ckf.blend_at`); None: `dense_logits` is blended already
    more: Mapping[str, int] = field(default_factory=dict)  # blends by decay, where terms have one of their own


@dataclass(frozen=True)
class BothTargets:
    """For a loss with terms of both kinds."""

    hard: HardTargets
    soft: SoftTargets


@dataclass(frozen=True)
class FeatureTargets:
    """For a loss with terms of features, next to what its other terms read."""

    features: Tensor | None  # float32 [B, C, h, w], the teacher's last feature map; None where only stages are read
    logits: HardTargets | SoftTargets | BothTargets | None = None
    stages: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # maps of earlier stages, each with channels and grid of its own


OfOne = HardTargets | SoftTargets | BothTargets | FeatureTargets | None
AnyTargets = OfOne | Mapping[str, OfOne]  # of one teacher; or of each cache by its name, '' of the first


class Term(Protocol):
    """A term of a user's own: the mean over the rows of a batch, a float scalar with a gradient.

    `heads`, where it has such an attribute, names what it trains of the student's outputs beyond what the method trains, out of
    'class', 'distillation', 'token:NAME' and 'patches'; patch logits are there for the methods of CSKD and for a term that names 'patches'.
    """

    def __call__(self, output: StudentOutput, labels: MixedLabels, targets: OfOne) -> Tensor: ...


class DistillationLoss:
    """The loss that a config asks for; it keeps nothing between calls, so one serves all epochs.

    Hard terms are cross entropies with the teacher's classes, mean over images (and cells). Soft terms are
    tau^2 * KL(teacher || student) of softmax(logits / tau), summed over classes, and then, by `soft_reduction`:

    - 'consistent': both are means, the distillation term over B images, the patch term over B * h * w cells.
    - 'paper': what the authors' code divides by, the distillation term by B * K, the patch term by B alone, which weighs
      K * h * w (49,000) times more against the other than in 'consistent'.

    A ViT without a distillation token has one head that serves all terms. With 'none' the class head is trained alone, as
    in DeiT's and the CSKD authors' code; with `baseline_head: mean` the mean of the logits of a distilled student's two
    heads, as timm does outside `distilled_training`: then both tokens learn. See `trained_heads`.

    Source: cskd.py of the CSKD authors' code and losses.py of DeiT's for the two divisors and the class head of 'none'.
    """

    def __init__(self, config: LossConfig, watched: LossTerm | None = None) -> None:
        """watched: a term of cells, whose `agreement` is among the values of a call, whether it counts or not."""
        self.config, self.terms, self._watched = config, expanded(config), watched
        own = own_terms(config)
        self._own = {one.name: one for one in own}
        own_heads = {head for one in own for head in one.heads}
        self.uses_patches = any(term.head == "patches" for term in self.terms) or "patches" in own_heads

    def __call__(
        self, output: StudentOutput, labels: MixedLabels, targets: AnyTargets = None, epoch: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:    targets HardTargets for '-hard' methods, SoftTargets for '-soft', BothTargets for terms of both kinds, in
                 FeatureTargets for terms of features; not read for 'none'; of several caches, those of each by its name. epoch, from 0: which terms count, of those that have `epochs`; None: all.
        Returns: the total, a float scalar; and each term by its name, detached scalars before their weights.
        Raises:  TypeError for the wrong kind of targets; ValueError where patch logits or cell targets are missing;
                 StudentError where the two differ in grid.
        """
        total: Tensor | None = None
        idle: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        for term in self.terms:
            cells = _cell_target(term, output, targets) if term.target == "cells" and not term.own else None
            if cells is not None and term == self._watched:
                terms[AGREEMENT] = agreement(_logits(term.head, output), cells)
            if epoch is not None and not counts(term, epoch):
                # Its heads have a gradient all the same, of zero: ranks wait for one of every parameter.
                idle += self._read(term, output)
                continue
            value = (
                self._own_value(term, output, labels, targets)
                if term.own
                else self._value(term, output, labels, targets, cells)
            )
            total = term.weight * value if total is None else total + term.weight * value
            terms[term.title] = value.detach()
        for unused in idle:
            nothing = unused.sum() * 0.0
            total = nothing if total is None else total + nothing
        return output.cls_logits.sum() * 0.0 if total is None else total, terms

    def reach(self, output: StudentOutput) -> Tensor:
        """Zero, whose graph leads to all that the terms read of an output, whether they count or not: of a term of a user's own, its
        `heads`."""
        read = [tensor.sum() for term in self.terms for tensor in self._read(term, output)]
        return torch.stack(read or [output.cls_logits.sum()]).sum() * 0.0

    def _read(self, term: LossTerm, output: StudentOutput) -> list[Tensor]:
        """What a term reads of an output."""
        if term.of_features:
            return [_projected(term, output)]
        return [_logits(head, output) for head in (self._own[term.title].heads if term.own else (term.head,))]

    def _value(
        self, term: LossTerm, output: StudentOutput, labels: MixedLabels, targets: AnyTargets, cells: Tensor | None
    ) -> Tensor:
        """A term before its weight, mean over the batch. cells: the target of a term of cells."""
        if isinstance(targets, Mapping):
            targets = targets[term.cache]
        if term.of_features:
            return feature_loss(_projected(term, output), _features(targets, term), term)
        logits = _logits(term.head, output)
        if term.target == "label":
            return label_loss(logits, labels, term.smoothing)
        if term.kind == "ce":
            if cells is None:
                return F.cross_entropy(logits, _hard(targets).global_class)
            rows = logits.permute(0, 2, 3, 1).flatten(0, 2)  # as they lie in memory: half the time on a CPU
            return F.cross_entropy(rows, cells.flatten())
        teacher, count = _soft(targets).global_logits if cells is None else cells, len(logits)
        if cells is not None:
            count *= 1 if term.divisor == "paper" else logits.shape[-2] * logits.shape[-1]
        elif term.divisor == "paper":
            count = logits.numel()
        student, teacher = logits, _full(teacher)
        if term.standardise:
            student, teacher = standardised(student), standardised(teacher)
        if term.kind == "dkd":
            return dkd_loss(student, teacher, labels.label, term.tau, term.dkd_alpha, term.dkd_beta)
        return kl_sum(student, teacher, term.tau) / count

    def _own_value(self, term: LossTerm, output: StudentOutput, labels: MixedLabels, targets: AnyTargets) -> Tensor:
        own = self._own[term.title]
        value = own.value(output, labels, targets[""] if isinstance(targets, Mapping) else targets)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise StudentError(
                f"loss.terms: {own.where} gave a {found}, expected a float scalar: a mean over the batch"
            )
        return value


def kl_sum(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 * KL(teacher || student) of softmax(logits / tau) over axis 1, summed over everything else."""
    log_student = F.log_softmax(student / tau, dim=1)
    log_teacher = F.log_softmax(teacher / tau, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * tau**2


def standardised(logits: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over axis 1: only their order and relations are taught.

    Source: logit standardisation, arXiv 2403.01427, which divides by the temperature afterwards.
    """
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-7)


def dkd_loss(student: Tensor, teacher: Tensor, label: Tensor, tau: float, alpha: float, beta: float) -> Tensor:
    """Decoupled KD: tau^2 * (alpha * KL of (target, all others) + beta * KL among the others), mean over the batch.

    Args:    student, teacher float [B, K], K > 1; label int64 [B], the target; of a mixed image, the label of its own share.
    Source:  arXiv 2203.08679. There the other classes' logits are masked by -1000; here they are left out.
    """
    at = label[:, None]
    log_student, log_teacher = (F.log_softmax(logits / tau, dim=1) for logits in (student, teacher))
    own_student, own_teacher = log_student.gather(1, at), log_teacher.gather(1, at)
    others = torch.arange(student.shape[1] - 1, device=student.device).repeat(len(student), 1)
    others += others >= at  # not by a mask: how many it selects is known when the device has computed it
    rest_student, rest_teacher = (logits.gather(1, others) / tau for logits in (student, teacher))
    log_rest_student, log_rest_teacher = (F.log_softmax(rest, dim=1) for rest in (rest_student, rest_teacher))
    mass_student, mass_teacher = (
        logs.gather(1, others).logsumexp(1, keepdim=True) for logs in (log_student, log_teacher)
    )
    pair_student, pair_teacher = torch.cat([own_student, mass_student], 1), torch.cat([own_teacher, mass_teacher], 1)
    target = F.kl_div(pair_student, pair_teacher, reduction="sum", log_target=True)
    other = F.kl_div(log_rest_student, log_rest_teacher, reduction="sum", log_target=True)
    return (alpha * target + beta * other) * tau**2 / len(student)


def label_loss(logits_BK: Tensor, labels: MixedLabels, smoothing: float) -> Tensor:
    """Cross entropy with the mixed, smoothed label, mean over the batch.

    The target puts smoothing / K on every class and 1 - smoothing, shared lam : 1 - lam, on the two labels; it is not
    materialised.

    Source: timm's mixup_target: on value 1 - smoothing + smoothing / K, off value smoothing / K.
    """
    log_p = F.log_softmax(logits_BK, dim=1)
    own = log_p.gather(1, labels.label[:, None])[:, 0]
    other = log_p.gather(1, labels.partner[:, None])[:, 0]
    mixed = torch.lerp(other, own, labels.lam.to(log_p.dtype))
    return -((1 - smoothing) * mixed + smoothing * log_p.mean(1)).mean()


def _full(logits: Tensor) -> Tensor:
    """Losses are never computed in half precision."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _logits(head: str, output: StudentOutput) -> Tensor:
    """Those of a head, [B, K] or [B, K, h, w]."""
    if head == "patches":
        if output.patch_logits is None:
            raise ValueError("no patch logits: the student was called without a teacher grid")
        return _full(output.patch_logits)
    tokens = output.token_logits or {}
    if head.startswith(TOKEN):
        if head.removeprefix(TOKEN) not in tokens:
            raise ValueError(f"no logits of {head}: the student has the tokens {', '.join(tokens) or 'none'}")
        return _full(tokens[head.removeprefix(TOKEN)])
    cls = _full(output.cls_logits)
    dist = cls if output.dist_logits is None else _full(output.dist_logits)
    if head != "mean":
        return dist if head == "distillation" else cls
    others = [*([] if output.dist_logits is None else [dist]), *map(_full, tokens.values())]
    return sum(others, cls) / (1 + len(others)) if others else cls


@torch.no_grad()
def agreement(patch_BKhw: Tensor, target: Tensor) -> Tensor:
    """Share of the cells of a batch whose largest patch logit is that of the target's class: float32 scalar in [0, 1].

    Args:    target int64 [B, h, w], classes; or float [B, K, h, w], blended logits, of which the largest counts.
    """
    return (patch_BKhw.argmax(1) == (target if target.ndim == 3 else target.argmax(1))).float().mean()


def _cell_target(term: LossTerm, output: StudentOutput, targets: AnyTargets) -> Tensor:
    """What a term of cells teaches at its blend: classes [B, h, w], or logits [B, K, h, w]."""
    grid = _logits(term.head, output).shape[-2:]
    of_one = targets[term.cache] if isinstance(targets, Mapping) else targets
    if term.kind == "ce":
        hard = _hard(of_one)
        return _cells(hard.more.get(term.decay or "", hard.cell_class), grid)
    soft = _soft(of_one)
    dense, blend = _cells(soft.dense_logits, grid), soft.more.get(term.decay or "", soft.blend)
    return dense if blend is None else ckf_blend(dense, soft.global_logits, blend / BLEND_ONE)


def logit_targets(targets: OfOne) -> HardTargets | SoftTargets | BothTargets | None:
    """Those of classes and logits alone."""
    return targets.logits if isinstance(targets, FeatureTargets) else targets


def _projected(term: LossTerm, output: StudentOutput) -> Tensor:
    if output.projected is None or term.title not in output.projected:
        raise ValueError(
            f"no projected tokens for {term.title}: call the student's projections, cskd.student.projections"
        )
    return _full(output.projected[term.title])


def _features(targets: OfOne, term: LossTerm) -> Tensor:
    if not isinstance(targets, FeatureTargets):
        raise TypeError(f"targets are {type(targets).__name__}, expected FeatureTargets for a term of features")
    found = targets.stages.get(term.stage) if term.stage else targets.features
    if found is None:
        raise ValueError(f"no map for {term.title}: the targets have the stages {list(targets.stages)}")
    return found


def _hard(targets: OfOne) -> HardTargets:
    targets = logit_targets(targets)
    if isinstance(targets, BothTargets):
        return targets.hard
    if not isinstance(targets, HardTargets):
        raise TypeError(f"targets are {type(targets).__name__}, expected HardTargets for a '-hard' method")
    return targets


def _soft(targets: OfOne) -> SoftTargets:
    targets = logit_targets(targets)
    if isinstance(targets, BothTargets):
        return targets.soft
    if not isinstance(targets, SoftTargets):
        raise TypeError(f"targets are {type(targets).__name__}, expected SoftTargets for a '-soft' method")
    return targets


def _cells(target: Tensor | None, grid: tuple[int, ...]) -> Tensor:
    if target is None:
        raise ValueError("no targets for the cells: a 'cskd-*' method needs cell_class or dense_logits")
    if tuple(target.shape[-2:]) != grid:
        raise StudentError(
            f"the targets' grid is {list(target.shape[-2:])}, the student's patch logits have {list(grid)}; "
            "call the student with the grid of the cache"
        )
    return target
