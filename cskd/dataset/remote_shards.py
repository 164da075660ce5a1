"""Shards and inventories that lie on an object store: whole copies in this machine's node cache, or a range of one for a few images."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cskd.dataset.inventory_checks import MEND
from cskd.dataset.inventory_format import DTYPES, HEADER, INVENTORY_FOLDER, read_header, verify_files
from cskd.errors import DataError, why
from cskd.files.folders import OF_DATA, other_kind
from cskd.files.paths import location_text
from cskd.files.read import MAX_TEXT, open_regular
from cskd.near import absent
from cskd.storage import Storage, join, open_storage
from cskd.storage.fetch import download
from cskd.storage.node_cache import Held, NodeCache, copy_name, node_cache, say_fetched_again
from cskd.storage.places import kind_of_objects

FIND_SHARDS = "restore it, or say where the shards are: data.train or data.val in the config, or --data of inspect, verify and repair"
ASKED_AT_ONCE = 32  # shards whose size is asked for, of a web server, which can't list them
SHARD = "shard"  # the file in a copy


class ChangedShardError(DataError):
    """A shard on an object store that is not as it was packed; single images of it may be."""


class Listed(Protocol):
    """An open inventory, as far as its shards go; see `cskd.dataset.inventory.Inventory`."""

    root: Path
    id: str
    crc32c: NDArray[np.uint32]
    shard: NDArray[np.uint32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]

    @property
    def shards(self) -> Sequence[tuple[str, int]]: ...

    def key(self, i: int) -> str: ...

    def shard_path(self, shard: int) -> Path: ...


_opening = threading.Lock()


@dataclass(frozen=True)
class RemoteShards:
    """Where the shards of an inventory are: an address, as `location_text` has it. Cheap to pickle."""

    location: str
    node: NodeCache

    @property
    def storage(self) -> Storage:
        """Opened when it is asked for first, by whichever of several threads; from Python 3.12 on cached_property has no lock."""
        with _opening:
            opened: Storage = self.__dict__.get("storage") or open_storage(self.location, "the data set")
            self.__dict__["storage"] = opened
            return opened

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteShards, (self.location, self.node)

    def where(self, name: str) -> str:
        """The address of a shard."""
        return join(self.location, name)

    def sizes(self, shards: Sequence[tuple[str, int]]) -> dict[str, int]:
        """Bytes of each shard that is there, by name."""
        wanted = {name for name, _ in shards}
        if not self.location.startswith("http"):
            return {stat.key: stat.size for stat in self.storage.list() if stat.key in wanted}
        with ThreadPoolExecutor(ASKED_AT_ONCE, "shards") as pool:
            stats = pool.map(self.storage.stat, sorted(wanted))
            return {stat.key: stat.size for stat in stats if stat is not None}

    def held(self, inventory: Listed, shard: int) -> Held | None:
        """The copy of a shard, where there is one already."""
        return self.node.hold(self._name(inventory, shard))

    def copy(self, inventory: Listed, shard: int, stop: Callable[[], bool] = lambda: False) -> Held:
        """The whole shard on this machine, every image as the inventory says.

        Args:    stop: asked now and then; InterruptedError where it says so.
        Raises:  FileNotFoundError; ChangedShardError; StorageError; as `NodeCache.fetch`.
        """
        name, size = inventory.shards[shard]

        def fill(folder: Path) -> None:
            for last in (False, True):  # what comes damaged may have been damaged on its way
                came = download(self.storage, name, size, folder / SHARD, stop)
                if wrong := _wrong(inventory, shard, folder / SHARD, came):
                    if last:
                        raise ChangedShardError(f"{self.where(name)} {wrong}; restore it or pack again")
                    continue
                return

        return self.node.fetch(self._name(inventory, shard), size, fill, self.where(name))

    def damaged(self, inventory: Listed, shard: int, wrong: str) -> None:
        """Remove the copy of a shard, and say so."""
        say_fetched_again(self.where(inventory.shards[shard][0]), wrong)
        self.forget(inventory, shard)

    def forget(self, inventory: Listed, shard: int) -> None:
        """Remove the copy of a shard."""
        self.node.drop(self._name(inventory, shard))

    def range(self, inventory: Listed, shard: int, offset: int, size: int) -> bytes:
        """Some bytes of a shard, not copied. FileNotFoundError, StorageError."""
        return self.storage.get(inventory.shards[shard][0], offset, size)

    def _name(self, inventory: Listed, shard: int) -> str:
        return copy_name(self.location, inventory.shards[shard][0], inventory.id)


def lost_shards(inventory: Listed, remote: RemoteShards | None) -> dict[int, str]:
    """Number of each shard that is missing, can't be opened, or has another length than recorded -> what is wrong."""
    lost: dict[int, str] = {}
    there = remote.sizes(inventory.shards) if remote else None
    for shard, (name, length) in enumerate(inventory.shards):
        where = remote.where(name) if remote else str(inventory.shard_path(shard))
        try:
            found = there[name] if there is not None else _size(inventory.shard_path(shard))
        except (FileNotFoundError, KeyError):
            place = remote.location if remote else inventory.root if inventory.root.exists() else absent(inventory.root)
            lost[shard] = f"shard {name} is not in {place}; {FIND_SHARDS}"
        except OSError as e:
            lost[shard] = f"{where} can't be read: {why(e)}"
        else:
            if found != length:
                lost[shard] = f"{where} has {found} bytes, the inventory says {length}; restore it or pack again"
    return lost


