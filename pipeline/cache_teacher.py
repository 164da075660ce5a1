"""Stage 1: run the CNN once over every view and keep what a student will ever ask of it.

    plan      which units (one view of one block) are missing
    load      the teacher, checked on clean images before the first unit
    loop      augmented quads -> mixed on the device -> dense and global logits -> codecs, a few batches at once
    commit    a unit at a time, while the teacher goes on; a pass that takes long is saved every `cache.save_seconds`, so that
              killing the process loses that much work, and what the teacher and the writer were at
    seal      when all are there

The same command resumes, and run several times at once it shares the work. Several configs, of teachers that see the same views, are
one pass over the images (`joint_line`). Launch: `cskd cache-teacher configs/imagenet_sample.yaml`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from rich.console import Console

from cskd.config import Config, to_dict
from cskd.config.pins import TEACHER, pinned, record_pins
from cskd.dataset.inventory import Inventory
from cskd.errors import CacheError, ConfigError
from cskd.files.paths import is_remote, location_text
from cskd.loading.feed import fed
from cskd.loading.shards_ahead import shards_of_passes
from cskd.loading.stage1 import ChunkMaker
from cskd.machine.arithmetic import float32_products
from cskd.machine.launch import launched, worker
from cskd.machine.threads import Threads, begun_with, brief_turns, choose_threads, computing_with
from cskd.pipeline.clean_check import clean_check
from cskd.pipeline.codec_tables import fit_tables, refit_lost, refuse_head
from cskd.pipeline.joint_line import feed_all, joint_passes, joint_tasks, refuse_apart, refuse_other_images
from cskd.pipeline.measure_precision import measure_precision
from cskd.pipeline.out_of_memory import Probe, explained, nothing_to_lower
from cskd.pipeline.outputs import use_own_node_cache
from cskd.pipeline.passes import has_claims, views_left
from cskd.pipeline.precheck import BEFORE_TEACHER, WITH_TEACHER, refuse
from cskd.pipeline.setup import Setup, device_of
from cskd.pipeline.show.progress import Notes, Progress, bound_by, duration, print_lines, say
from cskd.pipeline.unit_line import UnitLine, unit_line
from cskd.storage import open_storage
from cskd.store.cache import Cache, create_cache
from cskd.store.identity import identity_of
from cskd.store.manifest import Manifest, has_cache, write_resolved
from cskd.store.replay_check import check_versions
from cskd.store.seal import seal_cache
from cskd.teacher.fingerprint import compare_probe
from cskd.teacher.lanes import lanes_of
from cskd.teacher.model import Teacher, load_teacher
from cskd.views.digest import library_versions
from cskd.views.maker import ViewMaker

HOW_MANY = (
    "several processes share a cache on an object store best when each is told how many they are: "
    "CSKD_WORKER=0, 1, ... and CSKD_WORKERS=N; one alone needs nothing"
)
POLL_WAIT = 2.0  # seconds between two looks at what other processes are making


@dataclass(frozen=True)
class CacheReport:
    """What one run of stage 1 did."""

    cache: str
    units: int  # made by this run
    images: int  # views made by this run; those of unreadable images are not
    seconds: float
    loop_seconds: float  # from the first chunk of views to the last commit
    clean_top1: float | None  # None: the teacher has no classifier
    clean_data: str | None  # where its images are from: val or train; None: of a cache older than that fact
    quarantined: int  # images of the whole cache
    content_root: str
    bound_by: str
    notes: list[str]  # what a user should know, said before the first unit too


Tell = Callable[[int, int, int], None]  # views made by this process, by all, and of all


@dataclass(frozen=True)
class JointReport:
    """What one run of several teachers did."""

    caches: list[CacheReport]


@dataclass(frozen=True)
class _Job:
    """One teacher and its cache."""

    setup: Setup
    about_images: list[str]
    pins: Mapping[str, str]
    notes: Notes


def cache_teacher(config: Config, quiet: bool = False, tell: Tell | None = None, alone: bool = False) -> CacheReport:
    """Make, finish or extend the cache of a config. Raises CskdError; whatever was committed stays.

    tell: called again and again with how far the work is; then no progress is shown. alone: no other process makes this cache.
    """
    return cache_teachers([config], quiet, tell, alone)[0]


def cache_teachers(
    configs: Sequence[Config], quiet: bool = False, tell: Tell | None = None, alone: bool = False
) -> list[CacheReport]:
    """`cache_teacher` of several teachers in one pass over the images: each view is made once, each cache is what its own run makes.

    Raises:  ConfigError where they differ in what makes views, or in how stage 1 runs.
    """
    refuse_apart(configs)
    config = configs[0]
    use_own_node_cache(config)
    device, moved = device_of(config, "cache")
    gpu = device.type == "cuda"
    threads = choose_threads(config.cache.threads, "cache.threads", config.cache.workers, gpu=gpu)
    # Of the ranks of torchrun the first one speaks for all, since it counts what all make.
    quiet, start = quiet or not launched().speaks, time.perf_counter()
    # Not by TF32 what lanes encode and measure next to one another, either: the setting is the whole process's.
    with computing_with(threads.count), brief_turns(gpu), float32_products(False, device):
        jobs = [_job(one, device, moved, quiet) for one in configs]
        refuse_other_images([job.setup.inventory for job in jobs], configs)
        with explained(device, lambda probe: batch_advice(jobs[0].setup.teacher, config, probe)):
            return _fill(jobs, threads, quiet, start, tell, alone)


def cache_joint(configs: Sequence[Config], devices: str | None = None, quiet: bool = False) -> JointReport:
    """`cache_teachers` for the command line."""
    if devices:
        raise ConfigError(
            "--devices is for one config; for several start `cskd cache-teacher A.yaml B.yaml --set cache.device=cuda:0`, and the same for "
            "each other device: they share the work"
        )
    return JointReport(cache_teachers(configs, quiet))


def _job(config: Config, device: torch.device, moved: list[str], quiet: bool) -> _Job:
    """Look at all of a config, and load its teacher."""
    notes = Notes(quiet)
    notes.add(moved)
    root = location_text(config.cache.path, "cache.path", write=True)
    config, pins = pinned(config, TEACHER, root, lambda line: say([line], quiet))
    setup = Setup(config)
    ahead = refuse(BEFORE_TEACHER, setup)
    with explained(device, nothing_to_lower("cache.device")):
        setup.teacher = load_teacher(config.teacher, setup.inventory.classes, device, config.recipe.size)
    with_grid = refuse(WITH_TEACHER, setup).notes
    notes.add([*ahead.images, *setup.teacher.notes, *ahead.notes, *with_grid])
    return _Job(setup, ahead.images, pins, notes)


def _begun(job: _Job, threads: Threads, alone: bool) -> Cache:
    """Check the teacher, and open or begin its cache."""
    setup, notes = job.setup, job.notes
    notes.say()
    cache = _open_or_create(setup.config, setup.inventory, setup.teacher, setup.maker, job.about_images, notes)
    record_pins(cache.storage, job.pins)
    notes.add(_use_threads(threads, cache, setup.teacher, setup.config))
    notes.add([] if alone or has_claims(cache) or worker().count else [HOW_MANY])
    notes.say()
    return cache


def _fill(
    jobs: list[_Job], threads: Threads, quiet: bool, start: float, tell: Tell | None, alone: bool
) -> list[CacheReport]:
    """Make what the caches lack."""
    caches, counts = list[Cache](), set[int]()
    for job in jobs:
        caches.append(_begun(job, threads, alone))
        counts.add(torch.get_num_threads())
    if len(counts) > 1:
        raise CacheError(
            f"the caches were begun with {sorted(counts)} threads, which their targets' last bits depend on; finish each apart"
        )
    config = jobs[0].setup.config
    first, total = jobs[0].setup, sum(cache.inventory.n * cache.views for cache in caches)
    before = total - sum(map(views_left, caches))
    with (
        ExitStack() as stack,
        Progress("cache-teacher", total, "views", start=before, quiet=quiet or tell is not None) as progress,
    ):
        launch = Lock()  # on a GPU the arithmetic is a setting of the whole process: one forward at a time
        lines = [
            stack.enter_context(unit_line(cache, job.setup.teacher, job.setup.config, threads, quiet, launch))
            for cache, job in zip(caches, jobs, strict=True)
        ]

        def show(by_others: int) -> None:
            made = sum(line.images + line.restored for line in lines)
            progress.update(by_others + made)
            if tell is not None:
                tell(made, by_others + made, total)

        show(before)
        while passes := joint_passes(lines, worker()):
            maker_of_chunks = ChunkMaker(first.maker.whole(), first.inventory.id)
            blocks = [next(iter(one.values())) for one in passes]
            tasks = shards_of_passes(first.inventory, blocks, joint_tasks(lines, passes), config.recipe.mix_group)
            results = fed(maker_of_chunks, tasks, first.teacher.device, threads.workers)
            units = sum(line.units for line in lines)
            by_others = total - sum(map(views_left, caches)) - sum(line.images + line.restored for line in lines)
            for chunk in results:
                feed_all(lines, chunk)
                show(by_others)
            for line in lines:
                line.drain()
            show(by_others)
            if sum(line.units for line in lines) == units and not any(line.met for line in lines):
                time.sleep(POLL_WAIT)  # others are making all that is missing
    for job, line in zip(jobs, lines, strict=True):
        if line.twice:
            job.notes.add([f"passes of this process that had been made by another one meanwhile: {line.twice:.2f}"])
            job.notes.say()
    every = zip(jobs, caches, lines, strict=True)
    return [_report(job, cache, line, threads, time.perf_counter() - start) for job, cache, line in every]


def _report(job: _Job, cache: Cache, line: UnitLine, threads: Threads, seconds: float) -> CacheReport:
    """Seal a cache and say what was done."""
    return CacheReport(
        cache=cache.location,
        units=line.units,
        images=line.images - line.unreadable,
        seconds=seconds,
        loop_seconds=line.seconds,
        clean_top1=cache.manifest.clean_top1,
        clean_data=cache.manifest.clean_data,
        quarantined=int(cache.quarantined().sum()),
        content_root=seal_cache(cache, job.setup.config.cache.max_quarantine).content_root,
        bound_by=bound_by(line.pools, line.seconds, line.images, "views", cores=threads.workers > 0)
        if line.images
        else "nothing was missing",
        notes=job.notes.all,
    )


def batch_advice(teacher: Teacher, config: Config, probe: Probe) -> str:
    """After a forward that there was no memory for: the teacher.batch that there is memory for, and what setting it means."""
    batch = teacher.batch

    def forward(rows: int) -> None:
        size = teacher.image_size
        replace(teacher, batch=rows).in_batches(torch.zeros(rows, 3, size, size, device=teacher.device))

    halves = [(batch >> i) // 4 * 4 for i in range(1, batch.bit_length()) if batch >> i >= 4]
    fits = None if teacher.fingerprint.compile else probe(halves, forward)
    begun = has_cache(config.cache.path)
    again = f": the cache was begun with {batch}, another one needs another cache.path" if begun else ""
    return (
        f" with teacher.batch {batch}{f', {fits:,} fit' if fits else ''}; set "
        f"{f'teacher.batch={fits}' if fits else 'a smaller teacher.batch'}, which is part of the fingerprint{again}"
    )


def _open_or_create(
    config: Config, inventory: Inventory, teacher: Teacher, maker: ViewMaker, about_images: list[str], notes: Notes
) -> Cache:
    """The cache of this config: identity compared, the teacher's outputs on the probe images compared too."""
    storage = open_storage(config.cache.path, "cache.path")
    identity = identity_of(inventory, config.recipe, teacher.fingerprint.facts, teacher.grid, config.cache.codecs)
    refuse_head(identity, teacher)
    manifest, probe = Manifest(identity=identity, views=config.cache.views), teacher.probe()
    new = not has_cache(storage)
    if new:
        check = clean_check(teacher, maker, config)
        precision = measure_precision(teacher, maker, config.teacher)
        manifest = replace(
            manifest,
            config=_without_devices(config),
            data=config.data.train if is_remote(config.data.train) else str(Path(config.data.train).resolve()),
            clean_top1=check.top1,
            clean_images=check.images,
            clean_data=check.data,
            notes=[*about_images, *teacher.notes, *check.notes, *precision.notes],
            precision=precision.facts,
            probe=probe,
            tables=fit_tables(storage, identity, teacher, maker),
            threads=lanes_of(teacher.device, torch.get_num_threads(), teacher.reentrant)[1],
            versions=library_versions(),
            container=None if config.cache.container == "zarr" else config.cache.container,
        )
    cache = create_cache(storage, manifest, inventory)
    refit_lost(cache, teacher, maker)
    write_resolved(storage, cache.manifest)
    notes.add(cache.manifest.notes or [])
    notes.add([] if new else check_versions(cache))
    notes.say()
    difference = compare_probe(cache.manifest.probe or {}, probe)
    if difference:
        raise CacheError(
            f"{cache.location}: the teacher no longer gives the outputs the cache was begun with ({difference})"
        )
    return cache


