"""Both stages at work for a few seconds each, on a few images: the line of stage 1 and the steps of stage 2, as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd.codecs import Arrays, Codec, get_codec
from cskd.codecs.measured import MeasuredMap, measure
from cskd.codecs.stages import StageBitsCodec, StageCodec, stages_of
from cskd.config import Config, TrainConfig, to_dict
from cskd.dataset.inventory import Inventory
from cskd.errors import CodecError
from cskd.files.durable import put
from cskd.loading.feed import fed
from cskd.loading.sources import Batch
from cskd.loading.stage1 import ChunkMaker
from cskd.loading.stage2 import BatchMaker, EvalTask
from cskd.loading.targets import LiveTargets
from cskd.machine.arithmetic import float32_products
from cskd.machine.ranks import running_ranks
from cskd.machine.threads import Threads, brief_turns, choose_threads, computing_with
from cskd.pipeline.codec_tables import fit_tables
from cskd.pipeline.evaluate import score_heads
from cskd.pipeline.loader_speed import images_per_second
from cskd.pipeline.measure_precision import first_views
from cskd.pipeline.outputs import sole_run
from cskd.pipeline.passes import missing_passes
from cskd.pipeline.setup import even_divisors, micro_batch_of
from cskd.pipeline.show.progress import bound_by
from cskd.pipeline.train_step import TrainStep, micro_batches
from cskd.pipeline.training_run import TrainingRun, open_run
from cskd.pipeline.unit_line import unit_line
from cskd.store.cache import Cache, create_cache
from cskd.store.format import UNIT_FIELDS
from cskd.store.identity import identity_of
from cskd.store.manifest import Manifest
from cskd.store.unit import pack_unit
from cskd.teacher.model import Teacher
from cskd.views.digest import library_versions
from cskd.views.maker import ViewMaker

SETTLED = 0.25  # share of a measurement that is over when it begins to count
LEAST_BATCHES = 12  # of the teacher that one counts, whatever time they take
LONG_FORWARD = 0.05  # share of the time there is that one forward may take
LONG_STEP = 0.2  # and one step
LEAST_VIEWS = 16  # of a step that is timed
CODECS = ("envelope", "int8", "topk:10")  # whose sizes are told in addition to the config's
PCA_RANKS = (16, 64)  # of the smaller codecs of stages whose sizes are told in addition
SIZED = 256  # views whose targets are packed for that
WRITE_BYTES = 1 << 26  # of the file that the disk is timed with
EPOCHS = 10_000  # of a run that is timed: it never comes to its end


@dataclass(frozen=True)
class Stage1:
    """The line at work. view: seconds of a view; decode, augment: of one worker, of a view."""

    view: float
    decode: float
    augment: float
    views_done: int  # views of all images of the sample that are in the cache
    bound: str


@dataclass(frozen=True)
class Stage2:
    """Steps from the cache, in seconds of a view: with the loader, without it, and of a live teacher (no padding counted)."""

    cached: float
    student: float
    teacher: float
    decode: float  # of one worker
    augment: float
    evaluate: float  # per image of data.val
    epoch_end: float  # states and weights, once an epoch
    start: float
    workers: int
    threads: str
    bound: str


@dataclass(frozen=True)
class CodecSize:
    """What a codec takes; a unit holds the same view's seeds and checksums, too."""

    codec: str
    target_bytes: float  # per view
    unit_bytes: float  # per view
    exact_hard: bool
    soft: bool
    chosen: bool  # by cache.codecs
    lost: float | None = None  # of a stage's map, the share of its variance; None of codecs of classes


