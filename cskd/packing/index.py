"""`cskd index`: the inventory of webdataset shards that exist, without rewriting them."""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c

from cskd.errors import DataError
from cskd.files.folders import refuse_output
from cskd.files.paths import local_path
from cskd.files.writer import sole_writer
from cskd.inventory import Inventory, Sample, ShardFile, new_inventory, publish_inventory
from cskd.packing.names import CLASSES_FILE
from cskd.packing.shard_samples import Tally, expand_shards, shard_samples
from cskd.packing.sources import Place, Progress, label_names, read_place


def index(
    shards: str | Path,
    *,
    classes: Path | None = None,
    block: int = 8192,
    allow_incomplete: bool = False,
    progress: Progress | None = None,
) -> Inventory:
    """Make the inventory of webdataset shards in the folder that holds them; every byte is read once.

    Its id is the one `cskd pack` gives where samples, order and shards are the same.

    Args:    shards: a folder of .tar files, a glob, or a name with {000..146}; in the order of their names.
             classes: class file for the labels; without it classes.txt beside the shards, else names are '0', '1', ...
             allow_incomplete: leave out samples without image or label, and say how many, instead of refusing them.
             progress: called with (shards done, shards in all).
    Raises:  DataError for a damaged shard, an incomplete sample, a key that occurs twice, too few class names, or
             another inventory in that folder; PathError where that is of another kind, or written to by another process.
    """
    if block < 1:
        raise DataError(f"block is {block}, expected at least 1")
    paths = expand_shards(local_path(shards, "SHARDS"))
    data = Path(os.path.commonpath([path.parent for path in paths]))
    refuse_output(data, "data", "SHARDS")
    made = {"by": "index", "source": Path(shards).name, "block": block}
    incomplete = Tally() if allow_incomplete else None
    largest = 0
    try:
        with sole_writer(data, "index it then"), new_inventory(data) as writer:
            for number, path in enumerate(paths):
                for key, _, label, offset, size in shard_samples(path, incomplete):
                    crc = google_crc32c.value(read_place(Place(str(path), offset, size)))
                    writer.add(Sample(key, label, crc, number, offset, size))
                    largest = max(largest, label)
                if progress:
                    progress(number + 1, len(paths))
            names, notes = label_names(classes, data / CLASSES_FILE, largest)
            if incomplete:
                notes += incomplete.notes("samples without image or label")
            files = [ShardFile(path.relative_to(data).as_posix(), path.stat().st_size) for path in paths]
            writer.finish(names, files, block, made, notes)
            return publish_inventory(writer.folder, data)
    except FileExistsError as e:
        raise DataError(f"{e.filename} is a file, expected a folder; give another one") from e
    except OSError as e:
        raise DataError(f"{e.filename or data}: {e.strerror or e}; mend that and run again") from e
