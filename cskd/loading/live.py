"""Views without a cache: the same seeds and mixing a cache would hold, computed on the spot.

For a teacher that runs live, and for a baseline that has none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cskd.codecs import Codec
from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory
from cskd.store.cache import Unit
from cskd.views.fields import view_fields


class LiveViews:
    """Stands where a cache stands in training, but holds no targets and no digests.

    bad: bool [n], samples of the inventory that can't be decoded; `fingerprint`: that of the cache stage 1 would make, or
    where no teacher is known, what tells these views from others.
    """

    def __init__(
        self,
        inventory: Inventory,
        recipe: RecipeConfig,
        views: int,
        grid: tuple[int, int],
        bad: NDArray[np.bool_],
        fingerprint: str,
    ) -> None:
        self.inventory, self.recipe, self.views, self.grid, self.fingerprint = (
            inventory,
            recipe,
            views,
            grid,
            fingerprint,
        )
        self.classes = inventory.classes
        self.codecs: dict[str, Codec] = {}
        self._bad = bad

    def block_range(self, block: int) -> tuple[int, int]:
        """First sample of a block and the one after its last, as indices of the inventory."""
        return int(self.inventory.blocks[block]), int(self.inventory.blocks[block + 1])

    def quarantined(self) -> NDArray[np.bool_]:
        """bool [n]: samples that are never fed."""
        return self._bad

    def read(self, block: int, view: int, codec: str) -> Unit:
        """The unit stage 1 would make, without targets; its digests are 0."""
        first, stop = self.block_range(block)
        bad = self._bad[first:stop]
        kept = np.flatnonzero(~bad)
        fields = {name: a[kept] for name, a in view_fields(self.inventory, self.recipe, block, view, bad).items()}
        fields["digest"] = np.zeros(len(kept), np.uint32)
        return Unit(kept, fields, {})
