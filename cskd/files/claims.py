"""Claims: who is working on what, so that several processes on one cache share the work, and one folder has one writer.

A claim is a file with its owner's host and process, who touches it every few seconds. It is nobody's when the owner is of
this host and no longer lives, or when it was not touched for LEASE seconds of the file system's own clock: those of the
machines don't matter, and a process number that was given out again keeps a claim no longer than that. Claims on a cache only
save work: two owners of one claim make the same unit twice, and `commit.publish` lets the first one count. A claim with a
second line (see `signed`) says when its owner was started: on this host that very process keeps it however long it sleeps.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cskd.files.read import read_file

CLAIMS = "claims"
BEAT = 5.0  # seconds between touches
LEASE = 60.0  # seconds after which an untouched claim is nobody's


@dataclass(frozen=True)
class Owner:
    """Who has a claim. began: when the process was started, in ticks of its machine; since: when it took the claim."""

    host: str
    pid: int
    began: str = ""
    since: str = ""

    @property
    def is_here(self) -> bool:
        """Whether process numbers of that host are those of this one."""
        return self.host == _host()


class Claims:
    """The claims of one process on one folder. A context manager: at its end all are given back.

    folder: where in `root` they lie; '' for `root` itself. second_line: see `signed`.
    """

    def __init__(self, root: Path, folder: str = CLAIMS, second_line: str = "") -> None:
        self._root, self._folder, self._second_line = root, root / folder, second_line
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
        if self._folder != self._root:
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
                if not (_stale(path) and _removed(path)):
                    return None
            else:
                try:
                    with os.fdopen(fd, "w") as out:
                        out.write(_me() + self._second_line)
                except OSError:  # a full disk: an empty claim would keep the others waiting
                    path.unlink()
                    raise
                self._mine.add(path)
                return path
        return None

    def owns(self, path: Path) -> bool:
        """Whether a claim that was taken is this process's still; another's by now, where this one slept too long."""
        with contextlib.suppress(OSError, ValueError):
            return _read(path) == _me() + self._second_line
        return False

    def release(self, claims: Iterable[Path]) -> None:
        """Give claims back; one that was another's by now, since this process slept, is left alone."""
        for path in claims:
            self._mine.discard(path)
            with contextlib.suppress(OSError):
                if self.owns(path):
                    path.unlink()

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            for path in list(self._mine):
                with contextlib.suppress(OSError):
                    if self.owns(path):
                        os.utime(path)


def signed() -> str:
    """The second line of a claim on which all depends: when this process was started, and the time now."""
    return f"{_started(os.getpid()) or '-'} {time.strftime('%Y-%m-%d %H:%M:%S')}\n"


class NoClaims:
    """In place of `Claims` on an object store, where nobody could tell whether the owner of a claim lives: every piece of work
    may be taken by all, and what is made twice counts once."""

    def __enter__(self) -> NoClaims:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def take(self, name: str) -> Path | None:
        return Path(name)

    def release(self, claims: Iterable[Path]) -> None:
        pass


def owner_of(path: Path) -> Owner | None:
    """Who has a claim; None where there is none, or it is being written."""
    try:
        first, _, second = _read(path).partition("\n")
        host, _, pid = first.rpartition(" ")
        began, _, since = second.strip().partition(" ")
        return Owner(host, int(pid), began.strip("-"), since)
    except (OSError, ValueError):
        return None


def holder(path: Path) -> Owner | None:
    """Who has a claim and lives; None where that is nobody."""
    return None if _stale(path) else owner_of(path)


def held(root: Path) -> int:
    """How many claims on a cache have an owner that lives."""
    try:
        return sum(not _stale(path) for path in (root / CLAIMS).glob("[!.]*"))
    except FileNotFoundError:  # the last one was given back, and the folder with it, while they were listed
        return 0


def _read(path: Path) -> str:
    return read_file(path, 1 << 12).decode()


def _stale(path: Path) -> bool:
    owner = owner_of(path)
    if owner is not None and owner.is_here:
        if not _lives(owner.pid):
            return True
        if owner.began and (began := _started(owner.pid)):
            return began != owner.began
    try:
        touched = path.stat().st_mtime
        return _now(path.parent) - touched > LEASE
    except FileNotFoundError:
        return True


def _removed(path: Path) -> bool:
    """Remove a claim that was seen to be nobody's; False where another process has taken it over meanwhile."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.stale")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if not _stale(aside):
            os.rename(aside, path)
            return False
        aside.unlink()
    return True


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
    except (PermissionError, OverflowError):
        pass
    return _stat(pid)[:1] not in (["Z"], ["X"])  # ended, and its parent has not asked: so it stays in some containers


def _started(pid: int) -> str:
    """When a process was started, in ticks since the boot; '' where the system does not say."""
    return (_stat(pid)[19:20] or [""])[0]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
