"""Everything on real data in minutes: a small CNN learns from a few handwritten digits, and teaches one ViT three ways.

data      a few scans of digits to train on, as a folder of class folders, and all others to validate on; packed to shards
teacher   a thin timm ResNet, trained here on the same few scans
cache     its dense maps over every view, once
students  the same ViT from several seeds: labels only, DeiT, CSKD; same views and recipe, the teacher never runs
table     mean and spread over the seeds, and the paired difference to labels only

DeiT and CSKD read the teacher's soft outputs here: of images that it has learned by heart a teacher's hard class is the label
again. Settings were chosen on 600 scans that are no part of the demo's data (`Settings(tuning=True)`, see `demo_data.py`).
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cskd.config import Config, from_dict
from cskd.errors import ConfigError
from cskd.files.durable import json_bytes, put
from cskd.files.folders import mark, refuse_output
from cskd.files.read import parse_json, read_file
from cskd.files.writer import sole_writer
from cskd.loading.stream import end_with_main
from cskd.machine.threads import choose_threads, computing_with
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.demo_curve import Curve, draw_curves
from cskd.pipeline.demo_data import CLASSES, SIZE, digits, write_images
from cskd.pipeline.demo_teacher import MEAN_STD, TEACHER, train_teacher
from cskd.pipeline.intervals import Difference, paired_difference, spread
from cskd.pipeline.look.sheets import sheet
from cskd.pipeline.pack import pack_data
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.show.progress import Progress
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from cskd.teacher.model import teacher_images

STUDENTS = {"none": "none", "deit": "deit-soft", "cskd": "cskd-soft"}
LAYOUT = 2  # of the folder; raised whenever what lies in it would be other than before
RECORD = "demo.json"  # what an OUT folder was made with


@dataclass(frozen=True)
class Settings:
    """How much of everything. Tests make it small."""

    epochs: int = 48
    seeds: int = 4
    per_class: int = 5  # scans of each digit to train on
    copies: int = 16  # of each in the packed data: an epoch feeds so many views of a scan
    views: int = 16  # of each copy in the cache
    teacher_epochs: int = 80
    evaluations: int = 8  # of a student
    tuning: bool = False  # on the scans that the settings were chosen on


@dataclass(frozen=True)
class StudentResult:
    """Top-1 in per cent on the validation images of `head`, what timm computes from the exported weights: of a method that
    trains two heads their mean, of the baseline the class head. One figure a seed, in the order of the seeds; seconds of
    all their epochs, those of an earlier run of the demo too; images the teacher saw meanwhile (0)."""

    head: str
    top1: list[float]
    mean: float
    spread: float | None  # sample standard deviation over the seeds; None of one seed
    minus_none: Difference | None  # paired by seed, 95 % interval; None of the baseline, and of one seed
    seconds: float
    teacher_forwards: int


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured, and where its files are."""

    teacher_top1: float
    images: dict[str, int]  # of train and val
    seeds: list[int]
    students: dict[str, StudentResult]
    verdict: str
    bytes_per_view: float
    seconds: float
    paths: dict[str, str]


def run_demo(
    out: Path,
    epochs: int | None = None,
    quiet: bool = False,
    settings: Settings | None = None,
    processes: int | None = None,
) -> DemoReport:
    """Run everything into folder `out`. What an earlier run finished there is used again.

    processes: students at a time; None: one per core. Each has one thread, so their number changes no result.
    """
    settings = settings or Settings()
    if epochs is not None:
        settings = replace(settings, epochs=epochs)
    refuse_output(out, "demo", "OUT")
    with sole_writer(out, "give another folder"):
        return _run(out, settings, processes or choose_threads().count, quiet)