def _size(path: Path) -> int:
    fd = open_regular(path)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def samples_of(inventory: Listed, shard: int) -> range:
    """The samples of a shard, which follow one another."""
    first, stop = np.searchsorted(inventory.shard, [shard, shard + 1]).tolist()
    return range(first, stop)


def fetched_inventory(address: str) -> tuple[Path, str, Held]:
    """The inventory of the data folder, or the inventory folder, at an address: a copy of it on this machine, checked.

    Returns: its folder, the address of the data folder, and what keeps the copy.
    Raises:  DataError where there is none, or it is damaged; StorageError.
    """
    location = location_text(address, "the data set")
    storage = open_storage(location, "the data set")
    prefix, header = f"{INVENTORY_FOLDER}/", _read(storage, f"{INVENTORY_FOLDER}/{HEADER}")
    if header is None and (header := _read(storage, HEADER)) is not None:
        prefix, location = "", location.rpartition("/")[0]
    if header is None:
        if why_not := other_kind(location, OF_DATA, kind_of_objects(location, "the data set")):
            raise DataError(f"{location} {why_not}")
        raise DataError(f"no inventory at {location}; make one with 'cskd pack' or 'cskd index', and copy it there")
    columns = [f"{prefix}{name}.npy" for name in DTYPES]
    name = copy_name(storage.location, header)

    def fill(folder: Path) -> None:
        try:
            found = storage.get_many(columns)
        except FileNotFoundError as e:
            raise DataError(f"{e.filename} is not there; copy the folder {INVENTORY_FOLDER} again, or {MEND}") from None
        for column, data in zip(DTYPES, found, strict=True):
            (folder / f"{column}.npy").write_bytes(data)
        (folder / HEADER).write_bytes(header)
        _checked(folder, storage.location)

    size = len(header) + sum(stat.size for stat in map(storage.stat, columns) if stat is not None)
    for last in (False, True):
        held = node_cache().fetch(name, size, fill, join(storage.location, f"{prefix}{HEADER}"))
        try:
            _checked(held.path, storage.location)
            break
        except DataError as e:  # of a copy that was whole when it was made
            held.close()
            if last:
                raise
            say_fetched_again(join(storage.location, prefix.rstrip("/")), str(e).rpartition("/")[2].partition(";")[0])
            node_cache().drop(name)
    return held.path, location, held


def _checked(folder: Path, address: str) -> None:
    """DataError, which names the address, unless every byte of an inventory is as its header says."""
    try:
        verify_files(folder, read_header(folder))
    except DataError as e:
        raise DataError(str(e).replace(str(folder), address)) from None


def _read(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.get(key, limit=MAX_TEXT)
    except FileNotFoundError:
        return None
    except OSError as e:
        if e.errno != errno.EFBIG:
            raise
        raise DataError(f"{join(storage.location, key)} has {e.strerror}; {MEND}") from None


def _wrong(inventory: Listed, shard: int, path: Path, came: int) -> str:
    """What is wrong with a copy of a shard; empty where every image is as it was packed."""
    size = inventory.shards[shard][1]
    if came != size:
        return f"has {came} bytes, the inventory says {size}"
    with path.open("rb") as file:
        for i in samples_of(inventory, shard):
            file.seek(int(inventory.offset[i]))
            if google_crc32c.value(file.read(int(inventory.size[i]))) != inventory.crc32c[i]:
                return f"holds other bytes for sample '{inventory.key(i)}' than were packed"
    return ""
