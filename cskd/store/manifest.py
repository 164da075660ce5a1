"""The manifest of a cache: its facts in JSON with a hash over them, kept twice, each copy written whole or not at all."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cskd.config import to_yaml
from cskd.errors import CacheError
from cskd.files.durable import json_bytes, json_hash
from cskd.files.folders import other_kind
from cskd.files.hub import is_hub
from cskd.files.read import MAX_TEXT, parse_json
from cskd.near import absent
from cskd.storage import Place, is_remote, join, open_storage
from cskd.storage.places import kind_of_objects
from cskd.store.format import FORMAT, MANIFEST, MANIFEST_COPY, MANIFEST_FORMATS, RESOLVED
from cskd.store.identity import Facts, Identity

RESTORE = "`cskd repair` restores it from its second copy; else make the cache again elsewhere (--set cache.path=...)"
MAX_VIEWS = 100_000
_SEALS = ("format", "fingerprint", "sha256")


@dataclass(frozen=True, kw_only=True)
class Manifest(Facts):
    """What was known of a cache when it was begun, and how many views it has grown to. None: an older version kept none."""

    identity: Identity
    views: int
    config: Mapping[str, Any] = field(default_factory=dict)  # that it was begun with, as it was recorded
    data: str | None = None  # folder of the image shards
    clean_top1: float | None = None  # of the teacher, on so many clean images of data.val or data.train
    clean_images: int | None = None
    clean_data: str | None = None
    notes: Sequence[str] | None = None  # what there was to know of teacher and images
    precision: Mapping[str, Any] | None = None  # `cskd.teacher.arithmetic.Precision.facts`
    probe: Mapping[str, Any] | None = None  # `cskd.teacher.model.Teacher.probe`
    tables: Mapping[str, str] | None = (
        None  # codec -> sha256 of its tables, see `cskd.store.tables`; None: none has any
    )
    threads: int | None = None  # of arithmetic in one forward
    versions: Mapping[str, str] | None = None  # of libraries
    container: str | None = None  # of its units, see `format.CONTAINERS`; None: zarr

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Manifest:
        """From JSON of anyone, with its hashes or without. Raises ValueError with the first field that can't be.

        The hashes are no secret, so anyone can write a valid one: everything that becomes a number of loops or bytes is
        bounded.
        """
        _check_views(raw.get("views"))
        identity = Identity.read(raw.get("identity"))
        if not str(raw.get("data", "")).isprintable():
            raise ValueError("its data is a path with characters that control a terminal")
        _check_probe(raw.get("probe", {}))
        for name, kind in (("data", str), ("versions", dict), ("probe", dict), ("config", dict)):
            if name in raw and not isinstance(raw[name], kind):
                raise ValueError(f"its {name} is {str(raw[name])[:40]}")
        config, notes, top1 = raw.get("config", {}), raw.get("notes", []), raw.get("clean_top1")
        if not all(isinstance(config.get(name), dict) for name in ("cache", "teacher", "data")):
            raise ValueError("its config has a section that is no mapping")
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError(f"its notes are {str(notes)[:40]}, expected texts")
        _check_precision(raw.get("precision"))
        _check_tables(raw.get("tables", {}), identity)
        if top1 is not None and not isinstance(top1, int | float):
            raise ValueError(f"its clean_top1 is {str(top1)[:40]}")
        container = raw.get("container")
        if container is not None and (container == "zarr" or container not in [*MANIFEST_FORMATS]):
            raise ValueError(f"its container is {str(container)[:40]}, expected none or webdataset")
        if "format" in raw and raw["format"] != MANIFEST_FORMATS[container or "zarr"]:
            raise ValueError(f"its format is {str(raw['format'])[:40]}, its container {container or 'zarr'}")
        if (data := raw.get("clean_data")) not in (None, "val", "train"):
            raise ValueError(f"its clean_data is {str(data)[:40]}, expected val or train")
        return cls.of({key: value for key, value in raw.items() if key not in _SEALS} | {"identity": identity})

    @property
    def resolved(self) -> str:
        """The config that makes this cache, as YAML: the one it was begun with, and the views it has grown to.

        Not filled up with today's defaults: a version with one key more must find the file as it was written.
        """
        return to_yaml({**self.config, "cache": {**self.config["cache"], "views": self.views}})

    @property
    def sealed(self) -> dict[str, Any]:
        """The JSON object of its file: facts, format, fingerprint, and the hash over all of that."""
        identity = self.identity
        form = MANIFEST_FORMATS[self.container or "zarr"]
        facts = {**self.facts, "identity": identity.facts, "format": form, "fingerprint": identity.fingerprint}
        return {**facts, "sha256": json_hash(facts)}


def has_cache(root: Place) -> bool:
    """Whether there is a manifest: a cache that was begun. An empty text, and what lies on the hub, has none."""
    return bool(str(root)) and not is_hub(str(root)) and open_storage(root).stat(MANIFEST) is not None


def begin_manifest(root: Place, manifest: Manifest) -> None:
    """Put the manifest of a new cache in place; of several processes the first one counts, whatever its identity."""
    open_storage(root).create(MANIFEST, json_bytes(manifest.sealed))
    complete_manifest(root)


def complete_manifest(root: Place) -> None:
    """Write the second copy where it is missing, as after a death between the two."""
    storage = open_storage(root)
    if storage.stat(MANIFEST_COPY) is None:
        storage.put(MANIFEST_COPY, json_bytes(read_manifest(storage).sealed))


def write_manifest(root: Place, manifest: Manifest) -> None:
    """Replace both copies."""
    for name in (MANIFEST_COPY, MANIFEST):
        open_storage(root).put(name, json_bytes(manifest.sealed))


def write_resolved(root: Place, manifest: Manifest) -> None:
    """Put the resolved config next to the manifest, where it isn't there already: for people, and to finish the cache with."""
    storage, text = open_storage(root), manifest.resolved.encode()
    with contextlib.suppress(OSError):
        if storage.get(RESOLVED) == text:
            return
    storage.put(RESOLVED, text)


