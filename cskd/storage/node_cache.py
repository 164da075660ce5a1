"""Copies, on a local disk, of what lies on object stores: one per machine for all processes, of limited size.

A copy is a folder, made under another name and renamed: it is there whole or not at all. Its file `.lock` holds how many bytes it
takes, was last touched when the copy was last opened, and carries the locks (flock, which the system takes back when a process
ends, however it ends):

    while it is made      exclusive: others wait, and begin again where the maker died
    while it is read      shared: it is not evicted
    while it is evicted   exclusive, tried: the copy that was not opened for longest goes first

A copy that is evicted or damaged is fetched again, so nothing is synced to the disk, and its reader checks what it reads. No torch
in here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cskd.errors import LIMITS, ConfigError, CskdError, DataError, fitted, why
from cskd.files.folders import refuse_output

LOCK = ".lock"
GB = 1e9
_PART, _GONE, _ROOM = ".part-", ".gone-", ".room"  # being made; being removed; the lock under which room is made


class InUseError(CskdError):
    """All of the node cache is being read: there is no room for one more copy now."""


@dataclass(eq=False)
class Held:
    """A copy that stays until this is closed, or the process ends."""

    path: Path  # of its folder
    lock: int

    def close(self) -> None:
        """Let it be evicted."""
        lock, self.lock = self.lock, -1
        if lock >= 0:
            os.close(lock)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class NodeCache:
    """The copies in a folder. limit: bytes that they may take; None: half of what the disk has for them."""

    folder: Path
    limit: int | None = None

    def hold(self, name: str) -> Held | None:
        """The copy of that name; None where there is none."""
        return _held(self.folder / name)

    def fetch(self, name: str, size: int, fill: Callable[[Path], object], what: str) -> Held:
        """The copy of that name, made where it is not there: once, whoever else asks for it at the same time.

        Args:    size: bytes that it will take. fill: writes it into the folder that it is given. what: is copied, for messages.
        Raises:  ConfigError where the limit is less than `size`; InUseError where all that is there is being read; DataError where the
                 disk refuses; what `fill` raises.
        """
        try:
            self._make()
            while True:
                if (held := self.hold(name)) is not None:
                    return held
                if (made := self._made(name, size, fill, what)) is not None:
                    return made
        except OSError as e:
            if e.errno in LIMITS or isinstance(e, FileNotFoundError):
                raise
            cause = why(e).partition(";")[0]
            raise DataError(
                fitted(
                    f"data.node_cache {self.folder}: no copy of {what} can be written: {cause}; mend that, or set a folder on "
                    "another disk: --set data.node_cache=FOLDER"
                )
            ) from None

    def drop(self, name: str) -> None:
        """Remove a damaged copy, whoever reads it: what is open stays readable."""
        with contextlib.suppress(FileNotFoundError):
            _remove(self.folder / name)

    def room(self) -> int:
        """Bytes that all copies together may take."""
        self._make()
        return self._room(sum(copy.size for copy in self._copies()))

    def _room(self, used: int) -> int:
        return self.limit if self.limit is not None else (shutil.disk_usage(self.folder).free + used) // 2

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.is_symlink() or self.folder.stat().st_uid != os.getuid():
            raise PermissionError(errno.EACCES, "it is another user's, or a link", str(self.folder))

    def _made(self, name: str, size: int, fill: Callable[[Path], object], what: str) -> Held | None:
        """The copy, made now; None where another process made it, or gave up, while this one waited for it."""
        part = self.folder / f"{_PART}{name}"
        with contextlib.suppress(FileExistsError):  # not exist_ok, which fails where it is renamed at that moment
            part.mkdir(mode=0o700)
        try:
            lock = os.open(part / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # another process has just finished
            return None
        held, done = Held(part, lock), False
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # shared, since whoever makes it goes on to read it, for as long as it likes
                fcntl.flock(lock, fcntl.LOCK_SH)
                return None
            if not _is_at(lock, part / LOCK) or (self.folder / name).exists():
                return None
            try:
                for left in part.iterdir():  # of a process that was killed here
                    if left.name != LOCK:
                        left.unlink()
                self._reserve(lock, size, what)
                fill(part)
                os.rename(part, self.folder / name)
                done = True
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
            fcntl.flock(lock, fcntl.LOCK_SH)
            held.path = self.folder / name
            return held
        finally:
            if not done:
                held.close()

    def _reserve(self, lock: int, size: int, what: str) -> None:
        """Make room for a copy, and write down that it takes it."""
        os.ftruncate(lock, 0)
        with _locked(self.folder / _ROOM):
            copies = sorted(self._copies())
            used = sum(copy.size for copy in copies)
            room = self._room(used)
            if size > room:
                raise ConfigError(
                    f"data.node_cache_gb is {room / GB:.3g}, and {what} has {size / GB:.3g} GB; set at least "
                    f"{2 * size / GB:.3g}, or another folder: --set data.node_cache=FOLDER"
                )
            lacks, freed = max(used + size - room, size - shutil.disk_usage(self.folder).free), 0
            for copy in copies:
                if freed < lacks and _remove(copy.path, unless_read=True):
                    freed += copy.size
            if used + size - freed > room:
                raise InUseError(f"data.node_cache {self.folder}: all of its {room / GB:.3g} GB are being read")
            os.pwrite(lock, str(size).encode(), 0)

    def _copies(self) -> Iterator[_Copy]:
        """What is there and what is being made."""
        for entry in os.scandir(self.folder):
            if entry.name.startswith(_GONE):  # a process was killed while it removed it
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != _ROOM:
                with contextlib.suppress(OSError, ValueError):
                    lock = Path(entry.path, LOCK)
                    yield _Copy(lock.stat().st_mtime_ns, Path(entry.path), int(lock.read_bytes() or b"0"))


@dataclass(frozen=True, order=True)
class _Copy:
    touched: int
    path: Path
    size: int


def default_folder() -> Path:
    """In the folder of temporary files, which is on a local disk where a home folder may not be."""
    return Path(tempfile.gettempdir()) / f"cskd-node-{os.getuid()}"


_ours = [NodeCache(default_folder())]


def use_node_cache(folder: str | None, gb: float | None) -> NodeCache:
    """The node cache that this process reads through from now on, by `data.node_cache` and `data.node_cache_gb`. PathError where it lies
    in a cache, a data set or a run."""
    if folder:
        refuse_output(Path(folder), None, "data.node_cache")
    _ours[0] = NodeCache(Path(folder).absolute() if folder else default_folder(), None if gb is None else int(gb * GB))
    return _ours[0]


def node_cache() -> NodeCache:
    """That of this process."""
    return _ours[0]


def copy_name(*parts: object) -> str:
    """The name of a copy, by all that says what it is a copy of."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:40]


def say_fetched_again(what: str, wrong: str) -> None:
    """A line about a damaged copy: the disk may be failing. On standard error, from whichever process found it."""
    print(f"note: the copy of {what} in the node cache was damaged ({wrong}) and is fetched again", file=sys.stderr)


def _held(path: Path) -> Held | None:
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    held = Held(path, lock)
    fcntl.flock(lock, fcntl.LOCK_SH)
    if not _is_at(lock, path / LOCK):
        held.close()
        return None
    os.utime(lock)
    return held


def _remove(path: Path, unless_read: bool = False) -> bool:
    """Remove a copy. Returns: whether it was; not so where it is being read, or made, and `unless_read`."""
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if unless_read:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(lock, path / LOCK):
            return False
        gone = path.with_name(f"{_GONE}{uuid.uuid4().hex}")
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
