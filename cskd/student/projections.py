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

from cskd.config.schema import LossConfig, LossTerm
from cskd.method.features import MapShape, bilinear, finer
from cskd.method.losses import StudentOutput
from cskd.method.terms import blocks_of, expanded
from cskd.seeds import hash64
from cskd.student.model import Student, pool_tokens


class Projections(nn.ModuleList):
    """The layers of a loss, in the order of its terms of features.

    Args:    widths: C of the tokens that each term reads, by its head, or one for all; maps those of the teachers by `map_name` of a
             term; seed: first weights follow from it and the term's place.
    """

    def __init__(
        self, config: LossConfig, widths: Mapping[str, int] | int, maps: Mapping[str, MapShape], seed: int
    ) -> None:
        super().__init__()
        self.terms, self.maps = [term for term in expanded(config) if term.of_features], dict(maps)
        self.tokens = any(term.block is None for term in self.terms)
        self.blocks = blocks_of(config)
        with torch.random.fork_rng(devices=[]):
            for i, term in enumerate(self.terms):
                torch.manual_seed(hash64("projection", seed, i))
                free = term.projection == "linear"
                width = widths if isinstance(widths, int) else widths[term.head]
                layer = nn.Linear(width, self.maps[term.map_name].channels, bias=free)
                self.append(layer if free else orthogonal(layer, use_trivialization=False))

    def forward(self, output: StudentOutput) -> StudentOutput:
        """With `projected`: float32 [B, D, h, w], or [B, D] of a term of `pooled`; needs `tokens` and `blocks` of the terms' heads."""
        found = dict[str, Tensor]()
        # Not in half precision: the matrix would be orthogonal to three digits.
        with torch.autocast(output.cls_logits.device.type, enabled=False):
            for term, layer in zip(self.terms, self, strict=True):
                tokens_BHWC = output.tokens if term.block is None else (output.blocks or {}).get(term.block)
                if tokens_BHWC is None:
                    raise ValueError(
                        f"no tokens for {term.title}: the student was called without tokens=True, or blocks"
                    )
                x = tokens_BHWC.float() if tokens_BHWC.dtype != torch.float64 else tokens_BHWC
                if term.projection == "orthogonal":
                    _restore_signs(layer)
                found[term.title] = self._of(x, term, layer)
        return output._replace(projected=found)

    def _of(self, x_BHWC: Tensor, term: LossTerm, layer: nn.Module) -> Tensor:
        own, grid = (x_BHWC.shape[1], x_BHWC.shape[2]), self.maps[term.map_name].grid
        if term.target == "pooled":
            return cast(Tensor, layer(x_BHWC.mean((1, 2))))
        if term.resize == "finer":
            grid = finer(own, grid)
        if own[0] >= grid[0] and own[1] >= grid[1]:
            return cast(Tensor, layer(pool_tokens(x_BHWC.flatten(1, 2), own, grid)).movedim(-1, 1))
        return bilinear(layer(x_BHWC).movedim(-1, 1), grid)

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
        of = self.projections
        output: StudentOutput = of(self.student(images, teacher_grid, tokens=of.tokens, blocks=of.blocks))
        return output


@torch.no_grad()
def token_width(student: Student) -> int:
    """C of a student's tokens, found by one image: what models say of themselves differs."""
    return token_widths(student, LossConfig("none", terms=[LossTerm("tokens", "pooled", "mse")]))["tokens"]


@torch.no_grad()
def token_widths(student: Student, loss: LossConfig) -> dict[str, int]:
    """C of the tokens that the terms of features of a loss read, by their heads. StudentError as `Student.refuse_blocks`."""
    terms, blocks = [term for term in expanded(loss) if term.of_features], blocks_of(loss)
    student.refuse_blocks(blocks)
    training, device = student.training, next(student.parameters()).device
    try:
        image = torch.zeros(1, 3, *student.image_size, device=device)
        output = student.eval()(image, tokens=True, blocks=blocks)
    finally:
        student.train(training)
    every = {None: output.tokens, **(output.blocks or {})}
    return {term.head: int(every[term.block].shape[-1]) for term in terms}


@torch.no_grad()
def _restore_signs(layer: nn.Module) -> None:
    """The diagonal of torch's Householder parameters holds signs, which it cuts to whole numbers: an optimiser that moves them in
    spite of their gradient of 0 would end the matrix. With a matrix exponential the diagonal means nothing."""
    diagonal = cast(Any, layer).parametrizations.weight.original.diagonal()
    diagonal.copy_(torch.where(diagonal < 0, -1.0, 1.0))
