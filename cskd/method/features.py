"""Terms that teach a student's tokens the teacher's last feature map, cell by cell or its mean.

Shapes: B batch, C teacher's channels, h w teacher grid (7 7); the mean over the cells has no h and w.
Sources: FitNets, arXiv 1412.6550, for a projection to the teacher's width and the squared difference; VkD, arXiv 2403.06213,
for the orthogonal projection, the normed teacher and smooth L1, of the mean over the cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from cskd.config.schema import LossTerm
from cskd.errors import StudentError


class MapShape(NamedTuple):
    """Of a teacher's feature map."""

    channels: int
    grid: tuple[int, int]  # h, w


def feature_loss(student: Tensor, teacher_BChw: Tensor, term: LossTerm) -> Tensor:
    """A term of features before its weight, a scalar: the mean over images, cells and channels; of `cosine` over images and cells.

    Args:    student [B, C, h, w], or [B, C] for target `pooled`, projected to the teacher's channels; term its `target`, `kind` and
             `standardise`.
    Raises:  StudentError where the two differ in shape.
    """
    teacher = teacher_BChw.mean((2, 3)) if term.target == "pooled" else teacher_BChw
    if student.shape != teacher.shape:
        raise StudentError(
            f"loss.terms: {term.title} got tokens projected to {list(student.shape)}, the teacher's features are "
            f"{list(teacher.shape)}; project them to the map of the cache that the term reads"
        )
    if term.standardise:
        teacher = F.layer_norm(teacher.movedim(1, -1), teacher.shape[1:2]).movedim(-1, 1)
    if term.kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1).mean()
    return F.mse_loss(student, teacher) if term.kind == "mse" else F.smooth_l1_loss(student, teacher)