def _run(out: Path, settings: Settings, processes: int, quiet: bool) -> DemoReport:
    start = time.perf_counter()
    _record(out, settings)
    scans = digits(settings.per_class, settings.tuning)
    for split, copies in (("train", settings.copies), ("val", 1)):
        if not (out / "data" / split / "inventory").exists():
            write_images(out / "images" / split, scans[split], copies)
            pack_data(out / "images" / split, out / "data" / split, block=2048, shard_size=1024, quiet=True)
    if not (out / "teacher.safetensors").exists():
        with computing_with(choose_threads().count):
            train_teacher(out / "teacher.safetensors", scans["train"], settings.teacher_epochs, quiet)
    config = _config(out, "none", 0, settings)
    cached = cache_teacher(config, quiet=quiet)
    cache = open_cache(config.cache.path)
    commits = [cache.commit_of(b, v) for b in range(cache.blocks) for v in range(cache.views)]
    bytes_per_view = sum(f.size for c in commits if c for f in c.files) / sum(c.cached for c in commits if c)
    runs = _teach(out, settings, processes, quiet)
    students = _results(runs)
    pictures = {"maps": out / "dense_maps.png", "curves": out / "learning_curves.png"}
    sheet(cache, _one_a_class(cache.inventory.label, 4), 0).save(pictures["maps"])
    images = {split: len(s.labels) for split, s in scans.items()}
    title = f"one small ViT, {images['train']} digits to learn from, mean and range of {settings.seeds} seeds"
    draw_curves(pictures["curves"], _curves(runs), 100 * (cached.clean_top1 or 0), title)
    paths = {"shards": out / "data", "cache": cache.root, "students": out / "runs", **pictures}
    return DemoReport(
        teacher_top1=100 * (cached.clean_top1 or 0),
        images=images,
        seeds=list(range(settings.seeds)),
        students=students,
        verdict=verdict(students),
        bytes_per_view=bytes_per_view,
        seconds=time.perf_counter() - start,
        paths={name: str(path) for name, path in paths.items()},
    )


@dataclass(frozen=True)
class _Trained:
    """One student: its score's head, the rows of its epochs, and the images that the teacher saw."""

    head: str
    rows: list[dict[str, Any]]
    top1: float
    teacher_forwards: int


def _teach(out: Path, settings: Settings, processes: int, quiet: bool) -> dict[str, list[_Trained]]:
    """Every method from every seed, as many at a time as there are cores; all of a seed before the next one."""
    configs = [_config(out, name, seed, settings) for seed in range(settings.seeds) for name in STUDENTS]
    with (
        Progress("students", len(configs), "students", quiet=quiet) as progress,
        ProcessPoolExecutor(min(processes, len(configs)), get_context("spawn"), end_with_main) as pool,
    ):
        done = list[_Trained]()
        progress.say(_training(configs, 0, processes))
        for trained in pool.map(_student, configs) if processes > 1 else map(_student, configs):
            done.append(trained)
            progress.update(len(done))
            if more := _training(configs, len(done), processes):
                progress.say(f"top-1 {trained.top1:.1f} %; {more}")
    return {name: done[i :: len(STUDENTS)] for i, name in enumerate(STUDENTS)}


def _training(configs: list[Config], done: int, processes: int) -> str:
    """Which students train after the first `done`, with number, method and seed; '' where all are done."""
    now = list(enumerate(configs, 1))[done : done + processes]
    each = "; ".join(f"{n} of {len(configs)}, {c.loss.method}, seed {c.train.seed}" for n, c in now)
    return f"training {each}" if each else ""


def _student(config: Config) -> _Trained:
    before = teacher_images()
    report = train(config, quiet=True)
    rows = read_metrics(Path(report.output))
    return _Trained(report.score, rows, report.top1[report.score], teacher_images() - before)


def _results(runs: dict[str, list[_Trained]]) -> dict[str, StudentResult]:
    top1 = {name: [run.top1 for run in done] for name, done in runs.items()}
    several = len(top1["none"]) > 1
    return {
        name: StudentResult(
            head=done[0].head,
            top1=top1[name],
            mean=fmean(top1[name]),
            spread=spread(top1[name]) if several else None,
            minus_none=paired_difference(top1[name], top1["none"]) if several and name != "none" else None,
            seconds=sum(row["seconds"] for run in done for row in run.rows),
            teacher_forwards=sum(run.teacher_forwards for run in done),
        )
        for name, done in runs.items()
    }


def verdict(students: dict[str, StudentResult]) -> str:
    """Whether CSKD is above labels only by more than the spread over the seeds: the difference of the means is larger than
    the larger of the two standard deviations, and its 95 % interval is above 0."""
    none, cskd = students["none"], students["cskd"]
    d = cskd.minus_none
    if d is None or none.spread is None or cskd.spread is None:
        return f"cskd is {cskd.mean - none.mean:+.1f} points from none; one seed has no spread to compare that with"
    largest = max(none.spread, cskd.spread)
    above = d.mean > largest and d.low > 0
    what = "above none by more than the spread" if above else "NOT above none by more than the spread"
    return (
        f"cskd is {what} over {d.pairs} seeds: {d.mean:+.1f} points, 95 % interval {d.low:+.1f} to {d.high:+.1f}; "
        f"larger standard deviation of the two {largest:.1f}"
    )


