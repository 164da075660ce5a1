"""The road from loader to GPU: are a student's inputs the same bits on every road, does nothing wait, and how fast is it?

    python -m benchmarks.device_feed [--device cuda] [--workers 14] [--batch 1024] [--steps 24] [--images 1500]

Makes JPEGs of 500 x 375 pixels of noise and edges, plans steps of DeiT's recipe with three views of an image (no teacher, no
cache), and reads them by three roads: `plain` (views in the workers, mixed and normalised on the CPU), `host` and `device`
(`train.augment`), copied ahead as in training. The inputs of the first steps are compared bit for bit, and each view's
checksum of `device` with the host's. While steps are timed, work on the GPU runs next to them as a student would, and any
call that waits for the GPU is an error (`torch.cuda.set_sync_debug_mode`).

Prints a table and one JSON line last. Exits 1 where inputs differ.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from PIL import Image

from benchmarks.device_views import DEIT
from cskd.config import TrainConfig
from cskd.dataset.inventory import Inventory, Sample, ShardFile, write_inventory
from cskd.loading.feed import fed
from cskd.loading.plan import PlanSpec
from cskd.loading.raw_batches import DeviceViews, RawBatchMaker, refuse_device_views
from cskd.loading.sources import LiveViews, TargetSpec
from cskd.loading.stage2 import BatchMaker
from cskd.loading.stream import Stream
from cskd.loading.tasks import RunTasks
from cskd.views.digest import pixel_crc
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import InputMaker
from cskd.views.on_device import pixel_crcs

COMPARED = 3  # steps whose inputs are kept


def make_images(folder: Path, count: int) -> Inventory:
    """A shard of JPEGs of various sizes around 500 x 375 pixels."""
    draws, samples = np.random.default_rng(0), []
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(count):
            height, width = (int(side) for side in draws.integers((300, 400), (450, 600)))
            coarse = Image.fromarray(draws.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
            noisy = np.asarray(coarse).astype(np.int16) + draws.integers(-25, 26, (height, width, 1))
            out = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
            data, info = out.getvalue(), tarfile.TarInfo(f"image{i:05d}.jpg")
            info.size = len(data)
            samples.append(
                Sample(f"image{i:05d}", i % 10, int(google_crc32c.value(data)), 0, tar.offset + 512, len(data))
            )
            tar.addfile(info, io.BytesIO(data))
    shards = [ShardFile("00000.tar", (folder / "00000.tar").stat().st_size)]
    return write_inventory(folder, samples, classes=[str(n) for n in range(10)], shards=shards, block=count)


@contextmanager
def batches(road: str, source: LiveViews, args: argparse.Namespace, scratch: Path) -> Iterator[Iterator[Any]]:
    """The training batches of a road."""
    settings = TrainConfig(repeats=3, global_batch=args.batch, window=1)
    plan = PlanSpec.over(source, settings, 1)
    spec = TargetSpec("none", "", 0)
    views = ViewMaker(source.inventory, source.recipe)
    maker = (RawBatchMaker if road == "device" else BatchMaker)(views, None, 1.0, None)
    with RunTasks(source, plan, lambda _: spec, lambda _: [], scratch, 0, 1_000_000) as tasks:
        if road == "plain":
            yield iter(Stream(maker, tasks, args.workers, args.prefetch))
        else:
            make = DeviceViews(views, None) if road == "device" else None
            yield fed(maker, tasks, args.device, args.workers, args.prefetch, make)


def read(road: str, source: LiveViews, args: argparse.Namespace, scratch: Path) -> tuple[list[Any], dict[str, float]]:
    """Inputs and checksums of the first steps, and figures of a road."""
    cuda = args.device.type == "cuda" and road != "plain"
    inputs = InputMaker(DEIT.mean, DEIT.std, args.device if road != "plain" else torch.device("cpu"))
    kept: list[Any] = []
    burden = torch.randn(8192, 8192, device=args.device, dtype=torch.bfloat16) if cuda else None
    with batches(road, source, args, scratch) as coming:
        for batch in itertools.islice(coming, COMPARED):
            crcs = [pixel_crc(view) for view in batch["pixels"].cpu().numpy()]
            if road == "device" and pixel_crcs(batch["pixels"]).tolist() != crcs:
                raise SystemExit("checksums of the device are not those of the host")
            kept.append((inputs.mixed(batch).cpu(), crcs))
        if road == "plain":
            return kept, {}
        for _ in itertools.islice(coming, args.workers * (args.prefetch + 1)):  # until each buffer has been page-locked
            pass
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")
        begun, waiting, launching = time.perf_counter(), 0.0, 0.0
        for _ in range(args.steps):
            clock = time.perf_counter()
            batch = next(coming)
            waiting += time.perf_counter() - clock
            clock = time.perf_counter()
            pixels = inputs.mixed(batch)
            launching += time.perf_counter() - clock
            if burden is not None:
                for _ in range(args.burden):
                    burden = burden @ burden
                burden = burden + pixels.sum().to(burden.dtype) * 0
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        spent = time.perf_counter() - begun
    figures = {"images/s": args.steps * args.batch / spent, "ms in next": 1e3 * waiting / args.steps}
    figures |= {"ms to launch mixing": 1e3 * launching / args.steps, "ms a step": 1e3 * spent / args.steps}
    return kept, figures | ({"peak GB": torch.cuda.max_memory_reserved() / 1e9} if cuda else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--prefetch", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--burden", type=int, default=60, help="bf16 products of 8192 x 8192 on the GPU a step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inventory = make_images(Path(folder), args.images)
        source = LiveViews(inventory, DEIT, 300, (1, 1), np.zeros(len(inventory), bool), "none")
        refuse_device_views(source, args.device)
        print(f"torch {torch.__version__}: views of {args.device} agree with the host's", flush=True)
        report, differing, plain = dict[str, Any](), 0, list[Any]()
        for road in ("plain", "host", "device"):
            kept, figures = read(road, source, args, Path(folder) / road)
            plain = plain or kept
            same = [torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(plain, kept, strict=True)]
            differing += same.count(False)
            report[road] = {name: round(value, 2) for name, value in figures.items()}
            text = ", ".join(f"{name} {value}" for name, value in report[road].items())
            print(f"{road:<8}{same.count(True)} of {COMPARED} steps are those of plain; {text}", flush=True)
    print(json.dumps(report | {"differing": differing, "batch": args.batch, "workers": args.workers}))
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
