"""The one way a file is put in place: whole or not at all, and on disk before its name is. No torch in here.

A temporary file next to it, fsync, read back, rename or link, fsync of the folder; a folder that is made on the way is
fsynced into the one above it. Everything here raises OSError, to which callers give the error of their own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # how file systems without hard links answer


def put(path: Path, content: bytes | Callable[[Path], object], *, first: bool = False) -> bool:
    """Put a file in place of what was there. A death or an error at any point leaves the old file or the new one.

    Args:    content: its bytes, which are read back from the disk; or what writes a file to the path that it is given.
             first: a file that is there already stays, so that of several writers the first one counts.
    Returns: whether this file was put there.
    """
    make_folder(path.parent)
    temp = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write(temp, content)
        won = _name(temp, path, first)
    finally:
        if os.path.lexists(temp):  # a link leaves it, and so does an error
            with contextlib.suppress(OSError):
                temp.unlink()
    sync(path.parent)
    return won


def _write(temp: Path, content: bytes | Callable[[Path], object]) -> None:
    """A new file, on disk."""
    with open(temp, "xb") as file:
        if isinstance(content, bytes):
            file.write(content)
    if callable(content):
        mode = temp.stat().st_mode
        content(temp)
        temp.chmod(mode)  # safetensors makes files that only their owner can read
    with open(temp, "rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise") and isinstance(content, bytes):  # else what is read back is the copy in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if isinstance(content, bytes) and temp.read_bytes() != content:
        raise OSError(errno.EIO, "read back differs from what was written; check the disk", str(temp))


def _name(temp: Path, path: Path, first: bool) -> bool:
    """Give a file its name; False where that is taken and may not be given again."""
    if not first:
        os.replace(temp, path)
        return True
    try:
        os.link(temp, path)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in NO_LINKS:
            raise
        why = f"this file system has no hard links ({e.strerror}), which let one of several writers win"
        raise OSError(e.errno, f"can't be put in place: {why}", str(path)) from None
    return True


def make_folder(path: Path) -> None:
    """A folder and those above it; the name of each that is new is on disk before anything is written into it."""
    missing = itertools.takewhile(lambda folder: not folder.is_dir(), (path, *path.parents))
    for folder in reversed(list(missing)):
        folder.mkdir(exist_ok=True)  # another process may have been first
        sync(folder.parent)


def sync(path: Path) -> None:
    """Have the contents of a file, or the names in a folder, on disk before going on."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hard_link_error(folder: Path) -> OSError | None:
    """Why no hard link can be made in a folder; None where one was."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".cskd-links-") as made:
            Path(made, "a").touch()
            os.link(Path(made, "a"), Path(made, "b"))
    except OSError as e:
        return e
    return None


def json_bytes(value: Any) -> bytes:
    """JSON as every file of a cache has it."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def json_hash(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
