"""Whether a commit record can be what it says: its hash is no secret, so anyone can write a valid one.

A record names files: they are those that its other fields give, never a path of its own. Everything that becomes a number
of loops or bytes is bounded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cskd.store.format import unit_file

if TYPE_CHECKING:
    from cskd.store.commit import Commit

_HASH = re.compile(r"[0-9a-f]{64}")
_CODEC = re.compile(r"[a-z0-9:]{1,32}")


def check_commit(commit: Commit) -> None:
    """Raises ValueError with the first field of a record that can't be."""

    def count(value: object, low: int = 0) -> bool:
        return type(value) is int and low <= value < 1 << 48

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(what)

    for name in ("block", "view", "samples", "cached", "format"):
        need(count(getattr(commit, name)), f"its {name} is {str(getattr(commit, name))[:40]}, expected a count")
    for name in ("content_hash", "fingerprint"):
        need(_is_hash(getattr(commit, name)), f"its {name} is {str(getattr(commit, name))[:40]!r}, expected a sha256")
    need(isinstance(commit.quarantine, dict), "its quarantine is no mapping")
    for position, reason in commit.quarantine.items():
        known = re.fullmatch(r"0|[1-9]\d{0,11}", position) and int(position) < commit.samples
        need(bool(known) and isinstance(reason, str), f"it quarantines {position[:40]!r}, expected one of its samples")
    need(commit.cached + len(commit.quarantine) == commit.samples, "its counts do not add up")
    for file in commit.files:
        known = isinstance(file.codec, str) and _CODEC.fullmatch(file.codec) and _is_hash(file.sha256)
        need(bool(known) and count(file.size) and count(file.target_bytes), "a file of it has no codec, size or sha256")
        expected = str(unit_file(commit.block, commit.view, file.codec, file.sha256))
        need(file.path == expected, f"it names the file {str(file.path)[:120]!r}, expected {expected}")
    need(len({file.codec for file in commit.files}) == len(commit.files), "it names a codec twice")


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None
