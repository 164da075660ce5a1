"""What ranks, nodes and workers do, counted: the program's own code on small made caches. `python -m benchmarks.cluster` uses it.

A request is a file of the cache that is opened, and its bytes are those of the whole file: units and records are read whole.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numcodecs import zstd

from benchmarks.scale import add_unit, make_data
from cskd.config import RecipeConfig, TrainConfig, from_dict, to_dict
from cskd.files.shared_folder import SharedFolder
from cskd.loading.epoch_table import build_table
from cskd.loading.plan import PlanSpec, batch_part, epoch_plan
from cskd.loading.sources import TargetSpec
from cskd.store.cache import Cache, create_cache, open_cache
from cskd.store.identity import identity_of
from cskd.store.manifest import Manifest, write_resolved
from cskd.store.seal import seal_cache
from cskd.store.usable import usable_views

REPEATS = 3  # views of an image in one epoch, as DeiT has it
MOST_NODES = 8  # that are run; of more, so many evenly spread
CELLS = TargetSpec("cells", "envelope", 40_000)


@dataclass(frozen=True)
class Count:
    """Files that were opened, and their bytes."""

    requests: float = 0
    bytes: float = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.requests + other.requests, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Count:
        return Count(self.requests * factor, self.bytes * factor)


class _Opened:
    """Files under `root` that this process opened, from the interpreter's own reports."""

    def __init__(self) -> None:
        self.root, self.sizes = "", list[int]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not self.root or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if isinstance(path, str) and path.startswith(self.root) and os.path.isfile(path):
            self.sizes.append(os.stat(path).st_size)


_opened: list[_Opened] = []


@contextmanager
def counted(root: Path) -> Iterator[list[int]]:
    """The sizes of the files under root that are opened within, one each time."""
    if not _opened:
        _opened.append(_Opened())  # a hook can't be taken away again
    watch = _opened[0]
    watch.root, watch.sizes = str(root), []
    try:
        yield watch.sizes
    finally:
        watch.root = ""


def count_of(sizes: Sequence[int]) -> Count:
    return Count(len(sizes), sum(sizes))


def make_cache(folder: Path, blocks: int, block: int, grid: int, classes: int) -> Cache:
    """A cache of three views over made images, with made logits."""
    inventory = make_data(folder / "data", blocks * block, block, classes)
    recipe = RecipeConfig(size=32)
    raw = {"data": {"train": str(folder / "data")}, "recipe": to_dict(recipe), "cache": {"views": REPEATS}}
    manifest = Manifest(
        identity=identity_of(
            inventory, recipe, {"model": "made", "weights_sha256": "0" * 64}, (grid, grid), ["envelope"]
        ),
        views=REPEATS,
        config=to_dict(from_dict(raw)),
        data=str(folder / "data"),
        clean_top1=1.0,
        clean_images=0,
    )
    cache = create_cache(folder / "cache", manifest, inventory)
    write_resolved(cache.root, cache.manifest)
    for number in range(blocks):
        for view in range(REPEATS):
            add_unit(cache, number, view)
    return cache


@dataclass(frozen=True)
class Start:
    """What one rank reads before it feeds anything. inventory: its files, and their bytes per sample; records and index: per unit."""

    inventory: Count
    records: Count
    index_bytes: float
    index_measured: bool  # else modelled: the records in one zstd frame


def count_start(cache: Cache) -> Start:
    """By opening the cache as training does, before and after it is sealed."""
    units, n = cache.blocks * cache.views, cache.inventory.n
    inventory = [path.stat().st_size for path in (cache.root / "inventory").rglob("*") if path.is_file()]
    records = _opening(cache.root)
    lines = b"\n".join(path.read_bytes() for path in sorted((cache.root / "commits").rglob("*.json")))
    seal_cache(cache, 1.0)
    sealed = _opening(cache.root)
    measured = sealed.requests < records.requests
    size = sealed.bytes if measured else len(zstd.compress(lines, 3))
    return Start(Count(len(inventory), sum(inventory) / n), records * (1 / units), size / units, measured)


