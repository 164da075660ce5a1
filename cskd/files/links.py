"""Hard links: a commit record is put in place by one, the only way that lets the first of several writers count."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from cskd.errors import CacheError

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # how file systems without them answer


def hard_link_error(folder: Path) -> OSError | None:
    """Why no hard link can be made in a folder; None where one was."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".cskd-links-") as made:
            Path(made, "a").touch()
            os.link(Path(made, "a"), Path(made, "b"))
    except OSError as e:
        return e
    return None


def refuse_without_links(folder: Path, what: str) -> None:
    """CacheError where the file system of a folder, which need not be there yet, has no hard links; OSError where nothing
    can be written there."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    error = hard_link_error(there)
    if error is not None and error.errno in NO_LINKS:
        raise CacheError(
            f"{what} {folder}: its file system has no hard links ({error.strerror}), which let one of several writers win; "
            f"put it on one that has (--set {what}=...)"
        )
    if error is not None:
        raise error
