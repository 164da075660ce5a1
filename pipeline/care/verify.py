"""Check a cache against its own records: every unit's file, hash, checksums and counts, and one hash over all content.

Each record is parsed once, and each file of a unit is read once: its hash, its arrays and the hash of its content come from
the same bytes. Image shards are looked at where an option asks for images, and then first of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cskd.dataset.inventory import Inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import CacheError, CskdError, DataError, LimitError, ReadError, StorageError, counted
from cskd.files.durable import json_bytes
from cskd.files.read import MAX_TEXT
from cskd.pipeline.care.recompute import Recomputed, recompute, replay_again
from cskd.pipeline.care.units_read import Read, as_read
from cskd.pipeline.show.progress import Progress, print_lines, say
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import Commit, UnitFile, record_names
from cskd.store.format import MANIFEST, MANIFEST_COPY, RESOLVED, Unit, commit_file
from cskd.store.inventory_copy import check_inventory
from cskd.store.seal import Seal, check_index, check_seal, read_seal
from cskd.store.tables import COPIES, read_copy
from cskd.store.unit import content_hash

_TO_SEAL = " (the same `cskd cache-teacher` command once more does it)"
LISTED = 5  # units that are missing: of an unfinished cache it may be all


@dataclass(frozen=True)
class VerifyReport:
    """`errors`: one line for each unit that is not what its record says, image or shard that is not what the inventory says,
    or view that does not replay; `missing`: units not made yet, `first_missing` some of them; `sealed`: all are there, and are
    those that the seal speaks of; `content_root`: of the units that exist, empty where a record is damaged or lost; `notes`:
    what was asked for and not done."""

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
    images_read: int
    replayed: int  # views made again
    recomputed: Recomputed | None
    notes: list[str]

    @property
    def sound(self) -> bool:
        return not self.errors and not self.missing


@dataclass(frozen=True)
class CheckedUnit:
    """One unit as it was found. `commit`: its record, None where that is missing or damaged; `error`: one line, empty where
    nothing is wrong. Missing is no error, but where the cache was sealed with it."""

    block: int
    view: int
    commit: Commit | None
    error: str


def verify(
    path: Path | str,
    data: Path | None = None,
    images: bool = False,
    replay: int = 0,
    again: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> VerifyReport:
    """Read every byte of a cache; of `images`, every one too; make about `replay` views again, and run the teacher on
    about `again` of them. Without these three, the image shards may be absent.

    Raises:  CacheError when its manifest or inventory can't be read at all; DataError when images are asked for, and all
             shards are absent or those of another data set; TeacherError when the teacher can't be built.
    """
    wants_images = bool(images or replay or again)
    cache = open_cache(path, data=data, images=wants_images, index=False)
    lost = _lost_shards(cache.inventory) if wants_images else {}
    say(lost.values(), quiet)
    errors = check_frame(cache)
    seal = _seal(cache, errors)
    units = missing = cached = quarantined = 0
    first_missing: list[str] = []
    commits: dict[tuple[int, int], Commit] = {}
    all_records = True
    for unit in (unit for block in check_units(cache, seal, "verify", quiet) for unit in block):
        if unit.commit is not None:
            commits[unit.block, unit.view] = unit.commit
        if unit.error:
            errors.append(unit.error)
            all_records = all_records and unit.commit is not None
        elif unit.commit is not None:
            units += 1
            cached, quarantined = cached + unit.commit.cached, quarantined + len(unit.commit.quarantine)
        else:
            missing += 1
            first_missing += [_name(unit.block, unit.view)] if missing <= LISTED else []
    hashes = {unit: commit.content_hash for unit, commit in commits.items()}
    if seal is not None and not errors:
        try:
            check_seal(cache, seal, hashes)
            check_index(cache, seal, commits)
        except CacheError as e:
            errors.append(str(e))
    sealed = seal is not None and seal.views == cache.views and not errors
    errors += lost.values()
    images_read = replayed = 0
    recomputed, notes = None, []
    if images:
        images_read, damaged = _damaged_images(cache.inventory, lost, quiet)
        errors += damaged
    if replay and not errors:
        replayed, errors = replay_again(cache, replay, quiet)
    elif replay:
        notes.append("--replay was not done, since there are errors")
    if again and not errors:
        recomputed = recompute(cache, again, device, quiet)
    elif again:
        notes.append("--recompute was not done, since there are errors")
    return VerifyReport(
        cache=cache.location,
        units=units,
        missing=missing,
        first_missing=first_missing,
        sealed=sealed,
        cached=cached,
        quarantined=quarantined,
        inventory_samples=len(cache.inventory),
        errors=errors,
        content_root=cache.content_root(hashes=hashes) if all_records else "",
        images_read=images_read,
        replayed=replayed,
        recomputed=recomputed,
        notes=notes,
    )


def _seal(cache: Cache, errors: list[str]) -> Seal | None:
    try:
        return read_seal(cache)
    except CacheError as e:
        errors.append(str(e))
        return None


def _name(block: int, view: int) -> str:
    return f"block {block}, view {view}"


def check_units(cache: Cache, seal: Seal | None, what: str, quiet: bool) -> Iterator[list[CheckedUnit]]:
    """The units of each block, in order; every record and file is read once, on an object store many at the same time."""
    sealed = seal.views if seal else 0
    there = sum(not name.startswith(".") for names in record_names(cache.storage, cache.blocks) for name in names)
    done, units = 0, list[CheckedUnit]()
    with Progress(what, there, "units", quiet=quiet) as progress:
        for block, view, record, read in as_read(cache):
            commit, error = None, ""
            try:
                commit = record()
                if commit is not None:
                    check_unit(cache, commit, read)
                elif view < sealed:
                    name = cache.path(str(commit_file(block, view)))
                    gone = f"its record {name} is gone, though the cache was sealed"
                    error = f"{_name(block, view)}: {gone}; `cskd repair` makes it again"
            except (LimitError, StorageError):  # no unit is to blame, and `repair` must not withdraw one
                raise
            except CskdError as e:
                error = f"{_name(block, view)}: {e}"
            units.append(CheckedUnit(block, view, commit, error))
            done += commit is not None
            progress.update(done)
            if view + 1 == cache.views:
                yield _uneven_named(units)
                units = []


def uneven(units: list[CheckedUnit]) -> bool:
    """Whether units of a block quarantine other samples than the rest: whose pictures are bad can't depend on the view."""
    return len({frozenset(unit.commit.quarantine) for unit in units if unit.commit is not None}) > 1


