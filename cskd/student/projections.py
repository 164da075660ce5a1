"""What brings a student's tokens to the width of a teacher's features: one layer for each term of features.

They belong to the training: optimised and kept in resume states, neither averaged nor exported.

Shapes: B batch, C student's width, H W student's grid, D teacher's channels, h w teacher's grid.
Source: VkD, arXiv 2403.06213, and its authors' engine.py: an orthogonal matrix without bias, by torch's parametrisation of them: the
matrix exponential where it is square, Householder reflections elsewhere. It keeps the angles between student features where D >= C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from cskd.config.schema import LossConfig
from cskd.method.features import MapShape
from cskd.method.losses import StudentOutput
from cskd.method.terms import expanded
from cskd.seeds import hash64
from cskd.student.model import Student, pool_tokens


class Projections(nn.ModuleList):
    """The layers of a loss, in the order of its terms of features.

    Args:    width C; maps those of the teachers by cache, '' of the first; seed: first weights follow from it and the term's place.
    """

    def __init__(self, config: LossConfig, width: int, maps: Mapping[str, MapShape], seed: int) -> None:
        super().__init__()
        self.terms, self.maps = [term for term in expanded(config) if term.of_features], dict(maps)
        with torch.random.fork_rng(devices=[]):
            for i, term in enumerate(self.terms):
                torch.manual_seed(hash64("projection", seed, i))
                free = term.projection == "linear"
                layer = nn.Linear(width, self.maps[term.cache].channels, bias=free)
                self.append(layer if free else orthogonal(layer, use_trivialization=False))

    def forward(self, output: StudentOutput) -> StudentOutput:
        """With `projected`: float32 [B, D, h, w] of a term of `features`, [B, D] of one of `pooled`; needs `tokens`."""
        tokens_BHWC, found = output.tokens, dict[str, Tensor]()
        if tokens_BHWC is None:
            raise ValueError("no tokens: the student was called without tokens=True")
        own = (tokens_BHWC.shape[1], tokens_BHWC.shape[2])
        # Not in half precision: the matrix would be orthogonal to three digits.
        with torch.autocast(tokens_BHWC.device.type, enabled=False):
            for term, layer in zip(self.terms, self, strict=True):
                x = tokens_BHWC.float() if tokens_BHWC.dtype != torch.float64 else tokens_BHWC
                grid = self.maps[term.cache].grid
                x = x.mean((1, 2)) if term.target == "pooled" else pool_tokens(x.flatten(1, 2), own, grid)
                if term.projection == "orthogonal":
                    _restore_signs(layer)
                found[term.title] = layer(x).movedim(-1, 1)
        return output._replace(projected=found)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: the matrices of linear layers decay, as the student's do; nothing else does."""
        linear = [cast(nn.Linear, layer).weight for layer in self if not hasattr(layer, "parametrizations")]
        other = [p for p in self.parameters() if not any(p is weight for weight in linear)]
        groups = [{"params": linear, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]


class Taught(nn.Module):
    """A student, compiled or not, with the projections of its tokens: what a loss with terms of features is computed of."""

    def __init__(self, student: nn.Module, projections: Projections) -> None:
        super().__init__()
        self.student, self.projections = student, projections

    def forward(self, images: Tensor, teacher_grid: tuple[int, int] | None = None) -> StudentOutput:
        """As `Student.forward`, with `projected`."""
        output: StudentOutput = self.projections(self.student(images, teacher_grid, tokens=True))
        return output


@torch.no_grad()
def token_width(student: Student) -> int:
    """C of a student's tokens, found by one image: what models say of themselves differs."""
    training, device = student.training, next(student.parameters()).device
    try:
        output = student.eval()(torch.zeros(1, 3, *student.image_size, device=device), tokens=True)
    finally:
        student.train(training)
    assert output.tokens is not None
    return int(output.tokens.shape[-1])


@torch.no_grad()
def _restore_signs(layer: nn.Module) -> None:
    """The diagonal of torch's Householder parameters holds signs, which it cuts to whole numbers: an optimiser that moves them in
    spite of their gradient of 0 would end the matrix. With a matrix exponential the diagonal means nothing."""
    diagonal = cast(Any, layer).parametrizations.weight.original.diagonal()
    diagonal.copy_(torch.where(diagonal < 0, -1.0, 1.0))
