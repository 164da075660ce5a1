"""Is the envelope exact, and what do the codecs cost? Compared with the teacher itself, run again on the cached views.

    python -m benchmarks.codec [caches/imagenet_sample]

For every view of the cache the pixels are replayed (digests checked) and the teacher run again in stage 1's batches. At
64 blends from 0 to 1 every cell's hard target is computed directly, as the argmax of a * D + (1 - a) * g in float64, and
compared with what each codec gives. Bytes are those of whole unit files, packed in memory; `float16` is the raw dense
and global logits in float16 in the same container. Without a cache it is made first from the ImageNet sample, which
needs CSKD_DATA. 4 minutes for 3,000 views on 2 CPU cores (and 6 to make the cache); 600 KB of memory a sample of a block.

Prints the machine, a table, and one JSON line last. Exits 1 when one target of the envelope is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.codecs import Arrays, Codec, get_codec
from cskd.codecs.base import BLEND_ONE
from cskd.config import load_config
from cskd.errors import CacheError, CskdError
from cskd.loading.stage1 import ChunkMaker, chunks
from cskd.machine.devices import pick_device
from cskd.pipeline.show.progress import Progress
from cskd.store.cache import Cache, open_cache
from cskd.store.format import RESOLVED, UNIT_FIELDS, Unit
from cskd.store.unit import pack_unit
from cskd.teacher.model import Teacher, load_teacher
from cskd.views.digest import check_view
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from cskd.views.mixing import NONE, quads

ROOT = Path(__file__).resolve().parent.parent
# Shapes: R rows of a unit, K classes, h w teacher grid, n cells (h * w), Q blends

Dims = dict[str, tuple[str, ...]]
CODECS = ("envelope", "int8", "topk10")


@dataclass
class Score:
    """What one codec cost and got wrong, summed over units."""

    views: int = 0
    unit_bytes: int = 0
    target_bytes: int = 0
    lookups: int = 0
    mismatches: int = 0

    def facts(self) -> dict[str, Any]:
        return {
            "bytes_per_view": self.target_bytes / self.views,
            "unit_bytes_per_view": self.unit_bytes / self.views,
            "hard_agreement": 1 - self.mismatches / self.lookups,
            "mismatches": self.mismatches,
            "lookups": self.lookups,
        }


@dataclass
class Run:
    """The benchmark's results so far."""

    scores: dict[str, Score] = field(default_factory=dict)
    stored_equal: int = 0  # views whose stored arrays are those of the teacher run again
    stored_views: int = 0

    def add(
        self, name: str, unit: tuple[Arrays, Arrays], dims: Dims, about: dict[str, Any], wrong: int, n: int
    ) -> None:
        """One unit of a codec: its fields and targets, packed as the cache would pack them; `wrong` of n lookups."""
        fields, targets = unit
        about = {"codec": name, **about}
        whole = len(pack_unit(fields, targets, dims, about))
        score = self.scores.setdefault(name, Score())
        score.views += len(fields["key_hash"])
        score.unit_bytes += whole
        score.target_bytes += whole - len(pack_unit(fields, {}, dims, about))
        score.mismatches += wrong
        score.lookups += n


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", nargs="?", type=Path, default=Path("caches/imagenet_sample"))
    parser.add_argument("--data", type=Path, help="folder of the image shards, where they have moved")
    parser.add_argument("--views", type=int, help="how many views of each block to check; default all")
    parser.add_argument("--blends", type=int, default=64)
    options = parser.parse_args(arguments)
    try:
        cache = _open_or_make(options.cache, options.data)
        run = _compare(
            cache, options.views or cache.views, np.linspace(0, BLEND_ONE, options.blends).round().astype(int)
        )
    except CskdError as e:
        print(f"benchmarks/codec.py: {e}", file=sys.stderr)
        return 1
    facts = {name: score.facts() for name, score in run.scores.items()}
    _print_table(cache, run, facts, options.blends)
    print(json.dumps(facts))
    return 1 if facts["envelope"]["mismatches"] else 0