def read_manifest(root: Place, name: str = MANIFEST) -> Manifest:
    """The manifest, or its copy. CacheError when there is none, when it is of another format, or damaged."""
    storage = open_storage(root)
    root, path = storage.location, join(storage.location, name)
    try:
        raw = parse_json(storage.get(name, limit=MAX_TEXT))
    except FileNotFoundError:
        if name == MANIFEST and storage.stat(MANIFEST_COPY):
            raise CacheError(f"{path} is missing; {RESTORE}") from None
        if why_not := other_kind(root, ("cache",), kind_of_objects(root, "the cache") if is_remote(root) else None):
            raise CacheError(f"{root} {why_not}") from None
        there = is_remote(root) or Path(root).exists()
        said = f"no cache at {root} ({name} is missing)" if there else f"no cache at {absent(Path(root))}"
        raise CacheError(f"{said}; make one with `cskd cache-teacher CONFIG`") from None
    except NotADirectoryError:
        found = other_kind(root, ("cache",)) or "is a file, expected a cache, made by `cskd cache-teacher CONFIG`"
        raise CacheError(f"{root} {found}") from None
    except (ValueError, OSError) as e:
        raise CacheError(f"{path} is not readable: {e}; {RESTORE}") from None
    if not isinstance(raw, dict):
        raise CacheError(f"{path} holds a {type(raw).__name__}, expected a mapping; {RESTORE}")
    if raw.get("format") not in MANIFEST_FORMATS.values() or type(raw["format"]) is not int:
        mend = "cache it again" if type(raw.get("format")) is int else RESTORE
        raise CacheError(f"{path} has format {str(raw.get('format'))[:40]}, this version reads {FORMAT} and 2; {mend}")
    if json_hash({key: value for key, value in raw.items() if key != "sha256"}) != raw.get("sha256"):
        raise CacheError(f"{path} does not match its own hash; {RESTORE}")
    try:
        manifest = Manifest.read(raw)
    except ValueError as e:
        raise CacheError(f"{path} is no manifest of a cache: {e}; {RESTORE}") from None
    if manifest.identity.fingerprint != raw.get("fingerprint"):
        raise CacheError(f"{path} does not match its own fingerprint; {RESTORE}")
    return manifest


def _check_views(views: object) -> None:
    if type(views) is not int or not 1 <= views <= MAX_VIEWS:
        raise ValueError(f"its views are {str(views)[:40]}, expected 1 to {MAX_VIEWS}")


def _check_tables(tables: object, identity: Identity) -> None:
    known = isinstance(tables, dict) and set(tables) <= set(identity.codecs)
    if not known or not all(isinstance(h, str) and re.fullmatch(r"[0-9a-f]{64}", h) for h in tables.values()):  # type: ignore[attr-defined]
        raise ValueError(f"its tables are {str(tables)[:40]}, expected a sha256 for codecs that it has")


def _check_probe(probe: object) -> None:
    for name in ("global", "dense"):
        try:
            np.asarray(probe.get(name, []) if isinstance(probe, dict) else None, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"its probe has {name} logits that are no numbers") from None


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
