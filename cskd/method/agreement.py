"""How much of what it is taught a student says: the share of cells whose class is that of their target.

Shapes: B batch, K classes, h w teacher grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cskd.codecs.base import BLEND_ONE
from cskd.config.schema import LossConfig
from cskd.method.ckf import ckf_blend
from cskd.method.losses import HardTargets, SoftTargets

ROWS = 64  # views whose soft targets are blended at a time: a batch of 1,024 with 1,000 classes takes 200 MB


def has_agreement(loss: LossConfig) -> bool:
    """Whether a loss teaches cells, so that there is something to agree with."""
    return loss.method.startswith("cskd")


@torch.no_grad()
def agreement(patch_BKhw: Tensor, targets: HardTargets | SoftTargets | None) -> Tensor:
    """Share of the cells of a batch whose largest patch logit is that of the target's class: float32 scalar in [0, 1].

    The target is that of the epoch: the class that hard CKF teaches, or the largest logit of the blended ones.
    """
    said_Bhw = patch_BKhw.argmax(1)
    if isinstance(targets, HardTargets):
        assert targets.cell_class is not None
        return (said_Bhw == targets.cell_class).float().mean()
    assert targets is not None and targets.dense_logits is not None
    dense, image = torch.split(targets.dense_logits, ROWS), torch.split(targets.global_logits, ROWS)
    blend = 1.0 if targets.blend is None else targets.blend / BLEND_ONE
    parts = [ckf_blend(d, g, blend).argmax(1) for d, g in zip(dense, image, strict=True)]
    return (said_Bhw == torch.cat(parts)).float().mean()
