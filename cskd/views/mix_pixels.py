"""What is left for the device: mix two uint8 views and normalise. Teacher and student inputs come from the same arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cskd.views.mixing import CUTMIX, MIXUP, ONE

# Shapes: B batch, H W view, C 3 channels

_MIXING = ("pixels", "partner", "mode", "lam", "box")  # of a batch: the arguments of `mix_pixels`


def mix_pixels(views_BHWC: Tensor, partner_B: Tensor, mode_B: Tensor, lam_B: Tensor, box_B4: Tensor) -> Tensor:
    """Mix each view with its partner's in the same batch.

    Args:    views_BHWC uint8; partner_B int64, row of the partner in this batch (its own row where unmixed);
             mode_B uint8; lam_B int64 in 1/65536; box_B4 int64 (top, bottom, left, right). See `mixing.Mixing`.
    Returns: float32 [B, C, H, W], RGB in 0..255, channels_last. The same bits on the CPU as on other devices.
    """
    if views_BHWC.device.type == "cpu":
        return _mix_rows(views_BHWC, partner_B, mode_B, lam_B, box_B4)
    return _mix_batch(views_BHWC, partner_B, mode_B, lam_B, box_B4)


def normalise(pixels_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 RGB in 0..255 to (x / 255 - mean) / std; mean and std of RGB in [0, 1]."""
    scale_C, shift_C = _constants(tuple(mean), tuple(std), pixels_BCHW.dtype, pixels_BCHW.device)
    return pixels_BCHW * scale_C + shift_C


# Copies that are waited for, made once a device: any stream of it may use them.
@functools.lru_cache(maxsize=64)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift of `normalise`, [C, 1, 1] each."""
    scale, shift = (torch.tensor(values, dtype=dtype)[:, None, None].to(device) for values in _linear(mean, std))
    return scale, shift


@functools.lru_cache(maxsize=64)
def _counting(n: int, device: torch.device) -> Tensor:
    """0 .. n-1: int64 [n]."""
    return torch.arange(n).to(device)


def _linear(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Scale and shift of each channel that normalise a value in 0..255."""
    return [1.0 / (255.0 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _mix_batch(views_BHWC: Tensor, partner_B: Tensor, mode_B: Tensor, lam_B: Tensor, box_B4: Tensor) -> Tensor:
    """All rows at once: few kernels, for a device that runs a batch in parallel. Of bytes while that will do: they are a
    quarter of what float32 reads and writes."""
    other = views_BHWC[partner_B]
    rows, columns = (_counting(n, views_BHWC.device) for n in views_BHWC.shape[1:3])
    in_rows = (rows >= box_B4[:, 0:1]) & (rows < box_B4[:, 1:2])  # [B, H]
    in_columns = (columns >= box_B4[:, 2:3]) & (columns < box_B4[:, 3:4])  # [B, W]
    cut = (mode_B == CUTMIX)[:, None, None] & in_rows[:, :, None] & in_columns[:, None, :]
    own = torch.where(cut[..., None], other, views_BHWC)
    lam = torch.where(mode_B == MIXUP, lam_B, ONE).to(torch.float32)[:, None, None, None] / ONE
    mixed = own * lam
    mixed += other * (1.0 - lam)
    return mixed.permute(0, 3, 1, 2)


def _mix_rows(
    views_BHWC: Tensor,
    partner_B: Tensor,
    mode_B: Tensor,
    lam_B: Tensor,
    box_B4: Tensor,
    scale_shift: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One row after the other, in place: a row stays in the core's cache, and the result is all the memory there is.

    The same bits as `_mix_batch`, in a twentieth of its time on a CPU: pixels have 8 bits and lambda 16, so that each step
    of a MixUp is exact in float32, in whatever order a CPU takes it. scale_shift: float32 [W * C] each, to normalise a row
    as well; None: leave it in 0..255.
    """
    n, height, width, channels = views_BHWC.shape
    views = views_BHWC.reshape(n, height, width * channels).unbind()
    out = torch.empty((n, height, width * channels), dtype=torch.float32)
    other = torch.empty(out.shape[1:], dtype=torch.float32)
    fields = (partner_B.tolist(), mode_B.tolist(), lam_B.tolist(), box_B4.tolist())
    for mine, own, partner, mode, lam, (top, bottom, left, right) in zip(out, views, *fields, strict=True):
        mine.copy_(own)
        if mode == MIXUP:
            mine.lerp_(other.copy_(views[partner]), 1.0 - lam / ONE)
        elif mode == CUTMIX:
            box = slice(top, bottom), slice(left * channels, right * channels)
            mine[box].copy_(views[partner][box])
        if scale_shift is not None:
            mine.mul_(scale_shift[0]).add_(scale_shift[1])
    return out.view(views_BHWC.shape).permute(0, 3, 1, 2)


def mixed_pixels(batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """`mix_pixels` of a training batch (see `cskd.loading.stage2`), on the device."""
    return mix_pixels(*(batch[name].to(device, non_blocking=True) for name in _MIXING))


class InputMaker:
    """Batches of stage 2 to the student's input, in the arithmetic in which stage 1 fed the teacher."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std, self.device = mean, std, device

    def mixed(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised float32 [B, 3, H, W] of a training batch (see `cskd.loading.stage2`)."""
        if self.device.type == "cpu":
            views, partner, mode, lam, box = (batch[name] for name in _MIXING)
            return _mix_rows(views, partner, mode, lam, box, self._scale_shift(views.shape[2]))
        return normalise(mixed_pixels(batch, self.device), self.mean, self.std)

    def clean(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised float32 [B, 3, H, W] of an evaluation batch."""
        pixels = batch["pixels"].to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return normalise(pixels, self.mean, self.std)

    def _scale_shift(self, width: int) -> tuple[Tensor, Tensor]:
        """As of `normalise`, for a line of pixels: float32 [W * 3] each."""
        scale, shift = (torch.tensor(values).repeat(width) for values in _linear(self.mean, self.std))
        return scale, shift
