"""What the sections of `benchmarks.gpu` share: sizes, made data and weights, configs, where figures go."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.gpu.clocks import count_buffers
from cskd.config import Config, from_dict
from cskd.dataset.inventory import Sample, open_inventory, write_inventory
from cskd.loading.stream import _start_deaf_to_interrupts
from cskd.machine.arithmetic import computing_in
from cskd.machine.devices import pick_device
from cskd.pipeline.pack import pack_data
from cskd.teacher.build import build_model

RECIPE = {"randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
QUIET_BRANCH = 0.2  # of the norm that ends a branch; at 1 rounding grows from block to block and the network is chaos
VIEWS = 3  # of a cache, as many as the repeats of training


@dataclass(frozen=True)
class StudentRun:
    """A student, views per step, and steps before and while the clock runs."""

    model: str
    batch: int
    warm: int
    steps: int


@dataclass(frozen=True)
class Sizes:
    """How much of everything: FULL for a GPU with 16 cores, TINY to see every section run on a CPU."""

    pixels: int
    classes: int
    jpeg: tuple[int, int]  # width, height
    short_side: int  # of the raw members that are made of them
    distinct: int  # JPEGs that are made; all images are these
    teacher: str
    light: str  # a teacher that the loader holds up
    small: str  # of the checks
    teacher_batch: int
    few: int  # images that parts are tried on
    many: int  # images of stage 1 with the light teacher, and of stage 2
    check: int  # images of the checks
    workers: int
    calls: int  # timed calls of a forward or kernel
    gigabyte: int  # bytes of the copies
    matrix: int
    seconds: float  # of a loop that has no natural end
    students: dict[str, StudentRun]
    student_kwargs: dict[str, Any]


FULL = Sizes(
    pixels=224, classes=1000, jpeg=(500, 375), short_side=256, distinct=64, teacher="regnety_160", light="mobilenetv2_100", small="resnet18",
    teacher_batch=256, few=12288, many=26624, check=256, workers=16, calls=20, gigabyte=1 << 30, matrix=8192, seconds=3.0,
    students={
        "tiny": StudentRun("deit_tiny_distilled_patch16_224", 1024, 6, 14),
        "small": StudentRun("deit_small_distilled_patch16_224", 512, 9, 32),
        "base": StudentRun("deit_base_distilled_patch16_224", 256, 9, 20),
    },
    student_kwargs={},
)  # fmt: skip
TINY = Sizes(
    pixels=64, classes=10, jpeg=(80, 60), short_side=48, distinct=8, teacher="resnet10t", light="mobilenetv2_050", small="resnet10t",
    teacher_batch=8, few=128, many=64, check=32, workers=2, calls=2, gigabyte=1 << 16, matrix=64, seconds=0.1,
    students={name: StudentRun("deit_tiny_distilled_patch16_224", 8, 1, 2) for name in ("tiny", "small", "base")},
    student_kwargs={"depth": 1},
)  # fmt: skip


@dataclass
class Bench:
    """One run of the benchmark: where it writes, how much it does, on which device."""

    out: Path
    work: Path
    sizes: Sizes
    device: torch.device
    section: str = ""
    runs: int = field(default=0)
    raw: bool = False  # shards of raw pixels, as `cskd pack --short-side 256 --raw` makes them, and a cache of those

    def say(self, name: str, value: float | str, unit: str = "", note: str = "") -> None:
        """A figure, or words: a line on the terminal and a row of gpu.jsonl, both at once."""
        row = {"section": self.section, "name": name, "value": value, "unit": unit, "note": note}
        with (self.out / "gpu.jsonl").open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(line_of(row), flush=True)

    def attempt(self, name: str, job: Callable[..., object], *arguments: Any, **more: Any) -> Any:
        """A part whose failure is a figure like others: the next one runs. Returns what the part does, else None."""
        try:
            return job(*arguments, **more)
        except Exception as e:
            self.say(name, "FAILED", note=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
        finally:
            release()
        return None

    def data(self, images: int) -> Path:
        """Packed shards of so many images: a few under many keys, in shards that are links to one file."""
        kind, jpegs = "raw" if self.raw else "jpeg", self.work / "jpegs"
        folder, once = self.work / f"data {kind} {images}", self.work / f"distinct {kind}"
        if (folder / "inventory").is_dir():
            return folder
        if not (once / "inventory").is_dir():
            if not jpegs.is_dir():
                self._jpegs(jpegs)
            pack_data(jpegs, once, short_side=self.sizes.short_side if self.raw else None, raw=self.raw, quiet=True)
        source = open_inventory(once)
        folder.mkdir(exist_ok=True)
        per_shard = min(4096, images // 2)
        shards = [source.shards[0]._replace(name=f"part-{i:03d}.tar") for i in range(-(-images // per_shard))]
        for shard in shards:
            (folder / shard.name).unlink(missing_ok=True)
            os.link(once / source.shards[0].name, folder / shard.name)
        columns = [column.tolist() for column in (source.crc32c, source.offset, source.size)]
        rows = list(zip(*columns, strict=True))
        write_inventory(
            folder,
            (
                Sample(f"{i:06d}", i % self.sizes.classes, crc, i // per_shard, offset, size)
                for i in range(images)
                for crc, offset, size in [rows[i % len(rows)]]
            ),
            classes=[f"class {k:04d}" for k in range(self.sizes.classes)],
            shards=shards,
            block=per_shard,
        )
        return folder

    def _jpegs(self, folder: Path) -> None:
        """Smooth colours under noise: at 500 x 375 and quality 90 about 100 kB each, as ImageNet's are."""
        rng, (width, height) = np.random.default_rng(0), self.sizes.jpeg
        for i in range(self.sizes.distinct):
            smooth = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((width, height))
            noisy = np.asarray(smooth).astype(float) + rng.normal(0, 12, (height, width, 3))
            out = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
            path = folder / f"class {i % 2}" / f"{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(out.getvalue())

    def weights(self, model: str) -> Path:
        """Random weights, the same every time. No branch starts at zero, and batch norms know the statistics of noise:
        the arithmetic matters as in a trained network."""
        path = self.work / f"{model}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            net = build_model(model, {"num_classes": self.sizes.classes}).to(self.device).train()
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    with torch.no_grad():
                        module.weight.clamp_(min=QUIET_BRANCH)
                    module.momentum = None  # the mean of all batches
            with torch.no_grad():
                for _ in range(2):
                    coarse = torch.randn(32, 3, 14, 14, device=self.device)
                    noise = torch.randn(32, 3, self.sizes.pixels, self.sizes.pixels, device=self.device)
                    net(torch.nn.functional.interpolate(coarse, noise.shape[-2:], mode="bilinear") + 0.3 * noise)
            save_file({name: t.cpu().contiguous() for name, t in net.state_dict().items()}, f"{path}.partial")
            os.rename(f"{path}.partial", path)
        return path

    def cache(self, name: str) -> Path:
        """The folder of a cache of this name, of the shards at hand."""
        return self.work / f"cache {name}{' raw' if self.raw else ''}"

    def config(
        self,
        model: str,
        images: int,
        teacher: dict[str, Any],
        cache: str,
        student: StudentRun | None = None,
        method: str = "cskd-hard",
        cache_workers: int = 0,
        **train: Any,
    ) -> Config:
        """Of both stages: ImageNet's recipe, as configs/imagenet_deit_tiny.yaml has it. Each has an output of its own.
        cache_workers: of stage 1; 0: all."""
        s, self.runs = self.sizes, self.runs + 1
        student = student or s.students["tiny"]
        return from_dict(
            {
                "data": {"train": str(self.data(images))},
                "teacher": {
                    "model": model,
                    "weights": str(self.weights(model)),
                    "kwargs": {"num_classes": s.classes},
                    "input_size": s.pixels,
                    "batch": s.teacher_batch,
                    "check_images": 8,
                    "min_top1": 0.0,
                    **teacher,
                },
                "recipe": {"size": s.pixels, **RECIPE},
                "cache": {
                    "path": str(self.cache(cache)),
                    "views": VIEWS,
                    "workers": cache_workers or s.workers,
                    "device": str(self.device),
                },
                "student": {"model": student.model, "kwargs": s.student_kwargs},
                "loss": {"method": method},
                "train": {
                    "output": str(self.work / f"run {self.section} {self.runs}"),
                    "global_batch": student.batch,
                    "repeats": 3,
                    "ema": 0.99996,
                    "ema_warmup": False,
                    "workers": s.workers,
                    "prefetch": 2,
                    "device": str(self.device),
                    **train,
                },
            }
        )


