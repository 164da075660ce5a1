"""What part of the input a cell of a CNN's last map depends on, by the gradient of that cell.

Shapes: B images, C channels, h w the map's cells, H W pixels of the network's input.
Source of the effective field: Luo et al. 2016 (arXiv 1701.04128).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHARES = (0.68, 0.95)


@dataclass(frozen=True)
class ReceptiveField:
    """Of one cell, in pixels of the network's input."""

    cell: tuple[int, int]  # row, column
    grid: tuple[int, int]  # of the map
    input_size: tuple[int, int]  # height, width
    theoretical: tuple[int, int]  # height, width of the bounding box of all pixels with a gradient in any image
    whole_input: bool  # the box reaches all four edges: the true extent may be larger
    effective: dict[str, float]  # share -> side, see `centred_side`
    offset: tuple[float, float]  # down, right: from the middle of the cell's part of the image to the gradient's centre


def receptive_field(features: Callable[[Tensor], Tensor], inputs_BCHW: Tensor, seed: int = 0) -> ReceptiveField:
    """The field of the cell in the middle: row h // 2, column w // 2.

    The gradient is that of a sum over the cell's channels with random signs, so that channels don't cancel in the same way
    everywhere; its absolute value is summed over the input's channels, and averaged over images.

    Args:    features network input -> map [B, C, h, w], in evaluation mode: no image may depend on another;
             inputs_BCHW normalised images; more than one, as a rectifier that is shut in one passes nothing back.
    Raises:  ValueError where no pixel has a gradient.
    """
    x = inputs_BCHW.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        map_BChw = features(x)
        h, w = map_BChw.shape[2:]
        cell_BC = map_BChw[:, :, h // 2, w // 2]
        signs = torch.randint(0, 2, cell_BC.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        (gradient,) = torch.autograd.grad((cell_BC * signs.to(cell_BC)).sum(), x)
    strength_HW = gradient.double().abs().sum(1).mean(0).cpu()
    if not bool((strength_HW > 0).any()):
        raise ValueError("no pixel has a gradient; take other images")
    H, W = strength_HW.shape
    rows, columns = (strength_HW > 0).any(1).nonzero()[:, 0], (strength_HW > 0).any(0).nonzero()[:, 0]
    box = (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
    middle = ((h // 2 + 0.5) * H / h - 0.5, (w // 2 + 0.5) * W / w - 0.5)
    centre = centre_of(strength_HW)
    return ReceptiveField(
        cell=(h // 2, w // 2),
        grid=(h, w),
        input_size=(H, W),
        theoretical=box,
        whole_input=box == (H, W),
        effective={f"{share:g}": centred_side(strength_HW, share) for share in SHARES},
        offset=(centre[0] - middle[0], centre[1] - middle[1]),
    )


def centre_of(strength_HW: Tensor) -> tuple[float, float]:
    """Centre of mass of a map: row, column, whole numbers in the middle of a pixel."""
    total = strength_HW.sum()
    row = (strength_HW.sum(1) * torch.arange(strength_HW.shape[0])).sum() / total
    column = (strength_HW.sum(0) * torch.arange(strength_HW.shape[1])).sum() / total
    return float(row), float(column)


def centred_side(strength_HW: Tensor, share: float) -> float:
    """Side, in pixels, of the smallest square round `centre_of` whose whole pixels hold that share of the map.

    Where the centre is far from the middle the square may reach beyond the image.
    """
    row, column = centre_of(strength_HW)
    H, W = strength_HW.shape
    far_HW = torch.maximum(
        (torch.arange(H, dtype=torch.float64) - row).abs()[:, None],
        (torch.arange(W, dtype=torch.float64) - column).abs()[None],
    )
    order = far_HW.flatten().argsort()
    held = strength_HW.flatten()[order].cumsum(0)
    # Rounding of the running sum must not ask for pixels beyond the last one that has any.
    enough = int((held >= share * held[-1] * (1 - 1e-12)).nonzero()[0])
    return 2 * float(far_HW.flatten()[order[enough]]) + 1
