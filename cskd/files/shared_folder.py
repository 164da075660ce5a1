"""A folder on one machine's disk that several of its processes fill and read together, such as the ranks of torchrun there.

Each holds a lock of its own in it as long as it lives, which the system takes back however the process ends. So nobody waits
for one that is gone, and the last one to leave removes the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event

from cskd.errors import CacheError, RankError, fitted
from cskd.files.temporary import alive, hold, is_held

POLL = 0.02  # seconds between two looks at what is waited for
LOOK = 0.5  # seconds between two looks at whether the others live
_LONGEST = 200  # characters of another's reason


class SharedFolder:
    """`path`, for process `number` of the `count` that use it. Alone, nobody is waited for, and a folder without locks will do."""

    def __init__(self, path: Path, number: int = 0, count: int = 1) -> None:
        self.path, self.number, self.count = path, number, count
        self._lock: int | None = None

    def enter(self) -> SharedFolder:
        """Say that this process lives; all have to, before any waits. CacheError where the folder is not there, or has no locks."""
        try:
            self._lock = hold(self.path, self.number)
        except OSError as e:
            if self.count > 1:
                raise CacheError(
                    f"{self.path} can't be shared by the {self.count} ranks of this machine ({e.strerror}); set train.scratch "
                    "to a folder on a local disk that all of them see"
                ) from None
        return self

    def leave(self) -> None:
        """Leave, and remove the folder where all others have left or are gone."""
        if self._lock is not None:
            os.close(self._lock)  # before the look at the others: of two that leave at once one sees the other gone
            self._lock = None
        if self.gone() == self._others:
            shutil.rmtree(self.path, ignore_errors=True)

    def gone(self) -> set[int]:
        """Numbers of the others that have left, or have ended in any other way."""
        found = set()
        for other in self._others:
            with contextlib.suppress(FileNotFoundError):
                if is_held(alive(self.path, other)):
                    continue
            found.add(other)
        return found

    def fail(self, error: Exception) -> None:
        """Leave word to the others of why this one gives up."""
        if self.count > 1:
            with contextlib.suppress(OSError):
                (self.path / f"failed{self.number}").write_text(" ".join(str(error).split())[:_LONGEST])

    def wait(self, there: Callable[[], bool], what: str, ended: Event | None = None) -> None:
        """Return once `there()`.

        Raises:  RankError where another process failed or is gone by then; CancelledError once `ended` is set.
        """
        looked = time.monotonic()
        while not there():
            if ended is not None and ended.is_set():
                raise CancelledError
            if time.monotonic() >= looked + LOOK:
                # First who is gone, then what is there: one may have done its part and left in between.
                gone, looked = self.gone(), time.monotonic()
                if not there():
                    self._refuse(gone, what)
            time.sleep(POLL)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process of them is in here."""
        if self.count == 1:
            yield
            return
        with _opened(self.path / "turn", os.O_CREAT) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield

    def discard(self, folder: Path) -> None:
        """Have done with a folder in this one, which is removed once all have."""
        if self.count > 1 and folder.is_dir():
            with contextlib.suppress(FileNotFoundError):
                (folder / f"read{self.number}").touch()
            if not all((folder / f"read{number}").exists() for number in range(self.count)):
                return
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # holds others
            folder.parent.rmdir()

    @property
    def _others(self) -> set[int]:
        return set(range(self.count)) - {self.number}

    def _refuse(self, gone: set[int], what: str) -> None:
        for other in sorted(self._others):
            with contextlib.suppress(OSError):
                why = (self.path / f"failed{other}").read_text()
                raise RankError(fitted(f"local rank {self.number} stops because local rank {other} failed: {why}"))
        if gone:
            raise RankError(
                f"local rank {self.number} waited for {what} with local rank {min(gone)}, which is gone and left no word; "
                "if it was killed, memory may have run out; run the same command again"
            )


@contextlib.contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
