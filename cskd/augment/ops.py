"""Pixels of a view: uint8 in, uint8 out, no randomness, no float images on the CPU.

Source: resizing is torch's uint8 bicubic with antialiasing (the one torchvision calls), exact for given versions; the
digest of every view (`cskd.replay`) finds it when a version changes a pixel.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cskd.augment.recipe import Box, ViewParams

Image = NDArray[np.uint8]  # [H, W, 3], RGB


def apply(image_HWC: Image, params: ViewParams) -> Image:
    """The pixels of one view.

    Args:    image_HWC uint8 [H, W, 3]; params drawn for this image's height and width.
    Returns: uint8 [size, size, 3], contiguous.
    """
    if params.padding or params.crop.height == params.size == params.crop.width:
        out = _padded(image_HWC, params.crop, params.padding, params.size)
    else:
        out = resized_crop(image_HWC, params.crop, params.size)
    return np.ascontiguousarray(out[:, ::-1]) if params.flip else np.ascontiguousarray(out)


def resized_crop(image_HWC: Image, crop: Box, size: int) -> Image:
    """Crop, then resize to [size, size] (bicubic, antialiased)."""
    part = image_HWC[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if crop.height == size and crop.width == size:
        return part
    chw = torch.from_numpy(part.copy()).permute(2, 0, 1).unsqueeze(0)  # channels_last strides: the fast uint8 kernel
    out = F.interpolate(chw, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return out[0].permute(1, 2, 0).contiguous().numpy()


def _padded(image_HWC: Image, crop: Box, padding: int, size: int) -> Image:
    height, width = image_HWC.shape[:2]
    if padding and (height, width) != (size, size):
        image_HWC = resized_crop(image_HWC, Box(0, 0, height, width), size)
    if padding:
        image_HWC = np.pad(image_HWC, ((padding, padding), (padding, padding), (0, 0)))
    return image_HWC[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
