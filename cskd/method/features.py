"""Terms that teach a student's tokens a map of the teacher, the last one or that of a stage, cell by cell or its mean.

Shapes: B batch, C teacher's channels, h w the map's grid (7 7); the mean over the cells has no h and w.
Sources: FitNets, arXiv 1412.6550, for a projection to the teacher's width and the squared difference; VkD, arXiv 2403.06213,
for the orthogonal projection, the normed teacher and smooth L1, of the mean over the cells; Locality Guidance, arXiv 2207.10026, for
maps of stages, and both maps on the finer grid.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cskd.config.schema import LossTerm
from cskd.errors import StudentError


class MapShape(NamedTuple):
    """Of a map of a teacher."""

    channels: int
    grid: tuple[int, int]  # h, w


def feature_loss(student: Tensor, teacher_BChw: Tensor, term: LossTerm) -> Tensor:
    """A term of features before its weight, a scalar: the mean over images, cells and channels; of `cosine` over images and cells.

    Args:    student [B, C, h, w], or [B, C] for target `pooled`, projected to the teacher's channels; with `resize: finer` of a grid
             that is at least the map's, to which the map is brought; term its `target`, `kind`, `resize` and `standardise`.
    Raises:  StudentError where the two differ in shape.
    """
    teacher = teacher_BChw.mean((2, 3)) if term.target == "pooled" else teacher_BChw
    if term.resize == "finer" and student.ndim == 4:
        teacher = bilinear(teacher, (student.shape[2], student.shape[3]))
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


def finer(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The grid that has the more cells of both along each axis."""
    return max(a[0], b[0]), max(a[1], b[1])


def bilinear(x_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps on another grid, axis by axis: bilinear where it is finer (`align_corners=False`), means of adaptive bins where it is
    coarser. As products of matrices, whose backward pass adds in a fixed order on any device."""
    h, w = x_BChw.shape[2:]
    if (h, w) == grid:
        return x_BChw
    rows, cols = (_weights(n, m, x_BChw.dtype, x_BChw.device) for n, m in zip((h, w), grid, strict=True))
    return rows @ x_BChw @ cols.T


@cache  # each copied to a device once: a copy out of plain memory waits for all that the device is at
def _weights(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[m, n]: what each of m cells takes of n."""
    each = torch.eye(n, dtype=torch.float64)[None]
    found = F.adaptive_avg_pool1d(each, m) if m <= n else F.interpolate(each, m, mode="linear", align_corners=False)
    return found[0].T.contiguous().to(device, dtype)
