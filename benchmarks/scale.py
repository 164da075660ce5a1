"""Does anything grow with the data set or the number of views? Start-up, time an image and memory of both stages.

    python -m benchmarks.scale [--samples N ...] [--views V ...]

The data set is made: shards of 8,192 tiny images that are hard links of one file, with a key of their own for each sample;
the last size is ImageNet's. Its cache grows from one number of views to the next, and each is measured three times, in
processes of their own:

    cache-teacher   resumes when only the first block's last group of views is missing, makes it, and checks it is whole
    train           40 steps of 128 views from the start, with two workers
    table           the epoch table of a whole epoch, in this one process on one core

Units that these read are whole, with made logits, and stage 1's own. Of the other views there is only the commit record,
which is what a start reads of them: at 1,281,167 samples and 300 views that is 47,100 records, and 471 whole units. About
10 minutes for everything, nearly all of it to make the data.

Prints one JSON line last: for each size and number of views `startup_s` (to the first batch, importing included),
`us_an_image` after that, both once more in CPU time of the main process, `peak_mb` of that (Linux), and the largest growth
of each over the smallest case.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from PIL import Image

from benchmarks.tiny_teacher import TINY_TEACHER
from cskd.config import Config, from_dict, to_dict, to_yaml
from cskd.dataset.inventory import Inventory, Sample, ShardFile, write_inventory
from cskd.store.cache import Cache, create_cache
from cskd.store.commit import record_bytes
from cskd.store.format import commit_file, unit_file
from cskd.store.identity import identity_of
from cskd.store.manifest import Manifest
from cskd.store.unit_builder import UnitBuilder
from cskd.teacher.model import load_teacher
from cskd.views.digest import library_versions
from cskd.views.mixing import quads

ROOT = Path(__file__).resolve().parent.parent
SHARD = 8192
# Runs one stage and says when its first batch came, how long the others took, and how large the process was.
PROBE = """
import json, os, sys, time
begun = time.perf_counter()
stage, path, out = sys.argv[1:]
images, first, cpu = 0, begun, 0.0
if stage == "table":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from pathlib import Path
    from cskd.config import load_config
    from cskd.loading.epoch_table import build_table
    from cskd.loading.sources import TargetSpec
    from cskd.loading.plan import PlanSpec, epoch_plan
    from cskd.store.cache import open_cache
    config = load_config(path)
    cache = open_cache(config.cache.path)
    bad = cache.quarantined()
    first, cpu = time.perf_counter(), time.process_time()
    blocks, batch = cache.inventory.blocks, config.train.global_batch
    plan = epoch_plan(PlanSpec(blocks, bad, cache.inventory.id, cache.recipe, 1, 1, 0, batch, config.train.window), 0)
    images = len(plan.sample)
    build_table(cache, plan, TargetSpec("cells", "envelope", 40000), 0, images, Path(out))
else:
    from cskd.config import load_config
    from cskd.loading.stream import Stream
    plain = Stream.__iter__
    def timed(self):
        global first, cpu
        for result in plain(self):
            if first == begun:
                first, cpu = time.perf_counter(), time.process_time()
            yield result
    Stream.__iter__ = timed
    config = load_config(path)
    if stage == "cache-teacher":
        from cskd.pipeline.cache_teacher import cache_teacher
        images = cache_teacher(config, quiet=True).images
    else:
        from cskd.pipeline.train import train
        images = train(config, quiet=True, verify_replay=False).images
us, cpu_us = ((time.perf_counter() - first) / images * 1e6, (time.process_time() - cpu) / images * 1e6)
with open("/proc/self/status") as status:  # getrusage's includes that of the process which started this one
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
found = {"startup_s": first - begun, "startup_cpu_s": cpu, "us_an_image": us, "cpu_us_an_image": cpu_us, "peak_mb": peak}
print(json.dumps({**found, "images": images}))
"""
MEASURED = ("startup_s", "startup_cpu_s", "us_an_image", "cpu_us_an_image", "peak_mb")
STAGES = ("cache-teacher", "train", "table")
BATCH, STEPS = 128, 40


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_281_167])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 3, 300])
    options = parser.parse_args(arguments)
    print(f"machine: {platform.platform()}, {os.cpu_count()} cores")
    heads = f"{'first batch s':>14}{'CPU s':>7}{'us an image':>13}{'CPU us':>8}{'peak MB':>9}"
    print(f"{'samples':>10}{'views':>7}  {'stage':<14}{heads}", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for n in options.samples:
        with tempfile.TemporaryDirectory() as folder:
            for views, figures in measure(Path(folder), n, sorted(options.views)):
                found[f"{n} x {views}"] = figures
                for stage, f in figures.items():
                    times = f"{f['startup_s']:>14.2f}{f['startup_cpu_s']:>7.2f}{f['us_an_image']:>13.1f}"
                    times += f"{f['cpu_us_an_image']:>8.1f}{f['peak_mb']:>9.0f}"
                    print(f"{n:>10,}{views:>7}  {stage:<14}{times}", flush=True)
    least = next(iter(found.values()))
    growth = {
        stage: {name: max(f[stage][name] for f in found.values()) - least[stage][name] for name in MEASURED}
        for stage in STAGES
    }
    print(json.dumps({"benchmark": "scale", "sizes": found, "growth": growth}))
    return 0


def measure(folder: Path, n: int, views: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every stage over n samples, for each number of views."""
    inventory = make_data(folder / "data", n)
    for count in views:
        grow_cache(folder, inventory, count)
        shutil.rmtree(folder / "run", ignore_errors=True)
        path = folder / "config.yaml"
        path.write_text(to_yaml(config_of(folder, count)))
        figures = {}
        for stage in STAGES:
            command = [sys.executable, "-c", PROBE, stage, str(path), str(folder / "table")]
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # the workers have the other cores
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            figures[stage] = json.loads(done.stdout.splitlines()[-1])
        yield count, figures


