"""What do envelopes cost on one core: to make from the teacher's logits, and to look up for an epoch table?

    CSKD_DATA=... python -m benchmarks.envelope [--images 256] [--rounds 7] [--units 8]

Encoding: logits of MobileNetV2 on views of the ImageNet sample, mixed as in stage 1, in both memory layouts: classes
innermost, as the teacher's head gives them, and [B, K, h, w] contiguous. The other side walks each cell's envelope over
all classes and a shrinking set of active cells, in float64. Both must give the same class in every cell at every one of
65,537 / 256 blends. Tables: units of 8,192 rows on disk, made of mixtures of those logits, then `build_table` from them to
memory-mapped columns; the other side reads the same units with stock zarr, unchecked and without looking anything up. All
on one core; the two sides take turns, medians. 1.5 minutes.

Prints the machine, a table, and one JSON line last: `encode_ms` an image (of the slower layout), `encode_walk_ms`,
`encode_ratio`, `table_samples_per_s`, `zarr_samples_per_s`, and what parts of a table take in ms a unit. Exits 1 when one
lookup differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from cskd.codecs import Arrays, Codec, get_codec
from cskd.codecs.base import BLEND_ONE
from cskd.config import from_dict, load_config, to_dict
from cskd.dataset.inventory import Sample, ShardFile, open_inventory, write_inventory
from cskd.errors import CskdError
from cskd.loading.epoch_table import build_table
from cskd.loading.plan import PlanSpec, epoch_plan
from cskd.loading.sources import TargetSpec
from cskd.pipeline.pack import pack_data
from cskd.store.cache import Cache, create_cache
from cskd.store.format import Unit
from cskd.store.identity import identity_of
from cskd.store.manifest import Manifest
from cskd.store.unit import read_unit
from cskd.store.unit_builder import UnitBuilder
from cskd.teacher.model import load_teacher
from cskd.views.digest import library_versions
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from cskd.views.mixing import drawn_fields, quads

# Shapes: N samples, B batch, K classes, h w teacher grid, n its cells
ROOT = Path(__file__).resolve().parent.parent
BATCH, ROWS = 32, 8192
F32 = NDArray[np.float32]
Walked = tuple[NDArray[np.int64], list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="a multiple of 32, at most 480")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--units", type=int, default=8)
    options = parser.parse_args(arguments)
    if "CSKD_DATA" not in os.environ:
        print("benchmarks/envelope.py: set CSKD_DATA to the folder with data/ and teachers/", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            dense_NhwK, global_NK = teacher_outputs(Path(folder) / "data", options.images)
            core = one_core()
            codec = get_codec("envelope", global_NK.shape[1], (dense_NhwK.shape[1], dense_NhwK.shape[2]))
            result, wrong = encoding(codec, dense_NhwK, global_NK, options.rounds)
            result |= tables(Path(folder), codec, dense_NhwK, global_NK, options)
    except CskdError as e:
        print(f"benchmarks/envelope.py: {e}", file=sys.stderr)
        return 1
    print(f"machine: {platform.platform()}, core {core} of {os.cpu_count()}, torch {torch.__version__}")
    for name, value in result.items():
        print(f"{name:<28}{value:>14,.3f}" if value < 100 else f"{name:<28}{value:>14,.0f}")
    print(json.dumps({"benchmark": "envelope", **result, "lookups_wrong": wrong}))
    return 1 if wrong else 0


def one_core() -> int:
    """Keep this process, and the threads it starts from now on, on one core; its number, -1 where that can't be done."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return -1
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def teacher_outputs(folder: Path, images: int) -> tuple[F32, F32]:
    """Dense [N, h, w, K] and global [N, K] logits of the first view of that many images, mixed as stage 1 mixes them."""
    pack_data(Path(os.environ["CSKD_DATA"]) / "data" / "imagenet-sample.tar", folder)
    config = load_config(ROOT / "configs" / "imagenet_sample.yaml", [f"data.train={folder}"])
    inventory = open_inventory(folder)
    teacher = load_teacher(config.teacher, inventory.classes, torch.device("cpu"), config.recipe.size)
    maker, n = ViewMaker(inventory, config.recipe), int(inventory.blocks[1])
    fields = drawn_fields(inventory, config.recipe, 0, 0, np.zeros(n, bool))
    order = quads(n, config.recipe, inventory.id, 0, 0)[: images // BATCH * BATCH]
    dense, whole = [], []
    for position in order.reshape(-1, BATCH):
        place = {p: i for i, p in enumerate(position.tolist())}
        partner = [place.get(int(fields["partner"][p]), place[p]) for p in position.tolist()]
        mixing = [np.array(partner), *(fields[name][position].astype(np.int64) for name in ("mode", "lam", "box"))]
        views = [maker.view(maker.image(p), int(fields["seed"][p])) for p in position.tolist()]
        pixels = mix_pixels(torch.from_numpy(np.stack(views)), *map(torch.from_numpy, mixing))
        local, image = teacher.forward_dense(pixels)
        dense.append(local.permute(0, 2, 3, 1).numpy())
        whole.append(image.numpy())
    return np.concatenate(dense), np.concatenate(whole)


def encoding(codec: Codec, dense_NhwK: F32, global_NK: F32, rounds: int) -> tuple[dict[str, float], int]:
    """Milliseconds an image of both sides, and how many lookups differ."""
    innermost = [torch.from_numpy(d).permute(0, 3, 1, 2) for d in np.split(dense_NhwK, len(dense_NhwK) // BATCH)]
    images = [torch.from_numpy(g) for g in np.split(global_NK, len(innermost))]
    contiguous = [d.contiguous() for d in innermost]
    sides: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[Tensor]]] = {
        "innermost": (codec.encode, innermost),
        "contiguous": (codec.encode, contiguous),
        "walk": (walk, innermost),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for i, image in enumerate(images):
            for name, (encode, batches) in sides.items():
                clock = time.perf_counter()
                encode(batches[i], image)
                times[name].append((time.perf_counter() - clock) / BATCH * 1e3)
    wrong = sum(differences(codec, d, g) for d, g in zip(innermost, images, strict=True))
    ms = {name: statistics.median(values) for name, values in times.items()}
    encode_ms = max(ms["innermost"], ms["contiguous"])
    return {
        "encode_ms": encode_ms,
        "encode_innermost_ms": ms["innermost"],
        "encode_contiguous_ms": ms["contiguous"],
        "encode_walk_ms": ms["walk"],
        "encode_ratio": ms["walk"] / encode_ms,
    }, wrong


def walk(dense_BKhw: Tensor, global_BK: Tensor) -> list[Walked]:
    """Each image's envelope, from the global winner over all classes, in float64, a map at a time.

    Returns: for each image the winner at blend 0, then for each step of the walk the cells that take it, the classes that
             win there and the last blends, in 2^-16, at which they don't yet.
    """
    found: list[Walked] = []
    for dense_hwK, global_K in zip(dense_BKhw.permute(0, 2, 3, 1).numpy(), global_BK.numpy(), strict=True):
        local_nK = dense_hwK.reshape(-1, len(global_K)).astype(np.float64)
        image_K = global_K.astype(np.float64)
        active = np.arange(len(local_nK))
        winner = np.full(len(active), int(global_K.argmax()))
        first, steps = winner[:1].copy(), []
        while len(active):
            fall = image_K[winner][:, None] - image_K
            rise = local_nK[active]
            rise -= local_nK[active, winner][:, None]
            total = fall + rise
            overtakes = (fall >= 0) & (rise >= 0) & (total > 0)
            crossing = np.divide(fall, total, out=np.full_like(fall, 2.0), where=overtakes)
            winner = crossing.argmin(1)
            at = crossing[np.arange(len(active)), winner]
            going = at < 1
            active, winner = active[going], winner[going]
            steps.append((active, winner, np.floor(at[going] * BLEND_ONE).astype(np.int64)))
        found.append((first, steps))
    return found


def differences(codec: Codec, dense_BKhw: Tensor, global_BK: Tensor) -> int:
    """Lookups in which the codec and the walk differ, over all cells, at every 256th blend."""
    arrays, walked, wrong = codec.encode(dense_BKhw, global_BK), walk(dense_BKhw, global_BK), 0
    for blend in range(0, BLEND_ONE + 1, 256):
        found = codec.hard(arrays, blend).reshape(len(walked), -1)
        for target_n, (first, steps) in zip(found, walked, strict=True):
            expected = np.repeat(first, len(target_n))
            for cell, winner, start in steps:
                expected[cell[start < blend]] = winner[start < blend]
            wrong += int((target_n != expected).sum())
    return wrong


def tables(
    folder: Path, codec: Codec, dense_NhwK: F32, global_NK: F32, options: argparse.Namespace
) -> dict[str, float]:
    """Samples a second of whole tables and of stock zarr's reading, parts of a table, and how large the units are."""
    cache = make_cache(folder, codec, dense_NhwK, global_NK, options.units)
    n, spec = cache.inventory.n, TargetSpec("cells", "envelope", BLEND_ONE // 3)
    bounds = cache.inventory.blocks
    plan = epoch_plan(PlanSpec(bounds, np.zeros(n, bool), cache.inventory.id, cache.recipe, 1, 1, 0, 256, 8), 0)
    commits = [c for b in range(cache.blocks) if (c := cache.commit_of(b, 0)) is not None]
    files = [cache.root / c.files[0].path for c in commits]
    units = [cache.read(b, 0, "envelope") for b in range(cache.blocks)]
    sides: dict[str, Callable[[], Any]] = {
        "table": lambda: build_table(cache, plan, spec, 0, len(plan.sample), folder / "table"),
        "zarr": lambda: [stock_read(path) for path in files],
        "read": lambda: [read_unit(path) for path in files],
        "read_and_check": lambda: [cache.read(b, 0, "envelope") for b in range(cache.blocks)],
        "check_codec": lambda: list(map(partial(check, codec), units)),
        "look_up": lambda: [codec.hard(unit.targets, spec.blend) for unit in units],
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            clock = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - clock)
    s = {name: statistics.median(values) for name, values in times.items()}
    s["scatter"] = s["table"] - s["read_and_check"] - s["look_up"]
    return {
        "table_samples_per_s": len(plan.sample) / s["table"],
        "zarr_samples_per_s": n / s["zarr"],
        "bytes_per_view": sum(path.stat().st_size for path in files) / n,
        "segments_per_cell": 1 + float(np.mean([unit.targets["n_extra"].mean() for unit in units])),
        **{f"{name}_ms_a_unit": value / len(units) * 1e3 for name, value in s.items()},
    }


def make_cache(folder: Path, codec: Codec, dense_NhwK: F32, global_NK: F32, blocks: int) -> Cache:
    """One view of blocks of 8,192 samples without images: targets of random pairs of the logits, in random shares."""
    shards = [ShardFile(f"{b:05d}.tar", ROWS) for b in range(blocks)]
    samples = (Sample(f"{i:07d}", i % codec.classes, 0, i // ROWS, 0, 1) for i in range(blocks * ROWS))
    names = [f"class {i}" for i in range(codec.classes)]
    (folder / "made").mkdir()
    inventory = write_inventory(folder / "made", samples, classes=names, shards=shards, block=ROWS)
    recipe = load_config(ROOT / "configs" / "imagenet_sample.yaml").recipe
    identity = identity_of(inventory, recipe, {"model": "mixtures"}, codec.grid, ["envelope"])
    config, data = to_dict(from_dict({})), str(folder / "made")
    manifest = Manifest(identity=identity, views=1, config=config, data=data, versions=library_versions())
    cache = create_cache(folder / "cache", manifest, inventory)
    rng = np.random.default_rng(0)
    for block in range(blocks):
        parts: list[Arrays] = []
        for _ in range(ROWS // 64):
            (i, j), share = rng.integers(0, len(global_NK), (2, 64)), rng.uniform(0.5, 1, 64).astype(np.float32)
            a, b = share[:, None], 1 - share[:, None]
            dense = a[:, :, None, None] * dense_NhwK[i] + b[:, :, None, None] * dense_NhwK[j]
            image = a * global_NK[i] + b * global_NK[j]
            parts.append(codec.encode(torch.from_numpy(dense).permute(0, 3, 1, 2), torch.from_numpy(image)))
        order = quads(ROWS, recipe, inventory.id, block, 0)
        builder = UnitBuilder(inventory, recipe, cache.codecs, 0, block * ROWS, order)
        builder.add(np.arange(ROWS), np.zeros(ROWS, np.int64), {"envelope": codec.concat(parts)})
        cache.add_unit(block, 0, *builder.finish(), {})
    return cache


def stock_read(path: Path) -> list[NDArray[Any]]:
    """Every array of a unit as plain zarr reads it."""
    with zarr.storage.ZipStore(path, mode="r") as store:
        root = zarr.open_group(store, mode="r")
        arrays = [*root.arrays(), *((name, a) for _, group in root.groups() for name, a in group.arrays())]
        return [np.asarray(array[...]) for _, array in arrays]


def check(codec: Codec, unit: Unit) -> None:
    codec.check(unit.targets, len(unit.position), codec.classes)


if __name__ == "__main__":
    sys.exit(main())