def _opening(root: Path) -> Count:
    """Of what a run does to know its views and the samples it never feeds; the inventory and the manifest left out."""
    cache = open_cache(root)
    with counted(root) as sizes:
        usable_views(cache, 0)
        cache.quarantined()
    return count_of(sizes)


@dataclass(frozen=True)
class Epoch:
    """An epoch's reading, of units of `of` bytes in all. alone: a rank that makes a table for itself, the mean of four; node: all ranks of a node
    together; rank: the one of them that reads most; store: all nodes together."""

    of: Count
    alone: Count
    node: Count
    rank: Count
    store: Count


def count_epoch(cache: Cache, nodes: int, local: int, folder: Path) -> Epoch:
    """By making the epoch's table of every node, by all its ranks at once; and that of one rank as each made it before."""
    ranks = nodes * local
    plan = PlanSpec.over(cache, TrainConfig(repeats=REPEATS, seed=0, global_batch=max(2 * ranks, 512), window=8), ranks)
    epoch, batch = epoch_plan(plan, 0), plan.global_batch
    with counted(cache.root / "units") as sizes:
        for block in range(cache.blocks):
            for view in range(REPEATS):
                cache.read(block, view, "envelope")
    whole = count_of(sizes)
    share, some = batch // ranks, range(0, ranks, max(1, ranks // 4))
    alone = Count()
    for number in some:
        rows = batch_part(epoch, batch, number * share, (number + 1) * share)
        alone += _table(cache, rows, [SharedFolder(folder / "alone")])[0] * (1 / len(some))
        shutil.rmtree(folder / "alone")
    store, node, rank, run = Count(), Count(), Count(), range(0, nodes, max(1, nodes // MOST_NODES))
    for number in run:
        here = folder / f"node{number}"
        here.mkdir(parents=True)
        members = [SharedFolder(here, i, local).enter() for i in range(local)]
        first = number * local * share
        counts = _table(cache, batch_part(epoch, batch, first, first + local * share), members)
        ours = sum(counts, Count())
        store, node = store + ours * (nodes / len(run)), max(node, ours, key=lambda count: count.bytes)
        rank = max(rank, *counts, key=lambda count: count.bytes)
        for member in members:
            member.leave()
    return Epoch(whole, alone, node, rank, store)


def _table(cache: Cache, rows: Any, members: Sequence[SharedFolder]) -> list[Count]:
    """What each member read: units first counted one member at a time, since a file that is opened does not say by whom."""
    units: list[list[tuple[int, int]]] = [[] for _ in members]

    class Noted:
        def __init__(self, number: int) -> None:
            self.number = number

        def read(self, block: int, view: int, codec: str) -> Any:
            units[self.number].append((block, view))
            return cache.read(block, view, codec)

        def __getattr__(self, name: str) -> Any:
            return getattr(cache, name)

    def build(number: int) -> None:
        source: Any = Noted(number)
        folder = members[number].path / "epoch00000" / "0000000"
        build_table(source, rows, CELLS, 0, len(rows.sample), folder, None, members[number])

    with counted(cache.root) as sizes, ThreadPoolExecutor(len(members)) as pool:
        list(pool.map(build, range(len(members))))
    whole, read = count_of(sizes), sum(map(len, units))
    return [whole * (len(own) / max(1, read)) for own in units]


def unit_seconds(cache: Cache, nodes: int, local: int, folder: Path) -> tuple[float, float]:
    """CPU seconds of one unit's part in a table: of a node's rows, and of one rank's."""
    ranks = nodes * local
    plan = PlanSpec.over(cache, TrainConfig(repeats=REPEATS, seed=0, global_batch=8 * ranks, window=8), ranks)
    epoch, found = epoch_plan(plan, 0), []
    for count in (local, 1):
        rows = batch_part(epoch, plan.global_batch, 0, 8 * count)
        seconds = []
        for _ in range(3):
            begun = time.thread_time()
            build_table(cache, rows, CELLS, 0, len(rows.sample), folder / "table")
            seconds.append((time.thread_time() - begun) / (cache.blocks * REPEATS))
        found.append(min(seconds))
    return found[0], found[1]
