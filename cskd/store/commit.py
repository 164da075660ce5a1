"""How a unit comes to exist: files first, then one record that is put in place whole and only once.

temp file, fsync, read back and check, rename to a name that holds the hash, fsync of the folder; then the record, itself
a temp file that was fsynced and read back, put in place by os.link, which fails when a record is already there: of several
writers the first one counts, and a torn record can't block. Only valid records define what exists. A folder that is made
on the way is fsynced into the one above it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cskd.errors import CacheError
from cskd.files.read import parse_json, read_file
from cskd.store.format import FORMAT, commit_file, unit_file
from cskd.store.record_checks import check_commit


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
    stats: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT


def write_file(root: Path, block: int, view: int, codec: str, data: bytes, target_bytes: int) -> UnitFile:
    """Put a unit's bytes in place, durably, under a name that holds their hash."""
    digest = hashlib.sha256(data).hexdigest()
    relative = unit_file(block, view, codec, digest)
    path = root / relative
    write_whole(path, data)
    return UnitFile(codec, str(relative), len(data), digest, target_bytes)


def publish(root: Path, commit: Commit) -> bool:
    """Put the record in place; False when another writer's valid record is already there, whose unit then counts."""
    return link_whole(root / commit_file(commit.block, commit.view), record_bytes(commit))


def record_bytes(commit: Commit) -> bytes:
    """A record as it lies on disk; the same commit always gives the same bytes."""
    facts = asdict(commit)
    return json_bytes({"commit": facts, "sha256": hashlib.sha256(canonical(facts)).hexdigest()})


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
        if hashlib.sha256(canonical(body)).hexdigest() != raw["sha256"]:
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
        f"`cskd repair {cache}` makes it again; so does this: remove {record} and run the same `cskd cache-teacher` "
        "command again"
    )


def link_whole(path: Path, data: bytes) -> bool:
    """A small file, put in place whole and only once; False where one is there already, which stays.

    Raises:  CacheError where the file system has no hard links.
    """
    temp = _write_temp(path, data)
    try:
        os.link(temp, path)
        won = True
    except FileExistsError:
        won = False
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise CacheError(
            f"{path} can't be put in place: this file system has no hard links ({e.strerror}), which let one of several "
            "writers win; put the cache on one that has (--set cache.path=...)"
        ) from None
    finally:
        temp.unlink()
    fsync_folder(path.parent)
    return won


def write_json(path: Path, value: Any) -> None:
    """A small JSON file, written whole or not at all."""
    write_whole(path, json_bytes(value))


def write_whole(path: Path, data: bytes) -> None:
    """A file, written whole or not at all, in place of what was there."""
    temp = _write_temp(path, data)
    try:
        os.replace(temp, path)
    except BaseException:
        _discard(temp)
        raise
    fsync_folder(path.parent)


def json_bytes(value: Any) -> bytes:
    """JSON as every file of a cache has it."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def canonical(value: Any) -> bytes:
    """JSON as it is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _write_temp(path: Path, data: bytes) -> Path:
    """The bytes on disk beside `path`, in a file of a name of its own. CacheError when they read back otherwise."""
    make_folder(path.parent)
    temp = path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temp, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            if hasattr(os, "posix_fadvise"):  # else what is read back is the copy in memory
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if temp.read_bytes() != data:
            raise CacheError(f"{temp} read back differs from what was written; check the disk")
    except BaseException:
        _discard(temp)
        raise
    return temp


def _discard(temp: Path) -> None:
    with contextlib.suppress(OSError):
        temp.unlink()


def make_folder(path: Path) -> None:
    """A folder and those above it; the name of each that is new is on disk before anything is written into it."""
    new = []
    above = path
    while not above.is_dir():
        new.append(above)
        above = above.parent
    for folder in reversed(new):
        folder.mkdir(exist_ok=True)  # another process may have been first
        fsync_folder(folder.parent)


def fsync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
