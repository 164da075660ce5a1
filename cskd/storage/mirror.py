"""A folder of this machine that is the copy of one on an object store: what is there comes here first, and what is put here goes there.

The store is what counts. A run that goes on, here or on another machine, goes on from what lies there; what a killed process had
not put there yet is made again. One process at a time: the one that began last, by a record there that the others see before they
put anything. No torch in here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from cskd.errors import CskdError, PathError
from cskd.files import claims
from cskd.files.durable import make_folder
from cskd.files.folders import MARKER
from cskd.files.read import parse_json
from cskd.files.temporary import hold, sweep
from cskd.files.writer import LOCK, by
from cskd.storage import Storage, is_remote, open_storage
from cskd.storage.base import check_key
from cskd.storage.fetch import download

_OF_THIS_MACHINE = (LOCK, "scratch")


def working_folder(location: str | Path) -> Path:
    """The folder of this machine that stands for a location: itself, or of an address one in the folder of temporary files."""
    if not is_remote(location):
        return Path(location)
    text = str(location).rstrip("/")
    name = hashlib.sha256(text.replace("://", ":/", 1).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"cskd-work-{os.getuid()}" / name / text.rpartition("/")[2]


class Mirror:
    """The working folder of an address, and what of it is on the store. kind: of the folder, as `cskd.files.folders` has it."""

    def __init__(self, location: str, kind: str, what: str) -> None:
        self.location, self.kind, self.what = location.rstrip("/"), kind, what
        self.folder = working_folder(location)
        self._storage: Storage = open_storage(location, what)
        self._there: dict[str, tuple[int, int]] = {}  # key -> size and time here of what was put or fetched
        self._held: int | None = None
        self._token = uuid.uuid4().hex

    def names(self) -> dict[str, int]:
        """What lies on the store: key -> bytes. PathError where that is something else than a folder of the kind."""
        names = {stat.key: stat.size for stat in self._storage.list()}
        names.pop(LOCK, None)
        kind = None
        if MARKER in names:
            with contextlib.suppress(ValueError, AttributeError, OSError):
                kind = parse_json(self._storage.get(MARKER, limit=1 << 12)).get("kind")
        if names and kind != self.kind:
            raise PathError(
                f"{self.what} {self.location} holds {min(names)[:80]} of something else than a {self.kind}; set another address"
            )
        return names

    def fetch(self) -> None:
        """Make the working folder what lies on the store. Raises as `names`, and PathError while a process of this machine writes to
        the folder; StorageError, OSError."""
        if (owner := claims.holder(self.folder / LOCK)) is not None:  # `take` is for one that has lost this machine
            raise PathError(
                f"{self.what} {self.location} is being written to{by(owner)}; wait for it or end it, or set another address"
            )
        names = self.names()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.parent.mkdir(mode=0o700, exist_ok=True)
        if (above := self.folder.parent.parent).is_symlink() or above.stat().st_uid != os.getuid():
            raise PathError(f"{above} is another user's, or a link; set TMPDIR to a folder of your own")
        sweep(above, "")
        make_folder(self.folder)
        with contextlib.suppress(OSError):  # no locks there: what a killed process leaves then stays
            self._held = hold(self.folder.parent)
        for key, size in names.items():
            path = self.folder / check_key(key)
            make_folder(path.parent)
            if (came := download(self._storage, key, size, path)) != size:
                raise PathError(f"{self.location}/{key} has {size} bytes, and {came} came; run the same command again")
        self._there = self._here()

    def take(self, tell: Callable[[str], None]) -> None:
        """Be the one who writes there from now on. tell: called with a line where another may still be at it."""
        if (before := self._writer()) is not None:
            tell(
                f"{self.location} was being written to by process {before.get('pid')} on {before.get('host')}; it is stopped"
            )
        record = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%F %T"),
        }
        self._storage.put(LOCK, json.dumps(record).encode())

    def put(self, last: Collection[str] = ()) -> None:
        """Put there what is new here, then remove there what is gone here.

        Args:    last: names of folders whose files are put after all others, since they tell of these.
        Raises:  PathError where another process has taken over; StorageError.
        """
        if (self._writer() or {}).get("token") != self._token:
            raise PathError(
                f"{self.location} was taken over by another process; nothing more is put there: see that one runs"
            )
        here = self._here()
        new = [key for key, facts in here.items() if self._there.get(key) != facts]
        for key in sorted(new, key=lambda key: (key.partition("/")[0] in last, key)):
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                self._storage.put(key, (self.folder / key).read_bytes())
                self._there[key] = here[key]
        for key in self._there.keys() - here.keys():
            self._storage.delete(key)
            del self._there[key]

    def end(self) -> None:
        """Give the address back, and remove the working folder."""
        with contextlib.suppress(CskdError, OSError):
            if (self._writer() or {}).get("token") == self._token:
                self._storage.delete(LOCK)
        self.clear()

    def clear(self) -> None:
        """Remove the working folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _writer(self) -> dict[str, object] | None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = parse_json(self._storage.get(LOCK, limit=1 << 12))
            return found if isinstance(found, dict) else {}
        return None

    def _here(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.folder.rglob("*"):
            key = path.relative_to(self.folder).as_posix()
            skipped = key.partition("/")[0] in _OF_THIS_MACHINE or (
                path.name.startswith(".") and path.name.endswith(".tmp")
            )
            if path.is_file() and not path.is_symlink() and not skipped:
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    found[key] = (stat.st_size, stat.st_mtime_ns)
        return found
