"""`cskd plan`: what a config will take on this machine, and whether a cache pays, from some seconds of both stages at work.

data      a few images of data.train, or made ones where nothing is packed; in a folder next to cache.path, removed afterwards
stage 1   the teacher, and the line of stage 1 on a cache of those images
stage 2   steps of the student from that cache; the same without a loader; forwards of a live teacher
costs     hours of the whole, and from how many students on the cache costs less than the teacher at every step
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cskd.config import Config
from cskd.errors import ConfigError
from cskd.files.paths import is_remote, location_text
from cskd.files.scratch import GB
from cskd.files.temporary import temporary_folder
from cskd.loading.plan import PlanSpec
from cskd.loading.sources import LiveViews
from cskd.machine.cores import usable_cores
from cskd.machine.launch import launched
from cskd.machine.threads import brief_turns, choose_threads, computing_with
from cskd.pipeline.doctor import AS_IT_IS, load_row, loader_row
from cskd.pipeline.loader_speed import views_per_second
from cskd.pipeline.out_of_memory import explained, nothing_to_lower
from cskd.pipeline.outputs import use_own_node_cache
from cskd.pipeline.planning.costs import SHARED, Costs, Measured, Work, costs_of, hours, live_view, verdict
from cskd.pipeline.planning.measure import (
    CodecSize,
    Stage1,
    Stage2,
    codec_sizes,
    new_cache,
    small_train,
    step_batch,
    teacher_batch,
    time_stage1,
    time_stage2,
    write_rate,
)
from cskd.pipeline.planning.sample import VAL_IMAGES, DataFacts, copied, is_packed, made, unpacked, write_sample
from cskd.pipeline.precheck import PLANNED, refuse
from cskd.pipeline.setup import Setup, device_of, training_images
from cskd.pipeline.show.progress import Notes, print_lines
from cskd.store.cache import open_cache
from cskd.store.manifest import has_cache
from cskd.teacher.model import Teacher, load_teacher
from cskd.views.maker import ViewMaker

SECONDS = 8.0  # that each stage is watched for
MOST_IMAGES = 8192  # of the sample: a block
FULL = 0.9  # of the disk's or the loader's speed: more than that holds up the rest


@dataclass(frozen=True)
class PlanReport:
    """What a config will take here. Hours, bytes per view, views per second."""

    images: int
    made: bool  # no real image was seen
    val_images: int
    views: int
    epochs: int
    global_batch: int
    device: str
    hours: Costs
    views_per_second: dict[str, float]
    codecs: list[CodecSize]
    cache_gb: float  # of the codecs that the config names
    free_gb: float
    disk_mb_per_second: float
    verdict: list[str]
    stage1_bound_by: str
    student_bound_by: str
    cores: str
    threads: str
    measured: Measured
    seconds: float  # that planning took
    notes: list[str]


def plan(
    config: Config, students: int = 1, images: int | None = None, seconds: float = SECONDS, quiet: bool = False
) -> PlanReport:
    """Measure both stages for about so many seconds each, and tell what the whole will take.

    Args:    students: that will be trained; images: of the data set, where it is not packed yet.
    Raises:  CskdError for what either stage would refuse.
    """
    begun, notes = time.perf_counter(), Notes(quiet)
    if launched().count > 1:
        raise ConfigError("cskd plan measures one device; run it without torchrun or srun, and divide by the ranks")
    location_text(config.cache.path, "cache.path", write=True)  # what is planned is to make it
    if config.loss.method == "none":
        raise ConfigError("loss.method is none, which needs no teacher and no cache; set the method to plan for")
    if not config.student.model:
        raise ConfigError(
            "student.model is empty; name the ViT to plan for, for example --set student.model=deit_tiny_patch16_224"
        )
    use_own_node_cache(config)
    device, moved = device_of(config, "cache")
    load = load_row(usable_cores().count)
    notes.add([*moved, *([f"load {load.value}: {load.advice}; plan again when it has ended"] if load.advice else [])])
    data = _data(config, images, notes)
    with explained(device, nothing_to_lower("cache.device")):
        teacher = load_teacher(config.teacher, data.classes, device, config.recipe.size)
    notes.add(teacher.notes)
    notes.say()
    where = _disk(config)
    with temporary_folder("plan", where, hidden=True) as folder:
        return _plan(config, students, seconds, begun, data, teacher, where, folder, notes)


def _plan(
    config: Config,
    students: int,
    seconds: float,
    begun: float,
    data: DataFacts,
    teacher: Teacher,
    where: Path,
    folder: Path,
    notes: Notes,
) -> PlanReport:
    device, student_device = teacher.device, device_of(config, "train")[0]
    gpu = device.type == "cuda"
    threads = choose_threads(config.cache.threads, "cache.threads", config.cache.workers, gpu=gpu)
    loaded = time.perf_counter() - begun
    with computing_with(threads.count), brief_turns(gpu), explained(device, nothing_to_lower("cache.device")):
        rows, rate = teacher_batch(teacher, seconds)
        with explained(student_device, nothing_to_lower("train.device")):
            batch = step_batch(config, config.recipe.size, student_device, rate, seconds)
        count = _sample_size(config, rows, rate, batch, seconds, data)
        small, reading = _small(config, data, count, folder)
        inventory = training_images(small)
        cache = new_cache(folder / "cache", small, inventory, teacher)
        stage1 = time_stage1(cache, replace(teacher, batch=rows), small, threads, seconds)
        maker = ViewMaker(inventory, config.recipe)
        sizes = codec_sizes(cache, replace(teacher, batch=rows), maker, count, config.cache.codecs)
        disk = write_rate(folder)
        encoded = [maker.encoded(i) for i in range(min(64, count))]
        core = views_per_second(config.recipe, seconds / 8, encoded)
    live = teacher if student_device.type == device.type else None

    def live_teacher() -> Teacher:
        chosen = live or load_teacher(config.teacher, data.classes, student_device, config.recipe.size)
        return replace(chosen, batch=min(chosen.batch, batch))

    if config.train.caches:
        notes.add(
            ["train.caches: reading each is taken to cost what reading cache.path costs; making them is not counted"]
        )
    usable = stage1.views_done // config.train.repeats * config.train.repeats
    small = replace(small, train=small_train(small.train, batch, folder / "run", usable))
    with explained(student_device, nothing_to_lower("train.device")):
        stage2 = time_stage2(small, config.train.global_batch, student_device, seconds, live_teacher)

    work = _work(config, data, teacher)
    measured = _measured(config, data, stage1, stage2, student_device, loaded, rate)
    costs = costs_of(measured, work)
    free, size = shutil.disk_usage(where).free, sum(s.unit_bytes for s in sizes if s.chosen)
    whole = size * work.images * work.views
    notes.add(_disk_notes(whole, free, size / stage1.view, disk))
    notes.add(_reading_note(reading / count, stage1.decode))
    taken = 1 / stage2.student
    return PlanReport(
        images=work.images,
        made=data.train is None,
        val_images=len(data.val) if data.val else 0,
        views=work.views,
        epochs=work.epochs,
        global_batch=config.train.global_batch,
        device=str(device) if device == student_device else f"{device} and {student_device}",
        hours=costs,
        views_per_second={
            "stage 1": 1 / stage1.view,
            "student from the cache": 1 / stage2.cached,
            "student without a loader": taken,
            "student online": 1 / live_view(measured, 1),
            "one core's views": core,
        },
        codecs=sizes,
        cache_gb=whole / GB,
        free_gb=free / GB,
        disk_mb_per_second=disk / 1e6,
        verdict=verdict(costs, work, students),
        stage1_bound_by=stage1.bound,
        student_bound_by=stage2.bound,
        cores=_cores(config, student_device, taken, 1 / (stage2.decode + stage2.augment), core, threads.share),
        threads=stage2.threads,
        measured=measured,
        seconds=time.perf_counter() - begun,
        notes=notes.all,
    )


def _data(config: Config, images: int | None, notes: Notes) -> DataFacts:
    """The data sets of a config, checked with its student as stage 1 checks them; where none is packed, what stands for them."""
    if not is_packed(config.data.train):
        data = unpacked(config, images)
        notes.add(data.notes)
        return data
    setup = Setup(config)
    ahead, inventory = refuse(PLANNED, setup), setup.inventory
    notes.add([*ahead.images, *ahead.notes])
    if has_cache(config.cache.path):
        notes.add([f"{config.cache.path} holds a cache already; the plan is for making all of it"])
    return DataFacts(inventory, setup.val, len(inventory), inventory.classes, [])


def _disk(config: Config) -> Path:
    """The nearest folder above cache.path that is there: it lies on the cache's disk. For an object store the current folder."""
    path = config.cache.path
    there = Path(path).resolve().parent if path and not is_remote(path) else Path.cwd()
    return next(folder for folder in (there, *there.parents) if folder.is_dir())


