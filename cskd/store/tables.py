"""What all units of a codec share, such as the classifier of a `features` codec: a file of the cache, kept twice.

Its sha256 is in the manifest, which exists only after it. So of several processes that begin a cache at once, each with
tables of its own, the one whose manifest is put in place first decides for all. The others' files are left over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath

import safetensors.numpy
from safetensors import SafetensorError

from cskd.codecs import Arrays
from cskd.errors import CacheError
from cskd.storage import Place, join, open_storage
from cskd.store.format import TABLES

MAX_TABLES = 1 << 31  # bytes: 21,843 classes of 4,096 channels take a sixth of it
COPIES = ("", ".copy")


def tables_file(codec: str, digest: str, copy: str = "") -> PurePosixPath:
    """Path of a codec's tables inside the cache; `digest` is the hex sha256 of their bytes."""
    return PurePosixPath(TABLES) / f"{codec}.{digest[:16]}{copy}.safetensors"


def write_tables(root: Place, codec: str, arrays: Arrays) -> str:
    """Put both copies in place, durably. Returns: the sha256 of their bytes; the same arrays always give the same."""
    data = safetensors.numpy.save(arrays)
    digest = hashlib.sha256(data).hexdigest()
    for copy in COPIES:
        open_storage(root).put(str(tables_file(codec, digest, copy)), data)
    return digest


def read_tables(root: Place, codec: str, digest: str, copy: str = "") -> Arrays:
    """The tables of a codec. Raises CacheError where they are missing, damaged, or not those that the manifest names."""
    storage, key = open_storage(root), str(tables_file(codec, digest, copy))
    try:
        data = storage.get(key, limit=MAX_TABLES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError("it does not match the sha256 in the manifest")
        return safetensors.numpy.load(data)
    except (OSError, ValueError, SafetensorError) as e:
        why = "is missing" if isinstance(e, FileNotFoundError) else f"is damaged ({e})"
        raise CacheError(
            f"{join(storage.location, key)} {why}; `cskd repair` restores it from its second copy"
        ) from None


def copy_tables(source: Place, out: Place, tables: Mapping[str, str]) -> None:
    """Give another cache's folder the tables of this one; tables: codec -> sha256. CacheError where both copies are not as written."""
    for codec, digest in tables.items():
        write_tables(out, codec, _either(source, codec, digest)[0])


def restore_tables(root: Place, codec: str, digest: str) -> list[str]:
    """Mend one copy by the other; one line for each that was not as it was written. CacheError where both are not."""
    right, wrong = _either(root, codec, digest)
    if wrong:
        write_tables(root, codec, right)
    return wrong


def _either(root: Place, codec: str, digest: str) -> tuple[Arrays, list[str]]:
    """The tables by either copy, and one line for each copy that is not as it was written. CacheError where both are not."""
    wrong, right, location = list[str](), None, open_storage(root).location
    for copy in COPIES:
        try:
            right = read_tables(root, codec, digest, copy)
        except CacheError as e:
            wrong.append(str(e).partition("; `cskd")[0].removeprefix(f"{location}/"))
    if right is None:
        raise CacheError(
            f"{location}: both copies of {tables_file(codec, digest)} are lost, which all its units need; the same `cskd "
            "cache-teacher` command fits them again where the teacher and the libraries are as they were"
        )
    return right, wrong
