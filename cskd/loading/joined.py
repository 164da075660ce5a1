"""Several caches of the same views: each made with a teacher of its own, joined by block, view and sample.

Views do not depend on the teacher, and every unit holds their digests: that two teachers saw the same pixels is compared row by
row where their targets are read (`cskd.loading.epoch_table`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cskd.codecs import Codec
from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory
from cskd.errors import CacheError
from cskd.files.durable import json_hash
from cskd.store.cache import Cache, first_difference
from cskd.store.format import Unit
from cskd.store.identity import Identity
from cskd.views.digest import Recorded

SAME = ("inventory", "recipe", "recipe_code", "images")  # what views depend on, of the identity of a cache


class JoinedCaches:
    """The views of `first`, with the targets of all; those of `others` have the codecs `NAME/CODEC`."""

    def __init__(self, first: Cache, others: Mapping[str, Cache]) -> None:
        """Raises CacheError where another cache is of other images, or of other views of them."""
        self.first, self.others = first, dict(others)
        for name, cache in others.items():
            refuse_other_views(name, cache, first.identity, first.location)
        self.fingerprint = joined_fingerprint({"": first.fingerprint, **{n: c.fingerprint for n, c in others.items()}})
        self.codecs: dict[str, Codec] = {
            **first.codecs,
            **{f"{n}/{codec}": of for n, cache in others.items() for codec, of in cache.codecs.items()},
        }

    @property
    def inventory(self) -> Inventory:
        return self.first.inventory

    @property
    def recipe(self) -> RecipeConfig:
        return self.first.recipe

    @property
    def views(self) -> int:
        return self.first.views

    @property
    def grid(self) -> tuple[int, int]:
        return self.first.grid

    def quarantined(self) -> NDArray[np.bool_]:
        """Samples that any of them has no targets of."""
        bad: NDArray[np.bool_] = np.any([cache.quarantined() for cache in (self.first, *self.others.values())], axis=0)
        return bad

    def read(self, block: int, view: int, codec: str) -> Unit:
        name, _, of_other = codec.rpartition("/")
        return self.others[name].read(block, view, of_other) if name else self.first.read(block, view, codec)

    def recorded(self) -> Recorded:
        """By the first one: all saw the same."""
        return self.first.recorded()


def refuse_other_views(name: str, cache: Cache, first: Identity, where: str) -> None:
    """CacheError where a cache of `train.caches` is of other images than the first, or of other views of them. where: the first is."""
    expected, found = ({key: getattr(identity, key) for key in SAME} for identity in (first, cache.identity))
    if difference := first_difference(expected, found):
        key, theirs, its = difference
        raise CacheError(
            f"train.caches.{name}: {cache.location} has {key} {its!r}, {where} has {theirs!r}; both must be made of the same images by "
            "the same recipe"
        )


def joined_fingerprint(prints: Mapping[str, str]) -> str:
    """Of several caches. prints: name in train.caches, '' of cache.path -> fingerprint."""
    return json_hash(dict(prints))
