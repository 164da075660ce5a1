"""Is replay exact? Digests of views made in every way training can make them, against views made one at a time.

    python -m benchmarks.replay [--quick]

Packs the ImageNet sample ($CSKD_DATA, else `shared` beside the checkout), makes a cache with DeiT's full recipe and a
teacher of a few weights, and computes every (sample, view) pair straight: decode, `sample_params`, `apply`, one after the
other. Against these stand the digests stage 1 stored, and those of the batches that stage 2's own loader delivers with
other workers, ranks, start methods, batches, orders and starting points: pixels, mode, lambda, box and partner of each
row, hashed here, in the main process. 5,000 pairs a variant and about 10 minutes on 2 cores; `--quick` takes some images.

Prints the machine, a table, and one JSON line last. Exits 1 when one digest differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from benchmarks.tiny_teacher import TINY_TEACHER
from cskd.config import TrainConfig, from_dict
from cskd.dataset.images import decode
from cskd.dataset.inventory import open_inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import CskdError
from cskd.loading.plan import PlanSpec
from cskd.loading.sources import Batch, TargetSpec
from cskd.loading.stage1 import ChunkMaker, chunks
from cskd.loading.stage2 import BatchMaker
from cskd.loading.stream import Stream
from cskd.loading.tasks import RunTasks
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.pack import pack_data
from cskd.seeds import view_seeds
from cskd.store.cache import Cache, open_cache
from cskd.views.digest import pixel_crc, view_digest
from cskd.views.maker import ViewMaker
from cskd.views.mixing import NONE, mixing, quads
from cskd.views.ops import apply
from cskd.views.recipe import sample_params

ROOT = Path(__file__).resolve().parent.parent
DEIT = {"randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}


@dataclass(frozen=True)
class Sizes:
    """How much is compared: `pairs` a variant, out of images x views."""

    pairs: int
    views: int  # a multiple of 3, for the variant with repeats
    workers: int  # of the variants that are about something else
    many: tuple[int, ...]  # numbers of workers compared
    # the middle batch is that of the other variants, a multiple of 8: four ranks share it evenly
    batches: tuple[int, int, int]


FULL = Sizes(pairs=5000, views=12, workers=2, many=(0, 1, 4, 16), batches=(12, 64, 256))
QUICK = Sizes(pairs=96, views=9, workers=0, many=(0, 1, 4), batches=(12, 16, 24))


@dataclass(frozen=True)
class Variant:
    """One way to feed an epoch after the other, until enough pairs have come."""

    name: str
    workers: int
    batch: int
    ranks: int = 1
    start: str = "forkserver"
    repeats: int = 1
    epoch: int = 0
    cuts: int = 0  # the first epoch is left and resumed so many times
    reverse: bool = False


@dataclass
class Score:
    """What came of a variant."""

    comparisons: int = 0
    differences: int = 0
    distinct: int = 0
    seconds: float = 0.0


def variants(sizes: Sizes) -> Iterator[Variant]:
    few, batch, many = sizes.batches
    some = sizes.workers
    for workers in sizes.many:
        yield Variant(f"workers {workers}", workers, batch)
    for start in ("fork", "spawn", "forkserver"):
        yield Variant(f"start method {start}", max(1, some), batch, start=start)
    for ranks in (1, 2, 4):
        yield Variant(f"ranks {ranks}", some, batch, ranks=ranks)
    for size in (few, batch, many):
        yield Variant(f"batch {size}", some, size)
    yield Variant("blocks in reverse", some, batch, reverse=True)
    yield Variant("started at epoch 7", some, batch, epoch=7)
    yield Variant("resumed twice in an epoch", some, few, cuts=2)
    yield Variant("repeats 3", some, few, repeats=3)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, under a minute")
    parser.add_argument("--images", type=int, help="how many images of the sample; default all, --quick 48")
    options = parser.parse_args(arguments)
    source = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared")) / "data" / "imagenet-sample.tar"
    if not source.is_file():
        print(f"benchmarks/replay.py: no {source}; set CSKD_DATA to the folder with data/ in it", file=sys.stderr)
        return 1
    sizes = QUICK if options.quick else FULL
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            limit = options.images or (48 if options.quick else None)
            pack_data(source, data, shard_size=100, block=12 if options.quick else 100, limit=limit, quiet=True)
            return prove(data, Path(folder), sizes)
    except CskdError as e:
        print(f"benchmarks/replay.py: {e}", file=sys.stderr)
        return 1


def prove(data: Path, folder: Path, sizes: Sizes, size: int = 224) -> int:
    """The benchmark on packed images in `data`, with views of `size` pixels; works in `folder`. Returns the exit status."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"pillow": PIL.__version__}
    print(f"{platform.machine()}, {os.cpu_count()} cores, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"{'variant':<28}{'comparisons':>12}{'differences':>12}{'pairs':>8}{'seconds':>9}", flush=True)
    clock = time.perf_counter()
    cache = make_cache(data, folder, sizes, size)
    made = time.perf_counter() - clock
    clock = time.perf_counter()
    crc, digest = reference(cache)
    print(f"{'(one at a time)':<28}{'':>24}{digest.size:>8}{time.perf_counter() - clock:>9.1f}", flush=True)
    scores = {"stage 1": stored(cache, digest)}
    scores["stage 1"].seconds = made
    show("stage 1", scores["stage 1"])
    scores["stage 1, blocks in reverse"] = backwards(cache, crc, sizes)
    show("stage 1, blocks in reverse", scores["stage 1, blocks in reverse"])
    for variant in variants(sizes):
        scores[variant.name] = compare(cache, variant, sizes.pairs, digest, folder / "scratch" / variant.name)
        show(variant.name, scores[variant.name])
    comparisons = sum(score.comparisons for score in scores.values())
    differences = sum(score.differences for score in scores.values())
    result = {"benchmark": "replay", "pairs": digest.size, "comparisons": comparisons, "differences": differences}
    print(json.dumps(result | {"versions": versions, "variants": {n: vars(s) for n, s in scores.items()}}))
    return int(differences > 0)


def show(name: str, score: Score) -> None:
    numbers = f"{score.comparisons:>12,}{score.differences:>12,}{score.distinct:>8,}{score.seconds:>9.1f}"
    print(f"{name:<28}{numbers}", flush=True)


def make_cache(data: Path, folder: Path, sizes: Sizes, size: int) -> Cache:
    """Stage 1 as it is, with a teacher that costs next to nothing."""
    kwargs = {"classes": len(open_inventory(data).classes), "channels": 4, "patch": 32}
    teacher = {"model": TINY_TEACHER, "kwargs": kwargs, "grid": [1, 1]}
    config: dict[str, dict[str, Any]] = {
        "data": {"train": str(data)},
        "teacher": {**teacher, "input_size": size, "min_top1": 0.0, "check_images": 8},
        "recipe": {**DEIT, "size": size},
        "cache": {"path": str(folder / "cache"), "views": sizes.views, "workers": sizes.workers, "device": "cpu"},
    }
    cache_teacher(from_dict(config), quiet=True)
    return open_cache(folder / "cache")


def reference(cache: Cache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """crc of the pixels, and digest, of every (sample, view), made one at a time: int64 [n, V] each."""
    inventory, recipe = cache.inventory, cache.recipe
    crc = np.zeros((len(inventory), cache.views), np.int64)
    digest = np.zeros_like(crc)
    reader = ShardReader(inventory)
    for i in range(len(inventory)):
        image = decode(reader.read(i))
        for v in range(cache.views):
            seed = int(view_seeds(recipe.seed, inventory.id, inventory.key_hash[i : i + 1], v)[0])
            crc[i, v] = pixel_crc(apply(image, sample_params(seed, image.shape[0], image.shape[1], recipe)))
    for block, v in itertools.product(range(cache.blocks), range(cache.views)):
        first, stop = cache.inventory.block_range(block)
        hashes = inventory.key_hash[first:stop]
        seeds = view_seeds(recipe.seed, inventory.id, hashes, v)
        order = quads(stop - first, recipe, inventory.id, block, v // recipe.mix_group)
        m = mixing(seeds, order, np.zeros(stop - first, bool), recipe, v)
        for i in range(stop - first):
            partner = int(hashes[m.partner[i]]) if m.mode[i] != NONE else 0
            digest[first + i, v] = view_digest(int(crc[first + i, v]), int(m.mode[i]), int(m.lam[i]), m.box[i], partner)
    return crc, digest


def stored(cache: Cache, digest: NDArray[np.int64]) -> Score:
    """The digests in the cache's units."""
    score = Score(distinct=digest.size)
    for block, v in itertools.product(range(cache.blocks), range(cache.views)):
        unit = cache.read(block, v, "envelope")
        expected = digest[cache.inventory.block_range(block)[0] + unit.position, v]
        score.comparisons += len(expected)
        score.differences += int((unit.fields["digest"] != expected).sum())
    return score


def backwards(cache: Cache, crc: NDArray[np.int64], sizes: Sizes) -> Score:
    """Pixels as stage 1's workers make them, with the blocks, the views and the samples of a block in reverse."""
    score, clock = Score(distinct=crc.size), time.perf_counter()
    views = tuple(reversed(range(cache.views)))
    tasks = []
    for block in reversed(range(cache.blocks)):
        first, stop = cache.inventory.block_range(block)
        tasks += chunks(block, views, first, np.arange(stop - first)[::-1], 7)
    maker = ChunkMaker(ViewMaker(cache.inventory, cache.recipe), cache.inventory.id)
    for result in Stream(maker, tasks, sizes.workers):
        expected = crc[result.task.first + result.task.position][:, views].T
        found = np.array([[pixel_crc(view.numpy()) for view in row] for row in result.pixels])
        score.comparisons += expected.size
        score.differences += int((found != expected).sum())
    score.seconds = time.perf_counter() - clock
    return score


def compare(cache: Cache, variant: Variant, pairs: int, digest: NDArray[np.int64], scratch: Path) -> Score:
    """Digests of what the loader delivers, against `digest`."""
    score, seen, clock = Score(), np.zeros(digest.shape, bool), time.perf_counter()
    for batch in feed(cache, variant, pairs, scratch):
        sample, view = batch["sample"].numpy(), batch["view"].numpy()
        found = digests(batch, cache.inventory.key_hash)
        score.comparisons += len(found)
        score.differences += int((found != digest[sample, view]).sum())
        seen[sample, view] = True
    score.distinct, score.seconds = int(seen.sum()), time.perf_counter() - clock
    return score


def feed(cache: Cache, variant: Variant, pairs: int, scratch: Path) -> Iterator[Batch]:
    """What training would be fed: whole epochs of every rank, until `pairs` samples have come. Replay is not verified
    by the workers, so that differences are counted and not refused."""
    settings = TrainConfig(repeats=variant.repeats, global_batch=variant.batch, window=1 if variant.reverse else 2)
    plan = PlanSpec.over(cache, settings, variant.ranks)
    epochs = math.ceil(pairs / (plan.steps * variant.batch))
    first = variant.epoch * plan.steps
    inside = [first + plan.steps * cut // (variant.cuts + 1) for cut in range(1, variant.cuts + 1)]
    borders = [first, *inside, first + epochs * plan.steps]
    if len(set(borders)) < len(borders):
        raise CskdError(f"an epoch has {plan.steps} steps, expected more than {variant.cuts}; take more images")
    for rank, (start, stop) in itertools.product(range(variant.ranks), itertools.pairwise(borders)):
        maker = BatchMaker(ViewMaker(cache.inventory, cache.recipe), None, 1.0)
        targets = TargetSpec("none", "envelope", 0)
        with RunTasks(cache, plan, lambda _: targets, lambda _: [], scratch, start, stop, rank) as tasks:  # noqa: B023
            ordered = list(tasks)[::-1] if variant.reverse else tasks
            yield from Stream(maker, ordered, variant.workers, start=variant.start)


def digests(batch: Batch, key_hash: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Digest of each row of a delivered batch: int64 [n]."""
    rows = {name: batch[name].numpy() for name in ("pixels", "sample", "partner", "mode", "lam", "box")}
    out = np.zeros(len(rows["sample"]), np.int64)
    for i in range(len(out)):
        mode = int(rows["mode"][i])
        partner = int(key_hash[rows["sample"][rows["partner"][i]]]) if mode != NONE else 0
        out[i] = view_digest(pixel_crc(rows["pixels"][i]), mode, int(rows["lam"][i]), rows["box"][i], partner)
    return out


if __name__ == "__main__":
    sys.exit(main())