def wait(device: torch.device) -> None:
    """Until the device has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def teacher_batch(teacher: Teacher, seconds: float) -> tuple[int, float]:
    """How many images one forward may have here so that a few seconds hold many, at most `teacher.batch`; and images a second.

    A program is compiled for one number of rows: that one stays.
    """
    rows = teacher.batch if teacher.fingerprint.compile else 4
    while True:
        smaller = dataclasses.replace(teacher, batch=rows)
        x = torch.zeros(rows, 3, teacher.image_size, teacher.image_size, device=teacher.device)
        for _ in range(2):  # the first chooses kernels
            clock = time.perf_counter()
            smaller.in_batches(x)
            wait(teacher.device)
        took = time.perf_counter() - clock
        if rows == teacher.batch or took * 2 > LONG_FORWARD * seconds:
            return rows, rows / took
        rows = min(2 * rows, teacher.batch)


def step_batch(config: Config, size: int, device: torch.device, teacher_rate: float, seconds: float) -> int:
    """Views of a step that is timed: `train.global_batch`, or on a slow device an even part of it that takes not too long."""
    whole = config.train.global_batch
    if device.type != "cpu":
        return whole
    sizes, rows = even_divisors(whole) or [2], 0
    rate = images_per_second(config.student, size, min(8, whole), config.train.autocast, device, LONG_STEP)
    while True:  # larger steps take less time for a view, which more of them have room for
        most = max(LEAST_VIEWS, LONG_STEP * seconds / (1 / rate + 1 / teacher_rate))
        fits = next((n for n in sizes if n <= most), sizes[-1])
        if fits <= rows:
            return rows
        rows = fits
        rate = images_per_second(config.student, size, rows, config.train.autocast, device, LONG_STEP)


def new_cache(root: Path, config: Config, inventory: Inventory, teacher: Teacher) -> Cache:
    """A cache of the sample, with no check of the teacher and more views than there is time for."""
    identity = identity_of(inventory, config.recipe, teacher.fingerprint.facts, teacher.grid, config.cache.codecs)
    manifest = Manifest(
        identity=identity,
        views=config.cache.views,
        config=to_dict(config),
        data=str(inventory.root),
        versions=library_versions(),
        tables=fit_tables(root, identity, teacher, ViewMaker(inventory, config.recipe)),
    )
    return create_cache(root, manifest, inventory)


def time_stage1(cache: Cache, teacher: Teacher, config: Config, threads: Threads, seconds: float) -> Stage1:
    """The line of stage 1 at work for so long, and until all images have a first pass of views."""
    maker = ChunkMaker(ViewMaker(cache.inventory, cache.recipe), cache.inventory.id)
    points: list[tuple[float, int]] = []
    chunks = decode = augment = 0.0
    torch.set_num_threads(threads.count)
    with unit_line(cache, teacher, config, threads) as line, contextlib.ExitStack() as stack:
        results = fed(maker, line.tasks(missing_passes(cache)), teacher.device, threads.workers)
        stack.callback(results.close)  # type: ignore[attr-defined]  # a generator, all of them
        for chunk in results:
            line.feed(chunk)
            chunks += len(chunk.task.position) * len(chunk.task.views)
            decode, augment = decode + chunk.decode_seconds, augment + chunk.augment_seconds
            if line.images:
                points.append((time.perf_counter(), line.images))
            if points and line.units >= min(cache.recipe.mix_group, cache.views):
                spent, counted = points[-1][0] - points[0][0], _counted(points)
                if spent >= seconds and counted[1] >= LEAST_BATCHES * teacher.batch:
                    break
        elapsed, bound_pools, images = points[-1][0] - points[0][0], line.pools, line.images
    took, views = _counted(points)
    return Stage1(
        view=took / max(1, views),
        decode=decode / chunks,
        augment=augment / chunks,
        views_done=line.units,
        bound=bound_by(bound_pools, elapsed, images, "views", cores=threads.workers > 0),
    )


def _counted(points: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Seconds and views from the point where it had settled to the last."""
    begin = points[0][0] + SETTLED * (points[-1][0] - points[0][0])
    first = next(p for p in points if p[0] >= begin)
    return points[-1][0] - first[0], points[-1][1] - first[1]


