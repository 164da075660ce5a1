"""Scratch of a run, on local disk: the folder of temporary files (TMPDIR). It carries the run's identity, and ends with it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from cskd.errors import CacheError

GB = 1e9


def new_scratch(output: Path, rank: int = 0) -> Path:
    """An empty folder that only this user may read, for one rank of the run in `output`."""
    return Path(tempfile.mkdtemp(prefix=f"{_prefix(output)}rank{rank:03d}-"))


def clear_scratch(output: Path) -> None:
    """Remove what dead runs left, here and, of older versions, in the output folder. For the one writer of `output`."""
    for left in Path(tempfile.gettempdir()).glob(f"{_prefix(output)}*"):
        with contextlib.suppress(FileNotFoundError):
            if not left.is_symlink() and left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    old = output / "scratch"
    if old.is_dir() and not old.is_symlink():
        for left in old.glob("rank[0-9]*"):
            shutil.rmtree(left, ignore_errors=True)
        if not any(old.iterdir()):
            old.rmdir()


def refuse_small(folder: Path, size: float, what: str) -> None:
    """CacheError where a disk has no room for `size` more bytes: what is mapped on a full disk ends a process by a signal."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CacheError(_small(folder, f"{free / GB:.2f} GB free, {what} may take {size / GB:.2f}"))


def reserve(path: Path) -> None:
    """Have the disk keep room for all of a file that was made by its length alone. CacheError where it has none."""
    if not hasattr(os, "posix_fallocate"):
        return
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, max(1, os.fstat(fd).st_size))
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(_small(path.parent, f"no room for {os.fstat(fd).st_size / GB:.2f} GB")) from None
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # it can't reserve
            raise
    finally:
        os.close(fd)


def _small(folder: Path, found: str) -> str:
    return f"{folder} has {found}; set TMPDIR to a folder on a local disk with room, and run the same command again"


def _prefix(output: Path) -> str:
    there = os.stat(output)  # in two containers one path may be two folders
    identity = f"{os.path.realpath(output)} {there.st_dev} {there.st_ino}"
    return f"cskd-{hashlib.sha256(identity.encode()).hexdigest()[:12]}-"
