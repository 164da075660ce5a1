"""The frozen list of samples of a data set, made once by `cskd pack` or `cskd index`. No torch in here.

Samples are in shard order, then in member order. A block is a run of whole shards of about 8,192 samples. The id hashes
the ordered (key, label, crc32c) and the block bounds, not file names or offsets: a data set packed twice has one id.
Columns are memory-mapped on opening, so that processes share them. The files: `cskd/dataset/inventory_format.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cskd.dataset.inventory_checks import MEND, check_columns
from cskd.dataset.inventory_format import (
    DTYPES,
    HEADER,
    INVENTORY_FOLDER,
    INVENTORY_FORMAT,
    INVENTORY_VERSION,
    PARTIAL,
    finish_column,
    header_bytes,
    header_hash,
    identify,
    read_column,
    read_header,
    relabel_raw,
    verify_files,
)
from cskd.dataset.look_alikes import look_alike
from cskd.dataset.remote_shards import RemoteShards, fetched_inventory, lost_shards
from cskd.errors import DataError
from cskd.files.durable import put, sync
from cskd.files.folders import OF_DATA, other_kind
from cskd.files.paths import is_remote, local_path, location_text
from cskd.files.read import file_sha256
from cskd.seeds import U64, key_hash
from cskd.storage.node_cache import Held, node_cache

LOOKED_AT = 50_000  # keys that are compared with one that is not there
BATCH = 4096  # samples buffered before they go to the column files


class Sample(NamedTuple):
    """One row: an encoded image of `size` bytes at byte `offset` of shard number `shard`."""

    key: str
    label: int
    crc32c: int
    shard: int
    offset: int
    size: int


class ShardFile(NamedTuple):
    """A shard's path relative to the data folder, and its length in bytes."""

    name: str
    bytes: int


class Inventory:
    """An open inventory; columns as in `cskd/dataset/inventory_format.py`. Pickles as its path and is opened again."""

    def __init__(
        self, path: Path, root: Path | RemoteShards, header: dict[str, Any], columns: dict[str, NDArray[Any]]
    ) -> None:
        self.path = path  # the inventory's own folder
        self.remote = root if isinstance(root, RemoteShards) else None
        self.root = root if isinstance(root, Path) else Path(root.location)  # the folder the shards are in
        self.held: Held | None = None  # keeps a copy of the inventory in the node cache
        self.id: str = header["id"]
        self.classes: list[str] = header["classes"]
        self.n: int = header["num_samples"]
        self.blocks: NDArray[np.int64] = np.array(header["blocks"], np.int64)  # [n_blocks + 1], 0 first, n last
        self.shards = [ShardFile(s["name"], s["bytes"]) for s in header["shards"]]
        self.made: dict[str, Any] = header["made"]  # by what, from what, with which options
        self.notes: list[str] = header["notes"]  # what a user should know about how the source was read
        self._key: NDArray[np.uint8] = columns["key"]
        self._key_offset: NDArray[np.int64] = columns["key_offset"]
        self.key_hash: U64 = columns["key_hash"]
        self.label: NDArray[np.int32] = columns["label"]
        self.crc32c: NDArray[np.uint32] = columns["crc32c"]
        self.shard: NDArray[np.uint32] = columns["shard"]
        self.offset: NDArray[np.int64] = columns["offset"]
        self.size: NDArray[np.int64] = columns["size"]

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.path, self.remote or self.root)

    def __len__(self) -> int:
        return self.n

    def key(self, i: int) -> str:
        """The key of sample i."""
        try:
            return self._key[self._key_offset[i] : self._key_offset[i + 1]].tobytes().decode()
        except UnicodeDecodeError as e:
            raise DataError(f"{self.path}: the key of sample {i} is no UTF-8 ({e.reason}); {MEND}") from None

    def find(self, key: str) -> int:
        """The index of the sample with that key. Raises DataError when there is none."""
        for i in np.flatnonzero(self.key_hash == np.uint64(key_hash(key))):
            if self.key(int(i)) == key:
                return int(i)
        if alike := look_alike(key, map(self.key, range(min(self.n, LOOKED_AT)))):
            raise DataError(f"no sample '{key}' in {self.path}, but '{alike[0]}': {alike[1]}; give that one")
        raise DataError(f"no sample '{key}' in {self.path}; its keys look like '{self.key(0)}'")

    def block_of(self, i: int) -> int:
        """The block that holds sample i."""
        return int(np.searchsorted(self.blocks, i, side="right")) - 1

    def block_range(self, block: int) -> tuple[int, int]:
        """First sample of a block and the one after its last."""
        return int(self.blocks[block]), int(self.blocks[block + 1])

    def shard_path(self, shard: int) -> Path:
        """Where shard number `shard` of a local data set should be."""
        return self.root / self.shards[shard].name

    def where(self, shard: int) -> str:
        """Path or address of shard number `shard`, for messages."""
        return self.remote.where(self.shards[shard].name) if self.remote else str(self.shard_path(shard))

    def lost_shards(self) -> dict[int, str]:
        """Number of each shard that is missing, can't be opened, or has another length than recorded -> what is wrong."""
        return lost_shards(self, self.remote)

    def check_shards(self) -> None:
        """Before long work. Raises DataError, in one line, where a shard is not as recorded: see `lost_shards`."""
        lost = self.lost_shards()
        if not lost:
            return
        first, n = next(iter(lost.values())), len(self.shards)
        if len(lost) == n and not self.remote and (why_not := other_kind(self.root, OF_DATA)):
            raise DataError(f"{self.root} {why_not}")
        if len(lost) == n > 1:
            raise DataError(f"none of the {n} image shards is there as it was: {first}")
        raise DataError(first + (f" (and {len(lost) - 1} more of {n} shards)" if len(lost) > 1 else ""))


