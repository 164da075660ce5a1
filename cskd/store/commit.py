"""How a unit comes to exist: files first, then one record that is put in place whole and only once.

Both are put in place by a storage: a unit's file under a name that holds its hash; then the record, by `create`, which fails
when one is already there: of several writers the first one counts, and a torn record can't block.
Only valid records define what exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cskd.codecs.measured import AnyMeasured, from_facts
from cskd.codecs.stages import STORED
from cskd.errors import CacheError
from cskd.files.durable import json_bytes, json_hash
from cskd.files.read import MAX_TEXT, parse_json
from cskd.storage import Place, join, open_storage
from cskd.storage.posix import Posix
from cskd.store.format import CONTAINERS, FORMAT, commit_file, unit_file

_HASH = re.compile(r"[0-9a-f]{64}")
_RECORD = re.compile(r"commits/b(\d{5,9})/v(\d{4,9})\.json")
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
    root: Place, block: int, view: int, codec: str, data: bytes, target_bytes: int, container: str = "zarr"
) -> UnitFile:
    """Put a unit's bytes in place, durably, under a name that holds their hash."""
    digest = hashlib.sha256(data).hexdigest()
    relative = unit_file(block, view, codec, digest, container)
    open_storage(root).put(str(relative), data)
    return UnitFile(codec, str(relative), len(data), digest, target_bytes)


def publish(root: Place, commit: Commit) -> bool:
    """Put the record in place; False when another writer's valid record is already there, whose unit then counts."""
    return open_storage(root).create(str(commit_file(commit.block, commit.view)), record_bytes(commit))


def record_bytes(commit: Commit) -> bytes:
    """A record as it lies on disk; the same commit always gives the same bytes."""
    facts = asdict(commit)
    return json_bytes({"commit": facts, "sha256": json_hash(facts)})


def read_commit(root: Place, block: int, view: int, exact: bool = False) -> Commit | None:
    """The unit's record, None where there is none. Raises CacheError for one that is damaged.

    exact: also for one that says the same in other bytes than `record_bytes` gives.
    """
    storage, key = open_storage(root), str(commit_file(block, view))
    try:
        data = storage.get(key, limit=MAX_TEXT)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise _unreadable(join(storage.location, key), e, block, view) from None
    return parse_commit(data, join(storage.location, key), block, view, exact)


def read_commits(root: Place, wanted: Sequence[tuple[int, int]]) -> list[Commit | None]:
    """Many of them, (block, view), with many reads under way at once. Raises as `read_commit`."""
    storage, keys = open_storage(root), [str(commit_file(*unit)) for unit in wanted]
    try:
        found = storage.get_many(keys)
    except OSError:  # one was withdrawn meanwhile, or can't be read: which, and why
        return [read_commit(storage, *unit) for unit in wanted]
    return [
        parse_commit(data, join(storage.location, key), *unit)
        for data, key, unit in zip(found, keys, wanted, strict=True)
    ]


def valid_commits(root: Place) -> Iterator[Commit]:
    """Every valid record in the folder of records, of whatever cache; what can't be read, or is none, is passed over."""
    storage = open_storage(root)
    named = [_RECORD.fullmatch(about.key) for about in storage.list("commits")]
    units = [(int(match[1]), int(match[2])) for match in named if match]
    keys = [str(commit_file(*unit)) for unit in units]
    try:
        found: Sequence[bytes | None] = storage.get_many(keys)
    except OSError:
        found = [None] * len(keys)
    for unit, key, data in zip(units, keys, found, strict=True):
        with contextlib.suppress(CacheError):
            commit = read_commit(storage, *unit) if data is None else parse_commit(data, key, *unit)
            if commit is not None:
                yield commit


def parse_commit(data: bytes, where: str, block: int, view: int, exact: bool = False) -> Commit:
    """The record of a unit as `read_commit` gives it, from its bytes. where: the name of its file, for errors."""
    try:
        raw = parse_json(data)
    except ValueError as e:
        raise _unreadable(where, e, block, view) from None
    commit = _parse(raw, where, block, view)
    if exact and data != record_bytes(commit):
        raise CacheError(f"{where} is not, byte for byte, what was written; {again(block, view)}")
    return commit


def _unreadable(where: str, error: Exception, block: int, view: int) -> CacheError:
    return CacheError(f"{where} is not a readable commit record ({error}); {again(block, view)}")


def record_names(root: Place, blocks: int) -> list[set[str]]:
    """Of each block: the names in the folder of its records, see `format.record_name`; whether any is valid is not looked at."""
    storage = open_storage(root)
    if isinstance(storage, Posix):  # 10 ms for 47,100; a listing looks at each file
        return [_names_in(storage, block) for block in range(blocks)]
    found = [set[str]() for _ in range(blocks)]
    number = {str(commit_file(block, 0).parent): block for block in range(blocks)}
    for about in storage.list(str(commit_file(0, 0).parent.parent)):
        folder, _, name = about.key.rpartition("/")
        if folder in number:
            found[number[folder]].add(name)
    return found


def _names_in(storage: Posix, block: int) -> set[str]:
    try:
        return set(os.listdir(storage.path(str(commit_file(block, 0).parent))))
    except FileNotFoundError:
        return set()


def _parse(raw: Any, path: str, block: int, view: int) -> Commit:
    try:
        body = raw["commit"]
        whole = json_hash(body) == raw["sha256"]
    except (KeyError, TypeError):
        raise CacheError(f"{path} is not a commit record of format {FORMAT}; {again(block, view)}") from None
    if not whole:
        raise CacheError(f"{path} does not match its own hash; {again(block, view)}")
    return parse_facts(body, path, block, view)


def parse_facts(body: Any, path: str, block: int, view: int) -> Commit:
    """A record from its facts, without the hash over them. Raises CacheError as `read_commit`. path: for errors."""
    try:
        commit = Commit(**{**body, "files": [UnitFile(**f) for f in body["files"]]})
        check_commit(commit)
    except (KeyError, TypeError, AttributeError):
        raise CacheError(f"{path} is not a commit record of format {FORMAT}; {again(block, view)}") from None
    except ValueError as e:
        raise CacheError(f"{path} is no record of a unit: {e}; {again(block, view)}") from None
    if (commit.format, commit.block, commit.view) != (FORMAT, block, view):
        raise CacheError(
            f"{path} is a record of block {commit.block}, view {commit.view}, format {commit.format}; "
            f"expected {block}, {view}, {FORMAT}; {again(block, view)}"
        )
    return commit


def again(block: int, view: int) -> str:
    """What to do about a damaged unit: without its commit record it does not exist, and stage 1 makes it again."""
    return (
        f"`cskd repair` makes it again; so does this: remove {commit_file(block, view)} of the cache and run the same "
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
