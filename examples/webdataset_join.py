"""Images and their targets with stock webdataset alone: python webdataset_join.py 'data/{00000..00146}.tar' targets 3

`targets` is what `cskd export CACHE targets` wrote; 3 is the view, which is the epoch of a run that uses each view once.
"""

import sys
from collections.abc import Iterator
from typing import Any

import webdataset as wds


def joined(shards: str, targets: str, view: int) -> Iterator[dict[str, Any]]:
    """Samples with what is in both tars: the image, and its paug.json, cells.npy and global.json."""
    for shard in wds.shardlists.expand_urls(shards):
        sidecar = f"{targets}/{shard.rpartition('/')[2].removesuffix('.tar')}.view{view:03d}.tar"
        rows = iter(wds.WebDataset(sidecar, shardshuffle=False).decode())
        target = next(rows, {"__key__": None})
        for image in wds.WebDataset(shard, shardshuffle=False):
            found = image["__key__"] == target["__key__"]
            yield {**image, **(target if found else {})}
            target = next(rows, {"__key__": None}) if found else target


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    found = ["paug.json" in sample for sample in joined(sys.argv[1], sys.argv[2], int(sys.argv[3]))]
    print(f"{sum(found):,} of {len(found):,} images joined with their targets ({sum(found) / len(found):.0%})")
