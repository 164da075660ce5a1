"""What 8 x 8 and 128 x 8 GPUs ask of a store: bytes and requests of each rank, node and the store, starts, losses, stage 1.

    python -m benchmarks.cluster [--views-per-second N] [--latency SECONDS] [--gbit N] [--write docs/SCALE.md]

ImageNet x 300 views, by DeiT's `repeats: 3`. How often each file is read comes from running the program's own table code for
every simulated node (of 128 nodes, 8 evenly spread), all its ranks at once, on a small made cache, and counting what is opened;
so does what a start opens. That is multiplied by the sizes and counts of ImageNet. Every constant is measured here, measured
elsewhere by a command that is
named, or sourced; the table of them says which. Nothing ran on a real cloud.

Without --write the tables are printed, else put between the markers of the page. One JSON line comes last. About 3 minutes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from benchmarks.cluster_counts import (
    REPEATS,
    Count,
    Epoch,
    Start,
    count_epoch,
    count_start,
    make_cache,
    unit_seconds,
)
from benchmarks.marked import fill
from benchmarks.stage1_waste import Waste, simulated

GB, MB = 1e9, 1e6
IMAGES, VIEWS, BLOCK = 1_281_167, 300, 8192
BLOCKS = -(-IMAGES // BLOCK)
UNITS = BLOCKS * VIEWS
WINDOW = 8
SHAPES = ((8, 8), (128, 8))  # nodes, GPUs of each
WORKERS = (8, 64)
GROUP = 3  # views of a pass
PASSES = BLOCKS * VIEWS // GROUP
S3 = "https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html"


@dataclass(frozen=True)
class Facts:
    """Constants. Bytes, seconds, views per second; each with where it comes from in `sources`."""

    unit_view: float = 259  # bytes of a view in a unit
    images: float = 147.8 * GB  # bytes of all
    student: float = 6797  # views per second and GPU
    teacher: float = 2671
    imports: float = 3.9  # seconds from the start of the process to the first batch, on a local disk
    latency: float = 0.15  # of a request
    in_flight: int = 64  # requests of a process at a time
    node: float = 100e9 / 8  # bytes per second of a node
    gets: float = 5500  # per second and prefix of the store
    silent: float = 0  # seconds after which torchrun takes a node for lost
    unit_cpu: float = 0  # seconds of a unit's part in a node's table
    unit_cpu_alone: float = 0  # and in one rank's

    @property
    def unit(self) -> float:
        """Bytes of a unit."""
        return self.unit_view * IMAGES / BLOCKS

    def sources(self) -> Iterator[tuple[str, str, str]]:
        yield (
            "image",
            f"{self.images / IMAGES / 1e3:.1f} kB",
            (
                "the parts of ILSVRC2012_img_train.tar, 41.9 + 41.9 + 41.9 + 22.1 GB, over 1,281,167 images: "
                "[listing](https://huggingface.co/datasets/presencesw/ILSVRC2012/tree/main)"
            ),
        )
        yield (
            "view in a unit (`envelope`, 7x7)",
            f"{self.unit_view:.0f} bytes",
            "[BENCHMARKS.md](BENCHMARKS.md), codecs",
        )
        yield "student, DeiT-Ti on an H200", f"{self.student:,.0f} views/s", "BENCHMARKS.md, `python -m benchmarks.gpu`"
        yield "teacher, RegNetY-16GF on an H200", f"{self.teacher:,.0f} views/s", "the same"
        yield "process until its first batch", f"{self.imports} s", "BENCHMARKS.md, `python -m benchmarks.scale`"
        yield (
            "CPU time of a unit, a node's rows; a rank's",
            (f"{1e3 * self.unit_cpu:.1f}; {1e3 * self.unit_cpu_alone:.1f} ms"),
            "measured here: 8,192 made views of 7x7 cells, 20 classes",
        )
        yield (
            "first byte of a request",
            f"{1e3 * self.latency:.0f} ms",
            f"100 to 200 ms: [Amazon S3]({S3}); `--latency`",
        )
        yield "requests of a prefix", f"{self.gets:,.0f} per second", f"[Amazon S3]({S3})"
        yield "requests under way in a process", str(self.in_flight), "assumed"
        yield (
            "network of a node",
            f"{8 * self.node / 1e9:.0f} Gbit/s",
            ("a quarter of an 8-GPU p4d.24xlarge: [EC2](https://aws.amazon.com/ec2/instance-types/p4/); `--gbit`"),
        )
        yield "silence of a lost node", f"{self.silent:.0f} s", "torchrun's keep-alives, read from the installed torch"


@dataclass(frozen=True)
class Found:
    """All that was counted."""

    start: Start
    epochs: dict[tuple[int, int], Epoch]
    waste: dict[tuple[int, bool], Waste]  # workers, whether they are told how many they are


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views-per-second", type=float, default=Facts.student, help="of a student on one GPU")
    parser.add_argument("--latency", type=float, default=Facts.latency, help="seconds until a request's first byte")
    parser.add_argument("--gbit", type=float, default=Facts.node * 8 / 1e9, help="network of a node, Gbit/s")
    parser.add_argument("--write", type=Path, help="page whose blocks are replaced")
    args = parser.parse_args(arguments)
    keep_alive = inspect.signature(DynamicRendezvousHandler.from_backend).parameters
    silent = keep_alive["keep_alive_interval"].default * keep_alive["keep_alive_max_attempt"].default
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        timed = unit_seconds(make_cache(here / "timed", 1, BLOCK, 7, 20), 8, 8, here)
        found = count(here)
    facts = Facts(
        student=args.views_per_second,
        latency=args.latency,
        node=args.gbit * 1e9 / 8,
        silent=silent,
        unit_cpu=timed[0],
        unit_cpu_alone=timed[1],
    )
    tables = all_tables(facts, found)
    print("\n\n".join(f"{name}\n\n" + "\n".join(table) for name, table in tables.items()))
    if args.write is not None:
        args.write.write_text(fill(args.write.read_text(), tables, str(args.write)))
    print(json.dumps({"benchmark": "cluster", **figures(facts, found)}))
    return 0


def count(
    folder: Path,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    blocks: int = 4,
    block: int = BLOCK,
    passes: int = PASSES,
) -> Found:
    """Run the table code of every node of each shape on a small cache, the start of a run on the same, and stage 1 on so many passes."""
    cache = make_cache(folder / "small", blocks, block, 4, 4)
    epochs = {shape: count_epoch(cache, *shape, folder / f"{shape[0]}x{shape[1]}") for shape in shapes}
    waste = {(n, told): simulated(n, passes, told, 0.1) for n in WORKERS for told in (True, False)}
    return Found(count_start(cache), epochs, waste)


def all_tables(facts: Facts, found: Found) -> dict[str, list[str]]:
    """Name -> lines of Markdown."""
    tables = {"constants": _table(("constant", "value", "source"), facts.sources())}
    tables["epoch"] = _table(("", "what", "rank", "node", "store"), _epoch_rows(facts, found))
    tables["bound"] = _table(
        ("", "an epoch's steps", "tables, a rank for itself", "tables, a node's ranks together"), _bounds(facts, found)
    )
    tables["start"] = _table(("", "what", "rank", "node", "store", "seconds"), _start_rows(facts, found))
    tables["first-step"] = _table(
        ("", "records one by one", "records, 64 at a time", "sealed index"), _first_steps(facts, found)
    )
    tables["lost"] = _table(
        ("", "noticed", "started again", "repeated, at most", "in all", "GPU-hours"), _lost(facts, found)
    )
    tables["stage1"] = _table(
        ("workers", "hours", "made twice, told how many they are", "made twice, not told"), _stage1(facts, found)
    )
    return tables


def figures(facts: Facts, found: Found) -> dict[str, float]:
    """The main ones, for the JSON line."""
    made = dict[str, float]()
    for (nodes, local), epoch in found.epochs.items():
        before, now = targets(facts, epoch, nodes, local)
        made |= {
            f"gb_per_epoch_{nodes}x{local}": now.bytes / GB,
            f"gb_per_epoch_{nodes}x{local}_before": before.bytes / GB,
        }
    return made


def targets(facts: Facts, epoch: Epoch, nodes: int, local: int) -> tuple[Count, Count]:
    """What the store gives an epoch: where each rank makes its own table, and where the ranks of a node share one."""
    return _scaled(facts, epoch, epoch.alone) * (nodes * local), _scaled(facts, epoch, epoch.store)


def _scaled(facts: Facts, epoch: Epoch, count: Count) -> Count:
    """Of the small cache to ImageNet: as many requests per unit, and bytes per byte of all units of an epoch."""
    units = BLOCKS * REPEATS
    return Count(count.requests / epoch.of.requests * units, count.bytes / epoch.of.bytes * units * facts.unit)


def _epoch_rows(facts: Facts, found: Found) -> Iterator[tuple[str, ...]]:
    image = Count(1, facts.images / IMAGES) * (IMAGES / REPEATS)  # one decoding for all views in a batch
    shards = Count(BLOCKS, facts.images)
    for (nodes, local), epoch in found.epochs.items():
        shape, ranks = f"{nodes} x {local}", nodes * local
        alone = _scaled(facts, epoch, epoch.alone)
        yield shape, "targets, each rank its own table", *map(_said, (alone, alone * local, alone * ranks))
        shared = [_scaled(facts, epoch, count) for count in (epoch.rank, epoch.node, epoch.store)]
        yield shape, "**targets, one table a node**", *map(_said, shared)
        yield shape, "images, a request each", *map(_said, (image * (1 / ranks), image * (1 / nodes), image))
        yield shape, "shards whole, first epoch", *map(_said, (shards * (1 / local), shards, shards * nodes))
        yield shape, "shards whole, later, kept on the node", "0", "0", "0"


def _bounds(facts: Facts, found: Found) -> Iterator[tuple[str, ...]]:
    for (nodes, local), _ in found.epochs.items():
        steps = IMAGES / (facts.student * nodes * local)
        alone, together = BLOCKS * REPEATS * facts.unit_cpu_alone, BLOCKS * REPEATS * facts.unit_cpu / local
        yield f"{nodes} x {local}", *(_seconds(s) for s in (steps, alone, together))


def _start_rows(facts: Facts, found: Found) -> Iterator[tuple[str, ...]]:
    start = found.start
    index = Count(1, start.index_bytes * UNITS)
    inventory = Count(start.inventory.requests, start.inventory.bytes * IMAGES)
    how = "measured" if start.index_measured else "its size modelled"
    rows = (
        ("commit records", start.records * UNITS),
        (f"sealed index ({how})", index),
        ("inventory", inventory),
    )
    for nodes, local in found.epochs:
        for what, each in rows:
            seconds = _transfer(facts, each, local)
            slow = max(seconds, each.requests * nodes * local / facts.gets)  # all ranks start at once
            cells = map(_said, (each, each * local, each * (nodes * local)))
            yield f"{nodes} x {local}", what, *cells, _seconds(slow)


def _transfer(facts: Facts, count: Count, local: int, in_flight: int | None = None) -> float:
    """Seconds of one rank's reading while the others of its node read as much."""
    waits = -(-count.requests // (in_flight or facts.in_flight)) * facts.latency
    return float(waits + count.bytes * local / facts.node)


def first_step(facts: Facts, start: Start, nodes: int, local: int, records: Count, in_flight: int) -> float:
    """Seconds until the first step: imports, records, inventory, the first window's table, and its shards whole."""
    known = _transfer(facts, records, local, in_flight)
    known = max(known, records.requests * nodes * local / facts.gets)
    inventory = _transfer(facts, Count(start.inventory.requests, start.inventory.bytes * IMAGES), local)
    units = WINDOW * REPEATS / local
    table = units * (facts.latency + facts.unit_cpu) + WINDOW * REPEATS * facts.unit / facts.node
    shards = facts.latency + WINDOW * facts.images / BLOCKS / facts.node
    return facts.imports + known + inventory + max(table, shards)


def _first_steps(facts: Facts, found: Found) -> Iterator[tuple[str, ...]]:
    records, index = found.start.records * UNITS, Count(1, found.start.index_bytes * UNITS)
    for nodes, local in found.epochs:
        ways = ((records, 1), (records, facts.in_flight), (index, 1))
        yield f"{nodes} x {local}", *(_seconds(first_step(facts, found.start, nodes, local, *way)) for way in ways)


def _lost(facts: Facts, found: Found) -> Iterator[tuple[str, ...]]:
    index = Count(1, found.start.index_bytes * UNITS)
    for nodes, local in found.epochs:
        again = first_step(facts, found.start, nodes, local, index, 1)
        repeated = IMAGES / (facts.student * nodes * local)  # a state at the end of each epoch
        whole = facts.silent + again + repeated
        yield (
            f"{nodes} x {local}",
            *(_seconds(s) for s in (facts.silent, again, repeated, whole)),
            f"{whole * nodes * local / 3600:.2f}",
        )


def _stage1(facts: Facts, found: Found) -> Iterator[tuple[str, ...]]:
    hours = IMAGES * VIEWS / facts.teacher / 3600
    for workers in WORKERS:
        both = found.waste[workers, True], found.waste[workers, False]
        lasted = " and ".join(f"{waste.seconds * hours / workers:.2f}" for waste in both)
        twice = (waste.twice * workers for waste in both)
        yield f"{workers:,}", lasted, *(f"{n:,.1f} of {PASSES:,} ({100 * n / PASSES:.2f} %)" for n in twice)


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def _said(count: Count) -> str:
    size = f"{count.bytes / GB:,.2f} GB" if count.bytes >= GB / 100 else f"{count.bytes / MB:,.2f} MB"
    return f"{count.requests:,.0f} requests, {size}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s"


if __name__ == "__main__":
    sys.exit(main())
