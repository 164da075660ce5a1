"""What `benchmarks.faults` damages: a tiny data set, its cache and its student, made once undisturbed, and how a copy is judged."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import cskd.pipeline.cache_teacher
import cskd.pipeline.train_step
from benchmarks.children import in_child
from benchmarks.tiny_teacher import TINY_TEACHER
from cskd.config import Config, from_dict
from cskd.errors import CskdError
from cskd.loading.stream import Stream
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import verify
from cskd.pipeline.pack import pack_data
from cskd.pipeline.train import train
from cskd.student.optim import reseed_step

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES, SHARD, BLOCK = 48, 12, 24


class Bench:
    """`whole`, every file of the undisturbed cache; `root`, its content hash; `elsewhere`, the files of another cache of the
    same images; `seconds` that stage 1 takes in a child with two workers."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        noise = np.random.default_rng(0)
        for i in range(IMAGES):
            path = folder / "images" / "abcd"[i % 4] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        pack_data(folder / "images", folder / "data", shard_size=SHARD, block=BLOCK, quiet=True)
        self.cache, self.other = folder / "cache", folder / "other"
        _, answer = self.make(self.cache)
        self.root: str = answer["value"]
        clock = time.perf_counter()
        self.make(folder / "timed", workers=2)
        self.seconds = time.perf_counter() - clock
        in_child(lambda: cache_teacher(self.config(self.other, seed=5), quiet=True).units)  # other pixels, same images
        self.whole, self.elsewhere = files(self.cache), files(self.other)

    def config(self, cache: Path, run: str = "run", seed: int = 0, workers: int = 0) -> Config:
        return from_dict(
            {
                "data": {"train": str(self.folder / "data"), "val": str(self.folder / "data")},
                "teacher": {"model": TINY_TEACHER, "batch": 8, "min_top1": 0.0, "check_images": 8},
                "recipe": {"size": 32, "seed": seed},
                "cache": {"path": str(cache), "views": 3, "workers": workers, "device": "cpu"},
                "student": {
                    "model": "deit_tiny_distilled_patch16_224",
                    "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
                    "drop_path": 0.1,
                },
                "train": {
                    "output": str(self.folder / run),
                    "epochs": 3,
                    "global_batch": 8,
                    "warmup_epochs": 1,
                    "save_every": 2,
                    "workers": 0,
                    "device": "cpu",
                },
            }
        )

    def make(
        self,
        cache: Path,
        kill_after: float | None = None,
        workers: int = 0,
        armed: Callable[[], bool] = lambda: True,
    ) -> tuple[int, Any]:
        """Stage 1 in a child: its exit status, and the content hash as its value.

        workers: forked ones, since a fork server would have to import torch, which takes longer than the whole stage.
        """

        def stage() -> str:
            if workers:
                setattr(cskd.pipeline.cache_teacher, "Stream", functools.partial(Stream, start="fork"))  # noqa: B010
            return cache_teacher(self.config(cache, workers=workers), quiet=True).content_root

        return in_child(stage, kill_after, armed)

    def train(self, run: str, kill_after: float | None = None, kill_at: int | None = None) -> tuple[int, Any]:
        """Stage 2 in a child: its exit status, and as its value the sha256 of the weights and the notes of the run.

        kill_after: seconds; kill_at: the step before which it dies.
        """

        def strike(seed: int, step: int, part: int) -> None:
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            reseed_step(seed, step, part)

        def weights() -> list[Any]:
            setattr(cskd.pipeline.train_step, "reseed_step", strike)  # noqa: B010
            report = train(self.config(self.cache, run), quiet=True)
            model = (Path(report.output) / "model.safetensors").read_bytes()
            return [hashlib.sha256(model).hexdigest(), report.notes]

        return in_child(weights, kill_after)

    def resumed(self, cache: Path, workers: int = 0) -> bool:
        """Does the same call again end with the undisturbed content, whole and sealed?"""
        _, answer = self.make(cache, workers=workers)
        return self.judged(answer == {"value": self.root} and self.sound(cache), cache, answer)

    def sound(self, cache: Path) -> bool:
        """Is it whole, sealed, and what an undisturbed run makes? Asked in a child: reading units starts a thread."""

        def ask() -> list[Any]:
            report = verify(cache, quiet=True)
            return [report.sound, report.sealed, report.content_root]

        answer = in_child(ask)[1]
        return bool(answer == {"value": [True, True, self.root]})

    def judged(self, good: bool, cache: Path, answer: object) -> bool:
        """The same verdict; the reason of a bad one is printed."""
        if not good:
            print(f"{cache.name}: {answer}; verify says {in_child(lambda: self.errors(cache))[1]}", file=sys.stderr)
        return good

    def errors(self, cache: Path, images: bool = False) -> list[str]:
        """What `verify` says of a cache, in this process: forking ten thousand times would take long."""
        try:
            return verify(cache, images=images, quiet=True).errors
        except CskdError as e:
            return [str(e)]

    def fresh(self, name: str, without: tuple[int, int] | None = None) -> Path:
        """An empty place for a cache, or a copy of the whole one that lacks a unit (block, view), and so isn't sealed."""
        cache = self.folder / name
        shutil.rmtree(cache, ignore_errors=True)
        if without is not None:
            block, view = without
            shutil.copytree(self.cache, cache)
            record = cache / "commits" / f"b{block:05d}" / f"v{view:04d}.json"
            unit = json.loads(record.read_text())["commit"]["files"][0]["path"]
            for path in (record, cache / unit, cache / "sealed.json"):
                path.unlink()
        return cache


def flipped(data: bytes, rng: random.Random, first: int = 0, size: int | None = None) -> bytes:
    """With one bit changed: of all bytes, or of `size` bytes from `first` on."""
    bit = 8 * first + rng.randrange(8 * (len(data) if size is None else size))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def files(root: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
