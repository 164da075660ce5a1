"""Start-up time and memory of both stages over 1,000 samples and over as many as ImageNet has.

    python -m benchmarks.scale [--samples N ...]

The data set is made: shards of 8,192 tiny images that are hard links of one file, with a key of their own for each sample.
Stage 1 runs with a teacher of a few weights until its first unit is committed (what ImageNet's first unit costs is the
teacher's time, not this); stage 2 runs one step from a cache of one view. Peak memory is that of the main process.

Prints one JSON line last: for each size `cache_teacher` and `train` with `startup_s` (to the first batch of views, importing
included) and `peak_mb`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from PIL import Image

from cskd.augment.mixing import quads
from cskd.config import from_dict, to_dict, to_yaml
from cskd.identity import identity_of, library_versions
from cskd.inventory import Inventory, Sample, ShardFile, write_inventory
from cskd.store.cache import create_cache
from cskd.unit_builder import UnitBuilder

ROOT = Path(__file__).resolve().parent.parent
SHARD = 8192
TEACHER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.fc = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 4)

    def forward_features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))

def build():
    return Net()
"""
# Runs one stage until its first batch has come (stage 1: until its first unit is in), and says when and how large it was.
PROBE = """
import json, resource, sys, time
begun = time.perf_counter()
from cskd.config import load_config
from cskd.loading.stream import Stream
first = []
plain = Stream.__iter__
def timed(self):
    for result in plain(self):
        first.append(time.perf_counter() - begun)
        yield result
Stream.__iter__ = timed
class Enough(BaseException): pass
config = load_config(sys.argv[2])
if sys.argv[1] == "cache-teacher":
    from cskd.store.cache import Cache
    from pipeline.cache_teacher import cache_teacher
    add = Cache.add_unit
    def stop(self, *a):
        add(self, *a)
        raise Enough
    Cache.add_unit = stop
    try: cache_teacher(config, quiet=True)
    except Enough: pass
else:
    from pipeline.train import train
    train(config, verify_replay=False, quiet=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"startup_s": first[0], "peak_mb": peak, "seconds": time.perf_counter() - begun}))
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 1_281_167])
    sizes = parser.parse_args(arguments).samples
    result: dict[str, Any] = {"benchmark": "scale"}
    print(f"{'samples':>10}  {'stage':<14}{'first batch s':>14}{'peak MB':>10}")
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            result[str(n)] = stages(Path(folder), n)
            for stage, figures in result[str(n)].items():
                print(f"{n:>10,}  {stage:<14}{figures['startup_s']:>14.1f}{figures['peak_mb']:>10.0f}", flush=True)
    print(json.dumps(result))
    return 0


def stages(folder: Path, n: int) -> dict[str, Any]:
    """Both stages over n samples, each in a process of its own."""
    (folder / "net.py").write_text(TEACHER)
    inventory = make_data(folder / "data", n)
    make_cache(folder, inventory)
    found = {}
    for stage, cache in (("cache-teacher", "new"), ("train", "cache")):
        path = folder / f"{stage}.yaml"
        path.write_text(to_yaml(from_dict(raw(folder, folder / cache))))
        command = [sys.executable, "-c", PROBE, stage, str(path)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found[stage] = json.loads(done.stdout.splitlines()[-1])
    return found


def raw(folder: Path, cache: Path) -> dict[str, Any]:
    return {
        "data": {"train": str(folder / "data")},
        "teacher": {"model": f"{folder / 'net.py'}:build", "batch": 64, "min_top1": 0.0},
        "recipe": {"size": 32},
        "cache": {"path": str(cache), "views": 1, "workers": 2, "device": "cpu"},
        "student": {"model": "deit_tiny_distilled_patch16_224", "kwargs": {"patch_size": 8, "depth": 1}},
        "train": {
            "output": str(folder / "run"),
            "global_batch": 256,
            "epochs": 300,
            "max_steps": 1,
            "workers": 2,
            "device": "cpu",
        },
    }


def make_data(folder: Path, n: int) -> Inventory:
    """n samples in shards that are one file under many names."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    inside, first = [], folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for i in range(min(SHARD, n)):
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
            info = tarfile.TarInfo(f"{i:06d}.png")
            info.size = out.tell()
            inside.append((int(google_crc32c.value(out.getvalue())), tar.offset + tarfile.BLOCKSIZE, info.size))
            tar.addfile(info, io.BytesIO(out.getvalue()))
    shards = [ShardFile(first.name, first.stat().st_size)]
    for shard in range(1, -(-n // SHARD)):
        os.link(first, folder / f"{shard:05d}.tar")
        shards.append(ShardFile(f"{shard:05d}.tar", shards[0].bytes))
    samples = (Sample(f"{i:07d}", i % 4, inside[i % SHARD][0], i // SHARD, *inside[i % SHARD][1:]) for i in range(n))
    return write_inventory(folder, samples, classes=list("abcd"), shards=shards, block=SHARD)


def make_cache(folder: Path, inventory: Inventory) -> None:
    """A whole cache of one view, with made logits and digests of nothing."""
    config = from_dict(raw(folder, folder / "cache"))
    identity = identity_of(inventory, config.recipe, {"model": "made"}, (4, 4), ["envelope"])
    facts = {"config": to_dict(config), "versions": library_versions(), "data": str(folder / "data")}
    cache = create_cache(folder / "cache", identity, 1, facts, inventory)
    for block in range(cache.blocks):
        first, stop = cache.block_range(block)
        order = quads(stop - first, cache.recipe, inventory.id, block, 0)
        builder = UnitBuilder(inventory, cache.recipe, cache.codecs, 0, first, order)
        dense = torch.randn(stop - first, 4, 4, 4, generator=torch.Generator().manual_seed(block))
        encoded = {name: codec.encode(dense, dense.mean((2, 3))) for name, codec in cache.codecs.items()}
        builder.add(np.arange(stop - first), np.zeros(stop - first, np.int64), encoded)
        cache.add_unit(block, 0, *builder.finish(), {}, {})


if __name__ == "__main__":
    sys.exit(main())
