"""A data set into shards with an inventory (`cskd pack`), or an inventory for shards that exist (`cskd index`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from cskd.dataset.inventory import Inventory, open_inventory
from cskd.dataset.inventory_format import DTYPES, HEADER, INVENTORY_FOLDER
from cskd.errors import DataError, counted
from cskd.files.paths import is_remote, location_text
from cskd.files.temporary import temporary_folder
from cskd.packing.index import index
from cskd.packing.names import CLASSES_FILE
from cskd.packing.pack import pack
from cskd.pipeline.show.progress import Notes, Progress, print_lines, say
from cskd.storage import open_storage
from cskd.storage.places import refuse_objects


@dataclass(frozen=True)
class PackReport:
    """What was packed or indexed."""

    folder: str
    inventory: str
    samples: int
    classes: int
    classes_with_images: int
    shards: int
    blocks: int
    bytes: int
    seconds: float
    notes: list[str]


def pack_data(
    src: Path,
    out: Path,
    classes: Path | None = None,
    seed: int = 0,
    shard_size: int = 4096,
    block: int = 8192,
    limit: int | None = None,
    short_side: int | None = None,
    raw: bool = False,
    split: str | None = None,
    labels: Path | None = None,
    label_key: str | None = None,
    key_prefix: str | None = None,
    allow_incomplete: bool = False,
    quiet: bool = False,
) -> PackReport:
    """`cskd.packing.pack.pack` with progress; arguments as there."""
    start, notes = time.perf_counter(), Notes(quiet)

    def tell(lines: list[str]) -> None:
        notes.add(lines)
        notes.say()

    with _folder_for(out) as folder, ExitStack() as stack:
        shown = stack.enter_context(Progress("list", 0, quiet=quiet))

        def show(done: int, total: int) -> None:
            nonlocal shown
            if total and shown.what == "list":
                stack.close()
                shown = stack.enter_context(Progress("pack", total, quiet=quiet))
            shown.update(done)

        inventory = pack(
            src,
            folder,
            classes=classes,
            seed=seed,
            shard_size=shard_size,
            block=block,
            limit=limit,
            short_side=short_side,
            raw=raw,
            split=split,
            labels=labels,
            label_key=label_key,
            key_prefix=key_prefix,
            allow_incomplete=allow_incomplete,
            progress=show,
            tell=tell,
        )
        stack.close()
        if folder != out:
            inventory = _uploaded(inventory, str(out), quiet)
    tell(inventory.notes)
    return _report(inventory, start)


@contextmanager
def _folder_for(out: Path) -> Iterator[Path]:
    """Where shards are made: in their folder, or, for an object store, in one of temporary files, which is removed."""
    if not is_remote(out):
        yield out
        return
    refuse_objects(location_text(str(out), "OUT", write=True), "OUT", "a data set", _of_data, CLASSES_FILE)
    with temporary_folder("pack") as folder:
        yield Path(folder, "data")


def _of_data(key: str) -> bool:
    return key.endswith(".tar") or key.partition("/")[0] in (CLASSES_FILE, INVENTORY_FOLDER)


def _uploaded(made: Inventory, address: str, quiet: bool) -> Inventory:
    """A data set on an object store, its inventory last, which makes it valid. DataError where another one is there."""
    storage = open_storage(address, "OUT")
    if storage.stat(f"{INVENTORY_FOLDER}/{HEADER}") is not None:
        there = open_inventory(address)
        if there.id != made.id or there.classes != made.classes:
            raise DataError(
                f"{storage.location} holds the inventory {there.id[:12]} already, not {made.id[:12]}; give this data set an "
                "address of its own"
            )
        there.notes = [*made.notes, "this inventory was here already: nothing was written"]
        return there
    names = [shard.name for shard in made.shards]
    names += [CLASSES_FILE, *(f"{INVENTORY_FOLDER}/{name}.npy" for name in DTYPES), f"{INVENTORY_FOLDER}/{HEADER}"]
    with Progress("upload", len(names), "files", quiet=quiet) as shown:
        for n, name in enumerate(names, 1):
            storage.put(name, (made.root / name).read_bytes())
            shown.update(n)
    return open_inventory(address)


def index_data(
    shards: Path | Sequence[Path],
    out: Path | None = None,
    classes: Path | None = None,
    block: int = 8192,
    split: str | None = None,
    label_key: str | None = None,
    key_prefix: str | None = None,
    allow_incomplete: bool = False,
    quiet: bool = False,
) -> PackReport:
    """`cskd.packing.index.index` with progress; arguments as there."""
    start = time.perf_counter()
    with Progress("index", 0, quiet=quiet) as shown:

        def show(images: int, done: int, total: int) -> None:
            shown.update(images, shards=f"{done} of {total}")

        inventory = index(
            shards,
            out=out,
            classes=classes,
            block=block,
            allow_incomplete=allow_incomplete,
            split=split,
            label_key=label_key,
            key_prefix=key_prefix,
            progress=show,
        )
    say(inventory.notes, quiet)
    return _report(inventory, start, out)


def render(report: PackReport, console: Console) -> None:
    """The report for people."""
    rate = report.samples / report.seconds if report.seconds else 0.0
    held, classes = report.classes_with_images, report.classes
    print_lines(
        console,
        f"{report.folder}: {report.samples:,} images of {classes if held == classes else f'{held} of {classes}'} classes in "
        f"{counted(report.shards, 'shard')} ({counted(report.blocks, 'block')}, {report.bytes / 1e6:.1f} MB), "
        f"{report.seconds:.1f} s ({rate:,.0f} images/s)",
        f"inventory {report.inventory}",
    )


def _report(inventory: Inventory, start: float, out: Path | None = None) -> PackReport:
    return PackReport(
        folder=str(out or (inventory.remote.location if inventory.remote else inventory.root)),
        inventory=inventory.id,
        samples=len(inventory),
        classes=len(inventory.classes),
        classes_with_images=len(np.unique(inventory.label)),
        shards=len(inventory.shards),
        blocks=len(inventory.blocks) - 1,
        bytes=sum(shard.bytes for shard in inventory.shards),
        seconds=time.perf_counter() - start,
        notes=inventory.notes,
    )
