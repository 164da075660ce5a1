"""A teacher cache: its identity, its inventory, and its units. Reading and committing; no teacher, no images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.codecs import Arrays, Codec, get_codec, of_map_alone
from cskd.codecs.base import hard_rank
from cskd.codecs.measured import AnyMeasured
from cskd.codecs.tabled import TabledCodec
from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory
from cskd.errors import CacheError, CodecError, PathError
from cskd.files.durable import make_folder
from cskd.files.hub import is_hub
from cskd.files.paths import is_remote, local_path, location_text
from cskd.files.read import refuse_links
from cskd.seeds import view_seeds
from cskd.storage import Place, join, open_storage
from cskd.storage.posix import Posix
from cskd.store import index
from cskd.store.commit import Commit, again, publish, read_commit, read_commits, record_names, write_file
from cskd.store.format import OWN_NAMES, UNIT_FIELDS, Unit, record_name
from cskd.store.identity import Identity
from cskd.store.inventory_copy import get_inventory, put_inventory
from cskd.store.manifest import (
    Manifest,
    begin_manifest,
    complete_manifest,
    has_cache,
    read_manifest,
    write_manifest,
)
from cskd.store.tables import read_tables
from cskd.store.unit import content_hash, pack_unit, read_unit
from cskd.views.digest import Recorded
from cskd.views.mixing import NONE, partners, quads

_UNREAD = frozenset([-1])  # the quarantine of a record that is still to be read


class Cache:
    """An open cache. `storage` its bytes; `manifest` its facts; `identity` the part that must never change.

    reads_index: whether what a sealed cache's index says counts for the records; who makes or mends a cache looks at them.
    """

    def __init__(self, root: Place, manifest: Manifest, inventory: Inventory, reads_index: bool = False) -> None:
        self.storage, self.manifest, self.inventory = open_storage(root), manifest, inventory
        self.location, self._reads_index = self.storage.location, reads_index
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
                codec.use_tables(partial(read_tables, self.storage, name, (manifest.tables or {}).get(name, "")))
        if self.identity.teacher.get("dense") == "none":
            of_map_alone(self.codecs.values(), self.identity.teacher.get("head") != "no_classes")
        self._known: dict[int, tuple[set[str], dict[int, frozenset[int]]]] = {}  # see `_records`

    @property
    def root(self) -> Path:
        """The folder of a cache on this machine. PathError where it is on an object store."""
        if not isinstance(self.storage, Posix):
            raise PathError(
                f"{self.location} is on an object store, expected a folder here; copy the cache to one for this"
            )
        return self.storage.root

    def path(self, key: str) -> str:
        """The location of one of its files."""
        return join(self.location, key)

    @cached_property
    def index(self) -> index.Index | None:
        """The sealed index, where it counts: see `cskd.store.index`."""
        if not self._reads_index:
            return None
        return index.read_index(self.storage, self.fingerprint, self.manifest.tables, self.blocks)

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
        if self.index is not None and view < self.index.views:
            return self.own(self.index.commit(block, view))
        commit = read_commit(self.storage, block, view, exact)
        return None if commit is None else self.own(commit)

    def own(self, commit: Commit) -> Commit:
        """A record, which must be of this cache."""
        if commit.fingerprint != self.fingerprint:
            raise CacheError(
                f"unit block {commit.block}, view {commit.view} was made for fingerprint {commit.fingerprint[:12]}, "
                f"this cache is {self.fingerprint[:12]}; {again(commit.block, commit.view)}"
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
        sealed = self._sealed
        if self.index is not None and self.index.views >= self.views:
            return sealed
        changed = dict[int, tuple[set[str], dict[int, frozenset[int]]]]()
        for block, names in enumerate(record_names(self.storage, self.blocks)):
            before, known = self._known.get(block, (set(), {}))
            if names != before:
                there = [v for v in range(self.views) if record_name(v) in names and v not in sealed[block]]
                changed[block] = names, {view: known.get(view, _UNREAD) for view in there}
        new = [(block, view) for block, (_, known) in changed.items() for view in known if known[view] is _UNREAD]
        for (block, view), commit in zip(new, read_commits(self.storage, new), strict=True):
            if commit is None:  # withdrawn since the names were read
                del changed[block][1][view]
            else:
                changed[block][1][view] = frozenset(map(int, self.own(commit).quarantine))
        self._known |= changed
        return [{**sealed[block], **self._known.get(block, (set(), {}))[1]} for block in range(self.blocks)]

    @cached_property
    def _sealed(self) -> list[dict[int, frozenset[int]]]:
        """Of each block: what the index says of its views, see `_records`."""
        index = self.index
        if index is None:
            return [{} for _ in range(self.blocks)]
        views = range(min(index.views, self.views))
        return [{view: index.quarantine(block, view) for view in views} for block in range(self.blocks)]

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
            files.append(write_file(self.storage, block, view, name, data, target_bytes, self.container))
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
        publish(self.storage, commit)
        return commit

    def recorded(self) -> Recorded:
        """What replayed views are checked against."""
        return Recorded(self.quarantined(), dict(self.manifest.versions or {}))

    def read(self, block: int, view: int, codec: str) -> Unit:
        """One unit with one codec's targets, checked against the inventory and the seeds of its view."""
        commit = self.commit_of(block, view)
        if commit is None:
            raise CacheError(
                f"{self.location} has no unit for block {block}, view {view}; run `cskd cache-teacher` again to finish it"
            )
        return self.unit_of(commit, codec)

    def unit_of(self, commit: Commit, codec: str, data: bytes | None = None) -> Unit:
        """The unit of a record, as `read`. data: the bytes of its file, where they have been read already."""
        block, view = commit.block, commit.view
        where = f"block {block}, view {view}"
        file = next((f for f in commit.files if f.codec == codec), None)
        if file is None:
            raise CacheError(f"{where} has no codec {codec!r}, only {[f.codec for f in commit.files]}")
        path = self.path(file.path)
        try:
            fields, targets = read_unit(path, data if data is not None else partial(self.storage.get, file.path))
        except CacheError as e:
            if data is None and self.index is not None:  # since then it may have been made again, under another name
                now = read_commit(self.storage, block, view)
                if now is not None and now != commit:
                    return self.unit_of(self.own(now), codec)
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
        return again(block, view)

    def content_root(self, views: int | None = None, hashes: Mapping[tuple[int, int], str] | None = None) -> str:
        """One hash over the content of every unit that exists, in order: two caches with equal roots hold equal targets.

        Args:    views, of the first so many alone, all by default; hashes, (block, view) -> content hash of the units that
                 exist, where their records have been read already.
        """
        views = self.views if views is None else views
        if hashes is None:
            units = [(block, view) for block in range(self.blocks) for view in range(views)]
            hashes = {unit: commit.content_hash for unit in units if (commit := self.commit_of(*unit)) is not None}
        return index.content_root(self.fingerprint, self.manifest.tables, self.blocks, views, hashes)


