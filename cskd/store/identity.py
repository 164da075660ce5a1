"""What a cache is of: everything that decides its targets, as plain data that is compared field by field."""

from __future__ import annotations

import hashlib
from typing import Any

from cskd.config import RecipeConfig, to_dict
from cskd.dataset.images import POLICY
from cskd.dataset.inventory import Inventory
from cskd.views.recipe import RECIPE_CODE_VERSION


def identity_of(
    inventory: Inventory, recipe: RecipeConfig, teacher: dict[str, Any], grid: tuple[int, int], codecs: list[str]
) -> dict[str, Any]:
    """The identity of a cache, JSON-able: two caches with equal identities may be merged or resumed."""
    return {
        "inventory": inventory.id,
        "classes": hashlib.sha256("\n".join(inventory.classes).encode()).hexdigest(),
        "recipe": to_dict(recipe),
        "recipe_code": RECIPE_CODE_VERSION,
        "images": POLICY,
        "teacher": teacher,
        "grid": list(grid),
        "codecs": list(codecs),
    }
