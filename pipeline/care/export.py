"""`cskd export`: a cache for other programs and other places.

targets   next to each image shard's name a tar per view, with the same keys in the same order, for stock webdataset
cache     the same cache with its units in another container; the content, its hashes and the seal stay what they are

Both go unit by unit; a file is there whole or not at all. The same command goes on, and run several times at once it shares the work.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from cskd.codecs.base import quantise_blend
from cskd.codecs.measured import BLENDS, AnyMeasured, Measured, together
from cskd.dataset.images import decoded_size
from cskd.dataset.inventory import Inventory
from cskd.dataset.shard_reader import ShardReader, shard_file
from cskd.errors import CacheError, CodecError, ConfigError, DataError, ImageError, counted
from cskd.files.read import open_regular
from cskd.packing.shard_samples import webdataset_key
from cskd.packing.tar_headers import headers
from cskd.pipeline.care.export_out import Place, begin, make_all, open_out, write_sums
from cskd.pipeline.show.progress import print_lines
from cskd.storage import Storage
from cskd.store.cache import Cache, create_cache, open_cache
from cskd.store.commit import Commit
from cskd.store.manifest import has_cache, write_resolved
from cskd.store.seal import all_commits, seal_cache
from cskd.store.sidecar import ShardKeys, Sidecars, sidecar_name
from cskd.store.tables import copy_tables
from cskd.store.tars import write_tar
from cskd.store.unit import content_hash
from cskd.store.usable import refuse_no_classes, refuse_other_code


@dataclass(frozen=True)
class ExportReport:
    """What is in `out` now. tars: of targets, or files of units; made: of them, by this run; views: rows with targets;
    quarantined: rows without; missing: units that the cache lacks."""

    cache: str
    out: str
    container: str
    tars: int
    made: int
    views: int
    quarantined: int
    bytes: int
    missing: int
    seconds: float
    content_root: str = ""  # of a cache
    logits: str | None = None  # of targets: the codec that the image's logits are from


def export(
    path: Path,
    out: Path,
    data: Path | None = None,
    blends: Sequence[str] | None = None,
    more_blends: Sequence[str] = (),
    envelope: bool = False,
    views: int | None = None,
    container: str | None = None,
    quiet: bool = False,
) -> ExportReport:
    """The command: `export_cache` where a container is named, else `export_targets`. Raises ConfigError for options that exclude
    one another, and for blends that are no numbers. more_blends: what follows `--blends 1` as `0.5 0`."""
    if more_blends and blends is None:
        raise ConfigError(f"{more_blends[0]!r} after OUT is one word too many; `cskd export --help` lists the options")
    options = {"--blends": blends is not None, "--envelope": envelope, "--data": data is not None}
    given = [name for name, there in options.items() if there]
    if container is not None:
        if given:
            raise ConfigError(f"--container copies whole units, so that {given[0]} says nothing; leave one of them out")
        return export_cache(path, out, container, views, quiet)
    if envelope and blends is not None:
        raise ConfigError("--envelope holds every blend, so that --blends says nothing; leave one of them out")
    words = " ".join([*(blends or ()), *more_blends])
    try:
        chosen = None if blends is None else [float(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--blends {words!r} is no list of numbers; write it like 1,0.5,0") from None
    return export_targets(path, out, data, chosen, envelope, views, quiet)


def export_targets(
    path: Path,
    out: Path,
    data: Path | None = None,
    blends: Sequence[float] | None = None,
    envelope: bool = False,
    views: int | None = None,
    quiet: bool = False,
) -> ExportReport:
    """Write the targets of a cache as tars that join its image shards by key; see `cskd.store.sidecar`.

    Args:    data: folder of the image shards, where they have moved. blends: of the classes of cells, by default 1, 0.5 and 0, or 0
             alone where the cache holds the image's targets alone; envelope: every blend instead. views: only the first so many.
    Raises:  CacheError, DataError, CodecError for a blend outside [0, 1], PathError for an `out` of another kind or export.
    """
    begun = time.perf_counter()
    cache = open_cache(path, data=data)
    refuse_no_classes(cache, "--container webdataset copies its units as they are")
    cells = cache.codecs[cache.hard_codec].cells
    if blends is None:
        blends = (1.0, 0.5, 0.0) if cells else (0.0,)
    if not blends and not envelope:
        raise ConfigError("--blends names no blend; give some, such as 1,0.5,0, or --envelope for all of them")
    if (any([quantise_blend(blend) for blend in blends]) or envelope) and not cells:
        raise CodecError(
            f"{cache.location} holds the image's targets alone, which are those of blend 0; leave --blends and --envelope out, or cache a codec "
            "with cells as well, such as envelope"
        )
    count = _views(cache, views)
    refuse_other_code(cache)
    cache.inventory.check_shards()
    place, chosen = open_out(out, cache, "export"), [] if envelope else list(blends)
    commits = _commits(cache, count)
    what = {"targets": "envelope"} if envelope else {"targets": "cells", "blends": chosen}
    logits = begin(cache, place, what, nearest_logits(cache, commits.values()))
    names = {
        place: [sidecar_name(cache.inventory.shards[s].name, place[1]) for s, _, _ in _shards(cache, place[0])]
        for place in commits
    }
    hashes: dict[str, str] = {}
    images = lru_cache(maxsize=1)(lambda block: _keys_of(cache, block))

    def sizes() -> dict[str, int]:
        return {about.key: about.size for about in place.list()}

    def lacking() -> list[Place]:
        there = sizes()
        return [unit for unit in commits if not there.keys() >= {*names[unit]}]

    def made(unit: Place) -> bool:
        return all(place.stat(name) for name in names[unit])

    def make(block: int, view: int) -> None:
        sidecars = Sidecars(cache, commits[block, view], images(block), chosen, logits)
        for (_, first, stop), name in zip(_shards(cache, block), names[block, view], strict=True):
            file = io.BytesIO()
            write_tar(file, sidecars.members(first, stop))
            place.put(name, file.getvalue())
            hashes[name] = hashlib.sha256(file.getvalue()).hexdigest()

    make_all(cache, place, lacking, made, make, quiet)
    tars, there = [name for names_ in names.values() for name in names_], sizes()
    write_sums(place, tars, hashes, there)
    files = [there[name] for name in tars]
    report = _report(cache, place, "webdataset", commits, count, files, len(hashes), begun)
    return replace(report, logits=logits)


def export_cache(path: Path, out: Path, container: str, views: int | None = None, quiet: bool = False) -> ExportReport:
    """The same cache with units in another container; every unit is checked against its content hash on the way.

    Raises:  CacheError for a damaged unit, or an `out` that is another cache or in another container; PathError.
    """
    begun = time.perf_counter()
    cache = open_cache(path, images=False)
    count = _views(cache, views)
    place = open_out(out, cache, "cache")
    if has_cache(place):
        there = open_cache(place, images=False)
        if (there.fingerprint, there.container) != (cache.fingerprint, container):
            raise CacheError(
                f"OUT {place.location} is a cache with fingerprint {there.fingerprint[:12]} and container {there.container}, expected "
                f"{cache.fingerprint[:12]} and {container}; give another folder"
            )
    config: dict[str, Any] = {**cache.manifest.config}
    config["cache"] = {**config["cache"], "container": container, "path": place.location, "views": count}
    kept = None if container == "zarr" else container
    copy_tables(cache.storage, place, cache.manifest.tables or {})
    made = create_cache(place, replace(cache.manifest, container=kept, views=count, config=config), cache.inventory)
    write_resolved(place, made.manifest)
    commits, new = _commits(cache, count), set[Place]()

    def make(block: int, view: int) -> None:
        commit = commits[block, view]
        units = {name: cache.unit_of(commit, name) for name in cache.codecs}
        fields, targets = next(iter(units.values())).fields, {name: unit.targets for name, unit in units.items()}
        if content_hash(fields, targets) != commit.content_hash:
            raise CacheError(
                f"block {block}, view {view} is not what its record says; `cskd repair {cache.location}` makes it again"
            )
        made.add_unit(block, view, fields, targets, {int(i): why for i, why in commit.quarantine.items()})
        new.add((block, view))

    def lacking() -> list[Place]:
        return sorted(commits.keys() & {*made.missing()})

    make_all(cache, place, lacking, lambda unit: made.commit_of(*unit) is not None, make, quiet)
    copied = all_commits(made, made.views)
    if lost := sorted(commits.keys() - copied.keys()):
        block, view = lost[0]
        raise CacheError(f"{place.location} has lost block {block}, view {view}; run the same command again")
    hashes = {unit: commit.content_hash for unit, commit in copied.items()}
    root = made.content_root(hashes=hashes) if made.missing() else seal_cache(made, 1.0).content_root
    files = [file.size for unit in commits for file in copied[unit].files]
    report = _report(cache, place, container, commits, count, files, len(new) * len(cache.codecs), begun)
    return replace(report, content_root=root)


def _views(cache: Cache, asked: int | None) -> int:
    if asked is not None and not 1 <= asked <= cache.views:
        raise ConfigError(
            f"--views is {asked}, {cache.location} has {cache.views}; give 1 to {cache.views}, or leave it out"
        )
    return asked or cache.views


def _commits(cache: Cache, views: int) -> dict[Place, Commit]:
    if cache.index is not None and cache.index.views >= views:
        places = [(block, view) for block in range(cache.blocks) for view in range(views)]
        found = {place: commit for place in places if (commit := cache.commit_of(*place)) is not None}
    else:
        found = all_commits(cache, views)
    if not found:
        raise CacheError(f"{cache.location} has no unit yet; run `cskd cache-teacher` with its config first")
    return found


def nearest_logits(cache: Cache, commits: Iterable[Commit]) -> str | None:
    """Of the codecs that hold logits one that keeps the image's in 16 bits; else the one whose error there, as KL, is known to be the
    smallest: of a codec without cells what was measured when the units were made, of one with cells the measured mean over blends times
    their number, since the image's is one of the terms. The first of those that nobody measured. None where no codec holds any."""
    errors: dict[str, list[AnyMeasured]] = {name: [] for name, codec in cache.codecs.items() if codec.soft}
    for commit in commits:
        for name, error in commit.errors.items():
            errors.get(name, []).append(error)
    over_all = {name: together(of) for name, of in errors.items()}
    terms = {name: len(BLENDS) if cache.codecs[name].cells else 1 for name in errors}
    kl = {name: terms[name] * of.kl if isinstance(of, Measured) else math.inf for name, of in over_all.items()}
    return min(kl, key=lambda name: (not cache.codecs[name].fine_image, kl[name]), default=None)


