"""A view's parameters are data: everything random about an augmented image, drawn from its seed before a pixel is read.

`sample_params(seed, ...) -> ViewParams`, then `apply(image, params)` in `ops`, which draws nothing. The order is that
of timm's `create_transform`: crop, flip, RandAugment or colour jitter, erasing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from cskd.config import RecipeConfig
from cskd.config.rand_string import parse_rand_string
from cskd.seeds import Draws
from cskd.views.erasing import Erasure, draw_erasures
from cskd.views.randaugment import Op, draw_jitter, draw_randaugment

RECIPE_CODE_VERSION = 1  # raised whenever a seed would give other pixels; part of every digest and fingerprint

_settings = functools.lru_cache(maxsize=8)(parse_rand_string)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels: rows top .. top+height-1, columns left .. left+width-1."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class ViewParams:
    """One view: `crop` of the image (of the zero-padded image for `padded` crops), resized to `size`, flipped, then
    `ops` in their order, then `erasures`."""

    size: int
    crop: Box
    padding: int
    flip: bool
    ops: tuple[Op, ...] = ()
    erasures: tuple[Erasure, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]: colour from outside, and of the noise
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # of the noise


def sample_params(seed: int, height: int, width: int, recipe: RecipeConfig) -> ViewParams:
    """Draw one view's parameters.

    Args:    seed, of the view (`cskd.seeds.view_seeds`); height, width of the decoded image, pixels.
    Returns: ViewParams; the same for the same arguments, everywhere.
    """
    if recipe.crop == "padded":
        crop, padding = _padded_crop(seed, height, width, recipe)
    elif recipe.crop == "resized":
        crop, padding = _resized_crop(seed, height, width, recipe), 0
    else:
        side = min(height, width)
        crop, padding = Box((height - side) // 2, (width - side) // 2, side, side), 0
    if recipe.randaugment is None:
        ops = draw_jitter(seed, recipe.color_jitter)
    else:
        ops = draw_randaugment(seed, _settings(recipe.randaugment))
    return ViewParams(
        size=recipe.size,
        crop=crop,
        padding=padding,
        flip=Draws(seed, "flip").uniform() < recipe.flip,
        ops=ops,
        erasures=draw_erasures(seed, recipe.size, recipe.erase, recipe.erase_count),
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
    )


def describe(params: ViewParams) -> str:
    """One line for people: what was done to the image, in order."""
    return ", ".join(described(params))


def described(params: ViewParams) -> list[str]:
    """The steps of `describe`, one text each."""
    crop = params.crop
    parts = [f"crop {crop.height}x{crop.width} at ({crop.top}, {crop.left}) to {params.size}"]
    parts += ["flip"] if params.flip else []
    parts += [op.name if op.argument is None else f"{op.name} {op.argument:.3g}" for op in params.ops]
    parts += [f"erase {e.height}x{e.width} at ({e.top}, {e.left})" for e in params.erasures]
    return parts


def _resized_crop(seed: int, height: int, width: int, recipe: RecipeConfig) -> Box:
    """Random resized crop as in timm: ten tries at an area and a log-uniform ratio, then a centre crop."""
    draws = Draws(seed, "crop")
    log_low, log_high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    for _ in range(10):
        area = height * width * draws.uniform(recipe.scale[0], recipe.scale[1])
        ratio = math.exp(draws.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(draws.integer(height - h + 1), draws.integer(width - w + 1), h, w)
    w = min(width, max(1, round(height * recipe.ratio[1])))
    h = min(height, max(1, round(width / recipe.ratio[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _padded_crop(seed: int, height: int, width: int, recipe: RecipeConfig) -> tuple[Box, int]:
    """A size x size window of the image padded by `padding` zeros a side; other sizes of images are resized first."""
    draws = Draws(seed, "crop")
    span = 2 * recipe.padding + 1
    return Box(draws.integer(span), draws.integer(span), recipe.size, recipe.size), recipe.padding
