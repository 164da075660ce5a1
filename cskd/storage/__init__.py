"""Where bytes lie: a folder of this machine, or a prefix of an object store, behind one interface. The only package that
imports obstore."""

from __future__ import annotations

from pathlib import Path

from cskd.files.paths import is_remote, location_text
from cskd.storage.base import Counts, Range, Stat, Storage

__all__ = ["Counts", "Range", "Stat", "Storage", "is_remote", "join", "open_storage"]


def open_storage(location: str | Path, what: str = "the location") -> Storage:
    """What keeps bytes at a location. Nothing is looked up yet: neither the folder nor the bucket has to exist.

    Args:    what: the config key or argument that the location is of, for errors.
    Raises:  PathError for an address that can't be served; StorageError where the extra `cskd[cloud]` is not installed.
    """
    text = location_text(str(location), what)
    if is_remote(text):
        from cskd.storage.objects import Objects  # here, since only caches that are not on disk need obstore

        return Objects(text)
    from cskd.storage.posix import Posix

    return Posix(Path(text))


def join(location: str | Path, name: str) -> str:
    """The location of a name below another location."""
    text = str(location)
    return f"{text.rstrip('/')}/{name}" if is_remote(text) else str(Path(text, name))
