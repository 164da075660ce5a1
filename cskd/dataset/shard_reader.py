"""Reading encoded images out of the shards, by inventory: one pread a sample, checked.

Shards of an object store are read as copies in the node cache. Where only a few images of one are asked for, no copy is made."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from cskd.dataset.inventory import Inventory
from cskd.dataset.remote_shards import FIND_SHARDS, SHARD, ChangedShardError
from cskd.errors import DataError, ReadError, why
from cskd.files.read import open_regular, pread
from cskd.storage.node_cache import Held, InUseError

TRIES = 3
# Seconds before the second try, doubled before the third: what a network file system needs to come back.
RETRY_WAIT = 0.2
COPIES_OPEN = 4  # copies that a reader keeps from being evicted: those it opened last
FEW = 8  # images of a shard that are read from the object store one by one; then the whole shard is copied


class _Open(NamedTuple):
    fd: int
    held: Held | None  # what keeps a copy

    def close(self) -> None:
        os.close(self.fd)
        if self.held is not None:
            self.held.close()


def shard_file(inventory: Inventory, shard: int) -> tuple[Path, Held | None]:
    """Shard number `shard` as a file of this machine, and what keeps it there where that is a copy. Raises as `RemoteShards.copy`."""
    if inventory.remote is None:
        return inventory.shard_path(shard), None
    held = inventory.remote.copy(inventory, shard)
    return held.path / SHARD, held


class ShardReader:
    """Samples of an inventory as bytes, by index. Opens shards where it is used: pickle it, or fork, as you like.

    Threads may share one, but then read one after the other. Of shards on an object store: whole: all of their images will be read,
    so copy them at once. fresh: a copy that was there before is made again, since the store's bytes are what is looked at.
    """

    def __init__(self, inventory: Inventory, max_open: int = 32, whole: bool = False, fresh: bool = False) -> None:
        self.inventory, self.max_open, self.whole, self.fresh = inventory, max_open, whole, fresh
        self._files: OrderedDict[int, _Open] = OrderedDict()  # by shard, the one used last at the end
        self._asked = Counter[int]()  # by shard: images that were read without a copy
        self._seen = set[int]()  # shards whose copy is of this reader's time
        self._changed = set[int]()  # shards that are not copied, since not all of their images are as they were packed
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.inventory, self.max_open, self.whole, self.fresh)

    def __del__(self) -> None:
        self.close()

    def read(self, i: int) -> bytes:
        """The encoded image of sample i.

        Raises:  ReadError when the disk fails (after 3 tries); DataError when the shard is missing or was changed, or
                 the bytes don't have the recorded crc32c. Neither says that the image is bad.
        """
        shard = int(self.inventory.shard[i])
        offset, size = int(self.inventory.offset[i]), int(self.inventory.size[i])
        data = self._read(i, shard, offset, size)
        if google_crc32c.value(data) != self.inventory.crc32c[i] and self._copied(shard):
            data = self._again(i, shard, offset, size)
        if google_crc32c.value(data) != self.inventory.crc32c[i]:
            raise DataError(
                f"{self._name(i, shard)}: its {len(data)} bytes at {offset} are not those that were packed "
                f"({size} bytes, crc32c {self.inventory.crc32c[i]:08x}); restore the shard or pack again"
            )
        return data

    def close(self) -> None:
        """Close all files; reading again opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _copied(self, shard: int) -> bool:
        """Whether a shard is read as a copy."""
        return shard in self._files and self._files[shard].held is not None

    def _again(self, i: int, shard: int, offset: int, size: int) -> bytes:
        """The bytes of a sample out of a new copy of its shard."""
        with self._lock:
            self._drop(shard)
            self._damaged(shard, f"sample '{self.inventory.key(i)}'")
        return self._read(i, shard, offset, size)

    def _damaged(self, shard: int, wrong: str) -> None:
        assert self.inventory.remote is not None
        self.inventory.remote.damaged(self.inventory, shard, wrong)

    def _read(self, i: int, shard: int, offset: int, size: int) -> bytes:
        if self._pid != os.getpid():  # a fork: another thread may have held the parent's lock
            self._pid, self._lock = os.getpid(), threading.Lock()
            self.close()
        for attempt in range(TRIES):
            try:
                with self._lock:
                    fd = self._open(i, shard)
                    return self._range(shard, offset, size) if fd is None else pread(fd, offset, size)
            except FileNotFoundError:
                raise DataError(f"{self._name(i, shard)}: there is no such file; {FIND_SHARDS}") from None
            except OSError as e:
                error = e
                with self._lock:
                    self._drop(shard)  # a network file system may need the file opened again
                if attempt + 1 < TRIES:
                    time.sleep(RETRY_WAIT * 2**attempt)
        raise ReadError(f"{self._name(i, shard)}: reading failed {TRIES} times: {why(error)}")

    def _open(self, i: int, shard: int) -> int | None:
        """A descriptor of the shard; None where a range of it is to be asked for."""
        there = self._files.pop(shard, None)
        if there is None:
            most = self.max_open if self.inventory.remote is None else min(self.max_open, COPIES_OPEN)
            while len(self._files) >= most:
                self._files.popitem(last=False)[1].close()
            held = None
            if self.inventory.remote is not None and (held := self._held(shard)) is None:
                return None
            there = _Open(open_regular(self.inventory.shard_path(shard) if held is None else held.path / SHARD), held)
            length, expected = os.fstat(there.fd).st_size, self.inventory.shards[shard].bytes
            if length != expected:
                there.close()
                if held is None:
                    raise DataError(
                        f"{self._name(i, shard)}: the shard has {length} bytes, {expected} when it was packed; "
                        "restore it or pack again"
                    )
                self._damaged(shard, f"{length} bytes in place of {expected}")
                return self._open(i, shard)
        self._files[shard] = there
        return there.fd

    def _held(self, shard: int) -> Held | None:
        """The copy of a remote shard, made where that is worth it; None where it is not, or there is no room for one now."""
        remote, inventory = self.inventory.remote, self.inventory
        assert remote is not None
        if self.fresh and shard not in self._seen:
            remote.forget(inventory, shard)
        self._seen.add(shard)
        held = remote.held(inventory, shard)
        if (
            held is None
            and shard not in self._changed
            and (self.whole or self._asked[shard] >= FEW or not remote.storage.ranges)
        ):
            try:
                return remote.copy(inventory, shard)
            except ChangedShardError:
                self._changed.add(shard)
            except InUseError:
                pass
        return held

    def _range(self, shard: int, offset: int, size: int) -> bytes:
        assert self.inventory.remote is not None
        self._asked[shard] += 1
        return self.inventory.remote.range(self.inventory, shard, offset, size)

    def _drop(self, shard: int) -> None:
        if (there := self._files.pop(shard, None)) is not None:
            there.close()

    def _name(self, i: int, shard: int) -> str:
        return f"sample '{self.inventory.key(i)}' in {self.inventory.where(shard)}"