def create_cache(root: Place, manifest: Manifest, inventory: Inventory) -> Cache:
    """A new cache, or the one already at `root` when its identity is the same (then only `views` counts: it may have grown).

    Raises:   CacheError naming the first field that differs, both values, and what to do.
    """
    storage = open_storage(root)
    if isinstance(storage, Posix):
        refuse_links(storage.root, OWN_NAMES, "cache.path")
    if not has_cache(storage):
        if isinstance(storage, Posix):
            make_folder(storage.root)
        put_inventory(storage, inventory)
        begin_manifest(storage, manifest)  # another process may have been first
    cache = open_cache(storage, index=False)
    complete_manifest(storage)
    refuse_other_identity(cache, manifest.identity)
    if manifest.views > cache.views:
        write_manifest(storage, replace(cache.manifest, views=manifest.views))
        cache = open_cache(storage, index=False)
    return cache


def refuse_other_identity(cache: Cache, identity: Identity) -> None:
    """CacheError naming the first field of a cache that is not the one wanted, with both values."""
    difference = first_difference(cache.identity.facts, identity.facts)
    if difference:
        field, old, new = first_difference(*map(_by_config_keys, (cache.identity, identity))) or difference
        raise CacheError(
            f"{cache.location} was made with {field} = {_short(old)}, this config has {_short(new)}; "
            f"set {field} back, or cache into another folder (--set cache.path=...)"
        )


def open_cache(root: Place, data: Path | None = None, images: bool = True, index: bool = True) -> Cache:
    """Open a cache for reading; `root` may be an address of an object store, or of the hub, whose copy is then read. `data`:
    folder of the image shards, where they have moved.

    images: False where none will be read: what lies today where they were is then not looked at. index: whether a sealed
    cache's index counts for its records (`cskd.store.index`).

    Raises:  CacheError when there is none, when it is of another format, or its manifest is damaged.
    """
    storage = open_storage(cache_place(root))
    manifest = read_manifest(storage)
    shards = data or Path(manifest.data or ".")
    inventory = get_inventory(storage, shards if images or data else None)
    if inventory.id != (stated := manifest.identity.inventory):
        raise CacheError(f"{storage.location}: its inventory is {inventory.id[:12]}, the manifest says {stated[:12]}")
    return Cache(storage, manifest, inventory, index)


def cache_place(root: Place, what: str = "the cache") -> Place:
    """Where a cache lies that is only read: of an address of the hub its copy on this machine. PathError, HubError."""
    if not isinstance(root, str | Path):
        return root
    if is_hub(root) or not is_remote(root):
        return local_path(root, what, hub=True)
    return location_text(str(root), what)


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
    """What a config sets of an identity, by today's keys; what follows from that, such as the grid, is left out."""
    facts, teacher = identity.facts, dict(identity.teacher)
    if {"autocast", "dtype"} <= teacher.keys():
        autocast, dtype = teacher.pop("autocast"), teacher.pop("dtype")
        teacher["precision"] = dtype if autocast == "none" else autocast
    made = {"codecs": facts["codecs"], "device": teacher.pop("device", "cpu")}
    images = f"inventory {identity.inventory[:12]}"
    return {"cache": made, "data": {"train": images}, "recipe": facts["recipe"], "teacher": teacher}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
