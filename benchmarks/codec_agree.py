"""What the envelope next to it makes of an approximate codec's logits, at no byte: hard cells wrong, and KL.

    python -m benchmarks.codec_agree CACHE [--views 64]

The teacher runs again on some views of a cache that holds an envelope and a codec of logits. At each blend the decoded blended
logits are compared with the teacher's, as they are and projected to agree with the envelope's class (`cskd.method.agree`).
Prints a row a codec, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from cskd.codecs.base import BLEND_ONE
from cskd.machine.devices import pick_device
from cskd.method.agree import agreed
from cskd.method.ckf import ckf_blend
from cskd.pipeline.care.recompute import outputs_again
from cskd.pipeline.recorded_teacher import recorded_teacher
from cskd.store.cache import open_cache
from cskd.store.replay_check import golden_rows
from cskd.views.maker import ViewMaker

BLENDS = (0.25, 0.5, 0.75, 1.0)
ROWS = 8  # views whose maps of all classes are in memory at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--views", type=int, default=64)
    options = parser.parse_args()
    cache = open_cache(options.cache)
    teacher = recorded_teacher(cache, pick_device("cpu"))
    maker, sums, views = ViewMaker(cache.inventory, cache.recipe), defaultdict[str, list[float]](lambda: [0.0] * 6), 0
    names = [name for name, codec in cache.codecs.items() if codec.soft and codec.cells]
    for block, view, unit, rows in golden_rows(cache, options.views):
        stored = {name: cache.read(block, view, name).targets for name in (*names, "envelope")}
        for part in np.array_split(rows, -(-len(rows) // ROWS)):
            made = outputs_again(maker, teacher, unit, cache.inventory.block_range(block)[0], part)
            dense, image = made.dense, made.image
            views += len(part)
            for name in names:
                decoded = cache.codecs[name].logits(cache.codecs[name].take(stored[name], part))
                for blend in BLENDS:
                    hard = cache.codecs["envelope"].hard_at(stored["envelope"], part, round(blend * BLEND_ONE))
                    cls = torch.from_numpy(hard.astype(np.int64)).flatten()
                    true = _rows(ckf_blend(dense, image, blend))
                    found = _rows(ckf_blend(torch.from_numpy(decoded[0]), torch.from_numpy(decoded[1]), blend))
                    sums[name][0] += len(cls)
                    for i, logits in enumerate((found, agreed(found, cls))):
                        p, q = true.log_softmax(1), logits.log_softmax(1)
                        sums[name][1 + i] += float((p.exp() * (p - q)).sum())
                        sums[name][3 + i] += int((logits.argmax(1) != cls).sum())
    print(f"{views} views, blends {BLENDS}")
    print(f"{'codec':<20}{'KL':>10}{'agreed':>10}{'wrong':>10}{'agreed':>10}")
    facts = {}
    for name, (cells, kl, kl_agreed, wrong, wrong_agreed, _) in sums.items():
        facts[name] = {
            "kl": kl / cells,
            "kl_agreed": kl_agreed / cells,
            "wrong": wrong / cells,
            "wrong_agreed": wrong_agreed / cells,
        }
        print(
            f"{name:<20}{kl / cells:>10.5f}{kl_agreed / cells:>10.5f}{wrong / cells:>10.4%}{wrong_agreed / cells:>10.4%}"
        )
    print(json.dumps({"benchmark": "codec_agree", "views": views, "codecs": facts}))


def _rows(logits_BKhw: torch.Tensor) -> torch.Tensor:
    return logits_BKhw.movedim(1, -1).flatten(0, 2)


if __name__ == "__main__":
    main()
