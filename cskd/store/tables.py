"""What all units of a codec share, such as the classifier of a `features` codec: a file of the cache, kept twice.

Its sha256 is in the manifest, which exists only after it. So of several processes that begin a cache at once, each with
tables of its own, the one whose manifest is put in place first decides for all. The others' files are left over.
"""

from __future__ import annotations

import contextlib
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


def read_tables(root: Place, codec: str, digest: str) -> Arrays:
    """The tables of a codec, by its first copy or else by its second. CacheError where both are not as they were written."""
    for copy in COPIES:
        with contextlib.suppress(CacheError):
            return read_copy(root, codec, digest, copy)
    raise CacheError(
        f"{open_storage(root).location}: both copies of {tables_file(codec, digest)} are lost, which all its units need; the same `cskd "
        "cache-teacher` command fits them again where the teacher and the libraries are as they were"
    )


def read_copy(root: Place, codec: str, digest: str, copy: str) -> Arrays:
    """One copy of a codec's tables. CacheError where it is missing, damaged, or not the one that the manifest names."""
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
    """Give another cache's folder the tables of this one; tables: codec -> sha256. Raises as `read_tables`."""
    for codec, digest in tables.items():
        write_tables(out, codec, read_tables(source, codec, digest))


def restore_tables(root: Place, codec: str, digest: str) -> list[str]:
    """Mend one copy by the other; one line for each that was not as it was written. Raises as `read_tables`."""
    wrong, location = list[str](), open_storage(root).location
    for copy in COPIES:
        try:
            read_copy(root, codec, digest, copy)
        except CacheError as e:
            wrong.append(str(e).partition("; `cskd")[0].removeprefix(f"{location}/"))
    if wrong:
        write_tables(root, codec, read_tables(root, codec, digest))
    return wrong