def _open_or_make(path: Path, data: Path | None) -> Cache:
    """The cache, made from the ImageNet sample where there is none."""
    if not (path / "manifest.json").exists():
        source = os.environ.get("CSKD_DATA")
        if source is None:
            raise CacheError(
                f"no cache at {path}; give the path of one, or set CSKD_DATA to the folder with "
                "data/imagenet-sample.tar and teachers/imagenet_mobilenetv2_100.safetensors, and it is made"
            )
        from cskd.pipeline.cache_teacher import cache_teacher
        from cskd.pipeline.pack import pack_data

        shards = path.parent / f"{path.name}_data"
        pack_data(Path(source) / "data" / "imagenet-sample.tar", shards)
        overrides = [f"data.train={shards}", f"cache.path={path}"]
        cache_teacher(load_config(ROOT / "configs" / "imagenet_sample.yaml", overrides))
    return open_cache(path, data)


def _compare(cache: Cache, views: int, blends: NDArray[np.int64]) -> Run:
    """Every unit of the first `views` views: teacher again, direct targets, each codec's targets and bytes."""
    config = load_config(cache.root / RESOLVED)
    teacher = load_teacher(config.teacher, cache.classes, pick_device(config.cache.device), cache.recipe.size)
    if teacher.fingerprint.facts != cache.identity.teacher:
        raise CacheError(
            f"the teacher of {cache.root / RESOLVED} is not the one {cache.root} was made with; cache again"
        )
    views = min(views, cache.views)
    missing = cache.missing(list(range(views)))
    if missing:
        raise CacheError(f"{cache.root} misses {len(missing)} units; run `cskd cache-teacher` again to finish it")
    K = len(cache.classes)
    codecs = {name: get_codec(name, K, cache.grid) for name in CODECS if name != "topk10" or K > 10}
    maker = ChunkMaker(ViewMaker(cache.inventory, cache.recipe), cache.inventory.id)
    run = Run()
    with Progress("codec benchmark", views * cache.inventory.n, "views") as progress:
        for block in range(cache.blocks):
            first, stop = cache.inventory.block_range(block)
            for view in range(views):
                stored = cache.read(block, view, next(iter(cache.codecs)))
                dense, image = _teacher_again(cache, teacher, maker, block, view, stored, config.teacher.batch)
                _compare_unit(cache, run, codecs, block, view, stored.fields, dense, image, blends)
                progress.update(first * views + (view + 1) * (stop - first))
    return run


def _teacher_again(
    cache: Cache, teacher: Teacher, maker: ChunkMaker, block: int, view: int, unit: Unit, batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float32 [R, K, h, w] and global float32 [R, K] logits of a unit's rows, from replayed pixels in stage 1's
    batches. Raises ReplayError where a digest differs."""
    first, stop = cache.inventory.block_range(block)
    order = quads(stop - first, cache.recipe, cache.inventory.id, block, view // cache.recipe.mix_group)
    row_of = np.full(stop - first, -1)
    row_of[unit.position] = np.arange(len(unit.position))
    dense = torch.empty(len(unit.position), len(cache.classes), *cache.grid)
    image = torch.empty(len(unit.position), len(cache.classes))
    for task in chunks(block, (view,), first, order, batch):
        made = maker(task)
        rows = row_of[task.position]
        good = np.flatnonzero(rows >= 0)
        _check_digests(cache, unit, view, first + task.position[good], rows[good], made.crc[0][good])
        place = {int(p): i for i, p in enumerate(task.position)}
        fields = {
            name: np.zeros((len(rows), *unit.fields[name].shape[1:]), np.int64) for name in ("mode", "lam", "box")
        }
        for name in fields:
            fields[name][good] = unit.fields[name][rows[good]]
        partner = np.arange(len(rows))
        for i in good[fields["mode"][good] != NONE]:
            partner[i] = place[int(unit.fields["partner"][rows[i]])]
        tensors = (torch.from_numpy(a).to(teacher.device) for a in (partner, *fields.values()))
        pixels = mix_pixels(made.pixels[0].to(teacher.device), *tensors)
        local, whole = teacher.in_batches(pixels)
        dense[rows[good]], image[rows[good]] = local[good].cpu(), whole[good].cpu()
    return dense, image


def _check_digests(cache: Cache, unit: Unit, view: int, samples: Any, rows: Any, crcs: Any) -> None:
    first, recorded = cache.inventory.block_range(cache.inventory.block_of(int(samples[0])))[0], cache.recorded()
    for sample, row, crc in zip(samples.tolist(), rows.tolist(), crcs.tolist(), strict=True):
        fields = {name: values[row] for name, values in unit.fields.items()}
        partner = first + int(fields["partner"])
        check_view(cache.inventory, cache.recipe, recorded, sample, view, fields, partner, crc)


def _compare_unit(
    cache: Cache,
    run: Run,
    codecs: dict[str, Codec],
    block: int,
    view: int,
    fields: Arrays,
    dense: torch.Tensor,
    image: torch.Tensor,
    blends: NDArray[np.int64],
) -> None:
    names = {name: dims for name, (_, dims) in UNIT_FIELDS.items()}
    about = {"block": block, "view": view, "inventory": cache.inventory.id}
    truth = direct_targets(dense.numpy(), image.numpy(), blends)
    for name, codec in codecs.items():
        arrays = codec.encode(dense, image)
        wrong = int((_targets_of(codec, arrays, blends) != truth).sum())
        run.add(name, (fields, arrays), {**names, **codec.dimensions}, about, wrong, truth.size)
        if name in cache.codecs:
            run.stored_views += len(image)
            run.stored_equal += _equal_views(codec, cache.read(block, view, name).targets, arrays)
    half = {"dense": dense.half().numpy(), "global": image.half().numpy()}
    dims = {"dense": ("sample", "class", "row", "col"), "global": ("sample", "class")}
    wrong = int((direct_targets(half["dense"], half["global"], blends) != truth).sum())
    run.add("float16", (fields, half), {**names, **dims}, about, wrong, truth.size)


def direct_targets(dense_RKhw: NDArray[Any], global_RK: NDArray[Any], blends: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Argmax of a * D + (1 - a) * g in float64, the lowest class on ties: uint16 [Q, R, h * w]."""
    R, K = global_RK.shape
    out = np.empty((len(blends), R, dense_RKhw[0, 0].size), np.uint16)

    def one(r: int) -> None:  # one map at a time stays in a core's L2 cache; numpy lets other threads run
        local_nK = np.ascontiguousarray(dense_RKhw[r].reshape(K, -1).T, np.float64)
        image_K = global_RK[r].astype(np.float64)
        for q, blend in enumerate(blends):
            a = int(blend) / BLEND_ONE
            total_nK = a * local_nK
            total_nK += (1 - a) * image_K
            out[q, r] = total_nK.argmax(1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, range(R)))
    return out


