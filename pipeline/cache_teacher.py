"""Stage 1: run the CNN once over every view and keep what a student will ever ask of it.

    plan      which units (one view of one block) are missing
    load      the teacher, checked on clean images before the first unit
    loop      augmented quads -> mixed on the device -> dense and global logits -> codecs, a few batches at once
    commit    a unit at a time, while the teacher goes on; killing the process loses at most what was not committed of the
              pass it was in and of the one before
    seal      when all are there

The same command resumes, and run several times at once it shares the work. Launch: `cskd cache-teacher configs/imagenet_sample.yaml`.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape

from cskd.codecs import Arrays, get_codec
from cskd.config import Config, to_dict, to_yaml
from cskd.dataset.inventory import Inventory, open_inventory
from cskd.errors import CacheError, ConfigError
from cskd.files.claims import Claims
from cskd.loading.stage1 import Chunk, ChunkMaker, ChunkViews, chunks
from cskd.loading.stream import Stream
from cskd.machine.devices import pick_device
from cskd.machine.threads import Threads, begun_with, choose_threads, computing_with
from cskd.pipeline.clean_check import clean_check
from cskd.pipeline.measure_precision import measure_precision
from cskd.pipeline.outputs import refuse_cache_output
from cskd.pipeline.precheck import look_ahead
from cskd.pipeline.show.progress import Notes, Pool, Progress, bound_by, duration
from cskd.store.cache import Cache, create_cache
from cskd.store.commit import write_whole
from cskd.store.format import RESOLVED
from cskd.store.golden import check_versions
from cskd.store.identity import identity_of
from cskd.store.seal import seal_cache
from cskd.store.unit_builder import PassBuilder, UnitBuilder
from cskd.teacher.forwards import pad_rows
from cskd.teacher.lanes import Lanes, lanes_of
from cskd.teacher.model import Teacher, compare_probe, load_teacher
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from cskd.views.mixing import quads
from cskd.views.versions import library_versions

WAIT = 2.0  # seconds between two looks at what other processes are making


@dataclass(frozen=True)
class CacheReport:
    """What one run of stage 1 did."""

    cache: str
    units: int  # made by this run
    images: int  # views made by this run; those of unreadable images are not
    seconds: float
    loop_seconds: float  # from the first chunk of views to the last commit
    clean_top1: float
    clean_data: str | None  # where its images are from: val or train; None: of a cache older than that fact
    quarantined: int  # images of the whole cache
    content_root: str
    bound_by: str
    notes: list[str]  # what a user should know, said before the first unit too


def cache_teacher(config: Config, quiet: bool = False) -> CacheReport:
    """Make, finish or extend the cache of a config. Raises CskdError; whatever was committed stays."""
    threads = choose_threads(config.cache.threads, "cache.threads", config.cache.workers)
    with computing_with(threads.count):
        return _cache_teacher(config, threads, quiet)


def _cache_teacher(config: Config, threads: Threads, quiet: bool) -> CacheReport:
    start = time.perf_counter()
    if not config.cache.path:
        raise ConfigError("cache.path is empty; say where the cache goes, for example --set cache.path=caches/mine")
    if not config.data.train:
        raise ConfigError(
            "data.train is empty; say which packed data set to cache, for example --set data.train=data/mine"
        )
    refuse_cache_output(config)
    inventory = open_inventory(Path(config.data.train))
    inventory.check_shards()
    device = pick_device(config.cache.device)
    maker, notes = ViewMaker(inventory, config.recipe), Notes(quiet)
    ahead = look_ahead(config, maker)
    teacher = load_teacher(config.teacher, inventory.classes, device, config.recipe.size)
    notes.add([*ahead.images, *teacher.notes, *ahead.notes, *ahead.on_grid(teacher.grid)])
    notes.say()
    cache = _open_or_create(config, inventory, teacher, maker, ahead.images, notes)
    notes.add(_use_threads(threads, cache, teacher, config))
    notes.say()

    total, loop_clock = cache.inventory.n * cache.views, 0.0
    with (
        Claims(cache.root) as claims,
        _thread("write") as writer,
        Lanes(device, teacher.reentrant) as lanes,
        Progress("cache-teacher", total, "views", start=total - _left(cache), quiet=quiet) as progress,
    ):
        line = _Line(cache, teacher, config, claims, lanes, writer)
        while passes := _passes(cache):
            claimed: deque[tuple[PassBuilder, Path]] = deque()
            tasks = _claimed_tasks(cache, passes, claims, claimed, config.teacher.batch)
            pin = device.type == "cuda"
            results = iter(Stream(ChunkMaker(maker, inventory.id), tasks, config.cache.workers, pin_memory=pin))
            before, by_others = line.units, total - _left(cache) - line.images
            for chunk in results:
                loop_clock = loop_clock or time.perf_counter()
                line.feed(*claimed[0], chunk)
                if claimed[0][0].all_begun:
                    claimed.popleft()
                progress.update(by_others + line.images)
            line.drain()
            progress.update(by_others + line.images)
            if line.units == before:
                time.sleep(WAIT)  # others are making all that is missing
    loop_seconds = time.perf_counter() - loop_clock if loop_clock else 0.0
    return CacheReport(
        cache=str(cache.root),
        units=line.units,
        images=line.images - line.unreadable,
        seconds=time.perf_counter() - start,
        loop_seconds=loop_seconds,
        clean_top1=cache.manifest["clean_top1"],
        clean_data=cache.manifest.get("clean_data"),
        quarantined=int(cache.quarantined().sum()),
        content_root=seal_cache(cache, config.cache.max_quarantine).content_root,
        bound_by=bound_by(line.pools, loop_seconds, line.images, "views") if line.images else "nothing was missing",
        notes=notes.all,
    )


def _open_or_create(
    config: Config, inventory: Inventory, teacher: Teacher, maker: ViewMaker, about_images: list[str], notes: Notes
) -> Cache:
    """The cache of this config: identity compared, the teacher's outputs on the probe images compared too."""
    root = Path(config.cache.path)
    codecs = [get_codec(name, teacher.classes, teacher.grid).name for name in config.cache.codecs]
    identity = identity_of(inventory, config.recipe, teacher.fingerprint, teacher.grid, codecs)
    probe = teacher.probe()
    facts: dict[str, Any] = {}
    if not (root / "manifest.json").exists():
        check = clean_check(teacher, maker, config)
        precision = measure_precision(teacher, maker, config.teacher)
        facts = {
            **check.facts,
            "notes": [*about_images, *teacher.notes, *check.notes, *precision.notes],
            "precision": precision.facts,
            "probe": probe,
            "threads": lanes_of(teacher.device, torch.get_num_threads(), teacher.reentrant)[1],  # of one forward
            "versions": library_versions(),
            "data": str(Path(config.data.train).resolve()),
            "config": to_dict(config),
        }
    cache = create_cache(root, identity, config.cache.views, facts, inventory)
    write_resolved(cache)
    notes.add(cache.manifest.get("notes", []))
    if not facts and (note := check_versions(cache)):
        notes.add([note])
    notes.say()
    difference = compare_probe(cache.manifest["probe"], probe)
    if difference:
        raise CacheError(f"{root}: the teacher no longer gives the outputs the cache was begun with ({difference})")
    return cache