def open_inventory(path: str | Path, data: str | Path | None = None, verify: bool = False) -> Inventory:
    """Open the inventory at `path`: a data folder, or an inventory folder such as the copy in a cache.

    Args:    data: the folder the shards are in, where that is not the folder that holds the inventory. If it has an
             inventory of its own, that one is opened, so that files may have other names there; the ids must be equal.
             verify: also check the sha256 of every column and recompute the id.
    Raises:  DataError when there is none, it is damaged, newer than this code, or `data` holds another data set.

    Without `data` the shards are in the `root` that the header names (see `cskd index --out`), else next to the inventory.
    """
    path, at, held = _folder_of(path)
    header = read_header(path)
    root = _shards_at(data if data is not None else header.get("root", at))
    if data is not None and (is_remote(data) or (Path(data) / INVENTORY_FOLDER / HEADER).is_file()):
        there, at, held_there = _folder_of(data)
        header_there = read_header(there)
        if header_there["id"] != header["id"]:
            raise DataError(
                f"{at} holds the data set {header_there['id'][:12]}, but {path} is of {header['id'][:12]}; "
                "point to the data that it was made from"
            )
        path, root, held = there, _shards_at(header_there.get("root", data)), held_there
    inventory = _open(path, root, verify)
    inventory.held = held
    return inventory


def _folder_of(path: str | Path) -> tuple[Path, str | Path, Held | None]:
    """The folder of an inventory, of an address a copy; the data folder that it describes; and what keeps the copy."""
    if is_remote(path):
        return fetched_inventory(str(path))
    path = local_path(path, "the data set")
    if (path / INVENTORY_FOLDER / HEADER).is_file():
        path = path / INVENTORY_FOLDER
    return path, path.parent, None


def _shards_at(place: str | Path) -> Path | RemoteShards:
    return RemoteShards(location_text(str(place), "the data set"), node_cache()) if is_remote(place) else Path(place)