def _curves(runs: dict[str, list[_Trained]]) -> dict[str, Curve]:
    curves = {}
    for name, done in runs.items():
        key = f"top1.{done[0].head}"
        seen = [[row for row in run.rows if key in row] for run in done]
        epochs = np.array([row["epoch"] + 1 for row in seen[0]], np.int64)
        curves[name] = Curve(epochs, np.array([[row[key] for row in rows] for rows in seen], np.float64))
    return curves


def render(report: DemoReport, console: Console) -> None:
    """The table of the demo, and what it says."""
    n = len(report.seeds)
    table = Table(title=f"one small ViT, {report.images['train']} digits to learn from, {n} seeds a method")
    for column in ("method", "top-1 % ± sd", "minus none (95 %)", "s", "of head"):
        table.add_column(column, justify="left" if column in ("method", "of head") else "right", no_wrap=True)
    for name, s in report.students.items():
        d = s.minus_none
        table.add_row(
            name,
            f"{s.mean:.1f}" if s.spread is None else f"{s.mean:.1f} ± {s.spread:.1f}",
            "" if d is None else f"{d.mean:+.1f} ({d.low:+.1f}..{d.high:+.1f})",
            f"{s.seconds:.0f}",
            s.head,
        )
    forwards = sum(s.teacher_forwards for s in report.students.values())
    console.print(table)
    console.print(report.verdict)
    console.print(
        f"teacher top-1 {report.teacher_top1:.1f} %, all on {report.images['val']:,} images that nothing was trained on; "
        f"its forwards while students trained: {forwards} · {report.bytes_per_view:.0f} bytes per view · {report.seconds:.0f} s"
    )
    for name, path in report.paths.items():
        console.print(f"{name:9} {escape(path)}")


def _record(out: Path, settings: Settings) -> None:
    """Note what the folder is made with, or raise ConfigError for one that was made otherwise, before anything is made."""
    asked = {"layout": LAYOUT, **asdict(settings)}
    try:
        made = parse_json(read_file(out / RECORD))
    except FileNotFoundError:
        made = None
        if any((out / name).exists() for name in ("images", "data", "teacher.safetensors", "cache", "runs")):
            made = {}
    except (OSError, ValueError) as e:
        raise ConfigError(f"{out / RECORD} can't be read ({e}); give another folder") from None
    if made is not None and (not isinstance(made, dict) or made.get("layout") != LAYOUT):
        raise ConfigError(f"{out} holds a demo of another version, with other data and students; give another folder")
    for key, value in asked.items():
        if made is not None and made.get(key) != value:
            raise ConfigError(f"{out} holds a demo with {key} {made.get(key)}, asked for {value}; give another folder")
    mark(out, "demo")
    put(out / RECORD, json_bytes(asked))


def _config(out: Path, student: str, seed: int, settings: Settings) -> Config:
    epochs = settings.epochs
    raw: dict[str, Any] = {
        "data": {"train": str(out / "data/train"), "val": str(out / "data/val")},
        "teacher": {
            **TEACHER,
            **MEAN_STD,
            "weights": str(out / "teacher.safetensors"),
            "input_size": SIZE,
            "crop_pct": 1.0,
            "check_images": 2048,  # all that the students are measured on
        },
        "recipe": {"size": SIZE, "scale": [0.6, 1.0], "flip": 0.0},
        "cache": {"path": str(out / "cache"), "views": settings.views, "workers": 0, "codecs": ["envelope", "int8"]},
        "student": {
            "model": "deit_tiny_distilled_patch16_224",
            "kwargs": {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},
            **MEAN_STD,
        },
        "loss": {"method": STUDENTS[student], "decay": "linear", "patch_weight": 0.5},
        "train": {
            "output": str(out / "runs" / f"{student}-{seed}"),
            "seed": seed,
            "epochs": epochs,
            "global_batch": 50,
            "lr": 2.0e-3,
            "warmup_epochs": min(5, epochs - 1),
            "weight_decay": 0.05,
            "eval_every": max(1, epochs // settings.evaluations),
            "eval_crop_pct": 1.0,
            "workers": 0,
            "threads": 1,
        },
    }
    return from_dict(raw)


def _one_a_class(labels: NDArray[np.int32], count: int) -> list[int]:
    return [int(np.flatnonzero(labels == c)[0]) for c in range(0, CLASSES, CLASSES // count)][:count]
