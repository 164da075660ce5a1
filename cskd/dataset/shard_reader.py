"""Reading encoded images out of the shards, by inventory: one pread a sample, checked."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from typing import Any

import google_crc32c

from cskd.dataset.inventory import FIND_SHARDS, Inventory
from cskd.errors import DataError, ReadError, why
from cskd.files.read import open_regular, pread

TRIES = 3
# Seconds before the second try, doubled before the third: what a network file system needs to come back.
RETRY_WAIT = 0.2


class ShardReader:
    """Samples of an inventory as bytes, by index. Opens shards where it is used: pickle it, or fork, as you like.

    Threads may share one, but then read one after the other.
    """

    def __init__(self, inventory: Inventory, max_open: int = 32) -> None:
        self.inventory, self.max_open = inventory, max_open
        self._fds: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, the one used last at the end
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.inventory, self.max_open)

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
        if google_crc32c.value(data) != self.inventory.crc32c[i]:
            raise DataError(
                f"{self._name(i, shard)}: its {len(data)} bytes at {offset} are not those that were packed "
                f"({size} bytes, crc32c {self.inventory.crc32c[i]:08x}); restore the shard or pack again"
            )
        return data

    def close(self) -> None:
        """Close all files; reading again opens them again."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _read(self, i: int, shard: int, offset: int, size: int) -> bytes:
        if self._pid != os.getpid():  # a fork: another thread may have held the parent's lock
            self._pid, self._lock = os.getpid(), threading.Lock()
            self.close()
        for attempt in range(TRIES):
            try:
                with self._lock:
                    return pread(self._open(i, shard), offset, size)
            except FileNotFoundError:
                raise DataError(f"{self._name(i, shard)}: there is no such file; {FIND_SHARDS}") from None
            except OSError as e:
                error = e
                with self._lock:
                    self._drop(shard)  # a network file system may need the file opened again
                if attempt + 1 < TRIES:
                    time.sleep(RETRY_WAIT * 2**attempt)
        raise ReadError(f"{self._name(i, shard)}: reading failed {TRIES} times: {why(error)}")

    def _open(self, i: int, shard: int) -> int:
        fd = self._fds.pop(shard, None)
        if fd is None:
            while len(self._fds) >= self.max_open:
                os.close(self._fds.popitem(last=False)[1])
            fd = open_regular(self.inventory.shard_path(shard))
            length, expected = os.fstat(fd).st_size, self.inventory.shards[shard].bytes
            if length != expected:
                os.close(fd)
                raise DataError(
                    f"{self._name(i, shard)}: the shard has {length} bytes, {expected} when it was packed; "
                    "restore it or pack again"
                )
        self._fds[shard] = fd
        return fd

    def _drop(self, shard: int) -> None:
        fd = self._fds.pop(shard, None)
        if fd is not None:
            os.close(fd)

    def _name(self, i: int, shard: int) -> str:
        return f"sample '{self.inventory.key(i)}' in {self.inventory.shard_path(shard)}"
