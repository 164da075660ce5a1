"""The config that makes a cache, kept beside it as YAML: for people, and to finish or extend the cache with."""

from __future__ import annotations

import contextlib

from cskd.config import to_yaml
from cskd.files.durable import put
from cskd.store.cache import Cache
from cskd.store.format import RESOLVED


def resolved_of(cache: Cache) -> str:
    """The config that makes this cache, as YAML: the one it was begun with, and the views it has grown to.

    Not filled up with today's defaults: a version with one key more must find the file as it was written.
    """
    recorded = cache.manifest.config
    return to_yaml({**recorded, "cache": {**recorded["cache"], "views": cache.views}})


def write_resolved(cache: Cache) -> None:
    """Put the resolved config beside the cache, where it isn't there already."""
    path, text = cache.root / RESOLVED, resolved_of(cache)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    put(path, text.encode())
