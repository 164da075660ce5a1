"""Claims: who is working on what, so that several processes on one cache share the work.

A claim is a file with its owner's host and process, who touches it every few seconds. It is nobody's when the owner is of
this host and no longer lives, or when it was not touched for LEASE seconds of the file system's own clock: those of the
machines don't matter, and a process number that was given out again keeps a claim no longer than that. Claims only save
work: two owners of one claim make the same unit twice, and `commit.publish` lets the first one count.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

FOLDER = "claims"
BEAT = 5.0  # seconds between touches
LEASE = 60.0  # seconds after which an untouched claim is nobody's


class Claims:
    """The claims of one process on one cache. A context manager: at its end all are given back."""

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER
        self._mine: set[Path] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.release(list(self._mine))
        with contextlib.suppress(OSError):  # others have claims there
            self._folder.rmdir()

    def take(self, name: str) -> Path | None:
        """Claim a piece of work; None while another process has it."""
        path = self._folder / name
        for _ in range(2):
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileNotFoundError:  # the last owner took the empty folder away
                self._folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if not _stale(path):
                    return None
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
            else:
                try:
                    with os.fdopen(fd, "w") as out:
                        out.write(_me())
                except OSError:  # a full disk: an empty claim would keep the others waiting
                    path.unlink()
                    raise
                self._mine.add(path)
                return path
        return None

    def release(self, claims: Iterable[Path]) -> None:
        """Give claims back; one that was another's by now, since this process slept, is left alone."""
        for path in claims:
            self._mine.discard(path)
            with contextlib.suppress(OSError):
                if path.read_text() == _me():
                    path.unlink()

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            for path in list(self._mine):
                with contextlib.suppress(OSError):
                    os.utime(path)


def held(root: Path) -> int:
    """How many claims on a cache have an owner that lives."""
    return sum(not _stale(path) for path in (root / FOLDER).glob("[!.]*"))


def _stale(path: Path) -> bool:
    try:
        host, _, pid = path.read_text().rpartition(" ")
        if host == _host() and not _lives(int(pid)):
            return True
        return _now(path.parent) - path.stat().st_mtime > LEASE
    except FileNotFoundError:
        return True
    except ValueError:  # being written, or torn
        return _now(path.parent) - path.stat().st_mtime > LEASE


def _now(folder: Path) -> float:
    """The time a file gets that is touched now in that folder, which on a network is the server's."""
    probe = folder / f".now.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()
    except OSError:
        return time.time()


def _me() -> str:
    return f"{_host()} {os.getpid()}\n"


def _host() -> str:
    """Where process numbers mean the same: host and, on Linux, boot and process namespace (of a container)."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        name += f"/{boot}/{os.readlink('/proc/self/ns/pid')}"
    return name


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
