"""A cache's copy of its data set's inventory: in the folder of the cache, or on its object store and then once on this machine.

Columns are mapped into memory, so what lies on an object store is copied to `$XDG_CACHE_HOME/cskd/inventories` first, under the
hash of its header, which holds those of all columns. Such a copy may be removed at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cskd.dataset.inventory import Inventory, open_inventory
from cskd.dataset.inventory_format import DTYPES, HEADER, check_copy, copy_inventory, read_header
from cskd.errors import CacheError, DataError
from cskd.files.read import MAX_TEXT
from cskd.files.temporary import temporary_folder
from cskd.storage import Storage, join
from cskd.storage.posix import Posix
from cskd.store.format import INVENTORY

T = TypeVar("T")
FILES = tuple(f"{INVENTORY}/{name}.npy" for name in DTYPES)
WAIT, LOOK = 60.0, 1.0  # seconds that another process may take to put its columns there, and between two looks


def get_inventory(storage: Storage, data: Path | None) -> Inventory:
    """The inventory of a cache. data: the folder of its shards. CacheError where it has lost it, DataError where it is damaged."""
    lost = f"{storage.location} has lost its {INVENTORY} folder; `cskd repair` copies it again from the data set"
    if isinstance(storage, Posix):
        if not (storage.root / INVENTORY).is_dir():
            raise CacheError(lost)
        return open_inventory(storage.root / INVENTORY, data=data)
    try:
        header = storage.get(f"{INVENTORY}/{HEADER}", limit=MAX_TEXT)
    except FileNotFoundError:
        raise CacheError(lost) from None
    return open_inventory(_on_this_machine(storage, header), data=data)


def put_inventory(storage: Storage, inventory: Inventory) -> None:
    """Have a cache hold a copy of its inventory; of several processes the first one counts. DataError when another is there."""
    if isinstance(storage, Posix):
        if not (storage.root / INVENTORY).exists():
            copy_inventory(inventory, storage.root)
        _refuse_another(storage, inventory)
        return
    header = (inventory.path / HEADER).read_bytes()
    if not storage.create(f"{INVENTORY}/{HEADER}", header):
        _refuse_another(storage, inventory)
        end = time.monotonic() + WAIT
        while not _whole(storage) and time.monotonic() < end:
            time.sleep(LOOK)
        if _whole(storage):
            return
        storage.put(
            f"{INVENTORY}/{HEADER}", header
        )  # its writer has died; the same samples may lie elsewhere in the shards
    if not _whole(storage):
        for name in FILES:
            storage.put(name, (inventory.path / name.removeprefix(f"{INVENTORY}/")).read_bytes())


def _refuse_another(storage: Storage, inventory: Inventory) -> None:
    if (other := inventory_id(storage)) != inventory.id:
        raise DataError(
            f"{storage.location} holds the inventory {other[:12]} already, expected {inventory.id[:12]}; take another place"
        )


def check_inventory(storage: Storage) -> None:
    """Check every byte of a cache's copy. Raises DataError, OSError naming the first file that is not as it was written."""
    if isinstance(storage, Posix):
        check_copy(storage.root / INVENTORY)
        return
    with temporary_folder("inventory") as made:
        _download(storage, made)
        _located(storage, made, check_copy)


def remove_inventory(storage: Storage) -> None:
    """Make room for another copy."""
    if isinstance(storage, Posix):
        shutil.rmtree(storage.root / INVENTORY, ignore_errors=True)
        return
    for name in (f"{INVENTORY}/{HEADER}", *FILES):
        storage.delete(name)


def inventory_id(storage: Storage) -> str:
    """Which data set a cache's copy says it is of. DataError where there is none, or its header is damaged."""
    if isinstance(storage, Posix):
        return str(read_header(storage.root / INVENTORY)["id"])
    with temporary_folder("inventory") as made:
        _download(storage, made, ())
        return str(_located(storage, made, read_header)["id"])


def _download(storage: Storage, folder: Path, files: Sequence[str] = FILES) -> None:
    names = (f"{INVENTORY}/{HEADER}", *files)
    try:
        found = storage.get_many(names)
    except FileNotFoundError as e:
        raise DataError(f"{e.filename} is not there; `cskd repair` copies it again from the data set") from None
    for name, data in zip(names, found, strict=True):
        (folder / name.removeprefix(f"{INVENTORY}/")).write_bytes(data)


def _located(storage: Storage, folder: Path, call: Callable[[Path], T]) -> T:
    """What is called of a copy on this machine; what it says is wrong is of the one on the store."""
    try:
        return call(folder)
    except DataError as e:
        raise DataError(str(e).replace(str(folder), join(storage.location, INVENTORY))) from None


def _whole(storage: Storage) -> bool:
    return {about.key for about in storage.list(INVENTORY)} >= set(FILES)


def _on_this_machine(storage: Storage, header: bytes) -> Path:
    """The folder of a copy on this machine, every byte checked when it was made. DataError for one that is not as it was written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cskd" / "inventories"
    folder = base / hashlib.sha256(header).hexdigest()[:32]
    if (folder / HEADER).is_file():
        return folder
    base.mkdir(parents=True, exist_ok=True)
    with temporary_folder("inventory", base, hidden=True) as made:
        _download(storage, made)
        _located(storage, made, check_copy)
        if (made / HEADER).read_bytes() == header:
            with contextlib.suppress(OSError):  # another process was first
                os.rename(made, folder)
    return folder
