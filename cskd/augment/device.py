"""What is left for the device: mix two uint8 views and normalise. Teacher and student inputs come from the same arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cskd.augment.mixing import CUTMIX, MIXUP, ONE

# Shapes: B batch, H W view, C 3 channels


def mix_pixels(views_BHWC: Tensor, partner_B: Tensor, mode_B: Tensor, lam_B: Tensor, box_B4: Tensor) -> Tensor:
    """Mix each view with its partner's in the same batch.

    Args:    views_BHWC uint8; partner_B int64, row of the partner in this batch (its own row where unmixed);
             mode_B uint8; lam_B int64 in 1/65536; box_B4 int64 (top, bottom, left, right). See `mixing.Mixing`.
    Returns: float32 [B, C, H, W], RGB in 0..255, channels_last.
    """
    pixels = views_BHWC.permute(0, 3, 1, 2).float()
    other = pixels[partner_B]
    height, width = pixels.shape[-2:]
    lam = torch.where(mode_B == MIXUP, lam_B, ONE).to(torch.float32)[:, None, None, None] / ONE
    mixed = torch.where((mode_B == MIXUP)[:, None, None, None], pixels * lam + other * (1.0 - lam), pixels)
    rows = torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device)
    in_rows = (rows >= box_B4[:, 0:1]) & (rows < box_B4[:, 1:2])  # [B, H]
    in_columns = (columns >= box_B4[:, 2:3]) & (columns < box_B4[:, 3:4])  # [B, W]
    cut = (mode_B == CUTMIX)[:, None, None] & in_rows[:, :, None] & in_columns[:, None, :]
    return torch.where(cut[:, None], other, mixed)


def normalise(pixels_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 RGB in 0..255 to (x / 255 - mean) / std; mean and std of RGB in [0, 1]."""
    scale = pixels_BCHW.new_tensor([1.0 / (255.0 * s) for s in std])[:, None, None]
    shift = pixels_BCHW.new_tensor([-m / s for m, s in zip(mean, std, strict=True)])[:, None, None]
    return pixels_BCHW * scale + shift


def mixed_pixels(batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """`mix_pixels` of a training batch (see `cskd.loading.stage2`), on the device."""
    names = ("pixels", "partner", "mode", "lam", "box")
    return mix_pixels(*(batch[name].to(device, non_blocking=True) for name in names))


class InputMaker:
    """Batches of stage 2 to the student's input, in the arithmetic in which stage 1 fed the teacher."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std, self.device = mean, std, device

    def mixed(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised float32 [B, 3, H, W] of a training batch (see `cskd.loading.stage2`)."""
        return normalise(mixed_pixels(batch, self.device), self.mean, self.std)

    def clean(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised float32 [B, 3, H, W] of an evaluation batch."""
        pixels = batch["pixels"].to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return normalise(pixels, self.mean, self.std)
