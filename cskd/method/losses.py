"""What the student is taught: the label's term, the distillation token's and the patch tokens'.

    total = (1 - alpha) * CE(class head, label) + alpha * distillation term + patch_weight * patch term

Methods: 'none' only the label; 'deit-*' the first two terms; 'cskd-*' all three.
Shapes: B batch, K classes, h w teacher grid (7 7).
Source: arXiv 2307.08500, section 3; DeiT, arXiv 2012.12877, section 4.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cskd.codecs.base import BLEND_ONE
from cskd.config.schema import LossConfig
from cskd.errors import StudentError
from cskd.method.ckf import ckf_blend


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


class DistillationLoss:
    """The loss that a config asks for; stateless, so one serves all epochs.

    Hard terms are cross entropies with the teacher's classes, mean over images (and cells). Soft terms are
    tau^2 * KL(teacher || student) of softmax(logits / tau), summed over classes, and then, by `soft_reduction`:

        'consistent'  both are means: the distillation term over B images, the patch term over B * h * w cells.
        'paper'       what the authors' code divides by: the distillation term by B * K, the patch term by B alone,
                      which weighs K * h * w (49,000) times more against the other than in 'consistent'.

    A ViT without a distillation token has one head that serves all terms. With 'none' the class head is trained alone, as
    in DeiT's and the CSKD authors' code; with `baseline_head: mean` the mean of the logits of a distilled student's two
    heads, as timm does outside `distilled_training`: then both tokens learn. See `trained_heads`.

    Source: cskd.py of the CSKD authors' code and losses.py of DeiT's for the two divisors and the class head of 'none'.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.distils = config.method != "none"
        self.uses_patches = config.method.startswith("cskd")
        self.soft = config.method.endswith("soft")

    def __call__(
        self, output: StudentOutput, labels: MixedLabels, targets: HardTargets | SoftTargets | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:    targets HardTargets for '-hard' methods, SoftTargets for '-soft'; not read for 'none'.
        Returns: the total, a float scalar; and the terms 'label', 'dist', 'patch' that the method has, detached scalars
                 before alpha and patch_weight.
        Raises:  TypeError for the wrong kind of targets; ValueError where patch logits or cell targets are missing;
                 StudentError where the two differ in grid.
        """
        c = self.config
        cls = _full(output.cls_logits)
        dist = cls if output.dist_logits is None else _full(output.dist_logits)
        if not self.distils:
            alone = dist is cls or c.baseline_head == "class"
            total = label_loss(cls if alone else (cls + dist) / 2, labels, c.smoothing)
            return total, {"label": total.detach()}
        terms = {"label": label_loss(cls, labels, c.smoothing), "dist": self._distillation(dist, targets)}
        total = (1 - c.alpha) * terms["label"] + c.alpha * terms["dist"]
        if self.uses_patches:
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


def trained_heads(config: LossConfig, distilled: bool) -> tuple[str, ...]:
    """What a loss trains of a student's outputs, out of 'class', 'distillation' and 'patches'.

    Args:    distilled whether the student has a distillation token; without one its head is that of the class token.
    """
    if config.method == "none":
        return ("class", "distillation") if distilled and config.baseline_head == "mean" else ("class",)
    trains = {
        "class": not distilled or config.alpha < 1,
        "distillation": distilled and config.alpha > 0,
        "patches": config.method.startswith("cskd") and config.patch_weight > 0,
    }
    return tuple(name for name, yes in trains.items() if yes)


def unread_keys(method: str, given: Collection[str]) -> list[str]:
    """Which of the keys of the section `loss` that a config gives its method does not read."""
    read = {"method", "smoothing", "alpha" if method != "none" else "baseline_head"}
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