def _sample_size(config: Config, rows: int, rate: float, batch: int, seconds: float, data: DataFacts) -> int:
    """Images of the sample: two passes of stage 1 in the time there is, and whole steps of the student."""
    group, repeats = config.recipe.mix_group, config.train.repeats
    passes = rate * seconds / 2 / group
    least = max(batch + 4 * repeats, 4 * rows, 4 * repeats * 4)
    return int(min(max(passes, least), max(MOST_IMAGES, least), data.images))


def _small(config: Config, data: DataFacts, count: int, folder: Path) -> tuple[Config, float]:
    """The config of both stages on a sample, and the seconds that reading it took."""
    images = copied(data.train, count) if data.train else made(config.recipe, len(data.classes), count)
    inventory, reading = write_sample(folder / "data", images, data.classes)
    val = ""
    if data.val is not None:
        sample = copied(data.val, VAL_IMAGES)
        val = str(write_sample(folder / "val", sample, data.classes)[0].root)
    views, path = 1000 * config.recipe.mix_group, str(folder / "cache")
    others = [open_cache(other, images=False) for other in config.train.caches.values() if has_cache(other)]
    codecs = [*config.cache.codecs, *(name for one in others for name in one.manifest.config["cache"]["codecs"])]
    return replace(
        config,
        data=replace(config.data, train=str(inventory.root), val=val),
        cache=replace(config.cache, path=path, views=views, max_quarantine=1.0, codecs=list(dict.fromkeys(codecs))),
        # The other caches hold nothing of the sample: the one that is made stands for each, as large as it is.
        train=replace(config.train, output=str(folder / "run"), caches=dict.fromkeys(config.train.caches, path)),
    ), reading


