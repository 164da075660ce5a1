"""What a training view costs to load, and which share of it the proof of replay takes.

    python -m benchmarks.loader [--views N] [--rounds R]

ImageNet sample ($CSKD_DATA, else `shared` beside the checkout) at 224 pixels with DeiT's full recipe. Times, for the same
views in one process and one thread: reading and decoding, augmenting, and the digest that every training view is checked
by. Rounds of the three take turns, so that a busy machine slows all of them; the median round counts.

Prints one JSON line last: `decode_us`, `augment_us`, `digest_us` a view and `digest_share` of the three together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from cskd.augment.mixing import NONE, mixing, quads
from cskd.config import RecipeConfig
from cskd.errors import CskdError
from cskd.inventory import open_inventory
from cskd.loading.views import ViewMaker
from cskd.replay import Recorded, check_view, pixel_crc, view_digest
from cskd.seeds import view_seeds
from pipeline.packing import pack_data

ROOT = Path(__file__).resolve().parent.parent
RECIPE = RecipeConfig(randaugment="rand-m9-mstd0.5-inc1", erase=0.25)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=100, help="views a round")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(arguments)
    source = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared")) / "data" / "imagenet-sample.tar"
    if not source.is_file():
        print(f"benchmarks/loader.py: no {source}; set CSKD_DATA to the folder with data/ in it", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            pack_data(source, Path(folder) / "data", quiet=True)
            result = measure(Path(folder) / "data", options.views, options.rounds)
    except CskdError as e:
        print(f"benchmarks/loader.py: {e}", file=sys.stderr)
        return 1
    print(f"{'':<10}{'us a view':>10}")
    for name in ("decode", "augment", "digest"):
        print(f"{name:<10}{result[f'{name}_us']:>10.1f}")
    print(json.dumps({"benchmark": "loader", **result}))
    return 0


def measure(data: Path, views: int, rounds: int) -> dict[str, float]:
    """Median microseconds a view of each part."""
    inventory = open_inventory(data)
    maker = ViewMaker(inventory, RECIPE)
    views = min(views, len(inventory))
    block = int(inventory.blocks[1])
    seeds = view_seeds(RECIPE.seed, inventory.id, inventory.key_hash[:block], 0)
    m = mixing(seeds, quads(block, RECIPE, inventory.id, 0, 0), np.zeros(block, bool), RECIPE, 0)
    recorded = Recorded(np.zeros(len(inventory), bool), {})
    fields = {"seed": seeds, "mode": m.mode, "lam": m.lam, "box": m.box}
    seconds: dict[str, list[float]] = {"decode": [], "augment": [], "digest": []}
    for _ in range(rounds):
        clock = time.perf_counter()
        images = [maker.image(i) for i in range(views)]
        seconds["decode"].append(time.perf_counter() - clock)
        clock = time.perf_counter()
        pixels = [maker.view(images[i], int(seeds[i])) for i in range(views)]
        seconds["augment"].append(time.perf_counter() - clock)
        rows = [{name: array[i] for name, array in fields.items()} for i in range(views)]
        for i, row in enumerate(rows):
            partner = int(inventory.key_hash[m.partner[i]]) if row["mode"] != NONE else 0
            row["digest"] = view_digest(pixel_crc(pixels[i]), int(row["mode"]), int(row["lam"]), row["box"], partner)
        clock = time.perf_counter()
        for i, row in enumerate(rows):
            check_view(inventory, RECIPE, recorded, i, 0, row, int(m.partner[i]), pixel_crc(pixels[i]))
        seconds["digest"].append(time.perf_counter() - clock)
    found = {f"{name}_us": 1e6 * statistics.median(times) / views for name, times in seconds.items()}
    return {**found, "digest_share": found["digest_us"] / sum(found.values()), "views": views, "rounds": rounds}


if __name__ == "__main__":
    sys.exit(main())
