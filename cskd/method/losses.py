"""What the student is taught: the label's term, the distillation token's and the patch tokens'.

    total = (1 - alpha) * CE(class head, label) + alpha * distillation term + patch_weight * patch term

Methods: 'none' only the label; 'deit-*' the first two terms; 'cskd-*' all three.
Shapes: B batch, K classes, h w teacher grid (7 7).
Source: arXiv 2307.08500, section 3; DeiT, arXiv 2012.12877, section 4.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cskd.codecs.base import BLEND_ONE
from cskd.config.schema import LossConfig
from cskd.errors import ConfigError, StudentError
from cskd.files.own_code import load_own
from cskd.method.ckf import ckf_blend

TERMS = ("label", "dist", "patch")
HEADS = ("class", "distillation", "patches")  # what can be trained of a student's outputs


class StudentOutput(NamedTuple):
    """Logits of a student's heads, float32."""

    cls_logits: Tensor  # [B, K]
    dist_logits: Tensor | None = None  # [B, K]; None for a ViT without a distillation token
    patch_logits: Tensor | None = None  # [B, K, h, w], pooled to the teacher grid; None when none was asked for


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


@dataclass(frozen=True)
class SoftTargets:
    """Logits of the teacher."""

    global_logits: Tensor  # float32 [B, K]
    dense_logits: Tensor | None = None  # float32 [B, K, h, w]; 'cskd-soft' needs it
    blend: int | None = None  # 0..65536 (see `cskd.method.ckf.blend_at`); None: `dense_logits` is blended already


@dataclass(frozen=True)
class OwnTerm:
    """A loaded term of a user's own: the text that names it in the config, its name in logs, where and what it is."""

    text: str
    name: str
    where: str
    sha256: str
    value: Term
    heads: tuple[str, ...]


