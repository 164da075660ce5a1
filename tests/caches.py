"""A tiny cache for tests: shards of generated images, random logits through the real codecs. No teacher, no packing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cskd.config import RecipeConfig, from_dict, to_dict
from cskd.dataset.inventory import Inventory, Sample, ShardFile, write_inventory
from cskd.seeds import view_seeds
from cskd.store.cache import Cache, create_cache
from cskd.store.identity import identity_of
from cskd.store.manifest import Manifest, write_resolved
from cskd.store.unit_builder import UnitBuilder
from cskd.views.digest import pixel_crc
from cskd.views.maker import ViewMaker
from cskd.views.mixing import quads

CLASSES = ["apple", "bee [bold]", "a very long class name indeed", "n01440764", "été"]


def make_tiny_data(
    folder: Path,
    n: int = 10,
    block: int = 8,
    classes: Sequence[str] = CLASSES,
    pixels: int = 40,
    shard: int = 5,
    bad: Sequence[int] = (),
) -> Inventory:
    """Shards of n PNG images of smooth noise, `shard` a tar, with their inventory; those in `bad` are cut in half."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    shards: list[ShardFile] = []
    for s, first in enumerate(range(0, n, shard)):
        name = f"{s:05d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for i in range(first, min(first + shard, n)):
                coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                out = io.BytesIO()
                coarse.resize((pixels + i % 3, pixels), Image.Resampling.BICUBIC).save(out, "PNG")
                data = out.getvalue()
                data = data[: len(data) // 2] if i in bad else data
                info = tarfile.TarInfo(f"image{i:03d}.png")
                info.size = len(data)
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(data))
                crc = int(google_crc32c.value(data))
                samples.append(Sample(f"image{i:03d}", i % len(classes), crc, s, offset, len(data)))
        shards.append(ShardFile(name, (folder / name).stat().st_size))
    return write_inventory(folder, samples, classes=list(classes), shards=shards, block=block)


def random_logits(rows: int, classes: int, grid: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float32 [rows, K, h, w] with differing cells, and global float32 [rows, K], their mean."""
    dense = torch.randn(rows, classes, *grid, generator=torch.Generator().manual_seed(seed)) * 3
    return dense, dense.mean((2, 3))


def make_tiny_cache(
    folder: Path,
    codecs: Sequence[str] = ("envelope",),
    views: int = 3,
    n: int = 10,
    grid: tuple[int, int] = (3, 3),
    quarantine: Sequence[int] = (),
    skip: Sequence[tuple[int, int]] = (),
    classes: Sequence[str] = CLASSES,
    size: int = 32,
    block: int = 5,
) -> Cache:
    """folder/data with shards, folder/cache with units of `views` views, `block` samples to a block as far as shards allow it.

    quarantine: samples without targets. skip: (block, view) of units that are not made.
    Logits are `random_logits(..., seed=1000 * block + view)` in the order of the unit's rows.
    """
    inventory = make_tiny_data(folder / "data", n, block=block, classes=classes)
    recipe = RecipeConfig(size=size, seed=7)
    teacher = {"model": "tiny", "weights_sha256": "0" * 64}
    raw = {"data": {"train": str(folder / "data")}, "recipe": to_dict(recipe), "cache": {"views": views}}
    manifest = Manifest(
        identity=identity_of(inventory, recipe, teacher, grid, list(codecs)),
        views=views,
        config=to_dict(from_dict(raw)),
        data=str(folder / "data"),
        clean_top1=0.5,
        clean_images=n,
    )
    cache = create_cache(folder / "cache", manifest, inventory)
    write_resolved(cache.root, cache.manifest)
    maker = ViewMaker(inventory, recipe)
    for block in range(cache.blocks):
        first, stop = cache.inventory.block_range(block)
        bad = np.array([i - first for i in quarantine if first <= i < stop], np.int64)
        for view in range(views):
            if (block, view) not in skip:
                _add_unit(cache, maker, block, view, bad)
    return cache


def _add_unit(cache: Cache, maker: ViewMaker, block: int, view: int, bad: NDArray[np.int64]) -> None:
    first, stop = cache.inventory.block_range(block)
    order = quads(stop - first, cache.recipe, cache.inventory.id, block, view // cache.recipe.mix_group)
    builder = UnitBuilder(cache.inventory, cache.recipe, cache.codecs, view, first, order)
    builder.drop(bad)
    good = np.setdiff1d(np.arange(stop - first), bad)
    seeds = view_seeds(cache.recipe.seed, cache.inventory.id, cache.inventory.key_hash[first:stop], view)
    crc = np.array([pixel_crc(maker.view(maker.image(first + i), int(seeds[i]))) for i in good.tolist()])
    dense, image = random_logits(len(good), len(cache.classes), cache.grid, seed=1000 * block + view)
    builder.add(good, crc, {name: codec.encode(dense, image) for name, codec in cache.codecs.items()})
    cache.add_unit(block, view, *builder.finish(), {int(i): "not an image" for i in bad})