def config_of(folder: Path, views: int) -> Config:
    return from_dict(
        {
            "data": {"train": str(folder / "data")},
            "teacher": {"model": TINY_TEACHER, "batch": 64, "min_top1": 0.0},
            "recipe": {"size": 32},
            "cache": {"path": str(folder / "cache"), "views": views, "workers": 2, "device": "cpu"},
            "student": {"model": "deit_tiny_distilled_patch16_224", "kwargs": {"patch_size": 8, "depth": 1}},
            "train": {
                "output": str(folder / "run"),
                "global_batch": BATCH,
                "epochs": 300,
                "max_steps": STEPS,
                "workers": 2,
                "device": "cpu",
            },
        }
    )


def make_data(folder: Path, n: int, block: int = SHARD, classes: int = 4) -> Inventory:
    """n samples in shards of `block` that are one file under many names."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    inside, first = [], folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for i in range(min(block, n)):
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
            info = tarfile.TarInfo(f"{i:06d}.png")
            info.size = out.tell()
            inside.append((int(google_crc32c.value(out.getvalue())), tar.offset + tarfile.BLOCKSIZE, info.size))
            tar.addfile(info, io.BytesIO(out.getvalue()))
    shards = [ShardFile(first.name, first.stat().st_size)]
    for shard in range(1, -(-n // block)):
        os.link(first, folder / f"{shard:05d}.tar")
        shards.append(ShardFile(f"{shard:05d}.tar", shards[0].bytes))
    samples = (
        Sample(f"{i:07d}", i % classes, inside[i % block][0], i // block, *inside[i % block][1:]) for i in range(n)
    )
    return write_inventory(folder, samples, classes=[f"class {i}" for i in range(classes)], shards=shards, block=block)


def grow_cache(folder: Path, inventory: Inventory, views: int) -> None:
    """All units but the first block's last group of views: whole ones of the views that training reads, with made logits
    and digests of nothing, and bare records of the others."""
    config = config_of(folder, views)
    teacher = load_teacher(config.teacher, inventory.classes, torch.device("cpu"), config.recipe.size)
    identity = identity_of(inventory, config.recipe, teacher.fingerprint.facts, teacher.grid, ["envelope"])
    manifest = Manifest(
        identity=identity,
        views=views,
        config=to_dict(config),
        data=str(folder / "data"),
        clean_top1=1.0,
        clean_images=0,
        probe=teacher.probe(),
        versions=library_versions(),
    )
    cache = create_cache(folder / "cache", manifest, inventory)
    whole = STEPS * BATCH // len(inventory) + 2
    left = {(0, v) for v in range(views) if v // cache.recipe.mix_group == (views - 1) // cache.recipe.mix_group}
    for block, view in sorted(set(cache.missing()) - left, key=lambda unit: unit[1]):
        like = cache.commit_of(block, 0) if view >= whole else None
        if like is None:
            add_unit(cache, block, view)
        else:  # neither synced nor read back, as stage 1 does it: these must only be there
            path = cache.root / commit_file(block, view)
            files = [replace(f, path=str(unit_file(like.block, view, f.codec, f.sha256))) for f in like.files]
            path.write_bytes(record_bytes(replace(like, view=view, files=files)))


def add_unit(cache: Cache, block: int, view: int) -> None:
    first, stop = cache.inventory.block_range(block)
    order = quads(stop - first, cache.recipe, cache.inventory.id, block, view // cache.recipe.mix_group)
    builder = UnitBuilder(cache.inventory, cache.recipe, cache.codecs, view, first, order)
    rng = torch.Generator().manual_seed(block * 1000 + view)
    dense = torch.randn(stop - first, len(cache.classes), *cache.grid, generator=rng)
    encoded = {name: codec.encode(dense, dense.mean((2, 3))) for name, codec in cache.codecs.items()}
    builder.add(np.arange(stop - first), np.zeros(stop - first, np.int64), encoded)
    cache.add_unit(block, view, *builder.finish(), {})


if __name__ == "__main__":
    sys.exit(main())
