"""A data set into shards with an inventory (`cskd pack`), or an inventory for shards that exist (`cskd index`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from cskd.dataset.inventory import Inventory
from cskd.packing.index import index
from cskd.packing.pack import pack
from cskd.pipeline.show.progress import Notes, Progress, print_lines, say


@dataclass(frozen=True)
class PackReport:
    """What was packed or indexed."""

    folder: str
    inventory: str
    samples: int
    classes: int
    classes_with_images: int
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
    raw: bool = False,
    split: str | None = None,
    labels: Path | None = None,
    quiet: bool = False,
) -> PackReport:
    """`cskd.packing.pack.pack` with progress; arguments as there."""
    start, notes = time.perf_counter(), Notes(quiet)

    def tell(lines: list[str]) -> None:
        notes.add(lines)
        notes.say()

    with ExitStack() as stack:
        shown = stack.enter_context(Progress("list", 0, quiet=quiet))

        def show(done: int, total: int) -> None:
            nonlocal shown
            if total and shown.what == "list":
                stack.close()
                shown = stack.enter_context(Progress("pack", total, quiet=quiet))
            shown.update(done)

        inventory = pack(
            src,
            out,
            classes=classes,
            seed=seed,
            shard_size=shard_size,
            block=block,
            limit=limit,
            short_side=short_side,
            raw=raw,
            split=split,
            labels=labels,
            progress=show,
            tell=tell,
        )
    tell(inventory.notes)
    return _report(inventory, start)


def index_data(
    shards: Path | Sequence[Path],
    out: Path | None = None,
    classes: Path | None = None,
    block: int = 8192,
    split: str | None = None,
    label_key: str | None = None,
    key_prefix: str | None = None,
    allow_incomplete: bool = False,
    quiet: bool = False,
) -> PackReport:
    """`cskd.packing.index.index` with progress; arguments as there."""
    start = time.perf_counter()
    with Progress("index", 0, quiet=quiet) as shown:

        def show(images: int, done: int, total: int) -> None:
            shown.update(images, shards=f"{done} of {total}")

        inventory = index(
            shards,
            out=out,
            classes=classes,
            block=block,
            allow_incomplete=allow_incomplete,
            split=split,
            label_key=label_key,
            key_prefix=key_prefix,
            progress=show,
        )
    say(inventory.notes, quiet)
    return _report(inventory, start, out)


def render(report: PackReport, console: Console) -> None:
    """The report for people."""
    rate = report.samples / report.seconds if report.seconds else 0.0
    held, classes = report.classes_with_images, report.classes
    print_lines(
        console,
        f"{report.folder}: {report.samples:,} images of {classes if held == classes else f'{held} of {classes}'} classes in "
        f"{report.shards} shards ({report.blocks} blocks, {report.bytes / 1e6:.1f} MB), {report.seconds:.1f} s "
        f"({rate:,.0f} images/s)",
        f"inventory {report.inventory}",
    )


def _report(inventory: Inventory, start: float, out: Path | None = None) -> PackReport:
    return PackReport(
        folder=str(out or inventory.root),
        inventory=inventory.id,
        samples=len(inventory),
        classes=len(inventory.classes),
        classes_with_images=len(np.unique(inventory.label)),
        shards=len(inventory.shards),
        blocks=len(inventory.blocks) - 1,
        bytes=sum(shard.bytes for shard in inventory.shards),
        seconds=time.perf_counter() - start,
        notes=inventory.notes,
    )
