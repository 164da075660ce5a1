"""How much of what it is taught a student says: the share of cells whose class is that of their target.

Shapes: B batch, K classes, h w teacher grid.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cskd.codecs.base import BLEND_ONE
from cskd.config.schema import LossConfig, LossTerm
from cskd.method.ckf import ckf_blend
from cskd.method.losses import AnyTargets, BothTargets, HardTargets, SoftTargets, expanded, logit_targets

ROWS = 64  # views whose soft targets are blended at a time: a batch of 1,024 with 1,000 classes takes 200 MB


def cells_term(loss: LossConfig) -> LossTerm | None:
    """The first term of a loss that teaches patch tokens the teacher's cells; None where none does: nothing to agree with."""
    return next((t for t in expanded(loss) if not t.own and (t.head, t.target) == ("patches", "cells")), None)


@torch.no_grad()
def agreement(patch_BKhw: Tensor, targets: AnyTargets, term: LossTerm) -> Tensor:
    """Share of the cells of a batch whose largest patch logit is that of the target's class: float32 scalar in [0, 1].

    The target is that of the epoch for this term: the class that hard CKF teaches, or the largest logit of the blended ones.
    """
    said_Bhw = patch_BKhw.argmax(1)
    if isinstance(targets, Mapping):
        targets = targets[term.cache]
    targets = logit_targets(targets)
    hard, soft = (targets.hard, targets.soft) if isinstance(targets, BothTargets) else (targets, targets)
    if term.kind == "ce":
        assert isinstance(hard, HardTargets) and hard.cell_class is not None
        return (said_Bhw == hard.more.get(term.decay or "", hard.cell_class)).float().mean()
    assert isinstance(soft, SoftTargets) and soft.dense_logits is not None
    blend = soft.more.get(term.decay or "", soft.blend)
    share = 1.0 if blend is None else blend / BLEND_ONE
    parts = zip(torch.split(soft.dense_logits, ROWS), torch.split(soft.global_logits, ROWS), strict=True)
    return (said_Bhw == torch.cat([ckf_blend(dense, image, share).argmax(1) for dense, image in parts])).float().mean()
