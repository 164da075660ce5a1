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
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.codecs import Arrays, Codec, Outputs, get_codec
from cskd.codecs.base import BLEND_ONE
from cskd.codecs.features import FeaturesCodec
from cskd.codecs.measured import Measured, measure, together
from cskd.config import load_config
from cskd.errors import CacheError, CskdError, TeacherError
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
CODECS = ("envelope", "int8", "topk10", "features8", "featurespca384", "featurespca384b5", "featurespca384b6")
OF_IMAGE = ("global16", "global8", "global4", "globaltop100", "globaltop10")
# Of other programs that keep one vector per augmented view: bytes as their documentation gives them; 0: it gives none.
DOCUMENTED = (
    ("TinyViT, top 100", 404, "4 + 4k: seed, float16 and int16; github.com/microsoft/Cream/tree/main/TinyViT"),
    ("TinyViT, top 10", 44, "the same with k = 10"),
    (
        "dataset reinforcement",
        65,
        "65 to 104: downloads of 33.4 to 53.3 GB, 400 views of 1.28 M; github.com/apple/ml-dr",
    ),
    ("FKD, top 5", 0, "with box and flip of each of 500 crops; no size is stated; github.com/szq0214/FKD"),
)
KL_ROWS = 16  # views whose divergence is computed at a time


@dataclass
class Score:
    """What one codec cost and got wrong, summed over units."""

    views: int = 0
    unit_bytes: int = 0
    target_bytes: int = 0
    lookups: int = 0
    mismatches: int = 0
    errors: list[Measured] = field(default_factory=list)
    tables: int = 0  # bytes that all units share, once per cache

    def facts(self) -> dict[str, Any]:
        error = together(self.errors)
        measured = (
            {}
            if not isinstance(error, Measured)
            else {"kl": error.kl, "largest_error": error.largest, "wrong": error.wrong}
        )
        return measured | {
            "table_bytes": self.tables,
            "bytes_per_view": self.target_bytes / self.views,
            "unit_bytes_per_view": self.unit_bytes / self.views,
            "hard_agreement": 1 - self.mismatches / self.lookups if self.lookups else None,
            "mismatches": self.mismatches,
            "lookups": self.lookups,
        }


@dataclass
class Run:
    """The benchmark's results so far."""

    scores: dict[str, Score] = field(default_factory=dict)
    tables: dict[str, Arrays] = field(default_factory=dict)  # that codecs were fitted
    stored_equal: int = 0  # views whose stored arrays are those of the teacher run again
    stored_views: int = 0

    def add(
        self, name: str, unit: tuple[Arrays, Arrays], dims: Dims, about: dict[str, Any], wrong: int, n: int
    ) -> Score:
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
        return score


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
        overrides = [f"data.train={shards}", f"data.val={shards}", f"cache.path={path}"]
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
    codecs = {name: get_codec(name, K, cache.grid) for name in _names(K, _has_classifier(teacher))}
    maker = ChunkMaker(ViewMaker(cache.inventory, cache.recipe), cache.inventory.id)
    run = Run()
    with Progress("codec benchmark", views * cache.inventory.n, "views") as progress:
        for block in range(cache.blocks):
            first, stop = cache.inventory.block_range(block)
            for view in range(views):
                stored = cache.read(block, view, next(iter(cache.codecs)))
                outputs = _teacher_again(cache, teacher, maker, block, view, stored, config.teacher.batch)
                _compare_unit(cache, run, codecs, block, view, stored.fields, outputs, blends, teacher)
                progress.update(first * views + (view + 1) * (stop - first))
    return run


def _names(classes: int, has_classifier: bool) -> list[str]:
    """The codecs that can hold what such a teacher gives."""
    kept = []
    for name in (*CODECS, *OF_IMAGE):
        top = re.search(r"top(?:k)?([0-9]+)$", name)
        if (top is None or int(top[1]) < classes) and (has_classifier or not name.startswith("features")):
            kept.append(name)
    return kept


def _has_classifier(teacher: Teacher) -> bool:
    try:
        teacher.classifier("features8")
    except TeacherError:
        return False
    return True


