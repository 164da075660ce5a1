"""What the recipe says of a view, beside its pixels: seeds and mixing of one block, without a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory
from cskd.seeds import view_seeds
from cskd.views.mixing import mixing, quads


def view_fields(
    inventory: Inventory, recipe: RecipeConfig, block: int, view: int, bad: NDArray[np.bool_]
) -> dict[str, NDArray[Any]]:
    """What the recipe says of one view of one block: 'seed', 'partner', 'mode', 'lam', 'box' (see `mixing.Mixing`).

    Args:    bad bool [n], the quarantined samples of the block, which has n samples.
    Returns: arrays of n rows, in block order.
    """
    first, stop = int(inventory.blocks[block]), int(inventory.blocks[block + 1])
    seeds = view_seeds(recipe.seed, inventory.id, inventory.key_hash[first:stop], view)
    order = quads(stop - first, recipe, inventory.id, block, view // recipe.mix_group)
    m = mixing(seeds, order, bad, recipe, view)
    return {"seed": seeds, "partner": m.partner, "mode": m.mode, "lam": m.lam, "box": m.box}