def _work(config: Config, data: DataFacts, teacher: Teacher) -> Work:
    train = config.train
    if data.train is not None:
        good = torch.zeros(len(data.train), dtype=torch.bool).numpy()
        views = LiveViews(data.train, config.recipe, config.cache.views, teacher.grid, good, "")
        steps = PlanSpec.over(views, train).steps
    else:
        steps = max(1, data.images // train.global_batch)
    evaluations = -(-train.epochs // train.eval_every)
    val = len(data.val) if data.val else 0
    return Work(data.images, config.cache.views, train.epochs, steps * train.global_batch, evaluations * val)


def _measured(
    config: Config,
    data: DataFacts,
    stage1: Stage1,
    stage2: Stage2,
    device: torch.device,
    loaded: float,
    rate: float,
) -> Measured:
    """What was measured, for the batches of the config."""
    train = config.train
    rows = train.micro_batch or train.global_batch
    padded = (
        math.ceil(rows / config.teacher.batch) * config.teacher.batch / rows
    )  # a live teacher's forwards are whole batches
    workers = max(1, stage2.workers)
    checked = min(config.teacher.check_images, len(data.val) if data.val else data.images) / rate
    return Measured(
        stage1=stage1.view,
        cached=stage2.cached,
        student=stage2.student,
        teacher=stage2.teacher * padded,
        loader=(stage2.decode + stage2.augment) / workers,
        own_device=device.type != "cpu" and train.augment == "host" and stage2.workers > 0,
        evaluate=stage2.evaluate,
        epoch_end=stage2.epoch_end,
        stage1_start=loaded + checked,
        student_start=stage2.start,
        online_start=stage2.start + loaded + checked + data.images * stage1.decode * config.recipe.mix_group / workers,
    )


def _disk_notes(whole: float, free: float, written: float, disk: float) -> list[str]:
    notes = []
    if whole > free:
        notes.append(
            f"the cache will take {_bytes(whole)} and its disk has {_bytes(free)} free: put cache.path elsewhere"
        )
    if written > FULL * disk:
        notes.append(
            f"stage 1 will be bound by the disk of the cache: it makes {written / 1e6:,.0f} MB/s, {disk / 1e6:,.0f} MB/s can be "
            "written durably; take another disk, or codecs that need less"
        )
    return notes


def _reading_note(read: float, decode: float) -> list[str]:
    if read <= decode:
        return []
    return [
        f"reading an image of data.train took {1e3 * read:.1f} ms, decoding {1e3 * decode:.1f}: the first reading of all images may "
        "hold up the loader, which the plan leaves out"
    ]


def _cores(config: Config, device: torch.device, taken: float, made: float, core: float, share: int) -> str:
    """How many cores the loader of a device needs."""
    if device.type == "cuda":
        row = loader_row(config.student.model, taken, {AS_IT_IS: made}, share)
        return row.value + (f": {row.advice}" if row.advice else "")
    return (
        f"there is no GPU here; one needs a core for every {core:,.0f} images/s that it takes of {config.student.model} (this "
        f"CPU takes {taken:,.0f}); cskd doctor measures a GPU"
    )


def render(report: PlanReport, console: Console) -> None:
    """The report for people."""
    source = "made images" if report.made else "images"
    print_lines(
        console,
        f"{report.images:,} {source} x {report.views} views, {report.epochs} epochs in steps of {report.global_batch:,} on "
        f"{report.device}; measured in {report.seconds:.0f} s",
    )
    costs, rates = report.hours, report.views_per_second
    table = Table(box=None, pad_edge=False)
    for heading, side in (("", "left"), ("time", "right"), ("views/s", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    rows = [
        ("stage 1, once", costs.stage1, rates["stage 1"]),
        ("a student from the cache", costs.cached, rates["student from the cache"]),
        ("a student online", costs.online, rates["student online"]),
        *((f"one of {k} with one teacher forward for all", costs.shared[k], None) for k in SHARED),
    ]
    for name, value, rate in rows:
        table.add_row(Text(name), hours(value), f"{rate:,.0f}" if rate else "")
    console.print(table)
    sizes = Table(box=None, pad_edge=False)
    for heading in ("codec", "bytes per view", "all of it", "hard targets", "logits"):
        sizes.add_column(heading, justify="left" if heading == "codec" else "right")
    for size in report.codecs:
        whole = size.unit_bytes * report.images * report.views
        mark = " (of the config)" if size.chosen else ""
        exact, soft = "exact" if size.exact_hard else "close", "yes" if size.soft else "no"
        if size.lost is not None:
            exact, mark = "none", f"{mark}, {100 * size.lost:.2g} % of the variance lost"
        sizes.add_row(Text(size.codec + mark), f"{size.unit_bytes:,.0f}", _bytes(whole), exact, soft)
    console.print(sizes)
    if whole := GB * report.cache_gb:
        each = whole / report.images / report.views
        print_lines(
            console, f"cache.codecs together: {each:,.0f} bytes per view, seeds and digests included, {_bytes(whole)}"
        )
    print_lines(
        console,
        f"the disk of the cache writes {report.disk_mb_per_second:,.0f} MB/s and has {report.free_gb:,.1f} GB free",
        *report.verdict,
        f"stage 1: {report.stage1_bound_by}",
        f"student: {report.student_bound_by}",
        f"cores: {report.cores}",
    )


def _bytes(count: float) -> str:
    """Bytes as people say them."""
    return f"{count / GB:,.1f} GB" if count >= GB / 2 else f"{count / 1e6:,.1f} MB"
