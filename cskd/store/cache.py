"""A teacher cache: its identity, its inventory, and its units. Reading and committing; no teacher, no images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.codecs import Arrays, Codec, get_codec, of_map_alone
from cskd.codecs.base import hard_rank
from cskd.codecs.measured import AnyMeasured
from cskd.codecs.tabled import TabledCodec
from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory, open_inventory
from cskd.dataset.inventory_format import copy_inventory
from cskd.errors import CacheError, CodecError
from cskd.files.durable import make_folder
from cskd.files.paths import local_path
from cskd.files.read import refuse_links
from cskd.seeds import view_seeds
from cskd.store.commit import Commit, again, publish, read_commit, record_names, write_file
from cskd.store.format import INVENTORY, MANIFEST, OWN_NAMES, UNIT_FIELDS, Unit, commit_file, record_name
from cskd.store.identity import Identity
from cskd.store.manifest import Manifest, begin_manifest, complete_manifest, read_manifest, write_manifest
from cskd.store.tables import read_tables
from cskd.store.unit import content_hash, pack_unit, read_unit
from cskd.views.digest import Recorded
from cskd.views.mixing import NONE, partners, quads


class Cache:
    """An open cache. `root` folder; `manifest` its facts; `identity` the part that must never change."""

    def __init__(self, root: Path, manifest: Manifest, inventory: Inventory) -> None:
        self.root, self.manifest, self.inventory = root, manifest, inventory
        self.identity, self.views = manifest.identity, manifest.views
        self.fingerprint, self.container = self.identity.fingerprint, manifest.container or "zarr"
        h, w = self.identity.grid
        self.grid = h, w
        self.classes = inventory.classes
        self.recipe = RecipeConfig(**self.identity.recipe)
        self.codecs: dict[str, Codec] = {
            name: get_codec(name, len(self.classes), self.grid) for name in self.identity.codecs
        }
        for name, codec in self.codecs.items():
            if isinstance(codec, TabledCodec):
                codec.use_tables(partial(read_tables, root, name, (manifest.tables or {}).get(name, "")))
        if self.identity.teacher.get("dense") == "none":
            of_map_alone(self.codecs.values(), self.identity.teacher.get("head") != "no_classes")
        self._known: dict[int, tuple[set[str], dict[int, frozenset[int]]]] = {}  # see `_records`

    @property
    def blocks(self) -> int:
        return len(self.inventory.blocks) - 1

    @property
    def hard_codec(self) -> str:
        """The codec to read hard targets from: an exact one where there is one, else one that has cells."""
        return min(self.codecs, key=lambda name: hard_rank(self.codecs[name]))

    def commit_of(self, block: int, view: int, exact: bool = False) -> Commit | None:
        """The unit's commit record, None while it is missing. CacheError when damaged or of another identity.

        exact: see `read_commit`.
        """
        commit = read_commit(self.root, block, view, exact)
        if commit is not None and commit.fingerprint != self.fingerprint:
            raise CacheError(
                f"unit block {block}, view {view} was made for fingerprint {commit.fingerprint[:12]}, "
                f"this cache is {self.fingerprint[:12]}; {self._again(block, view)}"
            )
        return commit

    def missing(self, views: list[int] | None = None) -> list[tuple[int, int]]:
        """(block, view) of every unit that has no commit record, in the order of stage 1.

        Raises:  CacheError as `commit_of`, for a record that this object sees for the first time: a loop over this reads the
                 names of a folder a block, and only new records.
        """
        wanted = range(self.views) if views is None else views
        return [(b, v) for b, there in enumerate(self._records()) for v in wanted if v not in there]

    def quarantined(self) -> NDArray[np.bool_]:
        """bool [n]: samples of the inventory that have no targets. CacheError when the views of a block disagree."""
        bad = np.zeros(self.inventory.n, bool)
        for block, by_view in enumerate(self._records()):
            seen: frozenset[int] | None = None
            for view, quarantine in by_view.items():
                if seen is not None and seen != quarantine:
                    raise CacheError(
                        f"block {block}: view {view} quarantines other samples than the views before it; "
                        f"{self._again(block, view)}"
                    )
                seen = quarantine
            bad[[self.inventory.block_range(block)[0] + i for i in seen or ()]] = True
        return bad

    def _records(self) -> list[dict[int, frozenset[int]]]:
        """Of each block: every view that has a commit record, rising -> its quarantine, positions in the block.

        A record is never rewritten, so each is read and checked once; a withdrawn one is forgotten. With 47,100 of them (300
        views of ImageNet) the first call takes 1 s and the others 10 ms.
        """
        return [self._records_of(block) for block in range(self.blocks)]

    def _records_of(self, block: int) -> dict[int, frozenset[int]]:
        names, (before, known) = record_names(self.root, block), self._known.get(block, (set(), {}))
        if names != before:
            found = {}
            for view in range(self.views):
                if record_name(view) not in names:
                    continue
                if view in known:
                    found[view] = known[view]
                elif (commit := self.commit_of(block, view)) is not None:  # None: withdrawn since the names were read
                    found[view] = frozenset(map(int, commit.quarantine))
            known = found
            self._known[block] = names, known
        return known

    def add_unit(
        self,
        block: int,
        view: int,
        fields: dict[str, NDArray[Any]],
        targets: dict[str, Arrays],
        quarantine: dict[int, str],
        errors: Mapping[str, AnyMeasured] | None = None,
    ) -> Commit:
        """Write and commit one unit; rows in block order without the quarantined ones. errors: of each codec, as measured."""
        first, stop = self.inventory.block_range(block)
        rows = len(fields["key_hash"])
        if rows + len(quarantine) != stop - first:
            raise CacheError(
                f"block {block}, view {view}: {rows} cached + {len(quarantine)} quarantined samples, "
                f"the inventory has {stop - first}"
            )
        fields = {name: np.asarray(fields[name], dtype) for name, (dtype, _) in UNIT_FIELDS.items()}
        names = {name: dimensions for name, (_, dimensions) in UNIT_FIELDS.items()}
        files = []
        for name, codec in self.codecs.items():
            codec.check(targets[name], rows, len(self.classes))
            about = {"codec": name, "block": block, "view": view, "inventory": self.inventory.id}
            target_arrays, dimensions = codec.pack(targets[name]), {**names, **codec.packed_dimensions}
            data = pack_unit(fields, target_arrays, dimensions, about, self.container)
            empty = pack_unit(fields, {}, names, about, self.container)
            target_bytes = len(data) - len(empty)
            files.append(write_file(self.root, block, view, name, data, target_bytes, self.container))
        commit = Commit(
            block=block,
            view=view,
            files=files,
            content_hash=content_hash(fields, targets),
            fingerprint=self.fingerprint,
            samples=stop - first,
            cached=rows,
            quarantine={str(i): reason for i, reason in sorted(quarantine.items())},
            stats={name: error.facts for name, error in (errors or {}).items()},
        )
        publish(self.root, commit)
        return commit

    def recorded(self) -> Recorded:
        """What replayed views are checked against."""
        return Recorded(self.quarantined(), dict(self.manifest.versions or {}))

    def read(self, block: int, view: int, codec: str) -> Unit:
        """One unit with one codec's targets, checked against the inventory and the seeds of its view."""
        commit = self.commit_of(block, view)
        if commit is None:
            raise CacheError(
                f"{self.root} has no unit for block {block}, view {view}; run `cskd cache-teacher` again to finish it"
            )
        return self.unit_of(commit, codec)

    def unit_of(self, commit: Commit, codec: str, data: bytes | None = None) -> Unit:
        """The unit of a record, as `read`. data: the bytes of its file, where they have been read already."""
        block, view = commit.block, commit.view
        where = f"block {block}, view {view}"
        path = next((self.root / f.path for f in commit.files if f.codec == codec), None)
        if path is None:
            raise CacheError(f"{where} has no codec {codec!r}, only {[f.codec for f in commit.files]}")
        try:
            fields, targets = read_unit(path, data)
        except CacheError as e:
            raise CacheError(f"{e}; {self._again(block, view)}") from e
        first, stop = self.inventory.block_range(block)
        kept = np.ones(stop - first, bool)
        kept[[int(i) for i in commit.quarantine]] = False
        position = np.flatnonzero(kept)
        for name, (dtype, _) in UNIT_FIELDS.items():
            if name not in fields or fields[name].dtype != dtype or len(fields[name]) != len(position):
                raise CacheError(f"{path}: array {name} is missing or not {len(position)} x {np.dtype(dtype)}")
        key_hash = self.inventory.key_hash[first:stop][position]
        if not np.array_equal(fields["key_hash"], key_hash):
            raise CacheError(f"{path} holds other samples than the inventory's {where}; {self._again(block, view)}")
        seeds = view_seeds(self.recipe.seed, self.inventory.id, key_hash, view)
        if not np.array_equal(fields["seed"], seeds):
            row = int(np.flatnonzero(fields["seed"] != seeds)[0])
            raise CacheError(
                f"{path}: sample '{self.inventory.key(first + int(position[row]))}' has seed {fields['seed'][row]:016x}, "
                f"view {view} of it has {seeds[row]:016x}; {self._again(block, view)}"
            )
        order = quads(stop - first, self.recipe, self.inventory.id, block, view // self.recipe.mix_group)
        partner = np.where(fields["mode"] != NONE, partners(order, self.recipe, view)[position], -1)
        if not np.array_equal(fields["partner"], partner):
            row = int(np.flatnonzero(fields["partner"] != partner)[0])
            raise CacheError(
                f"{path}: sample '{self.inventory.key(first + int(position[row]))}' has partner {fields['partner'][row]}, "
                f"the recipe says {partner[row]} (places in the block); {self._again(block, view)}"
            )
        try:
            targets = self.codecs[codec].unpack(targets, len(position))
        except CodecError as e:
            raise CacheError(f"{path}: {e}; {self._again(block, view)}") from None
        self.codecs[codec].check(targets, len(position), len(self.classes))
        return Unit(position, fields, targets)

    def _again(self, block: int, view: int) -> str:
        return again(self.root / commit_file(block, view))

    def content_root(self, views: int | None = None, hashes: Mapping[tuple[int, int], str] | None = None) -> str:
        """One hash over the content of every unit that exists, in order: two caches with equal roots hold equal targets.

        Args:    views, of the first so many alone, all by default; hashes, (block, view) -> content hash of the units that
                 exist, where their records have been read already.
        """
        h = hashlib.sha256(self.fingerprint.encode())
        for name, digest in sorted((self.manifest.tables or {}).items()):  # units mean nothing without
            h.update(f"{name}:{digest};".encode())
        for block in range(self.blocks):
            for view in range(self.views if views is None else views):
                if hashes is not None:
                    content = hashes.get((block, view))
                else:
                    content = commit.content_hash if (commit := self.commit_of(block, view)) else None
                h.update(f"{block}:{view}:{content};".encode())
        return h.hexdigest()


def create_cache(root: Path, manifest: Manifest, inventory: Inventory) -> Cache:
    """A new cache, or the one already at `root` when its identity is the same (then only `views` counts: it may have grown).

    Raises:   CacheError naming the first field that differs, both values, and what to do.
    """
    refuse_links(root, OWN_NAMES, "cache.path")
    if (root / MANIFEST).exists():
        cache = open_cache(root)
        complete_manifest(root)
        refuse_other_identity(cache, manifest.identity)
        if manifest.views > cache.views:
            write_manifest(root, replace(cache.manifest, views=manifest.views))
            cache = open_cache(root)
        return cache
    make_folder(root)
    if not (root / INVENTORY).exists():
        copy_inventory(inventory, root)
    begin_manifest(root, manifest)
    return create_cache(root, manifest, inventory)  # another process may have been first


def refuse_other_identity(cache: Cache, identity: Identity) -> None:
    """CacheError naming the first field of a cache that is not the one wanted, with both values."""
    difference = first_difference(cache.identity.facts, identity.facts)
    if difference:
        field, old, new = first_difference(*map(_by_config_keys, (cache.identity, identity))) or difference
        raise CacheError(
            f"{cache.root} was made with {field} = {_short(old)}, this config has {_short(new)}; "
            f"set {field} back, or cache into another folder (--set cache.path=...)"
        )


def open_cache(root: str | Path, data: Path | None = None, images: bool = True) -> Cache:
    """Open a cache for reading; `root` may be an address of the hub, whose copy is `Cache.root`. `data`: folder of the image shards, where they have moved.

    images: False where none will be read: what lies today where they were is then not looked at.

    Raises:  CacheError when there is none, when it is of another format, or its manifest is damaged.
    """
    root = local_path(root, "the cache", hub=True)
    manifest = read_manifest(root)
    shards = data or Path(manifest.data or ".")
    if not (root / INVENTORY).is_dir():
        raise CacheError(f"{root} has lost its {INVENTORY} folder; `cskd repair` copies it again from the data set")
    inventory = open_inventory(root / INVENTORY, data=shards if images or data else None)
    if inventory.id != (stated := manifest.identity.inventory):
        raise CacheError(f"{root}: its inventory is {inventory.id[:12]}, the manifest says {stated[:12]}")
    return Cache(root, manifest, inventory)


def differences(old: Any, new: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of every field in which two nested dicts differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new:
            yield field, old, new
        return
    for key in sorted(old.keys() | new.keys()):
        yield from differences(old.get(key), new.get(key), f"{field}.{key}" if field else key)


def first_difference(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first of `differences`; None when equal."""
    return next(differences(old, new), None)


def _by_config_keys(identity: Identity) -> dict[str, Any]:
    """The facts of an identity, those of the teacher's arithmetic by the keys that set them today."""
    facts, teacher = identity.facts, dict(identity.teacher)
    if {"autocast", "dtype"} <= teacher.keys():
        autocast, dtype = teacher.pop("autocast"), teacher.pop("dtype")
        teacher["precision"] = dtype if autocast == "none" else autocast
    return {**facts, "teacher": teacher, "cache": {"device": teacher.pop("device", "cpu")}}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
