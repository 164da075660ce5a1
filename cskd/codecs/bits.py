"""Vectors of logits or features in a few bits a number: equal steps from the smallest to the largest, packed without gaps.

Shapes: ... any leading axes, K numbers of a vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MIN_BITS, MAX_BITS = 2, 16


def packed_length(count: int, bits: int) -> int:
    """Bytes of a packed vector."""
    return -(-count * bits // 8)


def pack_levels(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [..., K] as uint8 [..., ceil(K * bits / 8)], the lowest bit first, with the smallest number and the step of
    each vector, float32 [...]: a number is low + level * step, off by at most half a step. All on the host."""
    import torch

    # In float64, which not every device has: the difference of two numbers may overflow, or lose its digits.
    most, wide = 2**bits - 1, x.detach().cpu().double()
    low, high = wide.amin(-1), wide.amax(-1)
    step = ((high - low) / most).float()
    level = ((wide - low[..., None]) / step.double().clamp_min(2.0**-149)[..., None]).round_().clamp_(0, most).int()
    bit = (level[..., None] >> torch.arange(bits, dtype=torch.int32)) & 1
    packed = np.packbits(bit.flatten(-2).byte().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed), low.float(), step


def unpack_levels(packed: Tensor, low: Tensor, step: Tensor, count: int, bits: int) -> Tensor:
    """The numbers of `pack_levels`, on the device of `packed`: float32 [..., count]."""
    import torch

    eight = torch.arange(8, dtype=torch.int32, device=packed.device)
    bit = ((packed[..., None].int() >> eight) & 1).flatten(-2)[..., : count * bits]
    bit = bit.reshape(*bit.shape[:-1], count, bits)
    level: Tensor = (bit << torch.arange(bits, dtype=torch.int32, device=packed.device)).sum(-1)
    return low[..., None] + level * step[..., None]
