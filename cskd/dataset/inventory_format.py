"""The files of an inventory: names, types, hashes. What is in them: `cskd/dataset/inventory.py`. No torch in here.

DATA/inventory/
  inventory.json     version, id, classes, num_samples, shards (name, bytes), blocks, how it was made, notes, `root`
                     (path of the shards' folder, where that is not DATA), sha256 of every column file, and `hash`: sha256
                     of all of that
  key.npy            uint8  [bytes]  the samples' keys in UTF-8, one after the other
  key_offset.npy     int64  [N + 1]  where each key starts in key.npy
  key_hash.npy       uint64 [N]      `cskd.seeds.key_hash` of the key
  label.npy          int32  [N]      index in classes
  crc32c.npy         uint32 [N]      of the encoded image
  shard.npy          uint32 [N]      index in shards
  offset.npy         int64  [N]      first byte of the encoded image in the shard file
  size.npy           int64  [N]      its bytes
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cskd.dataset.inventory_checks import MEND, check_header
from cskd.errors import DataError, LimitError, why
from cskd.files.durable import json_hash, sync
from cskd.files.folders import OF_DATA, other_kind
from cskd.files.read import file_sha256, open_regular, parse_json, read_file
from cskd.near import absent

RESTORE_IT = f"restore it, or {MEND}"
INVENTORY_FORMAT = "cskd inventory"
INVENTORY_VERSION = 1
INVENTORY_FOLDER = "inventory"
HEADER = "inventory.json"
PARTIAL = ".inventory.partial"  # being written; never read
DTYPES = {
    "key": "|u1",
    "key_offset": "<i8",
    "key_hash": "<u8",
    "label": "<i4",
    "crc32c": "<u4",
    "shard": "<u4",
    "offset": "<i8",
    "size": "<i8",
}


class WhichInventory(Protocol):
    """An open inventory, as far as a copy needs it."""

    path: Path
    id: str


def read_header(path: Path) -> dict[str, Any]:
    """The header of the inventory folder at `path`. DataError when there is none or it is damaged, newer or unsafe."""
    try:
        header = parse_json(read_file(path / HEADER))
    except (FileNotFoundError, NotADirectoryError):
        if why_not := other_kind(path, OF_DATA):
            raise DataError(f"{path} {why_not}") from None
        raise DataError(
            f"no inventory at {absent(path) if not path.exists() else path}; make one with 'cskd pack' or 'cskd index'"
        ) from None
    except OSError as e:
        raise DataError(f"{path / HEADER} is not readable: {why(e)}") from None
    except ValueError as e:
        raise DataError(f"{path / HEADER} is not readable: {e}; {RESTORE_IT}") from None
    if not isinstance(header, dict) or header.get("format") != INVENTORY_FORMAT:
        raise DataError(f"{path / HEADER} is not an inventory; make one with 'cskd pack' or 'cskd index'")
    if header.get("version") != INVENTORY_VERSION:
        raise DataError(f"{path / HEADER} has version {header.get('version')}, expected {INVENTORY_VERSION}; {MEND}")
    if header.get("hash") != header_hash(header):
        raise DataError(f"{path / HEADER} does not match its own hash: it was changed; {RESTORE_IT}")
    check_header(header, path / HEADER)
    return header


def read_column(path: Path, name: str, dtype: str) -> NDArray[Any]:
    """One column, memory-mapped. DataError when it is missing or not of that type."""
    try:
        os.close(open_regular(path / f"{name}.npy"))  # a pipe would be waited for
        with np.errstate(over="ignore"):  # a size over 2^64 is refused without a warning before
            column = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if not isinstance(column, np.ndarray):
            raise ValueError("a zip of arrays, expected one array")
    except LimitError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path / name}.npy is not readable: it is not there; {RESTORE_IT}") from None
    except OSError as e:
        raise DataError(f"{path / name}.npy is not readable: {why(e)}") from None
    except Exception as e:  # numpy parses a header as Python: a damaged one raises a dozen types
        raise DataError(f"{path / name}.npy is not readable: {' '.join(str(e).split())}; {RESTORE_IT}") from None
    if column.dtype != np.dtype(dtype) or column.ndim != 1:
        raise DataError(
            f"{path / name}.npy is {column.dtype} {list(column.shape)}, expected {np.dtype(dtype)} in one dimension"
        )
    return np.asarray(column)  # a plain view: indexing np.memmap is several times slower


def verify_files(path: Path, header: dict[str, Any]) -> None:
    """Check the sha256 of every column file, and the id. Raises DataError naming the first that differs."""
    for name in DTYPES:
        try:
            digest = file_sha256(path / f"{name}.npy")
        except OSError as e:
            raise DataError(f"{path / name}.npy is not readable: {why(e)}") from None
        if digest != header["columns"].get(name, {}).get("sha256"):
            raise DataError(f"{path / name}.npy does not match its recorded sha256; {RESTORE_IT}")
    try:
        found = identify(path, np.array(header["blocks"], np.int64))
    except ValueError as e:  # a column's header of another version of the format
        raise DataError(f"{path} can't be checked: {' '.join(str(e).split())}; {MEND}") from None
    if found != header["id"]:
        raise DataError(f"{path} does not have the id that its header states; {MEND}")


def check_copy(path: Path) -> None:
    """Check every byte of an inventory folder. Raises DataError naming the first file that is not as it was written."""
    header = read_header(path)
    if (path / HEADER).read_bytes() != header_bytes(header):
        raise DataError(f"{path / HEADER} is not, byte for byte, what was written")
    verify_files(path, header)


def finish_column(folder: Path, name: str, dtype: np.dtype[Any], length: int) -> None:
    """Turn raw values of known length into an .npy file, on disk."""
    raw, final = folder / f"{name}.raw", folder / f"{name}.npy"
    about = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    with raw.open("rb") as source, final.open("wb") as target:
        np.lib.format.write_array_header_1_0(target, about)
        shutil.copyfileobj(source, target, 1 << 20)
    raw.unlink()
    sync(final)


def relabel_raw(raw: Path, relabel: Mapping[int, int]) -> None:
    """Give each number of a label column that is not finished the label that the mapping has for it."""
    known = np.array(sorted(relabel), np.int32)
    labels = np.array([relabel[int(number)] for number in known], DTYPES["label"])
    if not np.array_equal(known, labels):
        raw.write_bytes(labels[np.searchsorted(known, np.fromfile(raw, DTYPES["label"]))].tobytes())


def identify(folder: Path, bounds: NDArray[np.int64]) -> str:
    """The id: sha256 over keys, labels, checksums and block bounds, each preceded by its length.

    Reads the column files in pieces: mapping them would count as memory of the process.
    """
    digest = hashlib.sha256(b"cskd inventory 1")
    for name in ("key_offset", "key", "label", "crc32c"):
        with (folder / f"{name}.npy").open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            digest.update(shape[0].to_bytes(8, "little"))
            while piece := file.read(1 << 20):
                digest.update(piece)
    digest.update(len(bounds).to_bytes(8, "little"))
    digest.update(bounds.astype("<i8").tobytes())
    return digest.hexdigest()


def header_bytes(header: dict[str, Any]) -> bytes:
    """A header as it lies on disk."""
    return (json.dumps(header, indent=1) + "\n").encode()


def header_hash(header: dict[str, Any]) -> str:
    """sha256 of the header's canonical JSON without its own `hash`."""
    return json_hash({name: value for name, value in header.items() if name != "hash"})


def copy_inventory(inventory: WhichInventory, root: Path) -> None:
    """Copy an inventory to root/inventory, as caches do; of several processes the first one counts.

    Raises:  DataError when another one is there, or what is there is not whole.
    """
    partial, final = root / f"{PARTIAL}.{os.getpid()}.{uuid.uuid4().hex[:8]}", root / INVENTORY_FOLDER
    partial.mkdir(parents=True)
    try:
        for name in [HEADER, *(f"{name}.npy" for name in DTYPES)]:
            shutil.copyfile(inventory.path / name, partial / name)
            sync(partial / name)
        sync(partial)
        try:
            os.rename(partial, final)
            sync(root)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            there = read_header(final)["id"]
            if there != inventory.id:
                raise DataError(
                    f"{root} holds the inventory {there[:12]} already, expected {inventory.id[:12]}; take another folder"
                ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
