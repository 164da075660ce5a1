"""`cskd export`: a cache for other programs and other places.

targets   next to each image shard's name a tar per view, with the same keys in the same order, for stock webdataset
cache     the same cache with its units in another container; the content, its hashes and the seal stay what they are

Both go unit by unit; a file is there whole or not at all. The same command goes on, and run several times at once it shares the work.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from cskd.codecs.base import quantise_blend
from cskd.dataset.images import decoded_size
from cskd.dataset.inventory import Inventory
from cskd.dataset.shard_reader import ShardReader, shard_file
from cskd.errors import CacheError, CodecError, ConfigError, DataError, ImageError, counted
from cskd.files.claims import Claims
from cskd.files.durable import json_bytes, put
from cskd.files.folders import mark, refuse_output
from cskd.files.paths import is_remote
from cskd.files.read import file_sha256, open_regular, parse_json, read_file
from cskd.packing.shard_samples import webdataset_key
from cskd.packing.tar_headers import headers
from cskd.pipeline.show.progress import Progress, print_lines
from cskd.store.cache import Cache, create_cache, open_cache
from cskd.store.commit import Commit
from cskd.store.format import MANIFEST, OWN_NAMES
from cskd.store.manifest import write_resolved
from cskd.store.seal import seal_cache
from cskd.store.sidecar import ShardKeys, Sidecars, sidecar_name
from cskd.store.tables import copy_tables
from cskd.store.tars import write_tar
from cskd.store.unit import content_hash
from cskd.store.usable import refuse_no_classes, refuse_other_code

FACTS, SUMS = "export.json", "SHA256SUMS"
POLL_WAIT = 2.0  # seconds between two looks at what other processes are making
Place = tuple[int, int]  # block, view


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
    refuse_output(out, "export", "OUT", inputs={**_folder(path), "the data folder": cache.inventory.root})
    chosen = [] if envelope else list(blends)
    _begin(cache, out, {"targets": "envelope"} if envelope else {"targets": "cells", "blends": chosen})
    commits = _commits(cache, count)
    names = {
        place: [sidecar_name(cache.inventory.shards[s].name, place[1]) for s, _, _ in _shards(cache, place[0])]
        for place in commits
    }
    hashes: dict[str, str] = {}
    images = lru_cache(maxsize=1)(lambda block: _keys_of(cache, block))

    def made(place: Place) -> bool:
        return all((out / name).is_file() for name in names[place])

    def make(block: int, view: int) -> None:
        sidecars = Sidecars(cache, commits[block, view], images(block), chosen)
        for (_, first, stop), name in zip(_shards(cache, block), names[block, view], strict=True):
            file = io.BytesIO()
            write_tar(file, sidecars.members(first, stop))
            put(out / name, file.getvalue())
            hashes[name] = hashlib.sha256(file.getvalue()).hexdigest()

    _make_all(cache, out, list(commits), made, make, quiet)
    tars = [name for names_ in names.values() for name in names_]
    _write_sums(out, tars, hashes)
    return _report(cache, out, "webdataset", commits, count, [out / name for name in tars], len(hashes), begun)


def export_cache(path: Path, out: Path, container: str, views: int | None = None, quiet: bool = False) -> ExportReport:
    """The same cache with units in another container; every unit is checked against its content hash on the way.

    Raises:  CacheError for a damaged unit, or an `out` that is another cache or in another container; PathError.
    """
    begun = time.perf_counter()
    cache = open_cache(path, images=False)
    count = _views(cache, views)
    refuse_output(out, "cache", "OUT", inputs=_folder(path), names=OWN_NAMES)
    if (out / MANIFEST).exists():
        there = open_cache(out, images=False)
        if (there.fingerprint, there.container) != (cache.fingerprint, container):
            raise CacheError(
                f"OUT {out} is a cache with fingerprint {there.fingerprint[:12]} and container {there.container}, expected "
                f"{cache.fingerprint[:12]} and {container}; give another folder"
            )
    config: dict[str, Any] = {**cache.manifest.config}
    config["cache"] = {**config["cache"], "container": container, "path": str(out), "views": count}
    kept = None if container == "zarr" else container
    copy_tables(cache.storage, out, cache.manifest.tables or {})
    made = create_cache(out, replace(cache.manifest, container=kept, views=count, config=config), cache.inventory)
    write_resolved(out, made.manifest)
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

    _make_all(cache, out, list(commits), lambda place: made.commit_of(*place) is not None, make, quiet)
    files = [out / file.path for place in commits for file in _commit(made, place).files]
    root = made.content_root() if made.missing() else seal_cache(made, 1.0).content_root
    report = _report(cache, out, container, commits, count, files, len(new) * len(cache.codecs), begun)
    return replace(report, content_root=root)


def _folder(path: Path) -> dict[str, Path]:
    """The cache, where it lies in a folder that OUT must not be."""
    return {} if is_remote(path) else {"CACHE": path}


def _views(cache: Cache, asked: int | None) -> int:
    if asked is not None and not 1 <= asked <= cache.views:
        raise ConfigError(
            f"--views is {asked}, {cache.location} has {cache.views}; give 1 to {cache.views}, or leave it out"
        )
    return asked or cache.views


def _commits(cache: Cache, views: int) -> dict[Place, Commit]:
    places = [(block, view) for block in range(cache.blocks) for view in range(views)]
    found = {place: commit for place in places if (commit := cache.commit_of(*place)) is not None}
    if not found:
        raise CacheError(f"{cache.location} has no unit yet; run `cskd cache-teacher` with its config first")
    return found


def _commit(cache: Cache, place: Place) -> Commit:
    commit = cache.commit_of(*place)
    if commit is None:
        raise CacheError(f"{cache.location} has lost block {place[0]}, view {place[1]}; run the same command again")
    return commit


def _make_all(
    cache: Cache,
    out: Path,
    places: list[Place],
    made: Callable[[Place], bool],
    make: Callable[[int, int], None],
    quiet: bool,
) -> None:
    """Make what is not made, unit by unit, with every other process that is at it."""
    sizes = [stop - first for first, stop in map(cache.inventory.block_range, range(cache.blocks))]
    todo = [place for place in places if not made(place)]
    total = sum(sizes[block] for block, _ in todo)
    done = 0
    with Claims(out) as claims, Progress("export", total, "views", quiet=quiet) as progress:
        while todo:
            before = done
            for block, view in todo:
                claim = claims.take(f"b{block:05d}.v{view:04d}")
                if claim is None:
                    continue
                if not made((block, view)):  # others may have made it since
                    make(block, view)
                claims.release([claim])
                done += sizes[block]
                progress.update(done)
            todo = [place for place in todo if not made(place)]
            if todo and done == before:
                time.sleep(POLL_WAIT)
            done = total - sum(sizes[block] for block, _ in todo)
            progress.update(done)


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
    for shard, begin, end in _shards(cache, block):
        keys += _shard_keys(inventory, shard, begin, end)
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


def _begin(cache: Cache, out: Path, what: dict[str, Any]) -> None:
    """Have `out` say what it is of. CacheError where it is of something else."""
    facts = {"fingerprint": cache.fingerprint, "inventory": cache.inventory.id, "grid": list(cache.grid), **what}
    if put(out / FACTS, json_bytes(facts), first=True):
        mark(out, "export")
    try:
        there = parse_json(read_file(out / FACTS))
        differs = [key for key in sorted(facts | there) if facts.get(key) != there.get(key)]
    except (ValueError, TypeError, AttributeError):
        raise CacheError(f"{out / FACTS} is damaged, expected the facts of an export; give another OUT") from None
    if differs:
        old, new = (str(of.get(differs[0]))[:40] for of in (there, facts))
        raise CacheError(
            f"OUT {out} holds an export with {differs[0]} = {old}, this one has {new}; give another folder"
        )


def _write_sums(out: Path, names: Sequence[str], hashes: dict[str, str]) -> None:
    """The hashes of all tars, as sha256sum writes and checks them."""
    known: dict[str, str] = {}
    if (out / SUMS).is_file():
        lines = read_file(out / SUMS).decode(errors="replace").splitlines()
        known = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    known = {name: digest for name, digest in known.items() if (out / name).is_file()} | hashes
    found = known | {name: known.get(name) or file_sha256(out / name) for name in names}
    put(out / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items())).encode())


def _report(
    cache: Cache,
    out: Path,
    container: str,
    commits: dict[Place, Commit],
    views: int,
    files: Sequence[Path],
    made: int,
    begun: float,
) -> ExportReport:
    return ExportReport(
        cache=cache.location,
        out=str(out),
        container=container,
        tars=len(files),
        made=made,
        views=sum(commit.cached for commit in commits.values()),
        quarantined=sum(len(commit.quarantine) for commit in commits.values()),
        bytes=sum(file.stat().st_size for file in files),
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
        *([f"content {report.content_root}"] if report.content_root else []),
    )