def _open(path: Path, root: Path | RemoteShards, verify: bool = False) -> Inventory:
    """The inventory whose own folder is `path`, with its shards in `root`."""
    header = read_header(path)
    columns = {name: read_column(path, name, dtype) for name, dtype in DTYPES.items()}
    n = header["num_samples"]
    for name, column in columns.items():
        expected = columns["key_offset"][-1:].sum() if name == "key" else n + (name == "key_offset")
        if len(column) != expected:
            raise DataError(f"{path / name}.npy holds {len(column)} entries, expected {expected}; {MEND}")
    if verify:
        verify_files(path, header)
    check_columns(header, columns, path)
    return Inventory(path, root, header, columns)


def block_bounds(shard_counts: Sequence[int], block: int) -> NDArray[np.int64]:
    """Group consecutive shards to blocks of about `block` samples.

    A shard joins the block that it brings nearer to `block`; a last block below a quarter of that joins the one before.
    Returns: int64 [n_blocks + 1], first sample of every block, then the number of samples.
    """
    bounds, current = [0], 0
    for count in shard_counts:
        if current and abs(current + count - block) > abs(current - block):
            bounds.append(bounds[-1] + current)
            current = 0
        current += count
    if len(bounds) > 1 and current < block // 4:
        bounds[-1] += current
    else:
        bounds.append(bounds[-1] + current)
    return np.array(bounds, np.int64)


def evenly(n: int, most: int) -> NDArray[np.int64]:
    """At most so many of 0..n-1, spread evenly from the first to the last, rising: where a few have to stand for all."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).astype(np.int64))


def first_duplicate(key_hashes: U64) -> tuple[int, int] | None:
    """Two samples whose keys hash alike (equal keys; 64 bits make others improbable), or None."""
    ordered = np.sort(key_hashes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return None
    first, second = np.flatnonzero(key_hashes == twice[0])[:2].tolist()
    return first, second


class InventoryWriter:
    """Writes an inventory folder sample by sample, in little memory. Nothing is valid before `finish` has returned."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._raw = {name: (folder / f"{name}.raw").open("wb") for name in DTYPES}
        self._rows: list[Sample] = []
        self._counts: list[int] = []  # samples of each shard
        self._key_end = 0
        self._write("key_offset", [0])

    def add(self, sample: Sample) -> None:
        """The next sample, in shard order. ValueError when its shard comes before the last one's."""
        if sample.shard < len(self._counts) - 1:
            raise ValueError(
                f"sample '{sample.key}' of shard {sample.shard} after one of shard {len(self._counts) - 1}"
            )
        while len(self._counts) <= sample.shard:
            self._counts.append(0)
        self._counts[sample.shard] += 1
        self._rows.append(sample)
        if len(self._rows) == BATCH:
            self._flush()

    def finish(
        self,
        classes: Sequence[str],
        shards: Sequence[ShardFile],
        block: int,
        made: dict[str, Any],
        notes: Sequence[str] = (),
        *,
        relabel: Mapping[int, int] | None = None,
        root: Path | None = None,
    ) -> None:
        """Write columns and header and sync them to disk.

        Args:    relabel: the label for each number that samples were added with. root: the folder of the shards, absolute,
                 where that is not the one that holds the inventory.
        Raises:  DataError for no samples, a label outside the classes, or a key that occurs twice.
        """
        self._flush()
        self.close()
        n = sum(self._counts)
        if n == 0:
            raise DataError("no samples to list; expected images with labels")
        if relabel:
            relabel_raw(self.folder / "label.raw", relabel)
        for name, dtype in DTYPES.items():
            finish_column(
                self.folder, name, np.dtype(dtype), self._key_end if name == "key" else n + (name == "key_offset")
            )
        columns = {name: read_column(self.folder, name, dtype) for name, dtype in DTYPES.items()}
        bounds = block_bounds(self._counts, block)
        header = {
            "format": INVENTORY_FORMAT,
            "version": INVENTORY_VERSION,
            "id": identify(self.folder, bounds),
            "num_samples": n,
            "classes": list(classes),
            "blocks": bounds.tolist(),
            "shards": [shard._asdict() for shard in shards],
            **({} if root is None else {"root": str(root)}),
            "made": made,
            "notes": list(notes),
            "columns": {
                name: {"dtype": dtype, "sha256": file_sha256(self.folder / f"{name}.npy")}
                for name, dtype in DTYPES.items()
            },
        }
        self._check(Inventory(self.folder, self.folder.parent, header, columns))
        header["hash"] = header_hash(header)
        put(self.folder / HEADER, header_bytes(header))

    def close(self) -> None:
        """Close the files of a writer that will not be finished."""
        for file in self._raw.values():
            file.close()

    def _check(self, made: Inventory) -> None:
        low, high = int(made.label.min()), int(made.label.max())
        if low < 0 or high >= len(made.classes):
            i = int(np.flatnonzero((made.label < 0) | (made.label >= len(made.classes)))[0])
            raise DataError(
                f"sample '{made.key(i)}' has label {made.label[i]}, expected 0..{len(made.classes) - 1}; "
                "give a class file with a name for every label"
            )
        if pair := first_duplicate(made.key_hash):
            first, second = (f"'{made.key(i)}' in {made.shards[made.shard[i]].name}" for i in pair)
            same = made.shard[pair[0]] == made.shard[pair[1]]
            cure = "put the shard's name in front of each key with --key-prefix shard"
            raise DataError(
                f"two samples have the same key: {first} and {second}; keys must differ over all shards, and dots in them become "
                f"'_': {'rename one, or take it out' if same else cure}"
            )

    def _flush(self) -> None:
        if not self._rows:
            return
        keys = [row.key.encode() for row in self._rows]
        self._raw["key"].write(b"".join(keys))
        ends = self._key_end + np.cumsum([len(key) for key in keys])
        self._key_end = int(ends[-1])
        self._write("key_offset", ends)
        self._write("key_hash", [key_hash(row.key) for row in self._rows])
        for name in ("label", "crc32c", "shard", "offset", "size"):
            self._write(name, [getattr(row, name) for row in self._rows])
        self._rows.clear()

    def _write(self, name: str, values: Any) -> None:
        self._raw[name].write(np.asarray(values, DTYPES[name]).tobytes())


