"""Stage 1: run the CNN once over every view and keep what a student will ever ask of it.

    plan      which units (one view of one block) are missing
    load      the teacher, checked on clean images before the first unit
    loop      augmented quads -> mixed on the device -> dense and global logits -> codecs
    commit    a unit at a time; killing the process loses at most the pass it was in
    seal      when all are there

The same command resumes, and run several times at once it shares the work. Launch: `cskd cache-teacher configs/imagenet_sample.yaml`.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape

from cskd.augment.device import mix_pixels
from cskd.augment.mixing import NONE, quads
from cskd.codecs import get_codec
from cskd.config import Config, from_dict, to_dict, to_yaml
from cskd.devices import pick_device
from cskd.errors import CacheError, ConfigError, DataError, ImageError
from cskd.golden import check_versions
from cskd.identity import identity_of, library_versions
from cskd.inventory import Inventory, open_inventory
from cskd.loading.stage1 import Chunk, ChunkMaker, ChunkViews, chunks, pad_rows
from cskd.loading.stream import Stream
from cskd.loading.views import ViewMaker
from cskd.store.cache import Cache, create_cache
from cskd.store.claims import Claims
from cskd.store.commit import Commit, write_whole
from cskd.store.format import RESOLVED
from cskd.store.seal import seal_cache
from cskd.teacher import Teacher, check_clean, clean_top1, compare_probe, load_teacher
from cskd.unit_builder import UnitBuilder
from pipeline.progress import Progress, bound_by

WAIT = 2.0  # seconds between two looks at what other processes are making


@dataclass(frozen=True)
class CacheReport:
    """What one run of stage 1 did."""

    cache: str
    units: int  # made by this run
    images: int  # views made by this run
    seconds: float
    clean_top1: float
    quarantined: int  # images of the whole cache
    content_root: str
    bound_by: str


def cache_teacher(config: Config, quiet: bool = False) -> CacheReport:
    """Make, finish or extend the cache of a config. Raises CskdError; whatever was committed stays."""
    start = time.perf_counter()
    if not config.cache.path:
        raise ConfigError("cache.path is empty; say where the cache goes, for example --set cache.path=caches/mine")
    if not config.data.train:
        raise ConfigError(
            "data.train is empty; say which packed data set to cache, for example --set data.train=data/mine"
        )
    if Path(config.cache.path).resolve() == Path(config.data.train).resolve():
        raise ConfigError(f"cache.path and data.train are both {config.data.train}; give the cache a folder of its own")
    inventory = open_inventory(Path(config.data.train))
    device = pick_device(config.cache.device)
    teacher = load_teacher(config.teacher, inventory.classes, device, config.recipe.size)
    maker = ViewMaker(inventory, config.recipe)
    cache = _open_or_create(config, inventory, teacher, maker)

    seconds: defaultdict[str, float] = defaultdict(float)
    images = units = 0
    total = _left(cache)
    with Claims(cache.root) as claims, Progress("cache-teacher", total, "views", quiet=quiet) as progress:
        while passes := _passes(cache):
            taken: deque[Path] = deque()
            tasks = _claimed_tasks(cache, passes, claims, taken, config.teacher.batch)
            results = iter(Stream(ChunkMaker(maker, inventory.id), tasks, config.cache.workers))
            made = units
            while chunk := _timed(results, seconds):
                done = total - _left(cache)  # by this process and by others
                commits = _make_units(cache, chunk, results, teacher, config, seconds, progress, done)
                claims.release([taken.popleft()])
                images += sum(c.samples for c in commits)
                units += len(commits)
            if units == made:
                time.sleep(WAIT)  # others are making all that is missing
    return CacheReport(
        cache=str(cache.root),
        units=units,
        images=images,
        seconds=time.perf_counter() - start,
        clean_top1=cache.manifest["clean_top1"],
        quarantined=int(cache.quarantined().sum()),
        content_root=seal_cache(cache, config.cache.max_quarantine).content_root,
        bound_by=bound_by(dict(seconds), images, "views") if seconds else "nothing was missing",
    )


def _open_or_create(config: Config, inventory: Inventory, teacher: Teacher, maker: ViewMaker) -> Cache:
    """The cache of this config: identity compared, the teacher's outputs on the probe images compared too."""
    root = Path(config.cache.path)
    codecs = [get_codec(name, teacher.classes, teacher.grid).name for name in config.cache.codecs]
    identity = identity_of(inventory, config.recipe, teacher.fingerprint, teacher.grid, codecs)
    probe = teacher.probe()
    facts: dict[str, Any] = {}
    if not (root / "manifest.json").exists():
        top1, count = clean_check(teacher, maker, config)
        facts = {
            "clean_top1": top1,
            "clean_images": count,
            "probe": probe,
            "versions": library_versions(),
            "data": str(Path(config.data.train).resolve()),
            "config": to_dict(config),
        }
    cache = create_cache(root, identity, config.cache.views, facts, inventory)
    write_resolved(cache)
    if not facts:
        check_versions(cache)
    difference = compare_probe(cache.manifest["probe"], probe)
    if difference:
        raise CacheError(f"{root}: the teacher no longer gives the outputs the cache was begun with ({difference})")
    return cache


