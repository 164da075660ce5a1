"""One writer per output folder: the second one is refused by the name of the first. What a killed one left holds nobody up."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cskd.errors import PathError
from cskd.files.claims import LEASE, Claims, Owner, owner_of, signed

LOCK = ".cskd.writer"  # in the folder while it is written to
LOOK = 0.5  # seconds between two looks at a lock of another machine


@dataclass(frozen=True)
class Writer:
    """This process, as the only one that writes to a folder."""

    folder: Path
    lock: Path
    claims: Claims

    def check(self) -> None:
        """PathError where another machine took the folder over, as it may after LEASE seconds without a sign of life."""
        if not self.claims.owns(self.lock):
            raise PathError(
                f"{self.folder} was taken over{by(owner_of(self.lock))} while this process slept; nothing more is written: "
                "see that one runs, not two"
            )


@contextlib.contextmanager
def sole_writer(
    folder: Path, cure: str, *, name: str = LOCK, tell: Callable[[str], None] | None = None
) -> Iterator[Writer]:
    """Write to a folder alone. It is made, and removed again where nothing was put into it.

    A lock of this host is its process's as long as that one lives. One of another machine is waited for, for a beat of its
    owner (then it is refused) or until it has been silent for LEASE seconds (then it is taken over).

    Args:    cure: what the user may do instead. name: of the lock, where it is one of several in that folder. tell: called
             with a line when there is something to wait for.
    Raises:  PathError naming the process that writes to it, OSError where it can't be made.
    """
    made = _make(folder)
    try:
        with Claims(folder, "", signed()) as claims:
            yield Writer(folder, _take(claims, folder, name, cure, tell), claims)
    finally:
        for new in made:
            with contextlib.suppress(OSError):  # not empty
                new.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it. Returns those that are new, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(claims: Claims, folder: Path, name: str, cure: str, tell: Callable[[str], None] | None) -> Path:
    path, seen, told = folder / name, 0, False
    while (lock := claims.take(name)) is None:
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
        owner = owner_of(path)
        if owner is not None and (owner.is_here or seen not in (0, touched)):
            raise PathError(f"{folder} is being written to{by(owner)}; wait for it or end it, or {cure}")
        if tell and not told and owner is not None:
            tell(f"{folder} was being written to{by(owner)}; waiting up to {LEASE:.0f} s for a sign of life")
        seen, told = touched, True
        time.sleep(LOOK)
    return lock


def by(owner: Owner | None) -> str:
    """' by process 17 on host since then', as a refusal has it."""
    if owner is None:
        return ""
    mine = " (this one)" if owner.is_here and owner.pid == os.getpid() else ""
    since = f" since {owner.since[:20]}" if owner.since else ""
    return f" by process {owner.pid}{mine} on {owner.host.partition('/')[0][:64]}{since}"
