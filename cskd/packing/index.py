"""`cskd index`: the inventory of webdataset shards that exist, without rewriting them."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import google_crc32c

from cskd.dataset.inventory import Inventory, InventoryWriter, Sample, ShardFile, new_inventory, publish_inventory
from cskd.dataset.inventory_format import INVENTORY_FOLDER
from cskd.errors import NO_WRITING, DataError, said
from cskd.files.durable import put, sync
from cskd.files.folders import mark, refuse_output
from cskd.files.paths import local_path
from cskd.files.writer import sole_writer
from cskd.packing.layout import check_keys
from cskd.packing.names import CLASSES_FILE, classes_held
from cskd.packing.places import Place, read_place
from cskd.packing.shard_labels import ShardLabels
from cskd.packing.shard_samples import Reading, ShardSamples
from cskd.packing.shard_sets import find_all_shards, missing_numbers
from cskd.packing.split_words import KeySplit
from cskd.packing.tally import Tally, is_compressed_tar, plain_tar_name
from cskd.packing.tars import decompressed

IndexProgress = Callable[[int, int, int], None]
EVERY = 1024  # images between two calls of it
UNPACKED = "unpacked"  # folder in `out` for shards that were compressed
UNPACKING = ".unpacking"  # folder in it, while one is


def index(
    shards: str | Path | Sequence[str | Path],
    *,
    out: Path | None = None,
    classes: Path | None = None,
    block: int = 8192,
    allow_incomplete: bool = False,
    split: str | None = None,
    label_key: str | None = None,
    key_prefix: str | None = None,
    progress: IndexProgress | None = None,
) -> Inventory:
    """Make the inventory of webdataset shards, in the folder that holds them or in `out`; every byte is read once.

    Its id is the one `cskd pack` gives where samples, order and shards are the same.

    Args:    shards: a folder of .tar files, a file, a glob, or a name with {000..146}, or several; in the order of their paths.
             out: a folder for the inventory, which names the shards' folder by its path: where that can't be written to.
                  Compressed shards are decompressed into it, once: a sample is read from its place in a plain tar.
             classes: class file for the labels; without it classes.txt next to the shards, else the sorted names that samples
                  have as labels, else '0', '1', ...
             allow_incomplete: the same.
             split: only the shards whose names or folders have that word, or the samples whose keys have it.
             label_key, key_prefix: see `Reading`.
             progress: called with (images done, shards done, shards in all).
    Raises:  DataError for a damaged shard, an incomplete sample, a key that occurs twice, labels that are none, too few class
             names, shards of several splits, or another inventory in that folder; PathError where that is of another kind, or
             written to by another process.
    """
    if block < 1:
        raise DataError(f"block is {block}, expected at least 1")
    reading = Reading(label_key, key_prefix, allow_incomplete)
    specs = [local_path(spec, "SHARDS") for spec in ([shards] if isinstance(shards, str | Path) else shards)]
    if not specs:
        raise DataError("no shards are named, expected a folder, files or a pattern; give one")
    paths, key_split = find_all_shards(specs, split)
    data = Path(os.path.commonpath([path.parent for path in paths]))
    if out is None:
        _refuse_in_place(paths, data)
        refuse_output(data, "data", "SHARDS")
    else:
        out = local_path(out, "--out")
        refuse_output(out, "data", "--out", names=(INVENTORY_FOLDER, UNPACKED))
    source = specs[0].name if len(specs) == 1 else f"{specs[0].name} and {len(specs) - 1} more"
    made = {"by": "index", "source": source, **({"split": split} if split else {}), "block": block}
    made |= reading.given
    folder = out or data
    beside = data / CLASSES_FILE if (data / CLASSES_FILE).is_file() else paths[0].parent / CLASSES_FILE
    try:
        labels = ShardLabels(classes, beside, label_key)
        with sole_writer(folder, "index it then"), new_inventory(folder) as writer:
            prefixes = [reading.prefix_of(path, data) for path in paths]  # of where they lie, not of unpacked copies
            if out is not None:
                paths = [Path(os.path.abspath(_plain(path, data, out))) for path in paths]
                data = Path(os.path.commonpath([path.parent for path in paths]))
            samples, keys = ShardSamples(labels, allow_incomplete), KeySplit(key_split)
            counts, empty = _add_all(writer, samples, paths, prefixes, keys, progress)
            check_keys(keys.folders, key_split, sum(counts.values()), paths)
            names, notes, relabel = labels.finish(counts)
            notes += [*missing_numbers(paths), *classes_held(names, [relabel[number] for number in counts])]
            notes += [*empty.notes("shards without samples"), *samples.notes()]
            files = [ShardFile(path.relative_to(data).as_posix(), path.stat().st_size) for path in paths]
            writer.finish(names, files, block, made, notes, relabel=relabel, root=data if out is not None else None)
            if out is not None:
                mark(out, "data")
            return publish_inventory(writer.folder, folder)
    except FileExistsError as e:
        raise DataError(f"{e.filename} is a file, expected a folder; give another one") from e
    except OSError as e:
        elsewhere = (
            "; or give the inventory a folder of its own with --out DIR"
            if out is None and e.errno in NO_WRITING
            else ""
        )
        raise DataError(said(e, folder) + elsewhere) from e


def _refuse_in_place(paths: Sequence[Path], data: Path) -> None:
    """What needs a folder for the inventory that is not the shards' own."""
    if packed := [path for path in paths if is_compressed_tar(path.name)]:
        raise DataError(
            f"{len(packed)} compressed shard(s), {packed[0]} for one; samples are read from their places in plain tars: index "
            "with --out DIR, which decompresses them into DIR once, or decompress them here (gunzip *.tar.gz)"
        )
    if len(paths) > 1 and data == Path(data.anchor or "."):
        raise DataError(f"the shards have no folder in common but {data}; give one for the inventory with --out DIR")