def _teacher_again(
    cache: Cache, teacher: Teacher, maker: ChunkMaker, block: int, view: int, unit: Unit, batch: int
) -> Outputs:
    """What stage 1 handed to the codecs for a unit's rows, from replayed pixels in its batches. Raises ReplayError where a
    digest differs."""
    first, stop = cache.inventory.block_range(block)
    order = quads(stop - first, cache.recipe, cache.inventory.id, block, view // cache.recipe.mix_group)
    row_of = np.full(stop - first, -1)
    row_of[unit.position] = np.arange(len(unit.position))
    dense = torch.empty(len(unit.position), len(cache.classes), *cache.grid)
    image = torch.empty(len(unit.position), len(cache.classes))
    maps = torch.empty(0)
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
        local, whole, features = teacher.with_features(pixels)
        maps = maps if len(maps) else torch.empty(len(unit.position), *features.shape[1:])
        dense[rows[good]], image[rows[good]], maps[rows[good]] = (
            local[good].cpu(),
            whole[good].cpu(),
            features[good].cpu(),
        )
    label, partner = unit.fields["label"].astype(np.int64), unit.fields["partner"]
    other = np.where(partner < 0, label, cache.inventory.label[first:stop][np.maximum(partner, 0)])
    return Outputs(dense, image, torch.from_numpy(np.stack([label, other], 1)), maps)


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
    outputs: Outputs,
    blends: NDArray[np.int64],
    teacher: Teacher,
) -> None:
    names = {name: dims for name, (_, dims) in UNIT_FIELDS.items()}
    about = {"block": block, "view": view, "inventory": cache.inventory.id}
    dense, image = outputs.dense, outputs.image
    truth = direct_targets(dense.numpy(), image.numpy(), blends)
    for name, codec in codecs.items():
        if isinstance(codec, FeaturesCodec) and name not in run.scores:  # as stage 1 fits them: on the first unit
            key = name.partition("b")[0]  # bits change no tables
            if key not in run.tables:
                fit_on = [outputs.features[: codec.fitted_on]] if outputs.features is not None else []
                run.tables[key] = codec.fit(teacher.classifier(name), fit_on)
            tables = run.tables[key]
            codec.use_tables(partial(dict, tables))
            run.scores[name] = Score(tables=sum(a.nbytes for a in tables.values()))
        arrays = codec.encode_outputs(outputs)
        packed = codec.pack(arrays)
        wrong = int((_targets_of(codec, arrays, blends) != truth).sum()) if codec.cells else 0
        lookups = truth.size if codec.cells else 0
        score = run.add(name, (fields, packed), {**names, **codec.packed_dimensions}, about, wrong, lookups)
        score.errors += _errors(codec, arrays, outputs)
        if name in cache.codecs:
            run.stored_views += len(image)
            run.stored_equal += _equal_views(codec, cache.read(block, view, name).targets, arrays)
    half = {"dense": dense.half().numpy(), "global": image.half().numpy()}
    dims = {"dense": ("sample", "class", "row", "col"), "global": ("sample", "class")}
    wrong = int((direct_targets(half["dense"], half["global"], blends) != truth).sum())
    run.add("float16", (fields, half), {**names, **dims}, about, wrong, truth.size)


def _errors(codec: Codec, arrays: Arrays, outputs: Outputs) -> list[Measured]:
    """What stage 1 measures on a few views, of all."""
    found = []
    for i in range(0, len(outputs.image), KL_ROWS):
        part = np.arange(i, min(i + KL_ROWS, len(outputs.image)))
        some = Outputs(outputs.dense[part], outputs.image[part])
        found.append(measure(codec, codec.take(arrays, part), some, len(part)))
    return [error for error in found if isinstance(error, Measured)]


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
    found = np.empty((len(blends), R, codec.grid[0] * codec.grid[1]), np.uint16)
    for i in range(0, R, KL_ROWS):  # decoded maps are large
        part = np.arange(i, min(i + KL_ROWS, R))
        found[:, part] = direct_targets(*codec.logits(codec.take(arrays, part)), blends)
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
    print("KL: mean over cells and five blends from 0 to 1, nats, of softmax of the decoded logits from the teacher's")
    print(
        f"{'codec':<18}{'targets':>12}{'whole unit':>12}{'KL':>10}{'agreement':>13}{'wrong of lookups':>26}{'tables':>10}"
    )
    print(f"{'':<18}{'bytes/view':>12}{'bytes/view':>12}{'':>61}{'MB':>10}")
    for name, row in facts.items():
        if row["lookups"]:
            wrong = f"{row['mismatches']:,} of {row['lookups']:,}"
            kl = f"{row['kl']:.4f}" if "kl" in row else ""
            print(
                f"{name:<18}{row['bytes_per_view']:>12,.0f}{row['unit_bytes_per_view']:>12,.0f}{kl:>10}"
                f"{row['hard_agreement']:>13.6f}{wrong:>26}{row['table_bytes'] / 1e6:>10.1f}"
            )
    print(
        f"{'of the image alone':<28}{'bytes/view':>12}{'KL':>10}   cskd's hold both labels' logits, mean and std (20 bytes) too"
    )
    for name, row in facts.items():
        if not row["lookups"]:
            print(f"{name:<28}{row['bytes_per_view']:>12,.0f}{row['kl']:>10.4f}")
    for name, size, source in DOCUMENTED:
        print(f"{name:<28}{size or '-':>12}{'':>10}   {source}")


def _machine() -> Iterator[str]:
    yield platform.platform()
    yield f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    if torch.cuda.is_available():
        yield torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