def _without_devices(config: Config) -> dict[str, Any]:
    """The config as a manifest records it: which device of which machine is no part of a cache, and may be missing elsewhere."""
    recorded = to_dict(config)
    for section in ("cache", "train"):
        recorded[section]["device"] = "auto"
    return recorded


def _use_threads(threads: Threads, cache: Cache, teacher: Teacher, config: Config) -> list[str]:
    """Compute with so many from here on, or with those that the cache was begun with, where a forward is split over them: then
    its last bits depend on how many. Returns notes."""
    changed: list[str] = []
    if teacher.device.type == "cpu" and not teacher.reentrant:
        threads, changed = begun_with(cache.manifest.threads, threads, config.cache.threads is not None)
    torch.set_num_threads(threads.count)
    return [str(threads), *changed]


def render(report: CacheReport, console: Console) -> None:
    """The report for people."""
    rate, took = report.images / report.loop_seconds if report.loop_seconds else 0.0, duration(report.loop_seconds)
    did = f"{report.units:,} units, {report.images:,} views in {took} ({rate:,.0f} views/s), " if report.units else ""
    of = f" of data.{report.clean_data}" if report.clean_data else ""
    known = report.clean_top1 is not None
    top1 = (
        f"teacher top-1 on clean images{of} {100 * (report.clean_top1 or 0):.1f} %"
        if known
        else "teacher without classes"
    )
    print_lines(
        console,
        f"{report.cache}: {did}{duration(report.seconds)} with loading and checks",
        f"{top1}, quarantined {report.quarantined} images",
        f"sealed, content {report.content_root}",
        report.bound_by,
    )


def render_joint(report: JointReport, console: Console) -> None:
    """The reports of one pass, one after the other."""
    for one in report.caches:
        render(one, console)