def line_of(row: dict[str, Any]) -> str:
    """A row of gpu.jsonl for people."""
    value = row["value"]
    shown = value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return " ".join(
        filter(None, (f"{row['section']} {row['name']}:", shown, row["unit"], row["note"] and f"({row['note']})"))
    )


def teacher_keys(arithmetic: str) -> dict[str, Any]:
    """The keys of `teacher` for 'bf16', 'bf16+fold', 'bf16+fold+compile', ..."""
    precision, *more = arithmetic.split("+")
    return {"precision": precision, **dict.fromkeys(more, True)}


def computing(arithmetic: str, device: torch.device) -> AbstractContextManager[None]:
    """What the library computes a backbone in, for a network that runs by itself."""
    precision = arithmetic.split("+")[0]
    return computing_in("float32" if precision == "tf32" and device.type == "cpu" else precision, device)


def peak_mib(device: torch.device) -> float:
    """Peak MiB of tensors on the device since `release`."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def release() -> None:
    """Give back what earlier parts held on the device: their sizes must not count in the next one's."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def begin(out: Path, work: Path, tiny: bool, device: str) -> Bench:
    """In the process of a section: the device is touched here first; the server of workers starts meanwhile."""
    _start_deaf_to_interrupts()
    count_buffers()
    return Bench(out, work, TINY if tiny else FULL, pick_device(device))
