"""The records and files of all units of a cache, in order: from a folder one after the other, from an object store many at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from cskd.errors import CskdError
from cskd.storage.ahead import ahead
from cskd.storage.posix import Posix
from cskd.store.cache import Cache
from cskd.store.commit import Commit, UnitFile
from cskd.store.records import records

Read = Callable[[UnitFile], bytes]
Record = Callable[[], Commit | None]
Found = tuple[int, int, Record]


def as_read(cache: Cache) -> Iterator[tuple[int, int, Record, Read]]:
    """Block and view of every unit, in order, what gives its record, and what reads its files, which raises as `Storage.get`.

    On an object store they are asked for ahead, within the bounds of `cskd.storage.ahead`.
    """
    if isinstance(cache.storage, Posix):
        for block, view, record in records(cache, exact=True):
            yield block, view, record, partial(_file, cache)
        return

    def contents(found: Found) -> dict[str, bytes | OSError]:
        read: dict[str, bytes | OSError] = {}
        for file in _files(found):
            try:
                read[file.path] = _file(cache, file)
            except OSError as e:
                read[file.path] = e
        return read

    units = ahead(records(cache, exact=True), contents, lambda found: sum(file.size for file in _files(found)))
    with closing(units):
        for (block, view, record), files in units:
            yield block, view, record, partial(_of_unit, files.result)


def _files(found: Found) -> list[UnitFile]:
    """Of a record that is there, and no damaged one."""
    try:
        commit = found[2]()
    except CskdError:  # its reader meets it, too
        return []
    return commit.files if commit else []


def _file(cache: Cache, file: UnitFile) -> bytes:
    return cache.storage.get(file.path, limit=file.size)


def _of_unit(contents: Callable[[], dict[str, bytes | OSError]], file: UnitFile) -> bytes:
    found = contents()[file.path]
    if isinstance(found, OSError):
        raise found
    return found
