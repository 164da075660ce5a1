"""Views without a cache: the same seeds and mixing a cache would hold, computed on the spot.

For a teacher that runs live, and for a baseline that has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cskd.codecs import Codec
from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory
from cskd.store.format import Unit
from cskd.views.mixing import view_fields


@dataclass(frozen=True, eq=False)
class LiveViews:
    """A `ViewSource` that holds no targets and no digests."""

    inventory: Inventory
    recipe: RecipeConfig
    views: int
    grid: tuple[int, int]
    bad: NDArray[np.bool_]  # [n], samples of the inventory that can't be decoded
    fingerprint: (
        str  # of the cache stage 1 would make, or where no teacher is known, what tells these views from others
    )

    @property
    def classes(self) -> list[str]:
        return self.inventory.classes

    @property
    def codecs(self) -> dict[str, Codec]:
        return {}

    def block_range(self, block: int) -> tuple[int, int]:
        """First sample of a block and the one after its last, as indices of the inventory."""
        return int(self.inventory.blocks[block]), int(self.inventory.blocks[block + 1])

    def quarantined(self) -> NDArray[np.bool_]:
        """bool [n]: samples that are never fed."""
        return self.bad

    def read(self, block: int, view: int, codec: str) -> Unit:
        """The unit stage 1 would make, without targets; its digests are 0."""
        first, stop = self.block_range(block)
        bad = self.bad[first:stop]
        kept = np.flatnonzero(~bad)
        fields = {name: a[kept] for name, a in view_fields(self.inventory, self.recipe, block, view, bad).items()}
        fields["digest"] = np.zeros(len(kept), np.uint32)
        return Unit(kept, fields, {})

    def recorded(self) -> None:
        """Nothing to check views against."""
