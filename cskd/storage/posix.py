"""A folder of this machine, or of a file system that several machines mount, as a storage."""

from __future__ import annotations

import contextlib
import errno
import os
import stat as modes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cskd.files import durable
from cskd.files.read import open_regular, pread
from cskd.storage.base import Contents, Counts, Range, Stat, check_key

AT_ONCE = 8  # files read at the same time: what a network file system needs; a disk of this machine is as fast with one


class Posix:
    """See `cskd.storage.Storage`. Files are put in place by `cskd.files.durable`: fsync, read back, rename or hard link."""

    ranges = True

    def __init__(self, root: Path) -> None:
        self.root, self.location, self.counts = root, str(root), Counts()

    def __reduce__(self) -> tuple[type[Posix], tuple[Path]]:
        return Posix, (self.root,)

    def path(self, key: str) -> Path:
        """The file that holds an object."""
        return self.root / check_key(key)

    def get(self, key: str, start: int = 0, size: int | None = None, *, limit: int | None = None) -> bytes:
        path = self.path(key)
        fd = open_regular(path)
        try:
            length = os.fstat(fd).st_size
            if limit is not None and length > limit:
                raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
            data = pread(fd, start, max(0, length - start) if size is None else size)
        finally:
            os.close(fd)
        self.counts.add(read=len(data))
        return data

    def get_many(self, wanted: Sequence[str | Range]) -> Contents:
        ranges = [Range(one) if isinstance(one, str) else one for one in wanted]
        if len(ranges) < 2:
            return [self.get(*one) for one in ranges]
        with ThreadPoolExecutor(AT_ONCE, "read") as pool:
            return [*pool.map(lambda one: self.get(*one), ranges)]

    def put(self, key: str, data: bytes) -> None:
        durable.put(self.path(key), data)
        self.counts.add(written=len(data))

    def create(self, key: str, data: bytes) -> bool:
        won = durable.put(self.path(key), data, first=True)
        self.counts.add(written=len(data) if won else 0)
        return won

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Links are not followed, and files that are being written (see `durable.put`) are listed, too."""
        folders = [self.path(prefix) if prefix else self.root]
        while folders:
            self.counts.add()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        about = entry.stat(follow_symlinks=False)
                        key = Path(entry.path).relative_to(self.root).as_posix()
                        yield Stat(key, about.st_size, about.st_mtime)

    def stat(self, key: str) -> Stat | None:
        try:
            about = os.stat(self.path(key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        self.counts.add()
        return Stat(key, about.st_size, about.st_mtime) if modes.S_ISREG(about.st_mode) else None

    def delete(self, key: str) -> None:
        path = self.path(key)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            durable.sync(path.parent)
        self.counts.add()
