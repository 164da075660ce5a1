"""Mend a cache: withdraw what is damaged, and make only that again.

frame     manifest from its second copy, the one that the units are of; inventory from the data set's own, resolved config from the manifest
units     every one is checked as `cskd verify` does; a bad one loses its commit record, and so no longer exists
rebuild   where the images are there: stage 1 makes what is missing, with the config the cache was begun with
seal      what was sealed before must have the content it was sealed with; a seal that was damaged is made again
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from cskd.config import from_dict
from cskd.dataset.inventory import open_inventory
from cskd.dataset.inventory_format import check_copy, copy_inventory, read_header
from cskd.errors import CacheError, CskdError, DataError, counted
from cskd.files.durable import json_bytes, sync
from cskd.files.read import read_file
from cskd.near import absent
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import check_units, uneven, wrong_resolved
from cskd.pipeline.outputs import sole_repair
from cskd.pipeline.show.progress import print_lines
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import read_commit
from cskd.store.format import INVENTORY, MANIFEST, MANIFEST_COPY, RESOLVED, SEAL, commit_file
from cskd.store.manifest import Manifest, read_manifest, write_manifest, write_resolved
from cskd.store.seal import Seal, read_seal, seal_cache
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
    with sole_repair(path):
        return _repair(path, data, quiet)


def _repair(path: Path, data: Path | None, quiet: bool) -> RepairReport:
    restored = _restore_manifests(path) + _restore_inventory(path, data)
    cache = open_cache(path, data=data, images=False)
    for name, digest in (cache.manifest.tables or {}).items():
        restored += restore_tables(path, name, digest)
    if wrong := wrong_resolved(cache):
        restored.append(f"{RESOLVED}: {wrong}")
        write_resolved(path, cache.manifest)
    seal, about_seal = _seal(cache)
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
                cache=replace(config.cache, path=str(path), views=cache.views),
            )
            for block, view in sorted(withdrawn):
                record = path / commit_file(block, view)
                record.unlink(missing_ok=True)
                sync(record.parent)
            rebuilt = cache_teacher(made, quiet=quiet).units
        except CskdError as e:
            done = f"{counted(len(restored), 'file')} restored, " if restored else ""
            raise type(e)(f"{path}: {done}{counted(len(withdrawn) + missing, 'unit')} can't be made again: {e}") from e
    sealed = seal_cache(cache, config.cache.max_quarantine)
    if about_seal or seal is None or seal.views < cache.views:
        was = "was not there" if seal is None else f"was of {seal.views} views, there are {cache.views}"
        restored.append(f"{SEAL}: {about_seal or was}")
    lines = [line for _, line in sorted(withdrawn.items())]
    return RepairReport(str(path), restored, lines, missing, rebuilt, sealed.content_root)


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


def _restore_manifests(path: Path) -> list[str]:
    """Mend the manifest and its copy; one line for each that was not as it was written."""
    found: dict[str, Manifest] = {}
    wrong: dict[str, str] = {}
    for name in (MANIFEST, MANIFEST_COPY):
        try:
            found[name] = read_manifest(path, name)
        except CacheError as e:
            wrong[name] = _what(str(e)) if os.path.lexists(path / name) else "was not there"
    if not any(os.path.lexists(path / name) for name in (MANIFEST, MANIFEST_COPY)):
        raise CacheError(
            f"no cache at {absent(path) if not path.exists() else path}; give the folder that cache.path names"
        )
    if not found:
        raise CacheError(f"{path}: both copies of its manifest are damaged; {MANIFEST}: {wrong[MANIFEST]}")
    right = _that_of_the_records(path, list(found.values()))
    for name, manifest in found.items():
        if manifest.identity.fingerprint != right.identity.fingerprint:
            wrong[name] = "is another cache's: the one that the units are of counts"
        elif manifest != right:
            wrong[name] = "differs from the other one, which speaks of the units that are there"
        elif read_file(path / name) != json_bytes(right.sealed):
            wrong[name] = "was not, byte for byte, what was written"
    if wrong:
        write_manifest(path, right)
    return [f"{name}: {wrong[name]}" for name in (MANIFEST, MANIFEST_COPY) if name in wrong]


def _restore_inventory(path: Path, data: Path | None) -> list[str]:
    """Mend the copy of the inventory; one line where it was not as it was written."""
    manifest = read_manifest(path)
    try:
        check_copy(path / INVENTORY)
        if (there := read_header(path / INVENTORY)["id"]) != manifest.identity.inventory:
            raise CacheError(f"{path / INVENTORY} is that of another data set, {there[:12]}")
        return []
    except CskdError as e:
        wrong = f"{INVENTORY}: {e}"
    original = open_inventory(data or Path(manifest.data or "."), verify=True)
    if original.id != manifest.identity.inventory:
        raise CacheError(
            f"{path}: its inventory is damaged, and {original.root} holds another data set; say with --data where the "
            "images are that it was made from"
        )
    shutil.rmtree(path / INVENTORY, ignore_errors=True)
    copy_inventory(original, path)
    return [wrong]


def _that_of_the_records(path: Path, found: list[Manifest]) -> Manifest:
    """Of the manifests that are whole, the one that speaks of most units: a valid one of another cache would withdraw all.

    Raises:  CacheError where there are units, and none is of any manifest.
    """
    fingerprints, views = Counter[str](), Counter[tuple[str, int]]()
    for record in path.glob("commits/b*/v*.json"):
        try:
            commit = read_commit(path, int(record.parent.name[1:]), int(record.stem[1:]))
        except (CacheError, ValueError):
            continue
        if commit is not None:
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
        (cache.root / SEAL).unlink(missing_ok=True)
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
