"""Folders of temporary files that do not outlive the processes that use them, however these end.

Each user holds a lock on a file in the folder, which the system takes back with the process. Whoever makes such a folder first
removes those next to it that nobody holds any more: what a killed command left goes with the next one. A folder without such a file
is never touched, nor one whose users were of another machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "cskd-"
_ALIVE = "alive"


@contextlib.contextmanager
def temporary_folder(use: str, above: Path | None = None, *, hidden: bool = False) -> Iterator[Path]:
    """An empty folder of this user's own, which goes at the end of the context. use: its name says it. above: where it lies, by
    default the folder of temporary files. OSError where it can't be made."""
    above = above or Path(tempfile.gettempdir())
    sweep(above)
    outer = Path(tempfile.mkdtemp(prefix=f"{'.' * hidden}{PREFIX}{use}-", dir=above))
    try:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # no locks there: what a killed process leaves then stays
                held.callback(os.close, hold(outer))
            inner = outer / "files"  # so that the lock is not among them
            inner.mkdir()
            yield inner
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def hold(folder: Path, number: int = 0) -> int:
    """Say that this process uses a folder, as the one of that number, until what is returned is closed. OSError where the folder is not
    there, or has no locks."""
    path, new = alive(folder, number), folder / f".{_ALIVE}{number}"
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, _host(), 0)
        os.rename(new, path)  # locked before its name is there: nobody sees it free
    except OSError:
        os.close(fd)
        raise
    return fd


def alive(folder: Path, number: int | str) -> Path:
    """The file that the user of that number holds."""
    return folder / f"{_ALIVE}{number}"


def is_held(path: Path) -> bool:
    """Whether a process holds that file. FileNotFoundError where it is not there."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def sweep(above: Path, prefix: str = PREFIX) -> None:
    """Remove the folders of that name in `above` whose users are all gone."""
    with contextlib.suppress(OSError):  # it is not there, or has no list
        for folder in above.iterdir():
            if folder.name.removeprefix(".").startswith(prefix):
                with contextlib.suppress(OSError):
                    if _left(folder):
                        shutil.rmtree(folder, ignore_errors=True)


def _left(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        return False
    users = list(folder.glob(f"{_ALIVE}[0-9]*"))
    return bool(users) and all(user.read_bytes() == _host() and not is_held(user) for user in users)


def _host() -> bytes:
    """A lock may not be seen from another machine."""
    return os.fsencode(socket.gethostname())
