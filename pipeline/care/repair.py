"""Mend a cache: withdraw what is damaged, and make only that again.

frame     manifest from its second copy, the one that the units are of; inventory from the data set's own, resolved config from the manifest
units     every one is checked as `cskd verify` does; a bad one loses its commit record, and so no longer exists
rebuild   where the images are there: stage 1 makes what is missing, with the config the cache was begun with
seal      what was sealed before must have the content it was sealed with; a seal that was damaged is made again
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from cskd.config import from_dict
from cskd.dataset.inventory import open_inventory
from cskd.errors import CacheError, CskdError, DataError, counted
from cskd.files.durable import json_bytes
from cskd.files.paths import location_text
from cskd.files.read import MAX_TEXT
from cskd.near import absent
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import check_units, uneven, wrong_resolved
from cskd.pipeline.outputs import sole_repair
from cskd.pipeline.show.progress import print_lines
from cskd.storage import Storage, join, open_storage
from cskd.storage.posix import Posix
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import valid_commits
from cskd.store.format import INDEX, INVENTORY, MANIFEST, MANIFEST_COPY, RESOLVED, SEAL, commit_file
from cskd.store.inventory_copy import check_inventory, inventory_id, put_inventory, remove_inventory
from cskd.store.manifest import Manifest, read_manifest, write_manifest, write_resolved
from cskd.store.seal import Seal, read_seal, seal_cache, wrong_index_of
from cskd.store.tables import restore_tables


@dataclass(frozen=True)
class RepairReport:
    """What was done: `restored`, one line for each file of the cache outside its units that is as it was again, its name
    first; `withdrawn`, one line for each unit that was damaged or lost; `missing`, units that had never been made; `rebuilt`,
    units made, of both kinds; the content hash after it."""

    cache: str
    restored: list[str]
    withdrawn: list[str]
    missing: int
    rebuilt: int
    content_root: str


def repair(path: Path, data: Path | None = None, quiet: bool = False) -> RepairReport:
    """Bring a cache back to what it was. `data`: folder of the image shards, where they have moved.

    Raises:  CacheError when both copies of the manifest are damaged or of another cache; DataError when units are damaged and
             the images are not there: then no unit is withdrawn; TeacherError when the teacher that made the cache is not
             there: then the damaged units are withdrawn, and stay missing; PathError while another process makes or repairs
             the cache.
    """
    storage = open_storage(location_text(str(path), "CACHE", write=True))
    with sole_repair(storage):
        return _repair(storage, data, quiet)


def _repair(storage: Storage, data: Path | None, quiet: bool) -> RepairReport:
    path = storage.location
    restored = _restore_manifests(storage) + _restore_inventory(storage, data)
    cache = open_cache(storage, data=data, images=False, index=False)
    for name, digest in (cache.manifest.tables or {}).items():
        restored += restore_tables(storage, name, digest)
    if wrong := wrong_resolved(cache):
        restored.append(f"{RESOLVED}: {wrong}")
        write_resolved(storage, cache.manifest)
    (seal, about_seal), indexed = _seal(cache), storage.stat(INDEX) is not None
    withdrawn: dict[tuple[int, int], str] = {}
    missing = 0
    for units in check_units(cache, seal, "check", quiet):
        missing += sum(unit.commit is None and not unit.error for unit in units)
        withdrawn |= {(unit.block, unit.view): _what(unit.error) for unit in units if unit.error}
        if uneven(units):  # which of them is right, only the images can tell
            with_record = {(unit.block, unit.view) for unit in units if unit.commit is not None}
            withdrawn |= {
                (block, view): f"block {block}, view {view}: quarantines other samples than other views of its block"
                for block, view in with_record - withdrawn.keys()
            }
    rebuilt = 0
    config = from_dict(dict(cache.manifest.config))
    if withdrawn or missing:
        try:
            made = replace(
                config,
                data=replace(config.data, train=str(_images(cache, data))),
                cache=replace(config.cache, path=path, views=cache.views),
            )
            withdraw(storage, sorted(withdrawn))
            rebuilt = cache_teacher(made, quiet=quiet, alone=True).units
        except CskdError as e:
            done = f"{counted(len(restored), 'file')} restored, " if restored else ""
            raise type(e)(f"{path}: {done}{counted(len(withdrawn) + missing, 'unit')} can't be made again: {e}") from e
    wrong = "" if withdrawn or not seal else "was not there" if not indexed else wrong_index_of(cache, seal)
    sealed = seal_cache(cache, config.cache.max_quarantine)
    if wrong:
        restored.append(f"{INDEX}: {wrong}")
    if about_seal or seal is None or seal.views < cache.views:
        was = "was not there" if seal is None else f"was of {seal.views} views, there are {cache.views}"
        restored.append(f"{SEAL}: {about_seal or was}")
    lines = [line for _, line in sorted(withdrawn.items())]
    return RepairReport(path, restored, lines, missing, rebuilt, sealed.content_root)


def _images(cache: Cache, data: Path | None) -> Path:
    """The folder of the images that the cache was made from. DataError where they are not there, or not those."""
    folder = data or Path(cache.manifest.data or ".")
    try:
        inventory = open_inventory(folder)
    except DataError as e:
        raise DataError(f"{e}; say with --data where its images are") from None
    if inventory.id != cache.inventory.id:
        raise DataError(
            f"{folder} holds the data set {inventory.id[:12]}, the cache is of {cache.inventory.id[:12]}; say with --data where "
            "its images are"
        )
    inventory.check_shards()
    return folder


def _what(error: str) -> str:
    """What is wrong, without the advice to repair it."""
    return error.partition("; `cskd repair")[0]


def withdraw(storage: Storage, units: Sequence[tuple[int, int]]) -> None:
    """Remove the records of units, and before them the index, which would go on speaking of them."""
    if units:
        storage.delete(INDEX)
    for unit in units:
        storage.delete(str(commit_file(*unit)))


def _restore_manifests(storage: Storage) -> list[str]:
    """Mend the manifest and its copy; one line for each that was not as it was written."""
    path, found = storage.location, dict[str, Manifest]()
    wrong: dict[str, str] = {}
    for name in (MANIFEST, MANIFEST_COPY):
        try:
            found[name] = read_manifest(storage, name)
        except CacheError as e:
            wrong[name] = _what(str(e)) if _is_there(storage, name) else "was not there"
    if not any(_is_there(storage, name) for name in (MANIFEST, MANIFEST_COPY)):
        missing = isinstance(storage, Posix) and not storage.root.exists()
        where = absent(Path(path)) if missing else path
        raise CacheError(f"no cache at {where}; give the folder that cache.path names")
    if not found:
        raise CacheError(f"{path}: both copies of its manifest are damaged; {MANIFEST}: {wrong[MANIFEST]}")
    right = _that_of_the_records(storage, list(found.values()))
    for name, manifest in found.items():
        if manifest.identity.fingerprint != right.identity.fingerprint:
            wrong[name] = "is another cache's: the one that the units are of counts"
        elif manifest != right:
            wrong[name] = "differs from the other one, which speaks of the units that are there"
        elif storage.get(name, limit=MAX_TEXT) != json_bytes(right.sealed):
            wrong[name] = "was not, byte for byte, what was written"
    if wrong:
        write_manifest(storage, right)
    return [f"{name}: {wrong[name]}" for name in (MANIFEST, MANIFEST_COPY) if name in wrong]


def _is_there(storage: Storage, name: str) -> bool:
    return os.path.lexists(storage.root / name) if isinstance(storage, Posix) else storage.stat(name) is not None


def _restore_inventory(storage: Storage, data: Path | None) -> list[str]:
    """Mend the copy of the inventory; one line where it was not as it was written."""
    path, manifest = storage.location, read_manifest(storage)
    try:
        check_inventory(storage)
        if (there := inventory_id(storage)) != manifest.identity.inventory:
            raise CacheError(f"{join(path, INVENTORY)} is that of another data set, {there[:12]}")
        return []
    except CskdError as e:
        wrong = f"{INVENTORY}: {e}"
    original = open_inventory(data or Path(manifest.data or "."), verify=True)
    if original.id != manifest.identity.inventory:
        raise CacheError(
            f"{path}: its inventory is damaged, and {original.root} holds another data set; say with --data where the "
            "images are that it was made from"
        )
    remove_inventory(storage)
    put_inventory(storage, original)
    return [wrong]


def _that_of_the_records(storage: Storage, found: list[Manifest]) -> Manifest:
    """Of the manifests that are whole, the one that speaks of most units: a valid one of another cache would withdraw all.

    Raises:  CacheError where there are units, and none is of any manifest.
    """
    fingerprints, views = Counter[str](), Counter[tuple[str, int]]()
    path = storage.location
    for commit in valid_commits(storage):
        fingerprints[commit.fingerprint] += 1
        views[commit.fingerprint, commit.view] += 1

    def units(manifest: Manifest) -> int:
        own = manifest.identity.fingerprint
        return sum(n for (of, view), n in views.items() if of == own and view < manifest.views)

    best = max(found, key=units)  # the first of equals
    if fingerprints and not units(best):
        raise CacheError(
            f"{path}: its {fingerprints.total()} commit records are of fingerprint {fingerprints.most_common(1)[0][0][:12]}, its manifest of "
            f"{best.identity.fingerprint[:12]}: it is another cache's; put the right {MANIFEST} back"
        )
    return best


def _seal(cache: Cache) -> tuple[Seal | None, str]:
    """The seal, None where there is none, and what is wrong with it; a damaged one is removed."""
    try:
        return read_seal(cache), ""
    except CacheError as e:
        cache.storage.delete(SEAL)
        return None, _what(str(e))


def render(report: RepairReport, console: Console) -> None:
    """The report for people."""
    parts = [
        f"{counted(len(report.restored), 'file')} restored",
        f"{counted(len(report.withdrawn), 'unit')} damaged or lost",
        f"{report.rebuilt:,} made" + (f", {report.missing:,} of which were missing" if report.missing else ""),
    ]
    nothing = not (report.restored or report.withdrawn or report.missing)
    print_lines(
        console,
        *(f"restored {line}" for line in report.restored),
        *(f"made again {line}" for line in report.withdrawn),
        f"{report.cache}: {'whole, nothing to do' if nothing else '; '.join(parts)}",
        f"content {report.content_root}",
    )