def codec_sizes(cache: Cache, teacher: Teacher, maker: ViewMaker, views: int, chosen: Sequence[str]) -> list[CodecSize]:
    """Bytes per view of each codec, by its growth from half of some views to all of them: what every unit has once is left out."""
    unit = cache.read(0, 0, cache.hard_codec)
    pixels = first_views(maker, min(SIZED, views), 1)[: len(unit.position)]
    outputs = teacher.outputs_of(pixels.to(teacher.device), stages_of(cache.codecs))
    rows = len(outputs.dense)
    fields: Arrays = {name: unit.fields[name][:rows] for name in UNIT_FIELDS}
    names = {name: dims for name, (_, dims) in UNIT_FIELDS.items()}
    here = list(cache.codecs)
    asked = {get_codec(name, len(cache.classes), cache.grid).name for name in chosen}
    sizes: list[CodecSize] = []
    for name in dict.fromkeys([*here, *CODECS, *_smaller(cache)]):
        try:
            codec = cache.codecs.get(name) or get_codec(name, len(cache.classes), cache.grid)
        except CodecError:
            continue  # more classes per cell than there are
        if codec.name in [size.codec for size in sizes]:
            continue
        if isinstance(codec, StageCodec) and name not in here:
            tables = codec.fit([outputs.stages[codec.stage]])
            codec.use_tables(lambda tables=tables: tables)  # type: ignore[misc]
        whole = codec.encode_outputs(outputs)
        growth = _growth(fields, whole, codec, {**names, **codec.packed_dimensions}, rows)
        alone = _growth(fields, {}, codec, names, rows)
        off = measure(codec, whole, outputs, rows) if isinstance(codec, StageCodec) else None
        lost = off.lost if isinstance(off, MeasuredMap) else None
        sizes.append(
            CodecSize(codec.name, growth - alone, growth, codec.exact_hard, codec.soft, codec.name in asked, lost)
        )
    return sizes


def _smaller(cache: Cache) -> list[str]:
    """Codecs that would keep less of the stages whose maps a cache keeps whole."""
    whole = [codec for codec in cache.codecs.values() if isinstance(codec, StageBitsCodec)]
    return [f"stage:{of.stage}:pca{rank}" for of in whole for rank in PCA_RANKS if rank < of.channels]


