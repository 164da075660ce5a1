"""Check a cache against its own records: every unit's file, hash, checksums and counts, and one hash over all content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from cskd.errors import CacheError, CskdError, DataError
from cskd.inventory_format import check_copy
from cskd.shards import ShardReader
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import json_bytes, record_bytes
from cskd.store.format import INVENTORY, MANIFEST, MANIFEST_COPY, RESOLVED, commit_file
from cskd.store.seal import Seal, check_seal, read_seal
from cskd.store.unit import content_hash
from cskd.untrusted import read_file
from pipeline.cache_teacher import resolved_of
from pipeline.progress import Progress
from pipeline.recompute import Recomputed, recompute, replay_again

_TO_SEAL = " (the same `cskd cache-teacher` command once more does it)"
LISTED = 5  # units that are missing: of an unfinished cache it may be all


@dataclass(frozen=True)
class VerifyReport:
    """`errors`: one line a unit that is not what its record says, or a view that does not replay; `missing`: units not made
    yet, `first_missing` some of them; `sealed`: all are there, and are those that the seal speaks of; `content_root`: of the
    units that exist, empty where a record is damaged."""

    cache: str
    units: int
    missing: int
    first_missing: list[str]
    sealed: bool
    cached: int
    quarantined: int
    inventory_samples: int
    errors: list[str]
    content_root: str
    replayed: int  # views made again
    recomputed: Recomputed | None

    @property
    def sound(self) -> bool:
        return not self.errors and not self.missing


def verify(
    path: Path,
    data: Path | None = None,
    images: bool = False,
    replay: int = 0,
    again: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> VerifyReport:
    """Read every byte of a cache; of `images`, every one too; make about `replay` views again, and run the teacher on
    about `again` of them.

    Raises:  CacheError when its manifest or inventory can't be read at all; TeacherError when the teacher can't be built.
    """
    cache = open_cache(path, data=data)
    errors = check_frame(cache)
    seal = _seal(cache, errors)
    units = missing = cached = quarantined = 0
    first_missing: list[str] = []
    with Progress("verify", cache.blocks * cache.views, "units", quiet=quiet) as progress:
        for block in range(cache.blocks):
            for view in range(cache.views):
                try:
                    counts = check_unit(cache, block, view)
                except CskdError as e:
                    errors.append(f"block {block}, view {view}: {e}")
                else:
                    if counts is not None:
                        units, cached, quarantined = units + 1, cached + counts[0], quarantined + counts[1]
                    elif seal is not None and view < seal.views:
                        errors.append(lost(cache, block, view))
                    else:
                        missing += 1
                        first_missing += [f"block {block}, view {view}"] if missing <= LISTED else []
                progress.update(block * cache.views + view + 1)
            errors += uneven_quarantine(cache, block)
    try:
        root = cache.content_root()
        if seal is not None and not errors:
            check_seal(cache, seal)
    except CacheError as e:
        root = ""
        errors += [] if errors else [str(e)]
    if images:
        errors += _damaged_images(cache, quiet)
    replayed, recomputed = 0, None
    if replay and not errors:
        replayed, errors = replay_again(cache, replay, quiet)
    if again and not errors:
        recomputed = recompute(cache, again, device, quiet)
    return VerifyReport(
        cache=str(path),
        units=units,
        missing=missing,
        first_missing=first_missing,
        sealed=seal is not None and seal.views == cache.views and not errors,
        cached=cached,
        quarantined=quarantined,
        inventory_samples=len(cache.inventory),
        errors=errors,
        content_root=root,
        replayed=replayed,
        recomputed=recomputed,
    )


def _seal(cache: Cache, errors: list[str]) -> Seal | None:
    try:
        return read_seal(cache)
    except CacheError as e:
        errors.append(str(e))
        return None


def lost(cache: Cache, block: int, view: int) -> str:
    """What is wrong where a unit is gone that was there when the cache was sealed."""
    record = cache.root / commit_file(block, view)
    return f"block {block}, view {view}: its record {record} is gone, though the cache was sealed; `cskd repair` makes it again"


def uneven_quarantine(cache: Cache, block: int) -> list[str]:
    """One line for each unit of a block that quarantines other samples than the first: whose pictures are bad can't depend
    on the view."""
    found: dict[int, set[str]] = {}
    for view in range(cache.views):
        try:
            commit = cache.commit_of(block, view)
        except CacheError:  # told of as a unit
            continue
        if commit is not None:
            found[view] = set(commit.quarantine)
    first = next(iter(found), 0)
    return [
        f"block {block}, view {view}: quarantines samples {_few(bad - found[first])} and not {_few(found[first] - bad)}, other "
        f"than view {first}; `cskd repair` makes the block again"
        for view, bad in found.items()
        if bad != found[first]
    ]


def _few(positions: set[str]) -> str:
    return ", ".join(sorted(positions, key=int)[:LISTED]) or "none"


def check_frame(cache: Cache) -> list[str]:
    """What is wrong with a cache's files outside its units: manifest, inventory and resolved config, one line each."""
    errors = []
    written = read_file(cache.root / MANIFEST)
    if written != json_bytes(cache.manifest):
        errors.append(f"{cache.root / MANIFEST} is not, byte for byte, what was written; `cskd repair` restores it")
    try:
        if read_file(cache.root / MANIFEST_COPY) != written:
            errors.append(f"{cache.root / MANIFEST_COPY} differs from {MANIFEST}; `cskd repair` restores it")
    except OSError as e:
        errors.append(f"{cache.root / MANIFEST_COPY}: {e.strerror}; `cskd repair` restores it")
    try:
        check_copy(cache.root / INVENTORY)
    except CskdError as e:
        errors.append(f"{e}; `cskd repair` copies it again")
    try:
        if read_file(cache.root / RESOLVED).decode() != resolved_of(cache):
            errors.append(f"{cache.root / RESOLVED} is not the config in the manifest; `cskd repair` writes it again")
    except (OSError, UnicodeDecodeError) as e:
        errors.append(f"{cache.root / RESOLVED} is not readable ({e}); `cskd repair` writes it again")
    return errors


