"""The one interface of what keeps bytes: `Storage`, by keys relative to a location.

A location is a path of this machine, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, and for reading alone
http(s)://HOST/PREFIX. A key is names with '/' between them, none of them empty, '.' or '..'. docs/STORAGE.md has the variables
of the environment that endpoints and credentials come from.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Contents = list[bytes]  # in classes that have a method `list`


@dataclass(frozen=True)
class Stat:
    """What a listing says of an object: bytes, when it was written last, in seconds since 1970 (stores keep whole ones), and what
    the store calls this content or version of it (ETag); '' where it does not say."""

    key: str
    size: int
    modified: float = 0.0
    version: str = ""


class Range(NamedTuple):
    """Some bytes of an object; size None: to its end."""

    key: str
    start: int = 0
    size: int | None = None


class Counts:
    """Requests that were sent, and bytes that came or went, of one storage in this process."""

    def __init__(self) -> None:
        self.requests, self.read, self.written = 0, 0, 0
        self._lock = threading.Lock()

    def add(self, requests: int = 1, read: int = 0, written: int = 0) -> None:
        with self._lock:
            self.requests += requests
            self.read += read
            self.written += written


class Storage(Protocol):
    """Bytes under keys. Everything here may be called from several threads, and an object can be pickled: it is opened again.

    Raises:  FileNotFoundError where a key is absent, other OSErrors of a disk; StorageError where an object store can't be
             reached, has no such bucket or does not let this user in, which says nothing of an object.
    """

    location: str  # as `cskd.storage.open_storage` was given it, without a slash at its end
    counts: Counts
    ranges: bool  # False once a web server has shown that it sends whole objects only

    def get(self, key: str, start: int = 0, size: int | None = None, *, limit: int | None = None) -> bytes:
        """The bytes of an object, or of a range of it, fewer where it ends. limit: OSError for an object of more bytes."""

    def get_many(self, wanted: Sequence[str | Range]) -> Contents:
        """As `get`, of many objects or ranges, with many requests in flight, in the order of `wanted`."""

    def put(self, key: str, data: bytes) -> None:
        """Put an object in place of what was there: whole or not at all, and durably."""

    def create(self, key: str, data: bytes) -> bool:
        """Put an object in place where there is none, so that of several writers the first one counts.

        Returns: whether it now holds these bytes by this call; an object store that answers "exists already" to a repeated
                 request, whose first answer was lost, holds the same bytes: that counts as put there.
        """

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Every object below the folder `prefix`, at any depth, in any order; nothing where there is none."""

    def stat(self, key: str) -> Stat | None:
        """Of one object; None where it is absent."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is absent is no error."""


def check_key(key: str) -> str:
    """A key as it was given. ValueError for one that would lead out of its location."""
    if not all(part not in ("", ".", "..") for part in key.split("/")) or "\\" in key or "\0" in key:
        raise ValueError(f"{key[:80]!r} is no key of a storage")
    return key