class Term(Protocol):
    """A term of a user's own: the mean over the rows of a batch, a float scalar with a gradient.

    `heads`, where it has such an attribute, names what it trains of the student's outputs beyond what the method trains, out of
    'class', 'distillation' and 'patches'; patch logits are there for the methods of CSKD and for a term that names 'patches'.
    """

    def __call__(
        self, output: StudentOutput, labels: MixedLabels, targets: HardTargets | SoftTargets | None
    ) -> Tensor: ...


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

    Terms of a user's own (`loss.terms`) are added to all of that, each with its weight.

    Source: cskd.py of the CSKD authors' code and losses.py of DeiT's for the two divisors and the class head of 'none'.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.distils = config.method != "none"
        self.soft = config.method.endswith("soft")
        self.own = own_terms(config)
        self._patch_term = config.method.startswith("cskd")
        self.uses_patches = self._patch_term or "patches" in _own_heads(self.own)

    def __call__(
        self, output: StudentOutput, labels: MixedLabels, targets: HardTargets | SoftTargets | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:    targets HardTargets for '-hard' methods, SoftTargets for '-soft'; not read for 'none'.
        Returns: the total, a float scalar; and the terms 'label', 'dist', 'patch' that the method has, detached scalars
                 before alpha and patch_weight, and those of own terms.
        Raises:  TypeError for the wrong kind of targets; ValueError where patch logits or cell targets are missing;
                 StudentError where the two differ in grid.
        """
        total, terms = self._of_method(output, labels, targets)
        for term in self.own:
            value = term.value(output, labels, targets)
            if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
                found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise StudentError(
                    f"loss.terms: {term.where} gave a {found}, expected a float scalar: a mean over the batch"
                )
            total, terms[term.name] = total + self.config.terms[term.text] * value, value.detach()
        return total, terms

    def _of_method(
        self, output: StudentOutput, labels: MixedLabels, targets: HardTargets | SoftTargets | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        cls = _full(output.cls_logits)
        dist = cls if output.dist_logits is None else _full(output.dist_logits)
        if not self.distils:
            alone = dist is cls or c.baseline_head == "class"
            total = label_loss(cls if alone else (cls + dist) / 2, labels, c.smoothing)
            return total, {"label": total.detach()}
        terms = {"label": label_loss(cls, labels, c.smoothing), "dist": self._distillation(dist, targets)}
        total = (1 - c.alpha) * terms["label"] + c.alpha * terms["dist"]
        if self._patch_term:
            terms["patch"] = self._patches(output.patch_logits, targets)
            total = total + c.patch_weight * terms["patch"]
        return total, {name: term.detach() for name, term in terms.items()}

    def _distillation(self, logits_BK: Tensor, targets: HardTargets | SoftTargets | None) -> Tensor:
        if not self.soft:
            return F.cross_entropy(logits_BK, _hard(targets).global_class)
        kl = self._kl_sum(logits_BK, _soft(targets).global_logits)
        return kl / (logits_BK.numel() if self.config.soft_reduction == "paper" else len(logits_BK))

    def _patches(self, logits_BKhw: Tensor | None, targets: HardTargets | SoftTargets | None) -> Tensor:
        if logits_BKhw is None:
            raise ValueError("no patch logits: the student was called without a teacher grid")
        logits_BKhw = _full(logits_BKhw)
        grid = tuple(logits_BKhw.shape[-2:])
        if not self.soft:
            cells = _cells(_hard(targets).cell_class, grid)
            rows = logits_BKhw.permute(0, 2, 3, 1).flatten(0, 2)  # as they lie in memory: half the time on a CPU
            return F.cross_entropy(rows, cells.flatten())
        soft = _soft(targets)
        dense = _cells(soft.dense_logits, grid)
        if soft.blend is not None:
            dense = ckf_blend(dense, soft.global_logits, soft.blend / BLEND_ONE)
        kl, batch = self._kl_sum(logits_BKhw, dense), len(logits_BKhw)
        return kl / (batch if self.config.soft_reduction == "paper" else batch * grid[0] * grid[1])

    def _kl_sum(self, student: Tensor, teacher: Tensor) -> Tensor:
        """tau^2 * KL(teacher || student) over axis 1, summed over everything else."""
        tau = self.config.tau
        log_student = F.log_softmax(student / tau, dim=1)
        log_teacher = F.log_softmax(_full(teacher) / tau, dim=1)
        return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * tau**2


def own_terms(config: LossConfig) -> list[OwnTerm]:
    """The terms of a user's own, loaded. Raises ConfigError where one can't be, or has the name of another one."""
    found: list[OwnTerm] = []
    for text in config.terms:
        code = load_own(text, "loss.terms", "cskd.losses", "function", ConfigError)
        if code is None or not callable(code.value):
            what = "no entry point of cskd.losses" if code is None else f"a {type(code.value).__name__}"
            raise ConfigError(
                f"loss.terms: {text!r} is {what}, expected path/to/file.py:function or package.module:function"
            )
        if code.name in (*TERMS, *(term.name for term in found)):
            raise ConfigError(f"loss.terms: {text!r} has the name of another term, {code.name!r}; rename the function")
        heads = tuple(getattr(code.value, "heads", ()))
        if wrong := [head for head in heads if head not in HEADS]:
            raise ConfigError(
                f"loss.terms: {text!r} trains {wrong[0]!r}, expected of {', '.join(HEADS)}; mend its `heads`"
            )
        found.append(OwnTerm(text, code.name, code.where, code.sha256, code.value, heads))
    return found


def terms_of(config: LossConfig) -> tuple[str, ...]:
    """Names of all terms that a loss may have, as logged."""
    return (*TERMS, *(term.name for term in own_terms(config)))


def _own_heads(own: list[OwnTerm]) -> set[str]:
    return {head for term in own for head in term.heads}


def trained_heads(config: LossConfig, distilled: bool) -> tuple[str, ...]:
    """What a loss trains of a student's outputs, out of 'class', 'distillation' and 'patches'.

    Args:    distilled whether the student has a distillation token; without one its head is that of the class token.
    """
    own = _own_heads(own_terms(config)) - (set() if distilled else {"distillation"})
    if config.method == "none":
        trains = {"class": True, "distillation": distilled and config.baseline_head == "mean", "patches": False}
    else:
        trains = {
            "class": not distilled or config.alpha < 1,
            "distillation": distilled and config.alpha > 0,
            "patches": config.method.startswith("cskd") and config.patch_weight > 0,
        }
    return tuple(name for name, yes in trains.items() if yes or name in own)


def unread_keys(method: str, given: Collection[str]) -> list[str]:
    """Which of the keys of the section `loss` that a config gives its method does not read."""
    read = {"method", "smoothing", "terms", "alpha" if method != "none" else "baseline_head"}
    read |= {"decay", "patch_weight"} if method.startswith("cskd") else set()
    read |= {"tau", "soft_reduction"} if method.endswith("soft") else set()
    return sorted(key for key in given if key.startswith("loss.") and key.removeprefix("loss.") not in read)


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


def _hard(targets: HardTargets | SoftTargets | None) -> HardTargets:
    if not isinstance(targets, HardTargets):
        raise TypeError(f"targets are {type(targets).__name__}, expected HardTargets for a '-hard' method")
    return targets


def _soft(targets: HardTargets | SoftTargets | None) -> SoftTargets:
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
