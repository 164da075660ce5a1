"""Cumulative knowledge fusion: what a cell is taught at a given epoch.

Early the cell's own logits (local), later the image's (global): T_a = a * D + (1 - a) * g, a falling from 1.
Source: arXiv 2307.08500, section on CKF. Shapes: B batch, K classes, h w teacher grid (7 7).
"""

from __future__ import annotations

import math

from torch import Tensor

from cskd.codecs.base import BLEND_ONE, direct_hard, quantise_blend
from cskd.config.schema import Decay


def blend_at(epoch: int, epochs: int, decay: Decay) -> int:
    """The blend of an epoch as a whole number of 2^-16, so that cache and online targets agree exactly.

    Progress is p = epoch / epochs. The first epoch has a = 1; p never reaches 1, so the last has a = 1 / epochs where
    the decay is linear. Beside the paper's three decays, 'local' keeps a = 1 and 'global' a = 0.

    Args:    epoch 0..epochs-1; decay 'linear' 1 - p, 'quadratic' (1 - p)^2, 'cosine' cos(pi p / 2), 'local', 'global'.
    Returns: a * 65536, rounded, 0..65536.
    Raises:  ValueError for an epoch outside 0..epochs-1 or an unknown decay.
    Source:  arXiv 2307.08500; the authors' cskd.py counts epochs the same way.
    """
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch {epoch} of {epochs}, expected 0..{epochs - 1}; epochs are counted from 0")
    p = epoch / epochs
    blends: dict[str, float] = {
        "linear": 1 - p,
        "quadratic": (1 - p) ** 2,
        "cosine": math.cos(math.pi * p / 2),
        "local": 1.0,
        "global": 0.0,
    }
    if decay not in blends:
        raise ValueError(f"decay {decay!r}, expected one of {', '.join(blends)}")
    return quantise_blend(blends[decay])


def blend_schedule(epoch: int, epochs: int, decay: Decay = "linear") -> float:
    """The blend of an epoch as a share, 1 = local: what `cskd train` teaches at, since `blend_at` rounds it to 2^-16.

    Args, Raises, Source: as `blend_at`.
    """
    return blend_at(epoch, epochs, decay) / BLEND_ONE


def ckf_blend(dense_BKhw: Tensor, global_BK: Tensor, blend: float) -> Tensor:
    """Mix each cell's logits with the image's, for soft targets.

    Args:    dense_BKhw float logits; global_BK float logits; blend in [0, 1], 1 = local only.
    Returns: [B, K, h, w], of the logits' dtype.
    Raises:  ValueError when blend is outside [0, 1].
    Source:  arXiv 2307.08500, section on CKF.
    """
    if not 0.0 <= blend <= 1.0:
        raise ValueError(f"blend {blend}, expected a share in [0, 1]; pass blend_at(...) / {BLEND_ONE}")
    return blend * dense_BKhw + (1.0 - blend) * global_BK[:, :, None, None]


# The class that each cell is taught, straight from the teacher's logits: the rule of the codecs, which `--online` follows too.
hard_targets = direct_hard
