"""A tiny data set whose teacher takes its time, so that a worker can be ended in the middle, and the cache that one process makes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cskd.config import load_config
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.launch.options import Options
from cskd.pipeline.pack import pack_data
from cskd.store.cache import open_cache
from cskd.store.seal import read_seal

IMAGES, BLOCK, VIEWS = 96, 24, 9
UNITS = IMAGES // BLOCK * VIEWS
SLOW = "0.4"  # seconds of a forward of 12 images
WORKERS, NODES = 3, 2

_TEACHER = """
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.fc = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 4)

    def forward_features(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return self.body(x)

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))


def build():
    return Net()
"""

_CONFIG = """
data: {train: data, val: data}
teacher: {model: 'net.py:build', batch: 12, min_top1: 0.0, check_images: 12, check: note}
recipe: {size: 32}
# Threads as Ray gives an actor of one core: with another number float32 sums are rounded otherwise.
cache: {path: cache, views: 9, workers: 0, threads: 1, device: cpu, save_seconds: 0.5}
student:
  model: deit_tiny_distilled_patch16_224
  kwargs: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
train: {output: run, epochs: 2, global_batch: 24, warmup_epochs: 1, workers: 0, device: cpu}
"""


class Bench:
    """A folder whose name needs to be quoted, with data, teacher and config; root: the content of the cache of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / 'it\'s $HOME, in "two" words'
        if not (self.folder / "data").exists():
            noise = np.random.default_rng(0)
            for i in range(IMAGES):
                path = self.folder / "images" / "abcd"[i % 4] / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
            pack_data(self.folder / "images", self.folder / "data", shard_size=BLOCK, block=BLOCK, quiet=True)
        (self.folder / "net.py").write_text(_TEACHER)
        self.config = self.folder / "tiny.yaml"
        self.config.write_text(_CONFIG)
        with contextlib.chdir(self.folder):
            self.root = cache_teacher(load_config(self.config, self.sets("alone")), quiet=True).content_root

    def sets(self, name: str) -> list[str]:
        """Overrides for a cache and a run of that name."""
        return [f"cache.path=cache of {name}", f"train.output=run of {name}"]

    def options(self, address: str = "auto") -> Options:
        return Options(workers=WORKERS, gpus=0, nodes=NODES, cpus=1, env=[f"SLOW={SLOW}"], address=address)

    def units(self, name: str) -> int:
        """How many a cache has by now."""
        return len(list((self.folder / f"cache of {name}" / "commits").glob("*/*.json")))

    def sealed(self, name: str) -> str:
        """The content root of a cache that is sealed."""
        cache = open_cache(self.folder / f"cache of {name}")
        return cache.content_root() if read_seal(cache) else "not sealed"

    def trained(self, name: str) -> bool:
        return (self.folder / f"run of {name}" / "model.safetensors").exists()


def until(what: Callable[[], bool], said: str, seconds: float = 1800.0) -> None:
    """Wait for it. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"{said}: not in {seconds:g} s")
        time.sleep(0.2)
