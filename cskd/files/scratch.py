"""Scratch of a run, on local disk: in `train.scratch`, by default the folder of temporary files. It carries the run's identity,
and ends with it. The ranks of one machine share one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cskd.errors import CacheError
from cskd.files.folders import refuse_output
from cskd.files.temporary import PREFIX, sweep

GB = 1e9


def new_scratch(output: Path, rank: int = 0, where: str = "") -> Path:
    """An empty folder that only this user may read, for the run in `output`, made by `rank`. CacheError where it can't be made."""
    try:
        return Path(tempfile.mkdtemp(prefix=f"{_prefix(output)}rank{rank:03d}-", dir=scratch_above(where)))
    except OSError as e:
        raise CacheError(_refused(scratch_above(where), f"no folder can be made in it ({e.strerror})")) from None


def clear_scratch(output: Path, where: str = "") -> None:
    """Remove what dead runs left, of this output whether they held it or not: in `where`, among temporary files, and, of older
    versions, in the output folder. For the one writer of `output`."""
    for above in {scratch_above(where), scratch_above("")}:
        sweep(above)
    lefts = {left for above in {scratch_above(where), scratch_above("")} for left in above.glob(f"{_prefix(output)}*")}
    for left in lefts:
        with contextlib.suppress(FileNotFoundError):
            if not left.is_symlink() and left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    old = output / "scratch"
    if old.is_dir() and not old.is_symlink():
        for left in old.glob("rank[0-9]*"):
            shutil.rmtree(left, ignore_errors=True)
        if not any(old.iterdir()):
            old.rmdir()


def refuse_scratch(where: str) -> None:
    """CacheError where nothing can be written in `train.scratch`, which has to be there: a disk that is not mounted is not made
    up for by a folder on another one. PathError where it lies in a cache, a data set or a run."""
    above = scratch_above(where)
    if where and not above.is_file():
        refuse_output(above, None, "train.scratch")
    if not above.is_dir():
        raise CacheError(_refused(above, "it is no folder" if above.exists() else "it is not there"))
    if not os.access(above, os.W_OK | os.X_OK):
        raise CacheError(_refused(above, "it may not be written to"))


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
        size = os.fstat(fd).st_size
        with said_when_full(path.parent, size):
            os.posix_fallocate(fd, 0, max(1, size))
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # it can't reserve
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def said_when_full(folder: Path, size: int = 0) -> Iterator[None]:
    """CacheError in place of what the system says when the disk is full. size: bytes that were to be written."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CacheError(_small(folder, f"no room for {size / GB:.2f} GB" if size else "no room left")) from None


def _small(folder: Path, found: str) -> str:
    return (
        f"{folder} has {found}; set train.scratch (or TMPDIR) to a folder on a local disk with room, and run the same command "
        "again"
    )


def scratch_above(where: str) -> Path:
    """The folder that scratch lies in: `train.scratch`, or that of temporary files where it is empty."""
    return Path(where or tempfile.gettempdir())


def _refused(above: Path, why: str) -> str:
    return f"train.scratch {above}: {why}; expected a folder on a local disk of this machine with room: mount or make it, or set another"


def _prefix(output: Path) -> str:
    there = os.stat(output)  # in two containers one path may be two folders
    identity = f"{os.path.realpath(output)} {there.st_dev} {there.st_ino}"
    return f"{PREFIX}{hashlib.sha256(identity.encode()).hexdigest()[:12]}-"
