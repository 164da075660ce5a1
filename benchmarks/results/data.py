"""The images of docs/RESULTS.md: CIFAR-10 packed, and two splits of its training images.

    python -m benchmarks.results.data [OUT]       OUT: $CSKD_RESULTS, else runs/results

all 50,000 training images · val the 5,000 that results are reported on · few 5,000 training images, 500 a class, that
question A is about · tune 5,000 others, 500 a class, on which recipes are chosen.
Needs $CSKD_DATA (else `shared` beside the checkout) with data/cifar10-train.tar.gz and data/cifar10-val.tar.gz, tars of
class folders. What lies there already is kept.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from pathlib import Path

import numpy as np

from benchmarks.results import data_folder, results_folder
from cskd.dataset.inventory import Inventory, open_inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import CskdError
from cskd.pipeline.pack import pack_data
from cskd.seeds import permutation

PER_CLASS = 500
SPLITS = {"few": 0, "tune": 1}  # which PER_CLASS images of each class, after a shuffle


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=results_folder())
    out = parser.parse_args(arguments).out / "data"
    folder = data_folder() / "data"
    try:
        for name, source in (("all", "cifar10-train.tar.gz"), ("val", "cifar10-val.tar.gz")):
            if not (out / name / "inventory").exists():
                print(pack_data(folder / source, out / name))
        for name, part in SPLITS.items():
            if not (out / name / "inventory").exists():
                tar = write_split(open_inventory(out / "all"), part, out / f"{name}.tar")
                print(pack_data(tar, out / name, block=1024))
                tar.unlink()
    except CskdError as e:
        print(f"benchmarks/results/data.py: {e}", file=sys.stderr)
        return 1
    return 0


def write_split(inventory: Inventory, part: int, path: Path) -> Path:
    """A tar of class folders: images part * PER_CLASS and on of every class, in a shuffled order that the keys decide."""
    reader = ShardReader(inventory)
    keys = [inventory.key(i) for i in range(len(inventory))]
    by_key = np.array(sorted(range(len(inventory)), key=keys.__getitem__))
    with tarfile.open(path, "w") as tar:
        for label, name in enumerate(inventory.classes):
            rows = by_key[inventory.label[by_key] == label]
            chosen = rows[permutation(len(rows), 0)][part * PER_CLASS :][:PER_CLASS]
            for i in sorted(chosen.tolist(), key=keys.__getitem__):
                data = reader.read(i)
                member = tarfile.TarInfo(f"{name}/{keys[i].replace('/', '_')}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


if __name__ == "__main__":
    raise SystemExit(main())