def _damaged_images(cache: Cache, quiet: bool) -> list[str]:
    """One line for each image whose bytes in the shards are not those of the inventory."""
    reader, errors, n = ShardReader(cache.inventory), [], len(cache.inventory)
    with Progress("images", n, quiet=quiet) as progress:
        for i in range(n):
            try:
                reader.read(i)
            except DataError as e:
                errors.append(str(e))
            progress.update(i + 1)
    return errors


def check_unit(cache: Cache, block: int, view: int) -> tuple[int, int] | None:
    """(cached, quarantined) of one unit, None while it is missing. CacheError names what is wrong."""
    commit = cache.commit_of(block, view)
    if commit is None:
        return None
    record = cache.root / commit_file(block, view)
    if read_file(record) != record_bytes(commit):
        raise CacheError(f"{record} is not, byte for byte, what was written; `cskd repair {cache.root}` makes it again")
    first, stop = cache.block_range(block)
    if commit.cached + len(commit.quarantine) != stop - first:
        raise CacheError(
            f"{commit.cached} cached + {len(commit.quarantine)} quarantined, the inventory has {stop - first}"
        )
    if [f.codec for f in commit.files] != list(cache.codecs):
        raise CacheError(f"has codecs {[f.codec for f in commit.files]}, the cache {list(cache.codecs)}")
    targets = {}
    for file in commit.files:
        path = cache.root / file.path
        try:
            raw = read_file(path, file.size)
        except OSError as e:
            raise CacheError(
                f"{path} can't be read ({e.strerror}); `cskd repair {cache.root}` makes it again"
            ) from None
        if hashlib.sha256(raw).hexdigest() != file.sha256:
            raise CacheError(
                f"{path} has {len(raw)} bytes that don't match its hash, expected {file.size} bytes; "
                f"`cskd repair {cache.root}` makes it again"
            )
        unit = cache.read(block, view, file.codec)
        targets[file.codec] = unit.targets
    if content_hash(unit.fields, targets) != commit.content_hash:
        raise CacheError("the content differs from its commit record")
    return commit.cached, len(commit.quarantine)


def render(report: VerifyReport, console: Console) -> None:
    """The report for people."""
    for error in report.errors:
        console.print(escape(error), soft_wrap=True)
    console.print(
        f"{escape(report.cache)}: {report.units} units, {report.missing} missing, {len(report.errors)} errors; "
        f"{report.cached:,} views cached, {report.quarantined:,} quarantined, {report.inventory_samples:,} images",
        soft_wrap=True,
    )
    if report.missing:
        more = ", ..." if report.missing > len(report.first_missing) else ""
        console.print(f"missing: {'; '.join(report.first_missing)}{more}", soft_wrap=True)
    state = "sealed" if report.sealed else "not sealed" + ("" if report.missing or report.errors else _TO_SEAL)
    console.print(f"{state}, content {report.content_root or 'unknown'}", soft_wrap=True)
    if report.replayed:
        differ = len(report.errors)
        console.print(f"{report.replayed} views made again, {differ} differ", soft_wrap=True)
    if report.recomputed:
        r = report.recomputed
        logits = "" if r.largest_logit_difference is None else f", logits by {r.largest_logit_difference:.3g} at most"
        console.print(
            f"teacher run again on {r.views} views: {r.differing} of {r.lookups} hard targets differ"
            f" (margin {r.largest_margin:.2g} at most){logits}; probe images: {r.probe or 'equal'}",
            soft_wrap=True,
        )
