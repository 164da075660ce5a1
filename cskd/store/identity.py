"""What a cache is of: everything that decides its targets, compared field by field, and hashed to its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

from cskd.codecs import get_codec, known_own
from cskd.codecs.own import own_codec_hash
from cskd.config import RecipeConfig, from_dict, to_dict
from cskd.dataset.classes import MAX_CLASSES
from cskd.dataset.images import POLICY
from cskd.dataset.inventory import Inventory
from cskd.errors import CskdError
from cskd.files.durable import json_hash
from cskd.views.recipe import RECIPE_CODE_VERSION

MAX_GRID = 1024


@dataclass(frozen=True, kw_only=True)
class Facts:
    """JSON that other versions of the program write too: read, changed and written again without a loss.

    A key that the JSON lacks is None; one that this version does not know is kept in `other`, and so is a null.
    """

    other: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        """From a JSON object, unchecked."""
        names = {f.name for f in fields(cls)} - {"other"}
        known = {key: value for key, value in raw.items() if key in names and value is not None}
        return cls(**known, other={key: value for key, value in raw.items() if key not in known})

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON object that `of` reads."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "other"}
        return {**self.other, **{name: value for name, value in named.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class Identity(Facts):
    """Two caches with equal identities may be merged or resumed. Everything is as JSON has it: lists, no tuples."""

    inventory: str  # its id
    recipe: Mapping[str, Any]  # of `RecipeConfig`; caches of older versions lack its newer keys
    teacher: Mapping[str, Any]  # `cskd.teacher.fingerprint.Fingerprint.facts`, of whichever version
    grid: Sequence[int]  # h, w
    codecs: Sequence[str]
    classes: str | None = None  # sha256 of the class names
    recipe_code: int | None = None  # version of the code that makes views by the recipe
    codec_code: Mapping[str, str] | None = None  # codec -> sha256 of the file it is in, of a user's own ones
    images: Mapping[str, str] | None = None  # how images are read: `cskd.dataset.images.POLICY`

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON."""
        return json_hash(self.facts)

    @classmethod
    def read(cls, raw: object) -> Identity:
        """From JSON of anyone. Raises ValueError with the first field that can't be."""
        if not isinstance(raw, dict):
            raise ValueError("it has no identity")
        grid, codecs, recipe = raw.get("grid"), raw.get("codecs"), raw.get("recipe")
        if not isinstance(grid, list) or len(grid) != 2 or not all(type(n) is int and 1 <= n <= MAX_GRID for n in grid):
            raise ValueError(f"its grid is {str(grid)[:40]}, expected [h, w] of 1 to {MAX_GRID} cells")
        if not isinstance(codecs, list) or not codecs or not all(isinstance(name, str) for name in codecs):
            raise ValueError(f"its codecs are {str(codecs)[:40]}, expected names")
        if len(set(codecs)) < len(codecs):
            raise ValueError(f"its codecs are {str(codecs)[:80]}, each of which may occur once")
        named = isinstance(raw.get("teacher"), dict) and isinstance(raw.get("inventory"), str)
        if not isinstance(recipe, dict) or not named:
            raise ValueError("its identity has no recipe, teacher or inventory")
        try:
            for name in codecs:
                get_codec(name, MAX_CLASSES, (grid[0], grid[1]))
            if set(recipe) - set(RecipeConfig.__dataclass_fields__):
                raise ValueError(f"its recipe has the keys {str(sorted(recipe))[:200]}")
            read = json.loads(json.dumps(to_dict(from_dict({"recipe": recipe}).recipe)))
            # A text may read as a number.
            if changed := [name for name, value in recipe.items() if read[name] != value]:
                raise ValueError(f"its recipe.{changed[0]} is {str(recipe[changed[0]])[:40]!r}")
        except CskdError as e:
            raise ValueError(f"{e}") from None
        return cls.of(raw)


def identity_of(
    inventory: Inventory,
    recipe: RecipeConfig,
    teacher: Mapping[str, Any],
    grid: tuple[int, int],
    codecs: Sequence[str],
) -> Identity:
    """The identity of the cache that stage 1 makes of these. teacher: `Fingerprint.facts`; codecs: as a config names them."""
    names = [get_codec(known_own(text), len(inventory.classes), grid).name for text in codecs]
    own = {name: code for name in names if (code := own_codec_hash(name)) is not None}
    facts = {
        "inventory": inventory.id,
        "classes": hashlib.sha256("\n".join(inventory.classes).encode()).hexdigest(),
        "recipe": to_dict(recipe),
        "recipe_code": RECIPE_CODE_VERSION,
        "images": POLICY,
        "teacher": teacher,
        "grid": grid,
        "codecs": names,
        **({"codec_code": own} if own else {}),
    }
    return Identity.of(json.loads(json.dumps(facts)))