def _use_threads(threads: Threads, cache: Cache, teacher: Teacher, config: Config) -> list[str]:
    """Compute with so many from here on, or with those that the cache was begun with, where a forward is split over them: then
    its last bits depend on how many. Returns notes."""
    changed: list[str] = []
    if teacher.device.type == "cpu" and not teacher.reentrant:
        threads, changed = begun_with(cache.manifest.get("threads"), threads, config.cache.threads is not None)
    torch.set_num_threads(threads.count)
    return [str(threads), *changed]


def resolved_of(cache: Cache) -> str:
    """The config that makes this cache, as YAML: the one it was begun with, and the views it has grown to.

    Not filled up with today's defaults: a version with one key more must find the file as it was written.
    """
    recorded = cache.manifest["config"]
    return to_yaml({**recorded, "cache": {**recorded["cache"], "views": cache.views}})


def write_resolved(cache: Cache) -> None:
    """Put the resolved config beside the cache, where it isn't there already."""
    path, text = cache.root / RESOLVED, resolved_of(cache)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    write_whole(path, text.encode())


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
    cache: Cache,
    passes: list[tuple[int, tuple[int, ...]]],
    claims: Claims,
    claimed: deque[tuple[PassBuilder, Path]],
    batch: int,
) -> Iterator[Chunk]:
    """The tasks of every pass that no other process is at, drawn while those before it run; the passes, each with its claim,
    go to `claimed`."""
    for block, views in passes:
        claim = claims.take(f"b{block:05d}.g{views[0] // cache.recipe.mix_group:04d}")
        if claim is None:
            continue
        views = tuple(v for v in views if cache.commit_of(block, v) is None)  # others may have made some since
        if not views:
            claims.release([claim])
            continue
        first, stop = cache.block_range(block)
        order = quads(stop - first, cache.recipe, cache.inventory.id, block, views[0] // cache.recipe.mix_group)
        units = [UnitBuilder(cache.inventory, cache.recipe, cache.codecs, v, first, order) for v in views]
        claimed.append((PassBuilder(block, first, order, units, views), claim))
        yield from chunks(block, views, first, order, batch)


@contextlib.contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """One thread; at the end what it is at is waited for, and what still waits for it is dropped."""
    pool = ThreadPoolExecutor(1, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Batch:
    """One view of a chunk, under way in a lane; position int64 and crc int64 of its good rows."""

    work: PassBuilder
    claim: Path
    unit: UnitBuilder
    rows: int  # bad ones included
    position: NDArray[np.int64]
    crc: NDArray[np.int64]
    targets: Future[tuple[dict[str, Arrays], float, float]]


class _Line:
    """From chunks to commits: batches are with the lanes, whole passes with the writer, and results are taken in order."""

    def __init__(
        self,
        cache: Cache,
        teacher: Teacher,
        config: Config,
        claims: Claims,
        lanes: Lanes,
        writer: ThreadPoolExecutor,
    ) -> None:
        self.images = self.units = 0  # whose targets are in, and committed
        self.unreadable = 0  # of the images
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of each part, summed over all who do it
        self._cache, self._teacher, self._config = cache, teacher, config
        self._claims, self._lanes, self._writer = claims, lanes, writer
        self._underway: deque[_Batch] = deque()
        self._writing: deque[Future[tuple[int, float]]] = deque()

    @property
    def pools(self) -> list[Pool]:
        """Who did what for how long."""

        def of(*names: str) -> dict[str, float]:
            return {name: self._seconds[name] for name in names}

        workers = max(1, self._config.cache.workers)
        return [
            Pool(workers, of("decode", "augment")),
            Pool(self._lanes.count, of("teacher", "encode")),
            Pool(1, of("write")),
        ]

    def feed(self, work: PassBuilder, claim: Path, chunk: ChunkViews) -> None:
        """Begin the views of a chunk; returns when there is room for another. Raises what went wrong since the last call."""
        self._seconds["decode"] += chunk.decode_seconds
        self._seconds["augment"] += chunk.augment_seconds
        position = chunk.task.position
        bad = {int(position[row]): reason for row, reason in chunk.bad.items()}
        work.quarantine |= bad
        refuse_too_many(
            work.quarantine, len(work.order), self._cache.inventory, work.first, self._config.cache.max_quarantine
        )
        good = np.array([row for row in range(len(position)) if row not in chunk.bad], np.int64)
        for v, unit in enumerate(work.units):
            unit.drop(np.array(list(bad), np.int64))
            mixing = tuple(torch.from_numpy(field) for field in unit.mixing_rows(position))
            targets = self._lanes.submit(self._targets, chunk.pixels[v], mixing, good)
            crc = chunk.crc[v][good]
            self._underway.append(_Batch(work, claim, unit, len(position), position[good], crc, targets))
        work.begun += len(position)
        while len(self._underway) > self._lanes.room:
            self._collect()
        while self._writing and (self._writing[0].done() or len(self._writing) > 1):
            self._committed()

    def drain(self) -> None:
        """Wait for all that was begun, and its commits."""
        while self._underway:
            self._collect()
        while self._writing:
            self._committed()

    def _targets(
        self, views_BHWC: torch.Tensor, mixing: tuple[torch.Tensor, ...], good: NDArray[np.int64]
    ) -> tuple[dict[str, Arrays], float, float]:
        """In a lane: mix a chunk as the student's input is mixed, run the teacher on it, padded to a fixed size, and encode
        the rows `good`.

        Returns: arrays by codec, and the seconds of teacher and encoding.
        """
        if len(good) == 0:
            dense, logits = (torch.zeros(0, self._teacher.classes, *grid) for grid in (self._teacher.grid, ()))
            return {name: codec.encode(dense, logits) for name, codec in self._cache.codecs.items()}, 0.0, 0.0
        begun, device = time.perf_counter(), self._teacher.device
        inputs = [t.to(device, non_blocking=True) for t in (views_BHWC, *mixing)]
        keep = torch.from_numpy(good).to(device)
        with self._lanes.launching():
            pixels = mix_pixels(*inputs)
            dense, logits = self._teacher.forward_dense(pad_rows(pixels, self._config.teacher.batch))
            if len(good) < len(dense):
                dense, logits = dense[keep], logits[keep]
        middle = time.perf_counter()
        encoded = {name: codec.encode(dense, logits) for name, codec in self._cache.codecs.items()}
        return encoded, middle - begun, time.perf_counter() - middle

    def _collect(self) -> None:
        """Take the oldest batch's targets; the last one of a pass sends it to the writer."""
        batch = self._underway.popleft()
        encoded, forward, encode = batch.targets.result()
        batch.unit.add(batch.position, batch.crc, encoded)
        batch.work.rows += batch.rows
        self.images += batch.rows
        self.unreadable += batch.rows - len(batch.position)
        self._seconds["teacher"] += forward
        self._seconds["encode"] += encode
        if batch.work.complete:
            self._writing.append(self._writer.submit(self._commit, batch.work, batch.claim))

    def _commit(self, work: PassBuilder, claim: Path) -> tuple[int, float]:
        """In the writer: one commit a view, then the claim is given back. Returns units and seconds."""
        clock = time.perf_counter()
        for view, unit in zip(work.views, work.units, strict=True):
            self._cache.add_unit(work.block, view, *unit.finish(), work.quarantine, {})
        self._claims.release([claim])
        return len(work.views), time.perf_counter() - clock

    def _committed(self) -> None:
        units, seconds = self._writing.popleft().result()
        self.units += units
        self._seconds["write"] += seconds


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
    rate = report.images / report.loop_seconds if report.loop_seconds else 0.0
    did = (
        f"{report.units:,} units, {report.images:,} views in {duration(report.loop_seconds)} ({rate:,.0f} views/s), "
        if report.units
        else ""
    )
    of = f" of data.{report.clean_data}" if report.clean_data else ""
    console.print(f"{escape(report.cache)}: {did}{duration(report.seconds)} with loading and checks", soft_wrap=True)
    console.print(
        f"teacher top-1 on clean images{of} {100 * report.clean_top1:.1f} %, quarantined {report.quarantined} images",
        soft_wrap=True,
    )
    console.print(f"sealed, content {report.content_root}", soft_wrap=True)
    console.print(escape(report.bound_by), soft_wrap=True)
