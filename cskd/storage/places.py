"""What `cskd.files.folders` says of folders, of a prefix of an object store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

from cskd.errors import PathError
from cskd.files.folders import kind_of_name
from cskd.files.paths import is_remote, location_text
from cskd.storage import Storage, open_storage

LOOKED_AT = 1000  # objects: one answer of a store


def refuse_objects(
    location: str,
    what: str,
    kind: str,
    own: Callable[[str], bool],
    marker: str,
    others: Mapping[str, str] | None = None,
) -> Storage:
    """Refuse a place for an output where something of another kind is, or another path lies; before any work.

    Args:    what: the key or argument that names it. kind: what would be written, in words. own: whether a key may be of that kind;
             where the object `marker` is, all are. others: what else is read or written, by key or argument.
    Returns: the place. Raises PathError, StorageError.
    """
    storage = open_storage(location, what)
    for key, text in (others or {}).items():
        if not is_remote(text):
            continue
        if (other := location_text(text, key)) == storage.location:
            raise PathError(f"{what} and {key} are both {other}; give each a place of its own")
        if other.startswith(f"{storage.location}/"):
            raise PathError(f"{key} {other} lies in {what} {storage.location}; give each a place of its own")
    strange = (about.key for about in islice(storage.list(), LOOKED_AT) if not own(about.key))
    if (name := next(strange, None)) is not None and storage.stat(marker) is None:
        raise PathError(
            f"{what} {storage.location} holds {name[:80]}, which is no file of {kind}; give a place of its own"
        )
    return storage


_TELLING = {  # the first that is there says the kind: a cache has an inventory, too
    **dict.fromkeys(("manifest.json", "manifest.copy.json"), "cache"),
    **dict.fromkeys(("inventory/inventory.json", "inventory.json"), "data"),
    "resolved.yaml": "run",
}


def kind_of_objects(location: str, what: str) -> str | None:
    """The kind of what lies at an address: 'cache', 'data' or 'run', else that which its name says. Raises PathError, StorageError."""
    storage = open_storage(location, what)
    there = (kind for name, kind in _TELLING.items() if storage.stat(name) is not None)
    return next(there, None) or kind_of_name(location)
