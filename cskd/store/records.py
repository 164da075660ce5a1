"""The records of all units of a cache, in order; on an object store many are asked for at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from cskd.storage.ahead import ahead
from cskd.storage.posix import Posix
from cskd.store.cache import Cache
from cskd.store.commit import Commit, record_names
from cskd.store.format import record_name


def records(cache: Cache, exact: bool = False) -> Iterator[tuple[int, int, Callable[[], Commit | None]]]:
    """Block and view of every unit, and what gives its record, None where there is none, or raises as `Cache.commit_of`."""
    places = [(block, view) for block in range(cache.blocks) for view in range(cache.views)]
    if isinstance(cache.storage, Posix) or (cache.index is not None and cache.index.views >= cache.views):
        for block, view in places:
            yield block, view, partial(cache.commit_of, block, view, exact)
        return
    web = cache.location.startswith("http")  # which has no list of its files
    names = [] if web else record_names(cache.storage, cache.blocks)

    def record(place: tuple[int, int]) -> Commit | None:
        block, view = place
        return cache.commit_of(block, view, exact) if web or record_name(view) in names[block] else None

    with closing(ahead(places, record)) as found:
        for (block, view), commit in found:
            yield block, view, commit.result