def write_inventory(
    data: Path,
    samples: Iterable[Sample],
    *,
    classes: Sequence[str],
    shards: Sequence[ShardFile],
    block: int = 8192,
    made: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Inventory:
    """Make data/inventory from samples in shard order: whole or not at all.

    Raises:  DataError as `InventoryWriter.finish`, and when `data` has another inventory already.
    """
    with new_inventory(data) as writer:
        for sample in samples:
            writer.add(sample)
        writer.finish(classes, shards, block, made or {}, notes)
        return publish_inventory(writer.folder, data)


@contextmanager
def new_inventory(data: Path) -> Iterator[InventoryWriter]:
    """A writer in a folder of its own inside `data`, for `publish_inventory`; what isn't published is removed."""
    partial = data / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    writer = InventoryWriter(partial)
    try:
        yield writer
    finally:
        writer.close()
        shutil.rmtree(partial, ignore_errors=True)


def publish_inventory(partial: Path, data: Path) -> Inventory:
    """Rename a finished inventory folder to data/inventory; one of the same id there stays, another is a DataError."""
    final = data / INVENTORY_FOLDER
    if (final / HEADER).is_file():
        old, new = open_inventory(final), open_inventory(partial)
        if old.id != new.id or old.classes != new.classes:
            what = f"the inventory {old.id[:12]}" if old.id != new.id else "an inventory with other class names"
            raise DataError(
                f"{data} holds {what} already; delete {final} first if it may go, or give these shards a folder of their own"
            )
        old.notes = [*new.notes, "this inventory was here already: nothing was written"]
        return old
    shutil.rmtree(final, ignore_errors=True)  # without a header it is nobody's
    os.rename(partial, final)
    sync(data)
    return open_inventory(final)