def resolved_of(cache: Cache) -> str:
    """The config that makes this cache, as YAML: the one it was begun with, and the views it has grown to."""
    recorded = cache.manifest["config"]
    return to_yaml(from_dict({**recorded, "cache": {**recorded["cache"], "views": cache.views}}))


def write_resolved(cache: Cache) -> None:
    """Put the resolved config beside the cache, where it isn't there already."""
    path, text = cache.root / RESOLVED, resolved_of(cache)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    write_whole(path, text.encode())


def clean_check(teacher: Teacher, maker: ViewMaker, config: Config) -> tuple[float, int]:
    """Top-1 of the teacher on clean images spread over the data set, and how many; near chance is refused."""
    images, labels = [], []
    wanted = min(config.teacher.check_images, len(maker.inventory))
    for i in np.linspace(0, len(maker.inventory) - 1, wanted).astype(int).tolist():
        with contextlib.suppress(ImageError):  # it will be quarantined, and counted, in its turn
            images.append(maker.image(i))
            labels.append(int(maker.inventory.label[i]))
    if not images:
        raise DataError(
            f"none of {wanted} images of {config.data.train} can be decoded; run `cskd pack` on a whole data set"
        )
    top1 = clean_top1(teacher, images, labels)
    check_clean(top1, teacher.classes, len(images), config.teacher.min_top1)
    return top1, len(images)


