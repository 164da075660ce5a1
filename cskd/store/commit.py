"""How a unit comes to exist: files first, then one record that is put in place whole and only once.

Both are put in place by `cskd.files.durable.put`: a unit's file under a name that holds its hash; then the record, by a
hard link, which fails when one is already there: of several writers the first one counts, and a torn record can't block.
Only valid records define what exists.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cskd.codecs.measured import AnyMeasured, from_facts
from cskd.codecs.stages import STORED
from cskd.errors import CacheError
from cskd.files.durable import json_bytes, json_hash, put
from cskd.files.read import parse_json, read_file
from cskd.store.format import CONTAINERS, FORMAT, commit_file, unit_file

_HASH = re.compile(r"[0-9a-f]{64}")
_CODEC = re.compile(rf"[a-z0-9:]{{1,32}}|{STORED}")


@dataclass(frozen=True)
class UnitFile:
    """One codec's file of a unit: path inside the cache, bytes, hex sha256 of the bytes, bytes of its target arrays."""

    codec: str
    path: str
    size: int
    sha256: str
    target_bytes: int


@dataclass(frozen=True)
class Commit:
    """A commit record: what one unit is. `cached` + len(quarantine) = samples of the block in the inventory."""

    block: int
    view: int
    files: list[UnitFile]
    content_hash: str
    fingerprint: str
    samples: int
    cached: int
    quarantine: dict[str, str]  # position in the block -> reason
    format: int = FORMAT
    stats: dict[str, dict[str, float]] = field(default_factory=dict)  # codec -> `cskd.codecs.measured.Measured.facts`

    @property
    def errors(self) -> dict[str, AnyMeasured]:
        """The error of each codec, as it was measured when the unit was made; empty of what an older version made."""
        return {name: from_facts(facts) for name, facts in self.stats.items()}


def write_file(
    root: Path, block: int, view: int, codec: str, data: bytes, target_bytes: int, container: str = "zarr"
) -> UnitFile:
    """Put a unit's bytes in place, durably, under a name that holds their hash."""
    digest = hashlib.sha256(data).hexdigest()
    relative = unit_file(block, view, codec, digest, container)
    put(root / relative, data)
    return UnitFile(codec, str(relative), len(data), digest, target_bytes)


def publish(root: Path, commit: Commit) -> bool:
    """Put the record in place; False when another writer's valid record is already there, whose unit then counts."""
    return put(root / commit_file(commit.block, commit.view), record_bytes(commit), first=True)


def record_bytes(commit: Commit) -> bytes:
    """A record as it lies on disk; the same commit always gives the same bytes."""
    facts = asdict(commit)
    return json_bytes({"commit": facts, "sha256": json_hash(facts)})


def read_commit(root: Path, block: int, view: int, exact: bool = False) -> Commit | None:
    """The unit's record, None where there is none. Raises CacheError for one that is damaged.

    exact: also for one that says the same in other bytes than `record_bytes` gives.
    """
    path = root / commit_file(block, view)
    try:
        data = read_file(path)
        raw = parse_json(data)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as e:
        raise CacheError(f"{path} is not a readable commit record ({e}); {again(path)}") from None
    commit = _parse(raw, path, block, view)
    if exact and data != record_bytes(commit):
        raise CacheError(f"{path} is not, byte for byte, what was written; {again(path)}")
    return commit


def record_names(root: Path, block: int) -> set[str]:
    """The names in the folder of a block's records, see `format.record_name`; whether any is valid is not looked at."""
    try:
        return set(os.listdir((root / commit_file(block, 0)).parent))
    except FileNotFoundError:
        return set()


def _parse(raw: Any, path: Path, block: int, view: int) -> Commit:
    try:
        body = raw["commit"]
        if json_hash(body) != raw["sha256"]:
            raise CacheError(f"{path} does not match its own hash; {again(path)}")
        commit = Commit(**{**body, "files": [UnitFile(**f) for f in body["files"]]})
        check_commit(commit)
    except (KeyError, TypeError, AttributeError):
        raise CacheError(f"{path} is not a commit record of format {FORMAT}; {again(path)}") from None
    except ValueError as e:
        raise CacheError(f"{path} is no record of a unit: {e}; {again(path)}") from None
    if (commit.format, commit.block, commit.view) != (FORMAT, block, view):
        raise CacheError(
            f"{path} is a record of block {commit.block}, view {commit.view}, format {commit.format}; "
            f"expected {block}, {view}, {FORMAT}; {again(path)}"
        )
    return commit


def again(record: Path) -> str:
    """What to do about a damaged unit: without its commit record it does not exist, and stage 1 makes it again."""
    cache = record.parent.parent.parent
    return (
        f"`cskd repair` makes it again; so does this: remove {record.relative_to(cache)} of the cache and run the same "
        "`cskd cache-teacher` command again"
    )


def check_commit(commit: Commit) -> None:
    """Raises ValueError with the first field of a record that can't be: its hash is no secret, so anyone can write a valid one.

    A record names files: they are those that its other fields give, never a path of its own. Everything that becomes a number
    of loops or bytes is bounded.
    """

    def count(value: object, low: int = 0) -> bool:
        return type(value) is int and low <= value < 1 << 48

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(what)

    for name in ("block", "view", "samples", "cached", "format"):
        need(count(getattr(commit, name)), f"its {name} is {str(getattr(commit, name))[:40]}, expected a count")
    for name in ("content_hash", "fingerprint"):
        need(_is_hash(getattr(commit, name)), f"its {name} is {str(getattr(commit, name))[:40]!r}, expected a sha256")
    need(isinstance(commit.quarantine, dict), "its quarantine is no mapping")
    for position, reason in commit.quarantine.items():
        known = re.fullmatch(r"0|[1-9]\d{0,11}", position) and int(position) < commit.samples
        need(bool(known) and isinstance(reason, str), f"it quarantines {position[:40]!r}, expected one of its samples")
    need(commit.cached + len(commit.quarantine) == commit.samples, "its counts do not add up")
    need(isinstance(commit.stats, dict), "its stats are no mapping")
    need(commit.stats.keys() <= {file.codec for file in commit.files}, "it measured codecs that it has no file of")
    _ = commit.errors
    for file in commit.files:
        known = isinstance(file.codec, str) and _CODEC.fullmatch(file.codec) and _is_hash(file.sha256)
        need(bool(known) and count(file.size) and count(file.target_bytes), "a file of it has no codec, size or sha256")
        expected = [str(unit_file(commit.block, commit.view, file.codec, file.sha256, c)) for c in CONTAINERS]
        need(file.path in expected, f"it names the file {str(file.path)[:120]!r}, expected {expected[0]}")
    need(len({file.codec for file in commit.files}) == len(commit.files), "it names a codec twice")


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None
