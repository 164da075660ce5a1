"""Whom does a student follow in each cell: the teacher's class there, the teacher's class of the image, or the label?

Shapes: n images, K classes, h w the teacher's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cskd.codecs.base import BLEND_ONE
from cskd.method.ckf import hard_targets
from cskd.teacher.model import Teacher

ROWS = 64  # images whose logits are compared at a time: hard targets are computed in float64


@dataclass(frozen=True)
class Cells:
    """What may be followed; all int64."""

    local: Tensor  # [n, h, w], the teacher's class of the cell: the hard target at blend 1
    image: Tensor  # [n], its class of the image: that at blend 0
    label: Tensor  # [n]

    @property
    def differ(self) -> Tensor:
        """Where local and global class differ: bool [n, h, w]."""
        return self.local != self.image[:, None, None]


def teacher_cells(teacher: Teacher, pixels_BCHW: Tensor, label: Tensor) -> Cells:
    """The teacher's classes of clean images.

    Args:    pixels_BCHW uint8 [n, 3, H, W], RGB at the recipe's size; label int64 [n].
    """
    local, image = [], []
    for part in torch.split(pixels_BCHW, teacher.batch):
        dense_BKhw, global_BK = teacher.forward_dense(part.float())
        for dense, whole in zip(dense_BKhw.split(ROWS), global_BK.split(ROWS), strict=True):
            local.append(hard_targets(dense, whole, BLEND_ONE).cpu())
        image.append(global_BK.argmax(1).cpu())
    return Cells(torch.cat(local), torch.cat(image), label)


def agreement(said_nhw: Tensor, cells: Cells) -> dict[str, dict[str, float]]:
    """Shares of cells, over all images, whose predicted class is each of three others.

    Args:    said_nhw int64, argmax of the student's patch logits.
    Returns: part -> {'local', 'global', 'label'} -> share in [0, 1]. Parts are 'all' cells, those where the teacher's local
             and global class 'differ', and those where they are the 'same'; one that has no cells is left out. A label may
             be the local or the global class, so the three of a part need not add up to less than 1.
    """
    hits = {
        "local": said_nhw == cells.local,
        "global": said_nhw == cells.image[:, None, None],
        "label": said_nhw == cells.label[:, None, None],
    }
    parts = {"all": torch.ones_like(cells.differ), "differ": cells.differ, "same": ~cells.differ}
    return {
        part: {name: float(hit[where].double().mean()) for name, hit in hits.items()}
        for part, where in parts.items()
        if bool(where.any())
    }


def agreement_map(said_nhw: Tensor, local_nhw: Tensor) -> list[list[float]]:
    """Share of images whose predicted class is the local one, cell by cell: [h][w] in [0, 1]."""
    shares: list[list[float]] = (said_nhw == local_nhw).double().mean(0).tolist()
    return shares


def teacher_facts(cells: Cells) -> dict[str, Any]:
    """The teacher's own shares: how often its classes differ, and how often each is the label, in 'all' and 'differ' cells."""
    right, right_image = cells.local == cells.label[:, None, None], cells.image == cells.label
    facts: dict[str, Any] = {
        "images": len(cells.label),
        "grid": list(cells.local.shape[1:]),
        "cells_differ": float(cells.differ.double().mean()),
        "label": {"all": {"local": float(right.double().mean()), "global": float(right_image.double().mean())}},
    }
    if bool(cells.differ.any()):
        here = right_image[:, None, None].expand_as(right)
        facts["label"]["differ"] = {
            "local": float(right[cells.differ].double().mean()),
            "global": float(here[cells.differ].double().mean()),
        }
    return facts
