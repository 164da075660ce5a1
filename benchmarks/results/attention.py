"""Mean attention distance: how far, in pixels, the patch tokens of a ViT look.

Shapes: B images, H heads, T tokens, N patch tokens (rows x columns).
Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), section 4.5 and figure 7 right; Raghu et al. 2021 (arXiv 2108.08810).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cskd.errors import StudentError
from cskd.student import Student


def patch_distances(grid: tuple[int, int], patch: tuple[float, float]) -> Tensor:
    """Pixels between the centres of any two patches: float64 [N, N], patches row by row.

    Args:    grid (rows, columns) of patches; patch (height, width) of one, pixels.
    """
    rows = torch.arange(grid[0], dtype=torch.float64) * patch[0]
    columns = torch.arange(grid[1], dtype=torch.float64) * patch[1]
    centre_N2 = torch.cartesian_prod(rows, columns).reshape(-1, 2)
    return (centre_N2[:, None] - centre_N2[None]).square().sum(2).sqrt()


def mean_distance(weights_BHTT: Tensor, distance_NN: Tensor) -> Tensor:
    """Distance between a query patch and the key patches, weighted by attention, mean over images and query patches.

    Prefix tokens are left out, as queries and as keys; the weights of the patches that stay are divided by their sum.

    Args:    weights_BHTT attention after its softmax, [image, head, query, key], the N patches last; distance_NN pixels.
    Returns: float64 [H], pixels.
    """
    n = len(distance_NN)
    weights = weights_BHTT[:, :, -n:, -n:].double()
    weights = weights / weights.sum(3, keepdim=True)
    return (weights * distance_NN.to(weights.device)).sum(3).mean((0, 2))


@contextlib.contextmanager
def attention_weights(student: Student) -> Iterator[list[Tensor]]:
    """A list that a forward of the student appends each layer's attention to, after the softmax: [B, H, T, T].

    The weights are timm's own, so norms of queries and keys are in them: what enters the dropout behind the softmax. Fused
    attention, which never has them, is off meanwhile.

    Raises:  StudentError for a ViT whose blocks have no such attention.
    """
    modules: list[Any] = [m for m in student.backbone.modules() if hasattr(m, "fused_attn")]
    if not modules or not all(isinstance(getattr(m, "attn_drop", None), nn.Module) for m in modules):
        raise StudentError(
            f"the attention of {student.config.model} does not show its weights; take a plain ViT such as "
            "deit_tiny_distilled_patch16_224"
        )
    seen: list[Tensor] = []
    before = [bool(m.fused_attn) for m in modules]
    handles = [m.attn_drop.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0])) for m in modules]
    student.unfuse_attention()
    try:
        yield seen
    finally:
        for module, fused, handle in zip(modules, before, handles, strict=True):
            module.fused_attn = fused
            handle.remove()


@torch.no_grad()
def distances_by_layer(student: Student, batches: Iterable[Tensor]) -> Tensor:
    """`mean_distance` of every layer and head over all images: float64 [layers, H], pixels, layers from first to last.

    Args:    student in evaluation mode; batches of normalised images, float32 [B, 3, H, W], at least one.
    """
    rows, columns = student.patch_grid
    size = (student.image_size[0] / rows, student.image_size[1] / columns)
    distance_NN = patch_distances(student.patch_grid, size)
    total, images = None, 0
    with attention_weights(student) as seen:
        for batch in batches:
            seen.clear()
            student(batch)
            here = torch.stack([mean_distance(weights, distance_NN) for weights in seen]).cpu() * len(batch)
            total, images = here if total is None else total + here, images + len(batch)
    if total is None:
        raise ValueError("no images, expected at least one batch")
    return total / images
