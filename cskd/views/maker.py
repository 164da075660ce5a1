"""One sample's views: read, decode, augment. Used by both stages, so that they can't differ."""

from __future__ import annotations

from cskd.config import RecipeConfig
from cskd.dataset.images import decode
from cskd.dataset.inventory import Inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.views import Image
from cskd.views.ops import apply
from cskd.views.recipe import Box, ViewParams, sample_params


class ViewMaker:
    """Images of an inventory and their views under one recipe. Cheap to pickle; opens shards where it is used."""

    def __init__(self, inventory: Inventory, recipe: RecipeConfig, whole: bool = False) -> None:
        self.inventory, self.recipe = inventory, recipe
        self._reader = ShardReader(inventory, whole=whole)

    def whole(self) -> ViewMaker:
        """The same for who reads all images of a shard, see `ShardReader`."""
        return ViewMaker(self.inventory, self.recipe, whole=True)

    def image(self, sample: int) -> Image:
        """Decoded uint8 [H, W, 3]. Raises ImageError for a bad image, ReadError for bytes that can't be read."""
        return decode(self.encoded(sample))

    def encoded(self, sample: int) -> bytes:
        """The image as it is stored. Raises ReadError for bytes that can't be read."""
        return self._reader.read(sample)

    def view(self, image_HWC: Image, seed: int) -> Image:
        """The view of that seed: uint8 [size, size, 3]."""
        return self.made(image_HWC, seed)[1]

    def made(self, image_HWC: Image, seed: int) -> tuple[ViewParams, Image]:
        """The view of that seed, and how it was made."""
        height, width = image_HWC.shape[:2]
        params = sample_params(seed, height, width, self.recipe)
        return params, apply(image_HWC, params)


def clean_view(image_HWC: Image, size: int, crop_pct: float) -> Image:
    """The evaluation view: the centre square of crop_pct of the short side, resized to [size, size], as timm's
    resize-then-crop up to rounding, in one resampling step."""
    height, width = image_HWC.shape[:2]
    side = max(1, min(height, width, round(min(height, width) * crop_pct)))
    crop = Box((height - side) // 2, (width - side) // 2, side, side)
    return apply(image_HWC, ViewParams(size, crop, 0, False))
