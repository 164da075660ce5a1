"""One sample of a cache: its image as the teacher saw it, what the teacher said of it, and how the view was made.

python examples/look.py caches/mine
"""

from __future__ import annotations

import sys
from pathlib import Path

import cskd


def main(cache: str | Path) -> cskd.ReplaySample:
    """The first sample of a cache in its first view."""
    dataset = cskd.ReplayDataset(cache)
    sample = dataset[0]  # or dataset.sample("n01440764/n01440764_10026", view=2), by the key
    print(sample.image.shape, dataset.classes[sample.label], f"{sample.share:.2f} of the pixels and of the label")
    print(sample.targets.at(1.0))  # the class that each cell is taught early in training: int64 [h, w]
    print(sample.parameters)  # crop, flip, operations, mixing and the partner
    return sample


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1])
