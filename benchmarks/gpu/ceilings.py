"""What this machine can do at most: products, copies, and views per second of its cores."""

from __future__ import annotations

import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.gpu.bench import RECIPE, VIEWS, Bench
from benchmarks.gpu.clocks import second_half, seconds_of
from cskd.codecs import get_codec
from cskd.config import RecipeConfig
from cskd.dataset.inventory import open_inventory
from cskd.loading.stream import Stream
from cskd.pipeline.unit_line import writers_of
from cskd.seeds import mix64
from cskd.store.format import UNIT_FIELDS
from cskd.store.unit import content_hash, pack_unit
from cskd.views.maker import ViewMaker


class MakeViews:
    """In a worker: VIEWS views of each image of a task, decoded once, as both stages make them. Returns how many."""

    def __init__(self, maker: ViewMaker) -> None:
        self.maker = maker

    def __call__(self, task: range) -> int:
        for sample in task:
            image = self.maker.image(sample)
            for view in range(VIEWS):
                self.maker.view(image, mix64(VIEWS * sample + view))
        return VIEWS * len(task)


def ceilings(bench: Bench) -> None:
    """Products and copies of the device."""
    s, device = bench.sizes, bench.device
    operations = 2 * s.matrix**3
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        x = torch.randn(s.matrix, s.matrix, device=device, dtype=dtype)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        calls = max(2, s.calls // 4) if name == "float32" else s.calls
        seconds = seconds_of(lambda x=x: x @ x, calls, device)  # type: ignore[misc]
        bench.say(f"{name} matmul {s.matrix}", operations / seconds / 1e12, "TFLOP/s")
    torch.set_float32_matmul_precision("highest")
    source = torch.zeros(s.gigabyte, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    seconds = seconds_of(lambda: copy.copy_(source), s.calls, device)
    bench.say("copy on the device", 2 * s.gigabyte / seconds / 1e9, "GB/s", "read and written")
    host = torch.zeros(s.gigabyte // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    part = copy[: len(host)]
    seconds = seconds_of(lambda: part.copy_(host, non_blocking=True), s.calls, device)
    bench.say("host to device, pinned", len(host) / seconds / 1e9, "GB/s")
    pageable = torch.zeros_like(host, pin_memory=False)
    seconds = seconds_of(lambda: part.copy_(pageable), max(2, s.calls // 4), device, warm=1)
    bench.say("host to device, pageable", len(host) / seconds / 1e9, "GB/s")


def loader(bench: Bench) -> None:
    """Views of the cores: of one, of all by processes, and by threads of one process; of JPEGs, and of shards of raw pixels."""
    width, height = bench.sizes.jpeg
    jpegs = loader_of(bench, f"JPEG {width} x {height}", ("processes", "threads"))
    bench.raw = True
    raw = loader_of(bench, f"raw, short side {bench.sizes.short_side}", ("processes",))
    bench.say("raw / JPEG, processes", raw / jpegs)


def loader_of(bench: Bench, images: str, ways: tuple[str, ...]) -> float:
    """Returns views per second of all cores by the first of these ways."""
    s, rates = bench.sizes, []
    inventory = open_inventory(bench.data(s.few))
    make = MakeViews(ViewMaker(inventory, RecipeConfig(size=s.pixels, **RECIPE)))  # type: ignore[arg-type]
    torch.set_num_threads(1)
    done, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < s.seconds:
        done += make(range(done // VIEWS % s.few, done // VIEWS % s.few + 1))
    one = done / spent
    bench.say(f"decode and augment, {images}, one core", one, "views/s", f"{VIEWS} views per image")
    cores = min(s.workers, os.cpu_count() or 1)
    per_task = max(1, int(one * s.seconds / 8) // VIEWS)
    tasks = [range(i * per_task % (s.few // 2), i * per_task % (s.few // 2) + per_task) for i in range(16 * cores)]
    with ThreadPoolExecutor(cores) as threads:
        for name in ways:
            points, made = [(time.perf_counter(), 0)], 0
            for count in Stream(make, tasks, cores) if name == "processes" else threads.map(make, tasks):
                made += count
                points.append((time.perf_counter(), made))
            rate, python = second_half(points), platform.python_version() + ("" if locked() else ", free-threaded")
            words = f"{rate / one:.2f} times one core, Python {python}"
            bench.say(f"decode and augment, {images}, {cores} {name}", rate, "views/s", words)
            rates.append(rate)
    return rates[0]


def writer(bench: Bench) -> None:
    """Whole maps in int8 to the bytes of a unit's file and its content hash, by one thread and by as many as commit in stage 1."""
    s, grid = bench.sizes, (7, 7)
    rows = max(8, 256 * s.classes // 1000)
    torch.manual_seed(0)
    codec = get_codec("int8", s.classes, grid)
    logits = torch.randn(rows, s.classes, 1, 1) + 0.5 * torch.randn(rows, s.classes, *grid)
    targets = codec.encode(logits, logits.mean((2, 3)))
    fields = {
        name: np.zeros((rows, *(() if name != "box" else (4,))), dtype) for name, (dtype, _) in UNIT_FIELDS.items()
    }
    names = {name: dimensions for name, (_, dimensions) in UNIT_FIELDS.items()} | codec.dimensions

    def write(_: int) -> None:
        pack_unit(fields, targets, names, {})
        content_hash(fields, {"int8": targets})

    write(0)
    for count in dict.fromkeys((1, max(2, writers_of(min(s.workers, os.cpu_count() or 1))))):
        units, begun = 4 * count, time.perf_counter()
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(write, range(units)))
        rate = units * rows / (time.perf_counter() - begun)
        bench.say(
            f"int8 units written by {count} thread{'s' * (count > 1)}", rate, "views/s", f"{s.classes} classes, 7 x 7"
        )


def locked() -> bool:
    """Whether threads of this Python take turns."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())
