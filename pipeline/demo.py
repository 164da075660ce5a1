"""Everything on real data in minutes: scikit-learn's handwritten digits, a small timm CNN, and one ViT taught three ways.

data      1,797 scans of digits, 80 % to train, as a folder of class folders; packed to shards
teacher   a thin timm ResNet, trained here for a few epochs
cache     its dense maps over every view, once
students  the same ViT, seed and epochs: labels only, DeiT-hard, CSKD; the teacher never runs
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_model

from cskd.config import Config, from_dict, load_config
from cskd.errors import ConfigError
from cskd.files.folders import mark, refuse_output
from cskd.files.writer import sole_writer
from cskd.machine.threads import choose_threads, computing_with
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.look.inspect_cache import sheet
from cskd.pipeline.pack import pack_data
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.show.progress import Progress
from cskd.pipeline.train import train
from cskd.seeds import permutation
from cskd.store.cache import open_cache
from cskd.teacher.build import build_model
from cskd.teacher.forwards import teacher_images
from cskd.views.mix_pixels import normalise

SIZE = 32  # pixels; the scans are 8x8, enlarged
STUDENTS = {"none": "none", "deit": "deit-hard", "cskd": "cskd-hard"}
TEACHER: dict[str, Any] = {
    "model": "resnet18",
    "kwargs": {"channels": [24, 48, 96, 96], "output_stride": 8, "num_classes": 10},
}  # 4x4 cells at 32 pixels
MEAN_STD = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
TEACHER_EPOCHS = 24


@dataclass(frozen=True)
class StudentResult:
    """Top-1 in per cent on the validation images of `head`, what timm computes from the exported weights: of a method that
    trains two heads their mean, of the baseline the class head; seconds of its epochs, those of an earlier run of the demo
    too; images the teacher saw meanwhile (0)."""

    top1: float
    head: str
    seconds: float
    teacher_forwards: int


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured, and where its files are."""

    teacher_top1: float
    students: dict[str, StudentResult]
    bytes_per_view: float
    seconds: float
    paths: dict[str, str]


def run_demo(out: Path, epochs: int | None = None, quiet: bool = False) -> DemoReport:
    """Run everything into folder `out`. What an earlier run finished there is used again."""
    refuse_output(out, "demo", "OUT")
    with sole_writer(out, "give another folder"):
        return _run(out, epochs or 40, quiet)


def _run(out: Path, epochs: int, quiet: bool) -> DemoReport:
    start = time.perf_counter()
    _check_epochs(out, epochs)
    mark(out, "demo")
    torch.manual_seed(0)
    for split, (images, labels) in _digits().items():
        if not (out / "data" / split / "inventory").exists():
            _write_images(out / "images" / split, images, labels)
            pack_data(out / "images" / split, out / "data" / split, block=1024, shard_size=256, quiet=True)
    if not (out / "teacher.safetensors").exists():
        with computing_with(choose_threads().count):
            _train_teacher(out / "teacher.safetensors", quiet)
    config = _config(out, "none", epochs)
    cached = cache_teacher(config, quiet=quiet)
    cache = open_cache(config.cache.path)
    commits = [cache.commit_of(b, v) for b in range(cache.blocks) for v in range(cache.views)]
    bytes_per_view = sum(f.size for c in commits if c for f in c.files) / sum(c.cached for c in commits if c)
    students = {name: _student(_config(out, name, epochs), quiet) for name in STUDENTS}
    picture = out / "dense_maps.png"
    sheet(cache, _one_a_class(cache.inventory.label, 4), 0).save(picture)
    paths = {
        "shards": str(out / "data"),
        "cache": str(cache.root),
        "students": str(out / "runs"),
        "picture": str(picture),
    }
    return DemoReport(100 * cached.clean_top1, students, bytes_per_view, time.perf_counter() - start, paths)


def _student(config: Config, quiet: bool) -> StudentResult:
    before = teacher_images()
    report = train(config, quiet=quiet)
    seconds = sum(row["seconds"] for row in read_metrics(Path(report.output)))
    return StudentResult(report.top1[report.score], report.score, seconds, teacher_images() - before)