def _uneven_named(units: list[CheckedUnit]) -> list[CheckedUnit]:
    """With an error for each that quarantines other samples than the first, and has none yet."""
    if not uneven(units):
        return units
    first, right = next((unit.view, set(unit.commit.quarantine)) for unit in units if unit.commit is not None)
    named = []
    for unit in units:
        bad = right if unit.commit is None else set(unit.commit.quarantine)
        error = (
            f"{_name(unit.block, unit.view)}: quarantines samples {_few(bad - right)} and not {_few(right - bad)}, other "
            f"than view {first}; `cskd repair` makes the block again"
        )
        named.append(replace(unit, error=unit.error or error) if bad != right else unit)
    return named


def _few(positions: set[str]) -> str:
    return ", ".join(sorted(positions, key=int)[:LISTED]) or "none"


def check_frame(cache: Cache) -> list[str]:
    """What is wrong with a cache's files outside its units: manifest, inventory and resolved config, one line each."""
    errors = []
    written = cache.storage.get(MANIFEST, limit=MAX_TEXT)
    if written != json_bytes(cache.manifest.sealed):
        errors.append(f"{cache.path(MANIFEST)} is not, byte for byte, what was written; `cskd repair` restores it")
    try:
        if cache.storage.get(MANIFEST_COPY, limit=MAX_TEXT) != written:
            errors.append(f"{cache.path(MANIFEST_COPY)} differs from {MANIFEST}; `cskd repair` restores it")
    except OSError as e:
        errors.append(f"{cache.path(MANIFEST_COPY)}: {e.strerror}; `cskd repair` restores it")
    try:
        check_inventory(cache.storage)
    except CskdError as e:
        errors.append(f"{e}; `cskd repair` copies it again")
    for name, digest in (cache.manifest.tables or {}).items():
        for copy in COPIES:
            try:
                read_copy(cache.storage, name, digest, copy)
            except CacheError as e:
                errors.append(str(e))
    if wrong := wrong_resolved(cache):
        errors.append(f"{cache.path(RESOLVED)} {wrong}; `cskd repair` writes it again")
    return errors


def wrong_resolved(cache: Cache) -> str:
    """What is wrong with the resolved config, empty where nothing is."""
    try:
        right = cache.storage.get(RESOLVED, limit=MAX_TEXT).decode() == cache.manifest.resolved
    except (OSError, UnicodeDecodeError) as e:
        return f"is not readable ({getattr(e, 'strerror', None) or e})"
    return "" if right else "is not the config in the manifest"


def _lost_shards(inventory: Inventory) -> dict[int, str]:
    """One line for each shard that can't be read, by its number, with how many images are in it.

    Raises:  DataError in one line when none can be.
    """
    lost = inventory.lost_shards()
    if len(lost) == len(inventory.shards):
        inventory.check_shards()
    counts = np.bincount(inventory.shard, minlength=len(inventory.shards))
    return {shard: f"{why}; {counts[shard]:,} images are in it" for shard, why in lost.items()}