def _add_all(
    writer: InventoryWriter,
    samples: ShardSamples,
    paths: Sequence[Path],
    prefixes: Sequence[str],
    keys: KeySplit,
    progress: IndexProgress | None,
) -> tuple[Counter[int], Tally]:
    """Add the samples of all shards. Returns: how many have each of the numbers of `ShardLabels.of`; shards that have none."""
    counts: Counter[int] = Counter()
    empty, images = Tally(), 0
    for number, (path, prefix) in enumerate(zip(paths, prefixes, strict=True)):
        before = keys.seen
        for key, _, label, offset, size in samples.of(path, prefix=prefix):
            if not keys.takes(key.removeprefix(prefix)):
                continue
            crc = google_crc32c.value(read_place(Place(str(path), offset, size)))
            writer.add(Sample(key, label, crc, number, offset, size))
            counts[label] += 1
            images += 1
            if progress and images % EVERY == 0:
                progress(images, number, len(paths))
        if keys.seen == before:
            empty.add(path.name)
        if progress:
            progress(images, number + 1, len(paths))
    return counts, empty


def _plain(shard: Path, data: Path, out: Path) -> Path:
    """The shard itself; of a compressed one its copy in `out`, made again where it is not of this very file."""
    if not is_compressed_tar(shard.name):
        return shard
    copy = out / UNPACKED / shard.relative_to(data).with_name(plain_tar_name(shard.name))
    record, stat = copy.with_name(f".{copy.name}.json"), shard.stat()
    source = json.dumps([os.path.realpath(shard), stat.st_size, stat.st_mtime_ns]).encode()
    if copy.is_file() and record.is_file() and record.read_bytes() == source:
        return copy
    work = out / UNPACKED / UNPACKING
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        plain = decompressed(shard, work)
        if plain == shard:  # only its name says that it is compressed
            return shard
        sync(plain)
        copy.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        os.replace(plain, copy)
        put(record, source)
        sync(copy.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return copy