def render(report: DemoReport, console: Console) -> None:
    """The table of the demo."""
    table = Table(title="one small ViT, taught three ways")
    for column in ("method", "top-1 %", "of head", "seconds", "teacher forwards"):
        table.add_column(column, justify="left" if column in ("method", "of head") else "right")
    for name, s in report.students.items():
        table.add_row(name, f"{s.top1:.1f}", s.head, f"{s.seconds:.0f}", str(s.teacher_forwards))
    console.print(table)
    console.print(
        f"teacher top-1 {report.teacher_top1:.1f} % · {report.bytes_per_view:.0f} bytes a view · {report.seconds:.0f} s"
    )
    for name, path in report.paths.items():
        console.print(f"{name:9} {escape(path)}")


def _digits() -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """uint8 [N, 8, 8] and labels of each split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the demo's images come with scikit-learn, which is not installed; pip install 'cskd[demo]'"
        ) from None
    digits = load_digits()
    order = permutation(len(digits.target), 0)
    images = (digits.images * (255 / 16)).round().astype(np.uint8)[order]
    labels = digits.target.astype(np.int64)[order]
    cut = len(order) * 4 // 5
    return {"train": (images[:cut], labels[:cut]), "val": (images[cut:], labels[cut:])}


def _write_images(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path)


def _train_teacher(path: Path, quiet: bool) -> None:
    """A few epochs of plain supervised training, shifted by up to 2 pixels; weights to `path`."""
    images, labels = _digits()["train"]
    enlarged = [Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB") for i in images]
    x = normalise(torch.from_numpy(np.stack([np.asarray(i) for i in enlarged])).permute(0, 3, 1, 2).float(), **MEAN_STD)
    y = torch.from_numpy(labels)
    model = build_model(TEACHER["model"], TEACHER["kwargs"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    batch, steps = 128, TEACHER_EPOCHS * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    with Progress("train the teacher", total=steps * batch, unit="images", quiet=quiet) as progress:
        for step in range(steps):
            epoch, at = divmod(step * batch, len(x) // batch * batch)
            rows = torch.from_numpy(permutation(len(x), epoch)[at : at + batch])
            shift = [int(s) for s in permutation(5, step)[:2] - 2]
            loss = F.cross_entropy(model(x[rows].roll(shift, (2, 3))), y[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            progress.update((step + 1) * batch, loss=f"{loss.item():.3f}")
    save_model(model, str(path.with_suffix(".partial")))
    os.replace(path.with_suffix(".partial"), path)  # a run that is killed leaves a whole teacher or none


def _check_epochs(out: Path, epochs: int) -> None:
    """Raises ConfigError when students were trained here for another number of epochs, or by a version whose baseline was
    another."""
    for name in STUDENTS:
        made = out / "runs" / name / "resolved.yaml"
        begun = load_config(made) if made.is_file() else None
        if begun and begun.train.epochs != epochs:
            raise ConfigError(
                f"{out} has students of {begun.train.epochs} epochs, asked for {epochs}; give another folder"
            )
        if begun and "loss.baseline_head" not in begun.given:
            raise ConfigError(
                f"{out} has students of an earlier version, whose baseline was trained on the mean of two heads, "
                "not on the class head; give another folder"
            )


def _config(out: Path, student: str, epochs: int) -> Config:
    raw: dict[str, Any] = {
        "data": {"train": str(out / "data/train"), "val": str(out / "data/val")},
        "teacher": {
            **TEACHER,
            **MEAN_STD,
            "weights": str(out / "teacher.safetensors"),
            "input_size": SIZE,
            "crop_pct": 1.0,
        },
        "recipe": {"size": SIZE, "crop": "padded", "padding": 2, "flip": 0.0, "cutmix": 1.0, "mix_prob": 0.25},
        "cache": {"path": str(out / "cache"), "views": 12, "workers": 0, "codecs": ["envelope"]},
        "student": {
            "model": "deit_tiny_distilled_patch16_224",
            "kwargs": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
            **MEAN_STD,
        },
        "loss": {"method": STUDENTS[student]},
        "train": {
            "output": str(out / "runs" / student),
            "epochs": epochs,
            "global_batch": 64,
            "lr": 2.0e-3,
            "warmup_epochs": min(2, epochs - 1),
            "weight_decay": 0.05,
            "eval_every": max(1, epochs // 4),
            "eval_crop_pct": 1.0,
            "workers": 0,
        },
    }
    return from_dict(raw)


def _one_a_class(labels: NDArray[np.int32], count: int) -> list[int]:
    return [int(np.flatnonzero(labels == c)[0]) for c in range(0, 10, 10 // count)][:count]