def _growth(fields: Arrays, targets: Arrays, codec: Codec, names: dict[str, tuple[str, ...]], rows: int) -> float:
    def packed(count: int) -> int:
        some = np.arange(count)
        part = codec.pack(codec.take(targets, some)) if targets else {}
        return len(pack_unit({name: a[:count] for name, a in fields.items()}, part, names, {}))

    return (packed(rows) - packed(rows // 2)) / (rows - rows // 2)


def write_rate(folder: Path) -> float:
    """Bytes per second of a durable write, read back as units are."""
    content = np.random.default_rng(0).bytes(WRITE_BYTES)
    clock = time.perf_counter()
    put(folder / "written", content)
    took = time.perf_counter() - clock
    (folder / "written").unlink()
    return WRITE_BYTES / took


def time_stage2(
    config: Config, whole: int, device: torch.device, seconds: float, teacher: Callable[[], Teacher]
) -> Stage2:
    """Steps of a student from the cache of a config, as `cskd train` does them; then without a loader, and of a live teacher.

    whole: views of a step that the times are for, where those of `config` have fewer. teacher: asked for when the device has made its other steps.
    """
    began, gpu = time.perf_counter(), device.type == "cuda"
    threads = choose_threads(config.train.threads, "train.threads", config.train.workers, gpu=gpu)
    with (
        running_ranks(device) as ranks,
        sole_run(config, ranks, device, True) as writer,
        computing_with(threads.count),
        brief_turns(gpu),
        float32_products(config.train.tf32, device),
    ):
        run = open_run(config, ranks, device, True, False, True, threads, writer)
        update, spent = TrainStep(run), dict.fromkeys(("decode", "augment", "teacher", "student"), 0.0)
        tasks, batches = run.batches()
        run.state.begin()
        points: list[tuple[float, int]] = []
        loading = np.zeros(2)
        start, step, once = 0.0, 0, 0.0
        with tasks, contextlib.closing(batches):  # type: ignore[type-var]  # a generator, all of them
            while step < 3 or points[-1][0] - points[0][0] < seconds:
                batch = next(batches)
                start = start or time.perf_counter() - began
                loading += batch["seconds"].numpy()
                loss, terms = update(batch, step // run.plan.steps, step, spent)
                step += 1
                run.state.add(loss, terms, step, run.optimisation.skipped)
                run.state.mean_loss()  # as the line of progress does
                points.append((time.perf_counter(), step * run.plan.global_batch))
            wait(device)
            points[-1] = time.perf_counter(), points[-1][1]
            elapsed = points[-1][0] - points[0][0]
            held: Batch = {name: t.clone() for name, t in batch.items()}
        spent["decode"], spent["augment"] = loading.tolist()
        views = step * run.plan.global_batch
        bound = run.bound_by({**spent, "evaluate": 0.0}, tasks.read_seconds, elapsed, views)
        took, counted = _counted(points)
        batch_rows, epoch = run.plan.global_batch, step // run.plan.steps
        alone = _seconds_of(lambda: update(held, epoch, step, spent), device, seconds / 3)
        if whole > batch_rows:  # what a step costs whatever its size, as the optimiser, counts once in a whole one
            half = micro_batches(held, max(2, batch_rows // 4 * 2))[0]
            least = _seconds_of(lambda: update(half, epoch, step, spent), device, seconds / 6)
            grows = max(0.0, (alone - least) / (batch_rows - len(half["label"])))
            once = min(alone, max(0.0, alone - batch_rows * grows)) / batch_rows
        for _ in range(2):  # the first one imports, and makes folders
            clock = time.perf_counter()
            run.export(step)
            run.save(step)
            epoch_end = time.perf_counter() - clock
        evaluate = _time_evaluation(run, update, device, threads)
        live = LiveTargets(teacher(), config.loss, config.train.epochs)
        forward = _seconds_of(lambda: live.of(held, 0, device), device, seconds / 3)
    return Stage2(
        cached=took / counted - once * (1 - run.plan.global_batch / whole),
        student=alone / run.plan.global_batch - once * (1 - run.plan.global_batch / whole),
        teacher=forward / run.plan.global_batch,
        decode=loading[0] / views,
        augment=loading[1] / views,
        evaluate=evaluate,
        epoch_end=epoch_end,
        start=start,
        workers=run.workers,
        threads=str(threads),
        bound=bound,
    )


def _seconds_of(job: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Of one call; the first is not counted."""
    job()
    wait(device)
    calls, clock = 0, time.perf_counter()
    while not calls or time.perf_counter() - clock < seconds:
        job()
        calls += 1
    wait(device)
    return (time.perf_counter() - clock) / calls


def _time_evaluation(run: TrainingRun, update: TrainStep, device: torch.device, threads: Threads) -> float:
    """Seconds of an image of data.val: made in the workers, and scored."""
    if run.val is None:
        return 0.0
    maker = ViewMaker(run.val, run.views.recipe)
    count, clock = len(run.val), time.perf_counter()
    batch = BatchMaker(maker, maker, run.config.train.eval_crop_pct)(EvalTask(0, count))
    making = (time.perf_counter() - clock) / count
    ready: Batch = dict(batch)

    def score() -> None:
        score_heads(run.models, iter([ready]), 1, update.inputs, run.config.train.autocast, run.ranks)

    scoring = _seconds_of(score, device, 0.0) / count
    if device.type == "cuda":
        return max(scoring, making / max(1, run.workers))
    return scoring + making / threads.share


def small_train(settings: TrainConfig, batch: int, output: Path, views: int) -> TrainConfig:
    """The settings of a run whose steps are timed."""
    micro = micro_batch_of(settings)
    return dataclasses.replace(
        settings,
        output=str(output),
        epochs=EPOCHS,
        warmup_epochs=0,
        global_batch=batch,
        micro_batch=min(micro, batch),
        views=views,
        max_steps=0,
        best=None,
        export="auto",
        trackers=[],
        eval_every=EPOCHS,
    )
