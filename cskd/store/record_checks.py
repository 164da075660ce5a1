"""Whether a manifest or commit record can be what it says: their hashes are no secret, so anyone can write a valid one.

A record names files: they are those that its other fields give, never a path of its own. Everything that becomes a number
of loops or bytes is bounded.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from cskd.codecs import get_codec
from cskd.config import RecipeConfig, from_dict, to_dict
from cskd.dataset.classes import MAX_CLASSES
from cskd.errors import CskdError
from cskd.store.format import unit_file

if TYPE_CHECKING:
    from cskd.store.commit import Commit

MAX_VIEWS = 100_000
MAX_GRID = 1024
_HASH = re.compile(r"[0-9a-f]{64}")
_CODEC = re.compile(r"[a-z0-9:]{1,32}")


def check_commit(commit: Commit) -> None:
    """Raises ValueError with the first field of a record that can't be."""

    def count(value: object, low: int = 0) -> bool:
        return type(value) is int and low <= value < 1 << 48

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(what)

    for name in ("block", "view", "samples", "cached", "format"):
        need(count(getattr(commit, name)), f"its {name} is {str(getattr(commit, name))[:40]}, expected a count")
    for name in ("content_hash", "fingerprint"):
        need(_is_hash(getattr(commit, name)), f"its {name} is {str(getattr(commit, name))[:40]!r}, expected a sha256")
    need(isinstance(commit.quarantine, dict), "its quarantine is no mapping")
    for position, reason in commit.quarantine.items():
        known = re.fullmatch(r"0|[1-9]\d{0,11}", position) and int(position) < commit.samples
        need(bool(known) and isinstance(reason, str), f"it quarantines {position[:40]!r}, expected one of its samples")
    need(commit.cached + len(commit.quarantine) == commit.samples, "its counts do not add up")
    for file in commit.files:
        known = isinstance(file.codec, str) and _CODEC.fullmatch(file.codec) and _is_hash(file.sha256)
        need(bool(known) and count(file.size) and count(file.target_bytes), "a file of it has no codec, size or sha256")
        expected = str(unit_file(commit.block, commit.view, file.codec, file.sha256))
        need(file.path == expected, f"it names the file {str(file.path)[:120]!r}, expected {expected}")
    need(len({file.codec for file in commit.files}) == len(commit.files), "it names a codec twice")


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raises ValueError with the first field of a manifest that can't be."""
    identity = manifest.get("identity")
    if not isinstance(identity, dict) or not isinstance(manifest.get("fingerprint"), str):
        raise ValueError("it has no identity")
    views = manifest.get("views")
    if type(views) is not int or not 1 <= views <= MAX_VIEWS:
        raise ValueError(f"its views are {str(views)[:40]}, expected 1 to {MAX_VIEWS}")
    grid, codecs = identity.get("grid"), identity.get("codecs")
    if not isinstance(grid, list) or len(grid) != 2 or not all(type(n) is int and 1 <= n <= MAX_GRID for n in grid):
        raise ValueError(f"its grid is {str(grid)[:40]}, expected [h, w] of 1 to {MAX_GRID} cells")
    if not isinstance(codecs, list) or not codecs or not all(isinstance(name, str) for name in codecs):
        raise ValueError(f"its codecs are {str(codecs)[:40]}, expected names")
    if len(set(codecs)) < len(codecs):
        raise ValueError(f"its codecs are {str(codecs)[:80]}, each of which may occur once")
    recipe, teacher = identity.get("recipe"), identity.get("teacher")
    if not isinstance(recipe, dict) or not isinstance(teacher, dict) or not isinstance(identity.get("inventory"), str):
        raise ValueError("its identity has no recipe, teacher or inventory")
    try:
        for name in codecs:
            get_codec(name, MAX_CLASSES, (grid[0], grid[1]))
        if set(recipe) - set(RecipeConfig.__dataclass_fields__):
            raise ValueError(f"its recipe has the keys {str(sorted(recipe))[:200]}")
        read = json.loads(json.dumps(to_dict(from_dict({"recipe": recipe}).recipe)))
        if changed := [name for name, value in recipe.items() if read[name] != value]:  # a text that reads as a number
            raise ValueError(f"its recipe.{changed[0]} is {str(recipe[changed[0]])[:40]!r}")
    except CskdError as e:
        raise ValueError(f"{e}") from None
    if not str(manifest.get("data", "")).isprintable():
        raise ValueError("its data is a path with characters that control a terminal")
    probe = manifest.get("probe", {})
    for name in ("global", "dense"):
        try:
            np.asarray(probe.get(name, []) if isinstance(probe, dict) else None, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"its probe has {name} logits that are no numbers") from None
    for name, kind in (("data", str), ("versions", dict), ("probe", dict), ("config", dict)):
        if name in manifest and not isinstance(manifest[name], kind):
            raise ValueError(f"its {name} is {str(manifest[name])[:40]}")
    config = manifest.get("config", {})
    if not all(isinstance(config.get(name), dict) for name in ("cache", "teacher", "data")):
        raise ValueError("its config has a section that is no mapping")
    notes = manifest.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f"its notes are {str(notes)[:40]}, expected texts")
    _check_precision(manifest.get("precision"))
    top1 = manifest.get("clean_top1")
    if top1 is not None and not isinstance(top1, int | float):
        raise ValueError(f"its clean_top1 is {str(top1)[:40]}")
    if (data := manifest.get("clean_data")) not in (None, "val", "train"):
        raise ValueError(f"its clean_data is {str(data)[:40]}, expected val or train")


def _check_precision(facts: object) -> None:
    """Of the share of targets that the teacher's arithmetic changes (`cskd.teacher.arithmetic`); older caches lack it."""
    if facts is None:
        return
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), str) for name in ("backbone", "head")):
        raise ValueError(f"its precision is {str(facts)[:40]}")
    share, blends = facts.get("cells_differ"), facts.get("by_blend")
    measured = isinstance(blends, dict) and all(isinstance(v, int | float) for v in (share, *blends.values()))
    if not (share is None or measured) or type(facts.get("views")) is not int:
        raise ValueError(f"its precision has the share {str(share)[:40]}")


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None
