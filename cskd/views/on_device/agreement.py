"""Does a device make a recipe's views as the host does? Asked before a run, of views of its own images and of each operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from cskd.config import RecipeConfig
from cskd.errors import ConfigError
from cskd.views import Image
from cskd.views.on_device import OPERATIONS, make_views, plan_views
from cskd.views.ops import apply
from cskd.views.randaugment import Op, argument_of, operations_of
from cskd.views.recipe import Box, ViewParams, describe, sample_params

_SIDE = 512  # pixels
_INSTEAD = "set train.augment: host"


def refuse_recipe(recipe: RecipeConfig, device: torch.device) -> None:
    """ConfigError for a device that can't make views, or an operation that it would not make as the host does."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.augment is device and the device {device}, expected cuda, or cpu; {_INSTEAD}")
    for name in operations_of(recipe.randaugment, recipe.color_jitter):
        if name not in OPERATIONS:
            raise ConfigError(f"train.augment is device, and operation {name} of the recipe is the host's; {_INSTEAD}")


def refuse_difference(
    images: Sequence[Image], seeds: Sequence[int], recipe: RecipeConfig, device: torch.device
) -> None:
    """ConfigError with the operation by which a view differs on `device`.

    Args:    images uint8 [H, W, 3] each; seeds, of a view of each. On a part of the first every operation is tried, too.
    """
    each = zip(images, seeds, strict=True)
    views = [(image, sample_params(seed, image.shape[0], image.shape[1], recipe)) for image, seed in each]
    part = np.ascontiguousarray(images[0][:_SIDE, :_SIDE])
    views += [(part, params) for params in _each_operation(part, recipe)]
    for (image, params), differs in zip(views, _differing(views, device), strict=True):
        if differs:
            parts = list(_parts(params))
            found = _differing([(image, part) for _, part in parts], device)
            what = next(name for (name, _), wrong in zip(parts, found, strict=True) if wrong)
            raise ConfigError(
                f"train.augment is device, and {what} gives {differs:,} other bytes on {device} than on the host in a view "
                f"of an image of {image.shape[0]} x {image.shape[1]} pixels ({describe(params)}); {_INSTEAD}"
            )


def _each_operation(image: Image, recipe: RecipeConfig) -> Iterator[ViewParams]:
    """Views by one operation each, at three strengths and in both directions."""
    crop, mean, std = Box(0, 0, *image.shape[:2]), tuple(recipe.mean), tuple(recipe.std)
    for name in operations_of(recipe.randaugment, recipe.color_jitter):
        for magnitude in (1.3, 5.0, 9.7):
            ops = {Op(name, argument_of(name, magnitude, negative, True)) for negative in (False, True)}
            yield from (ViewParams(recipe.size, crop, 0, False, (op,), (), mean, std) for op in sorted(ops, key=repr))


def _differing(views: Sequence[tuple[Image, ViewParams]], device: torch.device) -> list[int]:
    """How many bytes of each view are others on the device."""
    images = list({id(image): image for image, _ in views}.values())
    number = {id(image): n for n, image in enumerate(images)}
    which = [number[id(image)] for image, _ in views]
    plan = plan_views([params for _, params in views], [image.shape[:2] for image in images], which).to(device)
    made = make_views([torch.from_numpy(image).to(device) for image in images], plan).cpu().numpy()
    return [int((there != apply(image, params)).sum()) for there, (image, params) in zip(made, views, strict=True)]


def _parts(params: ViewParams) -> Iterator[tuple[str, ViewParams]]:
    """A view after each of its operations, with the name of the last one."""
    plain = replace(params, flip=False, ops=(), erasures=())
    yield "the crop", plain
    yield "the flip", replace(plain, flip=params.flip)
    for n, op in enumerate(params.ops, 1):
        yield f"operation {op.name}", replace(params, ops=params.ops[:n], erasures=())
    yield "erasing", params