def _passes(cache: Cache) -> list[tuple[int, tuple[int, ...]]]:
    """(block, views) of each pass: the missing views of one mixing group of one block, made from one decoding."""
    by_pass: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for block, view in cache.missing():
        by_pass[view // cache.recipe.mix_group, block].append(view)
    return [(block, tuple(views)) for (_, block), views in sorted(by_pass.items())]


def _left(cache: Cache) -> int:
    """Views that have no unit yet."""
    sizes = np.diff(cache.inventory.blocks)
    return sum(int(sizes[block]) for block, _ in cache.missing())


def _claimed_tasks(
    cache: Cache, passes: list[tuple[int, tuple[int, ...]]], claims: Claims, taken: deque[Path], batch: int
) -> Iterator[Chunk]:
    """The tasks of every pass that no other process is at, drawn while those before it run; their claims go to `taken`."""
    for block, views in passes:
        claim = claims.take(f"b{block:05d}.g{views[0] // cache.recipe.mix_group:04d}")
        if claim is None:
            continue
        views = tuple(v for v in views if cache.commit_of(block, v) is None)  # others may have made some since
        if not views:
            claims.release([claim])
            continue
        taken.append(claim)
        first, stop = cache.block_range(block)
        yield from chunks(block, views, first, _order(cache, block, views, stop - first), batch)


def _timed(results: Iterator[ChunkViews], seconds: defaultdict[str, float]) -> ChunkViews | None:
    """The next result, None after the last; the time it was waited for is counted."""
    clock = time.perf_counter()
    chunk = next(results, None)
    seconds["decode and augment (waited for)"] += time.perf_counter() - clock
    return chunk


def _order(cache: Cache, block: int, views: tuple[int, ...], n: int) -> NDArray[np.int64]:
    return quads(n, cache.recipe, cache.inventory.id, block, views[0] // cache.recipe.mix_group)


def _make_units(
    cache: Cache,
    chunk: ChunkViews,
    results: Iterator[ChunkViews],
    teacher: Teacher,
    config: Config,
    seconds: defaultdict[str, float],
    progress: Progress,
    done: int,
) -> list[Commit]:
    """One pass, of which `chunk` is the first: its views for every sample of its block, then one commit a view."""
    block, views = chunk.task.block, chunk.task.views
    first, stop = cache.block_range(block)
    order = _order(cache, block, views, stop - first)
    builders = [UnitBuilder(cache.inventory, config.recipe, cache.codecs, v, first, order) for v in views]
    quarantine: dict[int, str] = {}
    seen = 0
    while True:
        position = chunk.task.position
        bad = {int(position[row]): reason for row, reason in chunk.bad.items()}
        quarantine |= bad
        refuse_too_many(quarantine, stop - first, cache.inventory, first, config.cache.max_quarantine)
        good = np.array([row for row in range(len(position)) if row not in chunk.bad], np.int64)
        for v, builder in enumerate(builders):
            builder.drop(np.array(list(bad), np.int64))
            if len(good) == 0:
                continue
            clock = time.perf_counter()
            dense, logits = _teacher_batch(teacher, chunk.pixels[v], position, builder, config.teacher.batch, good)
            seconds["teacher"] += time.perf_counter() - clock
            clock = time.perf_counter()
            encoded = {name: codec.encode(dense, logits) for name, codec in cache.codecs.items()}
            builder.add(position[good], chunk.crc[v][good], encoded)
            seconds["encode"] += time.perf_counter() - clock
        seen += len(position)
        progress.update(done + seen * len(views))
        following = _timed(results, seconds) if seen < len(order) else None
        if following is None:
            break
        chunk = following
    clock = time.perf_counter()
    commits = [cache.add_unit(block, v, *b.finish(), quarantine, {}) for v, b in zip(views, builders, strict=True)]
    seconds["write"] += time.perf_counter() - clock
    return commits


def _teacher_batch(
    teacher: Teacher,
    views_BHWC: torch.Tensor,
    position: NDArray[np.int64],
    builder: UnitBuilder,
    batch: int,
    good: NDArray[np.int64],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix one chunk on the device as the student's input is mixed, and run the teacher on it, padded to a fixed size.

    Returns: dense float32 [G, K, h, w] and global float32 [G, K] logits of the rows `good`.
    """
    m = builder.mixing
    row_of = np.full(int(position.max()) + 1, -1, np.int64)
    row_of[position] = np.arange(len(position))
    rows = np.arange(len(position))
    partner = np.where(m.mode[position] == NONE, rows, row_of[np.maximum(m.partner[position], position.min())])
    fields = (partner, m.mode[position], m.lam[position].astype(np.int64), m.box[position].astype(np.int64))
    device = teacher.device
    pixels = mix_pixels(
        views_BHWC.to(device, non_blocking=True),
        *(torch.from_numpy(np.ascontiguousarray(f)).to(device) for f in fields),
    )
    dense, logits = teacher.forward_dense(pad_rows(pixels, batch))
    keep = torch.from_numpy(good).to(device)
    return dense[keep], logits[keep]


def refuse_too_many(quarantine: dict[int, str], n: int, inventory: Inventory, first: int, limit: float) -> None:
    """CacheError when more than `limit` of a block's n samples can't be decoded. quarantine: position -> reason."""
    if len(quarantine) > max(1, limit * n):
        position, reason = next(iter(quarantine.items()))
        raise CacheError(
            f"{len(quarantine)} of {n} images of a block are unreadable, more than cache.max_quarantine {limit}; the first is "
            f"'{inventory.key(first + position)}': {reason}; mend the data set, or raise the limit"
        )


def render(report: CacheReport, console: Console) -> None:
    """The report for people."""
    rate = report.images / report.seconds if report.seconds else 0.0
    console.print(
        f"{escape(report.cache)}: {report.units} units, {report.images} views in {report.seconds:.1f} s ({rate:.0f} views/s)",
        soft_wrap=True,
    )
    console.print(
        f"teacher top-1 on clean images {100 * report.clean_top1:.1f} %, quarantined {report.quarantined} images",
        soft_wrap=True,
    )
    console.print(f"sealed, content {report.content_root}", soft_wrap=True)
    console.print(escape(report.bound_by), soft_wrap=True)
