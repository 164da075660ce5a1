"""How many hard targets the teacher's own arithmetic changes: the share that differs from the same weights in float32."""

# Shapes: B batch, C channels, H W pixels

from __future__ import annotations

import torch
from torch import Tensor

from cskd.codecs.base import quantise_blend
from cskd.method.ckf import hard_targets
from cskd.teacher.arithmetic import BLENDS, REFERENCE, Precision
from cskd.teacher.lanes import threads_of_a_lane
from cskd.teacher.model import Teacher

ROWS = 4  # views in one forward: many classes on a fine grid fill the memory


def is_reference(teacher: Teacher) -> bool:
    """Whether the teacher runs as REFERENCE does."""
    changed = teacher.fingerprint.compile or teacher.fingerprint.fold
    return teacher.precision == REFERENCE and not changed


def measure(teacher: Teacher, plain: Teacher | None, views_BCHW: Tensor) -> Precision:
    """Compare the hard targets of some views with those of `plain`, the same teacher as REFERENCE.

    Args:    plain None: there is none to compare with; views_BCHW float32, RGB in 0..255, as `forward_dense` takes them.
    """
    if plain is None:
        return Precision(teacher.precision, teacher.head_precision, None, 0)
    differing, cells = dict.fromkeys(BLENDS, 0), 0
    for part in torch.split(views_BCHW, teacher.batch if teacher.fingerprint.compile else ROWS):
        mine, its = _logits(teacher, part), _logits(plain, part)
        its = (its[0].to(teacher.device), its[1].to(teacher.device))
        cells += its[0][:, 0].numel()
        for blend in BLENDS:
            a, b = (hard_targets(*logits, quantise_blend(blend)) for logits in (mine, its))
            differing[blend] += int((a != b).sum())
    shares = {f"{blend:g}": count / max(1, cells) for blend, count in differing.items()}
    return Precision(teacher.precision, teacher.head_precision, shares, len(views_BCHW))


def _logits(teacher: Teacher, views_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    with threads_of_a_lane(teacher.device, teacher.reentrant):
        return teacher.forward_dense(views_BCHW)
