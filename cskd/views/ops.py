"""Pixels of a view: uint8 in, uint8 out, no randomness, no float images on the CPU.

Source: resizing is torch's uint8 bicubic with antialiasing (the one torchvision calls), exact for given versions; the
digest of every view (`cskd.views.digest`) finds it when a version changes a pixel.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from cskd.views import Image, colour, geometry
from cskd.views.erasing import erase
from cskd.views.randaugment import Op
from cskd.views.recipe import Box, ViewParams

_PLAIN = {"AutoContrast": colour.auto_contrast, "Equalize": colour.equalize, "Invert": colour.invert}
_WHOLE = {"Posterize": colour.posterize, "Solarize": colour.solarize, "SolarizeAdd": colour.solarize_add}
_FACTOR = {
    "Color": colour.color,
    "Contrast": colour.contrast,
    "Brightness": colour.brightness,
    "Sharpness": colour.sharpness,
}
_MOVED = {
    "Rotate": geometry.rotate,
    "ShearX": geometry.shear_x,
    "ShearY": geometry.shear_y,
    "TranslateX": geometry.translate_x,
    "TranslateY": geometry.translate_y,
}


def apply(image_HWC: Image, params: ViewParams) -> Image:
    """The pixels of one view.

    Args:    image_HWC uint8 [H, W, 3], left as it is; params drawn for this image's height and width.
    Returns: uint8 [size, size, 3], contiguous, sharing no memory with the image.
    """
    if params.padding or params.crop.height == params.size == params.crop.width:
        out = _padded(image_HWC, params.crop, params.padding, params.size)
    else:
        out = resized_crop(image_HWC, params.crop, params.size)
    if params.flip:
        out = torch.from_numpy(out).flip(1).numpy()  # ten times as fast as numpy copies RGB pixels backwards
    fill = fill_colour(params.mean)
    for op in params.ops:
        out = apply_op(out, op, fill)
    for erasure in params.erasures:
        erase(out, erasure, params.mean, params.std)
    return out


def apply_op(image_HWC: Image, op: Op, fill: geometry.Fill) -> Image:
    """One operation: uint8 [H, W, 3], contiguous, to the same; see `Op` for what its argument means.

    Raises:  ValueError for a name that is not one of `randaugment.TIMM_OPERATIONS`, or an argument that is missing.
    """
    if op.name in _PLAIN:
        return _PLAIN[op.name](image_HWC)
    if op.argument is None:
        raise ValueError(f"operation {op.name} has no argument, expected a number")
    if op.name in _WHOLE:
        return _WHOLE[op.name](image_HWC, int(op.argument))
    if op.name in _FACTOR:
        return _FACTOR[op.name](image_HWC, op.argument)
    if op.name in _MOVED:
        return _MOVED[op.name](image_HWC, op.argument, fill)
    raise ValueError(f"operation '{op.name}' is not known, expected one of randaugment.TIMM_OPERATIONS")


def fill_colour(mean: tuple[float, ...]) -> geometry.Fill:
    """The mean as uint8 RGB: what geometric operations show where there is no image."""
    red, green, blue = (min(255, round(255 * m)) for m in mean)
    return red, green, blue


def resized_crop(image_HWC: Image, crop: Box, size: int) -> Image:
    """Crop, then resize to [size, size] (bicubic, antialiased)."""
    part = image_HWC[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].copy()
    if crop.height == size and crop.width == size:
        return part
    # The batch dimension comes first: only so does torch see channels_last strides and take its fast uint8 kernel.
    nchw = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    out = F.interpolate(nchw, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return out[0].permute(1, 2, 0).contiguous().numpy()


def _padded(image_HWC: Image, crop: Box, padding: int, size: int) -> Image:
    height, width = image_HWC.shape[:2]
    if padding and (height, width) != (size, size):
        image_HWC = resized_crop(image_HWC, Box(0, 0, height, width), size)
    if padding:
        image_HWC = np.pad(image_HWC, ((padding, padding), (padding, padding), (0, 0)))
    return image_HWC[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].copy()
