"""Where bytes lie: a folder of this machine, or a prefix of an object store, behind one interface. The only package that
imports obstore."""

from __future__ import annotations

from pathlib import Path

from cskd.files.paths import is_remote, location_text
from cskd.storage.base import Counts, Range, Stat, Storage

__all__ = ["Counts", "Place", "Range", "Stat", "Storage", "is_remote", "join", "open_storage"]


Place = str | Path | Storage  # a location, or what keeps its bytes


def open_storage(location: Place, what: str = "the location") -> Storage:
    """What keeps bytes at a location. Nothing is looked up yet: neither the folder nor the bucket has to exist.

    Args:    location: a text, which is checked; a path, which is one of this machine unless it was made of an address; or a
             storage, which is given back. what: the config key or argument that the location is of, for errors.
    Raises:  PathError for an address that can't be served; StorageError where the extra `cskd[cloud]` is not installed.
    """
    if not isinstance(location, str | Path):
        return location
    text = location_text(str(location), what) if isinstance(location, str) or is_remote(location) else str(location)
    if is_remote(text):
        from cskd.storage.objects import Objects  # here, since only caches that are not on disk need obstore

        return Objects(text)
    from cskd.storage.posix import Posix

    return Posix(Path(text))


def join(location: str | Path, name: str) -> str:
    """The location of a name below another location."""
    text = str(location)
    return f"{text.rstrip('/')}/{name}" if is_remote(text) else str(Path(text, name))