def _targets_of(codec: Codec, arrays: Arrays, blends: NDArray[np.int64]) -> NDArray[np.uint16]:
    """A codec's hard targets: uint16 [Q, R, h * w]. Of a soft codec those of its decoded logits, as `Codec.hard` defines
    them, but decoded once for all blends."""
    R = len(codec.global_class(arrays))
    if codec.exact_hard:
        return np.stack([codec.hard(arrays, int(blend)).reshape(R, -1) for blend in blends])
    found = direct_targets(*codec.logits(arrays), blends)
    found[blends == 0] = codec.global_class(arrays)[:, None]
    return found


def _equal_views(codec: Codec, stored: Arrays, again: Arrays) -> int:
    """How many views have the same arrays in both."""
    one = (np.array([i]) for i in range(len(codec.global_class(stored))))
    return sum(_same(codec.take(stored, i), codec.take(again, i)) for i in one)


def _same(a: Arrays, b: Arrays) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def _print_table(cache: Cache, run: Run, facts: dict[str, dict[str, Any]], blends: int) -> None:
    print(f"machine: {'; '.join(_machine())}")
    views = run.scores["envelope"].views
    print(
        f"cache: {cache.root}, teacher {cache.identity.teacher.get('model')}, {views:,} views, grid "
        f"{cache.grid[0]} x {cache.grid[1]}, {len(cache.classes):,} classes, {blends} blends"
    )
    print(
        f"views whose stored arrays equal those of the teacher run again: {run.stored_equal:,} of {run.stored_views:,}"
    )
    print(f"{'codec':<10}{'targets':>12}{'whole unit':>12}{'agreement':>13}{'wrong of lookups':>26}")
    print(f"{'':<10}{'bytes/view':>12}{'bytes/view':>12}")
    for name, row in facts.items():
        wrong = f"{row['mismatches']:,} of {row['lookups']:,}"
        print(
            f"{name:<10}{row['bytes_per_view']:>12,.0f}{row['unit_bytes_per_view']:>12,.0f}"
            f"{row['hard_agreement']:>13.6f}{wrong:>26}"
        )


def _machine() -> Iterator[str]:
    yield platform.platform()
    yield f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    if torch.cuda.is_available():
        yield torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
