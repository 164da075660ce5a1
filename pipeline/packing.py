"""A data set into shards with an inventory (`cskd pack`), or an inventory for shards that exist (`cskd index`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from cskd.inventory import Inventory
from cskd.packing.index import index
from cskd.packing.pack import pack
from cskd.untrusted import printable
from pipeline.progress import Progress


@dataclass(frozen=True)
class PackReport:
    """What was packed or indexed."""

    folder: str
    inventory: str
    samples: int
    classes: int
    shards: int
    blocks: int
    bytes: int
    seconds: float
    notes: list[str]


def pack_data(
    src: Path,
    out: Path,
    classes: Path | None = None,
    seed: int = 0,
    shard_size: int = 4096,
    block: int = 8192,
    limit: int | None = None,
    short_side: int | None = None,
    quiet: bool = False,
) -> PackReport:
    """`cskd.packing.pack.pack` with progress; arguments as there."""

    def make(progress: Callable[[int, int], None]) -> Inventory:
        return pack(
            src,
            out,
            classes=classes,
            seed=seed,
            shard_size=shard_size,
            block=block,
            limit=limit,
            short_side=short_side,
            progress=progress,
        )

    return _run("pack", make, out, quiet)


def index_data(shards: Path, classes: Path | None = None, block: int = 8192, quiet: bool = False) -> PackReport:
    """`cskd.packing.index.index` with progress; arguments as there."""
    return _run("index", lambda p: index(shards, classes=classes, block=block, progress=p), shards, quiet)


def render(report: PackReport, console: Console) -> None:
    """The report for people."""
    rate = report.samples / report.seconds if report.seconds else 0.0
    console.print(
        f"{escape(printable(report.folder))}: {report.samples:,} images of {report.classes} classes in {report.shards} shards "
        f"({report.blocks} blocks, {report.bytes / 1e6:.1f} MB), {report.seconds:.1f} s ({rate:,.0f} images/s)",
        soft_wrap=True,
    )
    console.print(f"inventory {report.inventory}", soft_wrap=True)
    for note in report.notes:
        console.print(escape(printable(note)), soft_wrap=True)


def _run(what: str, make: Callable[[Callable[[int, int], None]], Inventory], folder: Path, quiet: bool) -> PackReport:
    start = time.perf_counter()
    with Progress(what, 0, quiet=quiet) as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        inventory = make(show)
    return PackReport(
        folder=str(folder),
        inventory=inventory.id,
        samples=len(inventory),
        classes=len(inventory.classes),
        shards=len(inventory.shards),
        blocks=len(inventory.blocks) - 1,
        bytes=sum(shard.bytes for shard in inventory.shards),
        seconds=time.perf_counter() - start,
        notes=inventory.notes,
    )
