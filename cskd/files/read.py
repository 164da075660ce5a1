"""Reading small files that others made: never blocked by a pipe, never larger or deeper than expected. No torch in here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cskd.errors import LIMITS, LimitError, said

MAX_TEXT = 1 << 26  # bytes of a JSON: the largest inventory header, of 65,535 classes and 100,000 shards, takes 15 MB
MAX_DEPTH = 64  # of nesting; cskd's own files have six


def open_regular(path: str | Path) -> int:
    """A descriptor for reading.

    Raises:  OSError for what is no regular file: opening a pipe would wait for a writer; LimitError where no more files may be
             open, which says nothing of this one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        if e.errno in LIMITS:
            raise LimitError(said(e)) from None
        raise
    if not stat.S_ISREG(mode := os.fstat(fd).st_mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "a pipe, socket or device, expected a regular file", str(path))
    return fd


def read_file(path: str | Path, limit: int = MAX_TEXT) -> bytes:
    """All bytes of a regular file of at most `limit` bytes. OSError for others, FileNotFoundError where there is none."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data


def pread(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`, or fewer where the file ends; a signal may cut one pread short."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


def file_sha256(path: Path) -> str:
    """Hex sha256 of a regular file of any length. OSError for others."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(data: bytes | str) -> Any:
    """`json.loads` without what JSON leaves open. ValueError for a key that occurs twice, NaN, or nesting over MAX_DEPTH."""
    try:
        value = json.loads(data, object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    check_depth(value)
    return value


def check_depth(value: Any, limit: int = MAX_DEPTH) -> None:
    """ValueError for dicts and lists nested deeper than `limit`: everything else that walks them may recurse."""
    level, depth = [value], 0
    while level := [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]:
        depth += 1
        if depth > limit:
            raise ValueError(f"nested deeper than {limit}")


def refuse_links(folder: Path, names: Iterable[str], what: str) -> None:
    """An output folder may be a link, what is written in it may not: whoever made the folder would choose where that goes.

    Raises:  OSError naming the link. `what`: the config key that says where the folder is.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise OSError(
                errno.ELOOP,
                f"a link inside {what}, which may lead out of it; make {what} itself the link",
                str(folder / name),
            )


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the key {twice[:40]!r} occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
