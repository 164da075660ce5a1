"""`cskd index`: the inventory of webdataset shards that exist, without rewriting them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import google_crc32c

from cskd.dataset.inventory import Inventory, Sample, ShardFile, new_inventory, publish_inventory
from cskd.errors import DataError
from cskd.files.folders import refuse_output
from cskd.files.paths import local_path
from cskd.files.writer import sole_writer
from cskd.packing.layout import check_keys
from cskd.packing.names import CLASSES_FILE, check_labels, classes_held, label_names
from cskd.packing.places import Place, read_place
from cskd.packing.shard_samples import shard_samples
from cskd.packing.shard_sets import find_shards, missing_numbers
from cskd.packing.split_words import KeySplit
from cskd.packing.tally import Tally

IndexProgress = Callable[[int, int, int], None]
EVERY = 1024  # images between two calls of it


def index(
    shards: str | Path,
    *,
    classes: Path | None = None,
    block: int = 8192,
    allow_incomplete: bool = False,
    split: str | None = None,
    progress: IndexProgress | None = None,
) -> Inventory:
    """Make the inventory of webdataset shards in the folder that holds them; every byte is read once.

    Its id is the one `cskd pack` gives where samples, order and shards are the same.

    Args:    shards: a folder of .tar files, a glob, or a name with {000..146}; in the order of their names.
             classes: class file for the labels; without it classes.txt next to the shards, else names are '0', '1', ...
             allow_incomplete: leave out samples without image or label, and say how many, instead of refusing them.
             split: only the shards whose names or folders have that word, or the samples whose keys have it.
             progress: called with (images done, shards done, shards in all).
    Raises:  DataError for a damaged shard, an incomplete sample, a key that occurs twice, too few class names, shards of
             several splits, or another inventory in that folder; PathError where that is of another kind, or written to by
             another process.
    """
    if block < 1:
        raise DataError(f"block is {block}, expected at least 1")
    paths, key_split = find_shards(local_path(shards, "SHARDS"), split)
    data = Path(os.path.commonpath([path.parent for path in paths]))
    refuse_output(data, "data", "SHARDS")
    made = {"by": "index", "source": Path(shards).name, **({"split": split} if split else {}), "block": block}
    incomplete, empty = Tally() if allow_incomplete else None, Tally()
    labels: Counter[int] = Counter()
    keys, images = KeySplit(key_split), 0
    try:
        with sole_writer(data, "index it then"), new_inventory(data) as writer:
            for number, path in enumerate(paths):
                before = keys.seen
                for key, _, label, offset, size in shard_samples(path, incomplete):
                    if not keys.takes(key):
                        continue
                    crc = google_crc32c.value(read_place(Place(str(path), offset, size)))
                    writer.add(Sample(key, label, crc, number, offset, size))
                    labels[label] += 1
                    images += 1
                    if progress and images % EVERY == 0:
                        progress(images, number, len(paths))
                if keys.seen == before:
                    empty.add(path.name)
                if progress:
                    progress(images, number + 1, len(paths))
            check_keys(keys.folders, key_split, images, paths)
            names, notes = label_names(classes, data / CLASSES_FILE, labels)
            notes += [*missing_numbers(paths), *classes_held(names, labels), *empty.notes("shards without samples")]
            if incomplete:
                notes += incomplete.notes("samples without image or label")
            files = [ShardFile(path.relative_to(data).as_posix(), path.stat().st_size) for path in paths]
            writer.finish(names, files, block, made, notes)
            check_labels(labels, named=classes is not None or (data / CLASSES_FILE).is_file())
            return publish_inventory(writer.folder, data)
    except FileExistsError as e:
        raise DataError(f"{e.filename} is a file, expected a folder; give another one") from e
    except OSError as e:
        raise DataError(f"{e.filename or data}: {e.strerror or e}; mend that and run again") from e
