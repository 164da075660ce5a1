"""Does copying shards ahead keep a loader from waiting for an object store, and is each shard fetched once per machine?

    python -m benchmarks.remote_shards [--latency MS] [--mb-per-second N] [--step MS]

A made data set (48 shards of 100 images of 20 kB, 96 MB) behind a storage that sleeps before each answer and sends no faster than
a set rate. Two epochs in the order of the plan: one batch at a time is read from the shards by `ShardReader` as a worker reads
it, then a training step is slept. Without and with `cskd.loading.shards_ahead`, each with a new node cache, and with one that is
too small for the data set. Counted: requests and bytes of each epoch, and the share of its time that the loader waited. Prints a
table, and one JSON line last. 1 minute.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory, Sample, ShardFile, open_inventory, write_inventory
from cskd.dataset.remote_shards import RemoteShards
from cskd.dataset.shard_reader import ShardReader
from cskd.loading.plan import PlanSpec, epoch_plan
from cskd.loading.shards_ahead import ahead, training_needs
from cskd.storage import Range, Storage, open_storage
from cskd.storage.node_cache import NodeCache

SHARDS, IMAGES, BYTES, BATCH, EPOCHS = 48, 100, 20_000, 64, 2


class Slow:
    """A storage with the latency and the rate of another one; many requests in flight share the rate."""

    def __init__(self, inner: Storage, latency: float, rate: float) -> None:
        self.inner, self.latency, self.rate = inner, latency, rate
        self.requests = self.read = 0
        self.ranges = True
        self._line, self._lock = 0.0, threading.Lock()  # when the line is free

    def get(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        data = self.inner.get(key, start, size)
        with self._lock:
            self.requests, self.read = self.requests + 1, self.read + len(data)
            self._line = max(self._line, time.monotonic()) + len(data) / self.rate
            wait = self._line - time.monotonic()
        time.sleep(self.latency + wait)
        return data

    def get_many(self, wanted: Sequence[Range]) -> list[bytes]:
        return [self.get(*one) for one in wanted]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=30.0, help="ms before each answer")
    parser.add_argument("--mb-per-second", type=float, default=200.0)
    parser.add_argument("--step", type=float, default=50.0, help="ms of a training step of 64 images")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        local = made(Path(folder, "data"))
        size = sum(shard.bytes for shard in local.shards)
        rows = []
        for name, share, prefetch in (
            ("as read", 4.0, False),
            ("ahead", 4.0, True),
            ("ahead, node cache of half", 0.5, True),
        ):
            node = NodeCache(Path(folder, name), int(share * size))
            rows += run(name, local, node, options, prefetch)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {SHARDS} shards, {size / 1e6:.0f} MB; {options.latency:g} ms latency"
    )
    print(
        f"{'shards are copied':28}{'epoch':>6}{'seconds':>9}{'waited %':>9}{'longest ms':>12}{'requests':>9}{'MB':>7}"
    )
    for r in rows:
        print(
            f"{r['mode']:28}{r['epoch']:>6}{r['seconds']:>9.2f}{r['waited_percent']:>9.1f}{r['longest_ms']:>12.0f}"
            f"{r['requests']:>9}{r['mb']:>7.0f}"
        )
    once = all(r["requests"] == (SHARDS if r["epoch"] == 1 else 0) for r in rows if "half" not in r["mode"])
    print(json.dumps({"benchmark": "remote_shards", "each_shard_once": once, "rows": rows}))
    return int(not once)


def made(folder: Path) -> Inventory:
    """Shards of random bytes: nothing is decoded here."""
    folder.mkdir()
    rng, samples, shards = np.random.default_rng(0), list[Sample](), list[ShardFile]()
    for shard in range(SHARDS):
        name, raw = f"{shard:05d}.tar", rng.bytes(IMAGES * BYTES)
        (folder / name).write_bytes(raw)
        shards.append(ShardFile(name, len(raw)))
        for i in range(IMAGES):
            crc = google_crc32c.value(raw[i * BYTES : (i + 1) * BYTES])
            samples.append(Sample(f"s{shard:03d}i{i:03d}", 0, crc, shard, i * BYTES, BYTES))
    return write_inventory(folder, samples, classes=["a"], shards=shards, block=2 * IMAGES)


def run(name: str, local: Inventory, node: NodeCache, options: Any, prefetch: bool) -> list[dict[str, Any]]:
    """A row per epoch."""
    inventory = open_inventory(local.root)
    inventory.remote = RemoteShards("s3://made/data", node)
    slow = Slow(open_storage(local.root), options.latency / 1e3, options.mb_per_second * 1e6)
    inventory.remote.__dict__["storage"] = slow
    plan = PlanSpec(inventory.blocks, np.zeros(inventory.n, bool), inventory.id, RecipeConfig(), 4, 1, 0, BATCH, 4)
    reader, rows = ShardReader(inventory, whole=True), []
    steps = range(EPOCHS * plan.steps)
    drawn = ahead(steps, training_needs(inventory, plan, 0, len(steps), lambda _: None)) if prefetch else iter(steps)
    for epoch in range(EPOCHS):
        samples = epoch_plan(plan, epoch).sample.reshape(-1, BATCH)
        begun, waited, longest, before = time.monotonic(), 0.0, 0.0, (slow.requests, slow.read)
        for step in range(plan.steps):
            next(drawn)
            clock = time.monotonic()
            for i in samples[step].tolist():
                reader.read(i)
            spent = time.monotonic() - clock
            waited, longest = waited + spent, max(longest, spent)
            time.sleep(options.step / 1e3)
        seconds = time.monotonic() - begun
        rows.append(
            {
                "mode": name,
                "epoch": epoch + 1,
                "seconds": seconds,
                "waited_percent": 100 * waited / seconds,
                "longest_ms": 1e3 * longest,
                "requests": slow.requests - before[0],
                "mb": (slow.read - before[1]) / 1e6,
            }
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