def _shards(cache: Cache, block: int) -> Iterator[tuple[int, int, int]]:
    """Number, first sample and the one after the last of each shard of a block."""
    first, stop = cache.inventory.block_range(block)
    while first < stop:
        shard = int(cache.inventory.shard[first])
        end = first + int((cache.inventory.shard[first:stop] == shard).sum())
        yield shard, first, end
        first = end


def _keys_of(cache: Cache, block: int) -> ShardKeys:
    """What the image shards say of a block's samples. DataError where it is not what the inventory says."""
    inventory, reader = cache.inventory, ShardReader(cache.inventory, whole=True)
    first, stop = inventory.block_range(block)
    keys: list[str] = []
    for shard, start, end in _shards(cache, block):
        keys += _shard_keys(inventory, shard, start, end)
    bad, sizes = cache.quarantined(), list[tuple[int, int] | None]()
    for sample in range(first, stop):
        try:
            sizes.append(None if bad[sample] else decoded_size(reader.read(sample)))
        except ImageError as e:
            raise DataError(f"sample '{inventory.key(sample)}' has targets, and its image can't be read: {e}") from None
    return ShardKeys(first, keys, sizes)


def _shard_keys(inventory: Inventory, shard: int, first: int, stop: int) -> list[str]:
    """The keys of samples first .. stop-1 as webdataset reads them in their shard."""
    (path, _held), where = shard_file(inventory, shard), inventory.where(shard)
    try:
        with open(open_regular(path), "rb") as file:
            names = {header.offset: header.name for header in headers(file, path.stat().st_size)}
    except ValueError as e:
        raise DataError(f"{where} {e}; restore it or pack again") from None
    keys = [webdataset_key(names.get(int(inventory.offset[i]), "")) for i in range(first, stop)]
    seen: set[str | None] = {None}
    for sample, key in zip(range(first, stop), keys, strict=True):
        if key in seen:
            why = f"webdataset reads a second sample '{key}' there" if key else "webdataset reads no sample there"
            raise DataError(f"sample '{inventory.key(sample)}' in {where}: {why}; make its shards with `cskd pack`")
        seen.add(key)
    return [key for key in keys if key is not None]


def _report(
    cache: Cache,
    out: Storage,
    container: str,
    commits: dict[Place, Commit],
    views: int,
    files: Sequence[int],
    made: int,
    begun: float,
) -> ExportReport:
    return ExportReport(
        cache=cache.location,
        out=out.location,
        container=container,
        tars=len(files),
        made=made,
        views=sum(commit.cached for commit in commits.values()),
        quarantined=sum(len(commit.quarantine) for commit in commits.values()),
        bytes=sum(files),
        missing=cache.blocks * views - len(commits),
        seconds=time.perf_counter() - begun,
    )


def render(report: ExportReport, console: Console) -> None:
    """The report for people."""
    what = f"units as {report.container}" if report.content_root else "tars of targets"
    print_lines(
        console,
        f"{report.out}: {report.tars:,} {what}, {report.made:,} made now, {report.bytes / 1e6:,.1f} MB, "
        f"{report.views:,} views, {report.quarantined:,} without targets (quarantined)",
        *(
            [f"{counted(report.missing, 'unit')} of {report.cache} missing; run this again once they are made"]
            if report.missing
            else []
        ),
        *([f"logits of the image from codec {report.logits}"] if report.logits else []),
        *([f"content {report.content_root}"] if report.content_root else []),
    )
