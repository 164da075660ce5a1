"""Image shards, written with webdataset's TarWriter: the same samples give the same bytes."""

from __future__ import annotations

import contextlib
import tarfile
from pathlib import Path

import webdataset

from cskd.dataset.inventory import ShardFile
from cskd.files.durable import sync

SHARD_BYTES = 1_000_000_000


class ShardWriter:
    """Writes folder/shard-000000.tar and on, each of at most `shard_size` samples and `shard_bytes` bytes of images.

    A sample is the member KEY.EXTENSION and then KEY.cls, its label in ASCII. Date, owner and mode are fixed.
    """

    def __init__(self, folder: Path, shard_size: int, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_size, self.shard_bytes = folder, shard_size, shard_bytes
        self.shards: list[ShardFile] = []  # those that are finished
        self._samples = self._bytes = 0  # in the shard that is open

    def add(self, key: str, extension: str, data: bytes, label: int) -> tuple[int, int]:
        """Write one sample. Returns its shard's number and the byte offset of `data` in that shard's file."""
        if self._samples and (self._samples == self.shard_size or self._bytes + len(data) > self.shard_bytes):
            self.close()
        if not self._samples:
            self._open()
        # Two calls, because one would sort the members by name; the image comes first in every shard.
        self._tar.write({"__key__": key, extension: data})
        offset = self._tar.tarstream.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._tar.write({"__key__": key, "cls": b"%d" % label})
        self._tar.tarstream.members.clear()  # tarfile remembers every member, for reading
        self._samples += 1
        self._bytes += len(data)
        return len(self.shards), offset

    def close(self) -> list[ShardFile]:
        """Finish the open shard, have it on disk, and return all shards written so far."""
        if self._samples:
            self._tar.close()
            self._file.close()
            sync(self._path)
            self.shards.append(ShardFile(self._path.name, self._path.stat().st_size))
            self._samples = self._bytes = 0
        return self.shards

    def abandon(self) -> None:
        """Close the open file of a writer that will not be finished."""
        if self._samples:
            with contextlib.suppress(OSError):
                self._tar.tarstream.fileobj.close()  # else it complains when it is collected, of a file that is closed
            self._file.close()

    def _open(self) -> None:
        self._path = self.folder / f"shard-{len(self.shards):06d}.tar"
        self._file = self._path.open("xb", buffering=1 << 20)
        # PAX: like USTAR where a name is short and ASCII, and the only format without a limit where it is not.
        self._tar = webdataset.TarWriter(
            self._file, user="", group="", mode=0o444, mtime=0, encoder=False, format="PAX_FORMAT"
        )
