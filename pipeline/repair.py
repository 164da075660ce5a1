"""Mend a cache: withdraw what is damaged, and make only that again.

frame     manifest from its second copy, the one that the units are of; inventory from the data set's own, resolved config from the manifest
units     every one is checked as `cskd verify` does; a bad one loses its commit record, and so no longer exists
rebuild   stage 1 makes what is missing, with the config the cache was begun with
seal      what was sealed before must have the content it was sealed with; a seal that was damaged is made anew
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cskd.config import from_dict
from cskd.errors import CacheError, CskdError
from cskd.inventory import copy_inventory, open_inventory
from cskd.inventory_format import check_copy, read_header
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import fsync_folder, read_commit
from cskd.store.format import INVENTORY, MANIFEST, MANIFEST_COPY, SEAL, commit_file
from cskd.store.manifest import read_manifest, write_manifest
from cskd.store.seal import read_seal, seal_cache
from pipeline.cache_teacher import cache_teacher, write_resolved
from pipeline.outputs import sole_repair
from pipeline.progress import Progress
from pipeline.verify import check_unit, lost, uneven_quarantine


@dataclass(frozen=True)
class RepairReport:
    """What was done: one line for each file restored and unit withdrawn; units made again; the content hash after it."""

    cache: str
    restored: list[str]
    withdrawn: list[str]
    rebuilt: int
    content_root: str


def repair(path: Path, data: Path | None = None, quiet: bool = False) -> RepairReport:
    """Bring a cache back to what it was. `data`: folder of the image shards, where they have moved.

    Raises:  CacheError when both copies of the manifest are damaged or of another cache; DataError and TeacherError when the images or the
             teacher that made the cache are not there: then the damaged units are withdrawn, and stay missing. PathError
             while another process makes or repairs the cache.
    """
    with sole_repair(path):
        return _repair(path, data, quiet)


def _repair(path: Path, data: Path | None, quiet: bool) -> RepairReport:
    restored = _restore_frame(path, data)
    cache = open_cache(path, data=data)
    write_resolved(cache)
    sealed = _sealed_views(cache, restored)
    withdrawn = []
    with Progress("check", cache.blocks * cache.views, "units", quiet=quiet) as progress:
        for block in range(cache.blocks):
            for view in range(cache.views):
                try:
                    if check_unit(cache, block, view) is None and view < sealed:
                        withdrawn.append(lost(cache, block, view))
                except CskdError as e:
                    _withdraw(cache, block, view)
                    withdrawn.append(f"block {block}, view {view}: {e}")
                progress.update(block * cache.views + view + 1)
            if uneven := uneven_quarantine(cache, block):
                withdrawn += uneven
                for view in range(cache.views):  # which of them is right, only the images can tell
                    _withdraw(cache, block, view)
    rebuilt = 0
    config = from_dict(cache.manifest["config"])
    if cache.missing():
        images = str(data or cache.manifest["data"])
        made = replace(
            config,
            data=replace(config.data, train=images),
            cache=replace(config.cache, path=str(path), views=cache.views),
        )
        rebuilt = cache_teacher(made, quiet=quiet).units
    seal_cache(cache, config.cache.max_quarantine)
    return RepairReport(str(path), restored, withdrawn, rebuilt, open_cache(path, data=data).content_root())


def _restore_frame(path: Path, data: Path | None) -> list[str]:
    """Mend manifest, inventory and their copies; one line each that was not as it was written."""
    restored = []
    found = []
    for name in (MANIFEST, MANIFEST_COPY):
        try:
            found.append(read_manifest(path, name))
        except CacheError as e:
            restored.append(f"{name}: {e}")
    if not found:
        raise CacheError(f"{path}: both copies of its manifest are damaged; {restored[0]}")
    manifest = _that_of_the_records(path, found)
    restored += [f"{MANIFEST} or its copy is another cache's: the one that the units are of counts"] * (
        found[0]["fingerprint"] != found[-1]["fingerprint"]
    )
    write_manifest(path, manifest)
    try:
        check_copy(path / INVENTORY)
        if (there := read_header(path / INVENTORY)["id"]) != manifest["identity"]["inventory"]:
            raise CacheError(f"{path / INVENTORY} is that of another data set, {there[:12]}")
    except CskdError as e:
        restored.append(f"{INVENTORY}: {e}")
        original = open_inventory(data or Path(manifest["data"]), verify=True)
        if original.id != manifest["identity"]["inventory"]:
            raise CacheError(
                f"{path}: its inventory is damaged, and {original.root} holds another data set; say with --data where the "
                "images are that it was made from"
            ) from None
        shutil.rmtree(path / INVENTORY, ignore_errors=True)
        copy_inventory(original, path)
    return restored


def _that_of_the_records(path: Path, found: list[dict[str, Any]]) -> dict[str, Any]:
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

    def units(manifest: dict[str, Any]) -> int:
        return sum(n for (of, view), n in views.items() if of == manifest["fingerprint"] and view < manifest["views"])

    best = max(found, key=units)  # the first of equals
    if fingerprints and not units(best):
        raise CacheError(
            f"{path}: its {fingerprints.total()} commit records are of fingerprint {fingerprints.most_common(1)[0][0][:12]}, its manifest of "
            f"{best['fingerprint'][:12]}: it is another cache's; put the right {MANIFEST} back"
        )
    return best


def _sealed_views(cache: Cache, restored: list[str]) -> int:
    """How many views the cache was sealed with, 0 where it was not; a damaged seal is removed."""
    try:
        seal = read_seal(cache)
    except CacheError as e:
        restored.append(f"{SEAL}: {e}")
        (cache.root / SEAL).unlink(missing_ok=True)
        return 0
    return seal.views if seal else 0


def _withdraw(cache: Cache, block: int, view: int) -> None:
    record = cache.root / commit_file(block, view)
    record.unlink(missing_ok=True)
    fsync_folder(record.parent)


def render(report: RepairReport, console: Console) -> None:
    """The report for people."""
    for line in report.restored + report.withdrawn:
        console.print(escape(line), soft_wrap=True)
    did = f"{len(report.restored)} files restored, {len(report.withdrawn)} units withdrawn, {report.rebuilt} made"
    console.print(f"{escape(report.cache)}: {did}", soft_wrap=True)
    console.print(f"content {report.content_root}", soft_wrap=True)
