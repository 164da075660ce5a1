"""The demo's images: scikit-learn's 1,797 scans of handwritten digits, real images that need no download.

They are split three ways by a fixed permutation. The first POOL scans were for choosing the demo's settings (`tuning`): of
them some train and the others validate. The demo itself never sees these; it trains on a few of the rest and validates on
all others of the rest. So no image that its table is measured on had a say in how it trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cskd.errors import ConfigError
from cskd.seeds import permutation

SIZE = 32  # pixels; the scans are 8x8, enlarged
CLASSES = 10
POOL = 600  # scans for choosing the settings
SEED = 0  # of the permutation


@dataclass(frozen=True)
class Scans:
    """images uint8 [N, 8, 8], labels int64 [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def digits(per_class: int, tuning: bool = False) -> dict[str, Scans]:
    """The scans of 'train', `per_class` of every digit, and of 'val', all others of the same part.

    Raises: ConfigError without scikit-learn, or for more of a digit than there are.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the demo's images come with scikit-learn, which is not installed; pip install 'cskd[demo]'"
        ) from None
    raw = load_digits()
    order = permutation(len(raw.target), SEED)
    rows = order[:POOL] if tuning else order[POOL:]
    labels = raw.target.astype(np.int64)[rows]
    images = (raw.images * (255 / 16)).round().astype(np.uint8)[rows]
    fewest = int(np.bincount(labels, minlength=CLASSES).min())
    if not 0 < per_class < fewest:
        raise ConfigError(f"{per_class} scans of every digit to train on, expected 1 to {fewest - 1}")
    chosen = np.zeros(len(labels), bool)
    for c in range(CLASSES):
        chosen[np.flatnonzero(labels == c)[:per_class]] = True
    return {"train": Scans(images[chosen], labels[chosen]), "val": Scans(images[~chosen], labels[~chosen])}


def enlarged(scan: NDArray[np.uint8]) -> Image.Image:
    """A scan uint8 [8, 8] as an RGB image of SIZE pixels."""
    return Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")


def write_images(folder: Path, scans: Scans, copies: int = 1) -> None:
    """PNGs in class folders, each scan `copies` times: an epoch then sees as many different views of it."""
    for i, (scan, label) in enumerate(zip(scans.images, scans.labels.tolist(), strict=True)):
        image, home = enlarged(scan), folder / str(label)
        home.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            image.save(home / f"{i:04d}_{copy}.png")
