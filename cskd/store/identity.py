"""What a cache is of: everything that decides its targets, as plain data that is compared field by field."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from typing import Any

from cskd.config import RecipeConfig, to_dict
from cskd.dataset.images import POLICY, decoder_versions
from cskd.dataset.inventory import Inventory
from cskd.views.recipe import RECIPE_CODE_VERSION

# Libraries whose version can change a pixel or a logit.
_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy", "zarr", "numcodecs")


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


def library_versions() -> dict[str, str]:
    """Versions recorded beside the identity, those of the image decoders included; a change of them calls for a replay,
    not for a new cache."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found | {f"decoder {name}": version for name, version in decoder_versions().items()}


def changed_versions(recorded: dict[str, str]) -> str:
    """What is installed here in another version than `recorded`, in words; '' where nothing is."""
    now = library_versions()
    names = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    return ", ".join(f"{name} {recorded.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in names)
