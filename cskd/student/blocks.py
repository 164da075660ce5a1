"""Maps of a student's blocks, by timm's forward_intermediates: of a ViT after each block, of other models after each stage.

Shapes: B batch, C features, H W the block's grid.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cskd.errors import StudentError, one_line


@torch.no_grad()
def depth_of(backbone: nn.Module, image_size: tuple[int, int]) -> int:
    """How many maps the model gives for such an image; 0 where it gives none. Costs no arithmetic: it runs on the meta device.

    Raises:  StudentError where its last features then are not those of forward_features in shape.
    """
    if not hasattr(backbone, "forward_intermediates"):
        return 0
    twin: Any = copy.deepcopy(backbone).to("meta").eval()
    image = torch.empty(1, 3, *image_size, device="meta")
    try:
        features, maps = twin.forward_intermediates(image)
        plain = twin.forward_features(image)
    except Exception as e:  # a model of timm raises whatever it likes
        raise StudentError(
            f"loss.terms: the student does not give its blocks ({one_line(e)}); teach head: tokens"
        ) from None
    usable = all(isinstance(x, Tensor) and x.ndim == 4 for x in maps)
    if not usable or not isinstance(features, Tensor) or features.shape != plain.shape:
        raise StudentError(
            "loss.terms: the student's blocks give no maps of cells; teach head: tokens, or take another model"
        )
    return len(maps)


def of_blocks(backbone: Any, images: Tensor, blocks: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The last features as of forward_features, and [B, C, H, W] of these blocks, which rise."""
    features, maps = backbone.forward_intermediates(images, indices=list(blocks))
    return features, dict(zip(blocks, maps, strict=True))
