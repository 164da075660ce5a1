"""Read and decode every image of a packed or indexed data set, before stage 1 is begun: `cskd verify DATA --images`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from cskd.dataset.images import decode
from cskd.dataset.inventory import Inventory, open_inventory
from cskd.dataset.inventory_format import HEADER, INVENTORY_FOLDER
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import DataError, ImageError, PathError, ReadError, counted
from cskd.files.folders import kind_of
from cskd.files.paths import is_remote, location_text
from cskd.machine.cores import usable_cores
from cskd.pipeline.show.progress import Progress, print_lines
from cskd.storage import open_storage
from cskd.store.format import MANIFEST, MANIFEST_COPY

CHUNK = 32  # images per task of a thread
MOST_FAILURES = 5  # reads of one shard that fail, each after three tries, before the rest of it is passed over


@dataclass(frozen=True)
class BadImage:
    """An image that stage 1 would quarantine, or can't read at all."""

    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class ImagesReport:
    """`lost`: one line for each shard that is not there as recorded; `read`: images that were looked at; `unread`: images of
    shards that are lost or whose reading failed."""

    data: str
    inventory: str
    images: int
    read: int
    unread: int
    lost: list[str]
    bad: list[BadImage]

    @property
    def sound(self) -> bool:
        return not (self.lost or self.bad or self.unread)


def is_data(path: Path, images: bool = False) -> bool:
    """Whether a path, or an address, is a folder of packed or indexed data, not a cache. images: they are asked for, so that a folder which is
    neither is taken for data, too."""
    if is_remote(path):
        storage = open_storage(path, "CACHE")
        if storage.stat(MANIFEST) is not None or storage.stat(MANIFEST_COPY) is not None:
            return False
        return images or any(storage.stat(name) is not None for name in (f"{INVENTORY_FOLDER}/{HEADER}", HEADER))
    return (kind := kind_of(path)) in ("data", "inventory") or (images and kind is None)


def verify_images(
    data: Path, images: bool = True, shards: Path | None = None, others: bool = False, quiet: bool = False
) -> ImagesReport:
    """Decode every image of a data folder, or of one at an address, in as many threads as there are cores.

    Args:    shards: folder of the image shards, where they have moved. images, others: what the command was asked for, of which
             a data folder has the images only.
    Raises:  PathError for another wish; DataError where the inventory, or all shards, can't be read.
    """
    place = location_text(str(data), "DATA")
    if not images or others:
        raise PathError(
            f"{place} is a packed data set, not a cache; 'cskd verify {place} --images' decodes its images, --replay and "
            "--recompute need a cache"
        )
    inventory = open_inventory(data, data=shards, verify=True)
    lost = inventory.lost_shards()
    if len(lost) == len(inventory.shards):
        inventory.check_shards()
    bad, failures, read = [], [0] * len(inventory.shards), 0
    rows = np.flatnonzero(~np.isin(inventory.shard, list(lost)))
    with Progress("images", len(rows), quiet=quiet) as progress:
        for done, chunk in _checked(inventory, rows, failures):
            for i, reason in chunk:
                shard = inventory.where(int(inventory.shard[i]))
                bad.append(BadImage(inventory.key(i), shard, reason))
            read = done
            progress.update(done, bad=str(len(bad)))
    given_up = sum(max(0, n - MOST_FAILURES) for n in failures)
    return ImagesReport(
        place, inventory.id, inventory.n, read - given_up, inventory.n - read + given_up, list(lost.values()), bad
    )


def _checked(
    inventory: Inventory, rows: np.ndarray[tuple[int], np.dtype[np.intp]], failures: list[int]
) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """How many images are done, and those of a chunk that are bad with the reason, in the order of the inventory."""
    reader, workers = ShardReader(inventory, whole=True, fresh=True), max(1, usable_cores().count)
    waiting: deque[tuple[int, Future[list[tuple[int, str]]]]] = deque()

    def check(chunk: list[int]) -> list[tuple[int, str]]:
        return [(i, reason) for i in chunk if (reason := _reason(reader, i, failures))]

    pool = ThreadPoolExecutor(workers, "decode")
    done = 0
    try:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK].tolist()
            waiting.append((len(chunk), pool.submit(check, chunk)))
            while len(waiting) > 2 * workers or (waiting and start + CHUNK >= len(rows)):
                size, result = waiting.popleft()
                done += size
                yield done, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _reason(reader: ShardReader, i: int, failures: list[int]) -> str:
    """What is wrong with an image; empty where nothing is, or its shard was given up."""
    shard = int(reader.inventory.shard[i])
    if failures[shard] >= MOST_FAILURES:
        failures[shard] += 1
        return ""
    try:
        decode(reader.read(i))
    except ReadError as e:
        failures[shard] += 1
        return str(e)
    except (ImageError, DataError) as e:
        return str(e)
    return ""


def render(report: ImagesReport, console: Console) -> None:
    """The report for people: every bad image in a line of its own, so that a pager or grep can have it."""
    lines = [*report.lost, *(f"{one.key} in {one.shard}: {one.reason}" for one in report.bad)]
    what = "all images decode" if report.sound else f"{counted(len(report.bad), 'bad image')}"
    if report.lost or report.unread:
        what += f", {counted(len(report.lost), 'lost shard')}, {report.unread:,} images not read"
    cure = "" if report.sound else "; replace or take out the bad ones, else stage 1 quarantines them"
    print_lines(console, *lines, f"{report.data}: {report.read:,} of {report.images:,} images read, {what}{cure}")
