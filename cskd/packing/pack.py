"""`cskd pack`: any source to shuffled shards with an inventory, whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cskd.dataset.classes import classes_text
from cskd.dataset.inventory import Inventory, InventoryWriter, Sample, open_inventory, publish_inventory
from cskd.dataset.inventory_format import HEADER, INVENTORY_FOLDER
from cskd.errors import DataError, said
from cskd.files.durable import put, sync
from cskd.files.folders import refuse_output
from cskd.files.paths import local_path
from cskd.files.writer import sole_writer
from cskd.machine.cores import usable_cores
from cskd.packing.listing import PackProgress
from cskd.packing.names import CLASSES_FILE, classes_held
from cskd.packing.payloads import Payload, Remake, payloads
from cskd.packing.shard_samples import Reading
from cskd.packing.sources import Source, open_source
from cskd.packing.spool import MAX_SPOOL
from cskd.seeds import U64, hash64, mix64_array

_OURS = re.compile(r"shard-\d{6,}\.tar|classes\.txt")
WORK = ".packing"  # folder in OUT while a pack runs
PUBLISHING = "publishing"  # file in it: the names that are being moved to OUT: these alone are ever removed there


def pack(
    src: str | Path,
    out: str | Path,
    *,
    classes: Path | None = None,
    seed: int = 0,
    shard_size: int = 4096,
    block: int = 8192,
    limit: int | None = None,
    short_side: int | None = None,
    quality: int = 90,
    raw: bool = False,
    workers: int | None = None,
    max_spool: int = MAX_SPOOL,
    split: str | None = None,
    labels: Path | None = None,
    label_key: str | None = None,
    key_prefix: str | None = None,
    allow_incomplete: bool = False,
    progress: PackProgress | None = None,
    tell: Callable[[list[str]], None] | None = None,
) -> Inventory:
    """Shuffle a data set into webdataset shards out/shard-000000.tar, ... with out/inventory and out/classes.txt.

    The order depends on (seed, key) only, so a folder, a tar and a tar.gz of it give the same inventory id.

    Args:    src, classes, max_spool, split, labels: see `open_source`. shard_size: images per shard (fewer where they pass 1 GB).
             block: images per block, about. limit: only the first so many of the shuffled images. short_side, quality,
             raw: see `Remake`. workers: threads that read, or processes that re-encode (default: the CPUs, at least 2, at
             most 8). label_key, key_prefix, allow_incomplete: of shards, see `Reading`. progress: called with (images done, images in all), the latter 0 while the source is being listed.
             tell: called with the notes on how the source was read, before images are.
    Returns: the inventory; its notes say what was passed over. The same data set in `out` already: nothing is written.
    Raises:  DataError, PathError for an `out` that is no folder for it; `out` is then as it was before.
    """
    src, out = local_path(src, "SRC"), local_path(out, "OUT")
    counts = {"shard_size": shard_size, "block": block, "limit": limit, "short_side": short_side, "workers": workers}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}, expected at least 1")
    if not 1 <= quality <= 100:
        raise DataError(f"quality is {quality}, expected a JPEG quality of 1 to 100")
    if src.exists() and out.exists() and src.resolve() == out.resolve():
        raise DataError(f"{out} is the source; pack into another folder, or use 'cskd index' for shards as they are")
    refuse_output(out, "data", "OUT", inputs={"SRC": src}, names=(INVENTORY_FOLDER, WORK))
    options = {"seed": seed, "shard_size": shard_size, "block": block, "limit": limit}
    options |= {"short_side": short_side, "quality": quality if short_side is not None and not raw else None}
    options |= {"raw": True} if raw else {}
    remake = Remake(short_side, quality, raw)
    reading = Reading(label_key, key_prefix, allow_incomplete)
    asked = ({"split": split} if split else {}) | ({"labels": labels.name} if labels else {}) | reading.given
    workers = workers or min(8, max(2, usable_cores().count))
    try:
        with _workspace(out) as work:
            source = open_source(src, classes, work, max_spool, progress, split, labels, reading)
            order = shuffled(source.key_hash, seed)[:limit]
            if len(order) < len(source.listing):
                source.notes.append(
                    f"{len(order)} of {len(source.listing)} images taken, as limited; labels stay those of all "
                    f"{len(source.classes)} classes"
                )
            names = classes_text(source.classes, str(src))  # refused before any image is read
            source.notes += classes_held(source.classes, {source.label(int(i)) for i in order})
            if tell:
                tell(source.notes)
            with closing(payloads(source.listing, order, remake, workers)) as stream:
                images = _counted(stream, len(order), progress)
                if (out / INVENTORY_FOLDER / HEADER).is_file():
                    return _confirm(open_inventory(out), source, len(order), images, options)
                _write(source, images, work, names, {"by": "pack", "source": src.name, **asked, **options})
            return _publish(work, out)
    except FileExistsError as e:
        raise DataError(f"{e.filename} is a file, expected a folder; give another one") from e
    except OSError as e:
        raise DataError(said(e, out)) from e


def shuffled(key_hashes: U64, seed: int) -> NDArray[np.int64]:
    """The order of packing: a permutation that depends on the seed and the set of keys only."""
    return np.argsort(mix64_array(key_hashes ^ np.uint64(hash64("pack", seed))), kind="stable")


def _write(
    source: Source, images: Iterator[tuple[int, Payload]], work: Path, names: bytes, made: dict[str, Any]
) -> None:
    from cskd.store.shard_writer import ShardWriter  # here: webdataset takes seconds to import

    shards, inventory = ShardWriter(work, made["shard_size"]), InventoryWriter(work / INVENTORY_FOLDER)
    again = bad = 0
    try:
        for i, payload in images:
            key, label = source.listing.key(i), source.label(i)
            extension = payload.extension or source.listing.extension(i)
            shard, offset = shards.add(key, extension, payload.data, label)
            crc = google_crc32c.value(payload.data)
            inventory.add(Sample(key, label, crc, shard, offset, len(payload.data)))
            again += payload.extension is not None
            bad += payload.bad
        notes = list(source.notes)
        if made["short_side"] is not None or "raw" in made:
            side = f" to a short side of {made['short_side']} pixels" if made["short_side"] else ""
            notes.append(f"{again} images re-encoded{side}{' as raw pixels' if 'raw' in made else ''}")
        if bad:
            notes.append(f"{bad} images can't be decoded and stay as they are; stage 1 will quarantine them")
        inventory.finish(source.classes, shards.close(), made["block"], made, notes)
        put(work / CLASSES_FILE, names)
    finally:
        shards.abandon()
        inventory.close()


def _publish(work: Path, out: Path) -> Inventory:
    """Move what is finished to its place; the inventory last, which makes it valid."""
    names = [*(shard.name for shard in open_inventory(work).shards), CLASSES_FILE]
    put(work / PUBLISHING, "\n".join(names).encode())
    for name in names:
        os.rename(work / name, out / name)
    sync(out)
    return publish_inventory(work / INVENTORY_FOLDER, out)


def _confirm(
    old: Inventory, source: Source, n: int, images: Iterator[tuple[int, Payload]], options: dict[str, Any]
) -> Inventory:
    """`old`, which is in the way, if packing would give it again; DataError with the first difference otherwise."""

    def refuse(difference: str) -> DataError:
        return DataError(f"{old.root} holds the data set {old.id[:12]}, {difference}; pack into another folder")

    if bool(old.made.get("raw")) != ("raw" in options):
        raise refuse(
            "made with --raw, asked for without" if "raw" in old.made else "made without --raw, asked for with it"
        )
    for name, value in options.items():
        if old.made.get(name) != value:
            raise refuse(f"made with {name} = {old.made.get(name)}, asked for {value}")
    if old.n != n:
        raise refuse(f"of {old.n} images, and the source has {n}")
    if old.classes != source.classes:
        raise refuse("with other class names, or in another order")
    old.check_shards()
    for place, (i, payload) in enumerate(images):
        new = (source.listing.key(i), source.label(i), google_crc32c.value(payload.data))
        if (old.key(place), old.label[place], old.crc32c[place]) != new:
            raise refuse(f"whose '{old.key(place)}' is not '{new[0]}' of the source")
    old.notes = [*source.notes, "this data set was packed here already: nothing was written"]
    return old


def _counted(
    images: Iterator[tuple[int, Payload]], total: int, progress: PackProgress | None
) -> Iterator[tuple[int, Payload]]:
    for done, image in enumerate(images, 1):
        yield image
        if progress and (done % 64 == 0 or done == total):
            progress(done, total)


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """An empty folder inside `out` for one pack at a time; what an interrupted one left is removed."""
    with sole_writer(out, "pack into another folder"):
        if (out / WORK).exists():
            _clean(out)
        ours = [*out.glob("shard-*.tar"), *out.glob(CLASSES_FILE)]
        if ours and not (out / INVENTORY_FOLDER / HEADER).is_file():
            raise DataError(
                f"{out} holds {min(ours).name} but no inventory; pack into an empty folder, or run 'cskd index' on it"
            )
        (out / WORK).mkdir()
        try:
            yield out / WORK
        finally:
            _clean(out)


def _clean(out: Path) -> None:
    """Remove a pack's work, and the files that it had begun to put into their places."""
    publishing = out / WORK / PUBLISHING
    if publishing.is_file() and not (out / INVENTORY_FOLDER / HEADER).is_file():
        for name in publishing.read_text(encoding="utf-8", errors="replace").splitlines():
            if _OURS.fullmatch(name):  # whatever else such a file says, nothing but a pack's own files is removed
                (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / WORK, ignore_errors=True)