def _damaged_images(inventory: Inventory, lost: Container[int], quiet: bool) -> tuple[int, list[str]]:
    """How many images were read, and one line for each whose bytes in the shards are not those of the inventory, or for a
    shard of which none is; shards that are lost are passed over."""
    reader, errors, done = ShardReader(inventory, whole=True, fresh=True), [], 0
    counts = np.bincount(inventory.shard, minlength=len(inventory.shards))
    total = sum(n for shard, n in enumerate(counts.tolist()) if shard not in lost)
    with Progress("images", total, quiet=quiet) as progress:
        for shard in range(len(inventory.shards)):
            rows = [] if shard in lost else np.flatnonzero(inventory.shard == shard).tolist()
            bad, failures = [], 0
            for place, i in enumerate(rows):
                try:
                    reader.read(i)
                except DataError as e:
                    bad.append(str(e))
                    failures += isinstance(e, ReadError)
                done += 1
                progress.update(done)
                if failures == LISTED and place + 1 < len(rows):  # each takes three tries and their waits
                    bad.append(f"{inventory.where(shard)}: {len(rows) - place - 1} further images were not read")
                    break
            if len(bad) == len(rows) > 1:
                where = inventory.where(shard)
                bad = [f"{where}: none of its {len(rows)} images is as it was; the first: {bad[0]}"]
            errors += bad
    return done, errors


def check_unit(cache: Cache, commit: Commit, read: Read) -> None:
    """Every byte of one unit's files, against its record. read: gives a file's bytes, or OSError. CacheError names what is wrong."""
    first, stop = cache.inventory.block_range(commit.block)
    if commit.cached + len(commit.quarantine) != stop - first:
        raise CacheError(
            f"{commit.cached} cached + {len(commit.quarantine)} quarantined, the inventory has {stop - first}"
        )
    if [f.codec for f in commit.files] != list(cache.codecs):
        raise CacheError(f"has codecs {[f.codec for f in commit.files]}, the cache {list(cache.codecs)}")
    units = {file.path: _decoded(cache, commit, file, read) for file in commit.files}
    fields = next(iter(units.values())).fields
    for path, unit in units.items():
        if differ := sorted(n for n in fields | unit.fields if not _same(fields.get(n), unit.fields.get(n))):
            raise CacheError(
                f"{cache.path(path)} has other {', '.join(differ)} than {commit.files[0].path}, another codec's file of the "
                f"same views; `cskd repair {cache.location}` makes it again"
            )
    targets = {file.codec: units[file.path].targets for file in commit.files}
    if content_hash(fields, targets) != commit.content_hash:
        raise CacheError("the content differs from its commit record")


def _decoded(cache: Cache, commit: Commit, file: UnitFile, read: Read) -> Unit:
    """One codec's file of a unit; the bytes that are hashed are those that are decoded."""
    path, mend = cache.path(file.path), f"`cskd repair {cache.location}` makes it again"
    try:
        raw = read(file)
    except OSError as e:
        raise CacheError(f"{path} can't be read ({e.strerror}); {mend}") from None
    if hashlib.sha256(raw).hexdigest() != file.sha256:
        raise CacheError(f"{path} has {len(raw)} bytes that don't match its hash, expected {file.size} bytes; {mend}")
    return cache.unit_of(commit, file.codec, raw)


def _same(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)


def render(report: VerifyReport, console: Console) -> None:
    """The report for people."""
    lines = [*report.errors]
    lines.append(
        f"{report.cache}: {report.units} units, {report.missing} missing, {counted(len(report.errors), 'error')}; "
        f"{report.cached:,} views cached, {report.quarantined:,} quarantined, {report.inventory_samples:,} images"
    )
    if report.missing:
        more = ", ..." if report.missing > len(report.first_missing) else ""
        missing = "; ".join(report.first_missing)
        lines.append(f"missing: {missing}{more}; `cskd cache-teacher` with its config makes them")
    state = "sealed" if report.sealed else "not sealed" + ("" if report.missing or report.errors else _TO_SEAL)
    lines.append(f"{state}, content {report.content_root or 'unknown'}")
    if report.images_read:
        lines.append(f"{report.images_read:,} images of the shards read")
    lines += report.notes
    if report.replayed:  # only where there were no errors before
        lines.append(f"{report.replayed} views made again, {len(report.errors)} differ")
    if r := report.recomputed:
        logits = "" if r.largest_logit_difference is None else f", logits by {r.largest_logit_difference:.3g} at most"
        off = r.largest_feature_difference
        features = "" if off is None else f", features by {off:.3g} at most"
        maps = "".join(
            f", {name} by {of.largest_difference:.3g} ({of.beyond} of {of.cells} cells beyond the codec's own error)"
            for name, of in r.stages.items()
        )
        lines.append(
            f"teacher run again on {r.views} views: {r.differing} of {r.lookups} hard targets differ"
            f" (margin {r.largest_margin:.2g} at most){logits}{features}{maps}; probe images: {r.probe or 'equal'}"
        )
    print_lines(console, *lines)
