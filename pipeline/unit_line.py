"""Stage 1 from chunks to commits: what is missing is claimed, batches go through the lanes, whole passes to the writer.

tasks    the missing passes that no other process is at, claimed one by one, as chunks for the workers
feed     a chunk's views, each a batch for a lane: mix, teacher, encode
collect  results, in order; the last one of a pass sends it to the writer
commit   in the writer: one commit a view, then the claim is given back
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.codecs import Arrays
from cskd.config import Config
from cskd.files.claims import Claims
from cskd.loading.feed import DeviceBatch
from cskd.loading.stage1 import Chunk, ChunkViews, chunks
from cskd.machine.side_stream import to_device
from cskd.machine.threads import Threads
from cskd.pipeline.show.progress import Pool
from cskd.store.cache import Cache
from cskd.store.seal import refuse_too_many
from cskd.store.unit_builder import UnitBuilder
from cskd.teacher.lanes import Lanes
from cskd.teacher.model import Teacher
from cskd.views.mix_pixels import mix_pixels
from cskd.views.mixing import quads


@contextlib.contextmanager
def unit_line(cache: Cache, teacher: Teacher, config: Config, threads: Threads) -> Iterator[UnitLine]:
    """A line with its claims and threads; at the end what they are at is waited for, and what still waits is dropped."""
    writers = writers_of(threads.share)
    writer = ThreadPoolExecutor(writers, "write")
    with Claims(cache.root) as claims, contextlib.ExitStack() as stack:
        stack.callback(writer.shutdown, cancel_futures=True)
        lanes = stack.enter_context(Lanes(teacher.device, teacher.reentrant))
        yield UnitLine(cache, teacher, config, threads.workers, claims, lanes, writer, writers)


def writers_of(cores: int) -> int:
    """Threads that compress and commit, each a pass at a time. One keeps up with a CPU's teacher; a GPU's fills several with
    whole maps, which are a hundred times as large as envelopes."""
    return max(1, min(4, cores // 4))


def missing_passes(cache: Cache) -> list[tuple[int, tuple[int, ...]]]:
    """(block, views) of each pass: the missing views of one mixing group of one block, made from one decoding."""
    by_pass: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for block, view in cache.missing():
        by_pass[view // cache.recipe.mix_group, block].append(view)
    return [(block, tuple(views)) for (_, block), views in sorted(by_pass.items())]


def views_left(cache: Cache) -> int:
    """Views that have no unit yet."""
    sizes = np.diff(cache.inventory.blocks)
    return sum(int(sizes[block]) for block, _ in cache.missing())


@dataclass
class _Pass:
    """The units of one pass: the missing views of one mixing group of one block, made from one decoding of its images."""

    block: int
    first: int  # the block's first sample
    order: NDArray[np.int64]  # of the block's positions, as their quads come
    units: list[UnitBuilder]
    views: tuple[int, ...]
    quarantine: dict[int, str] = field(default_factory=dict)  # position -> reason
    begun: int = 0  # rows handed to the teacher, in every view
    rows: int = 0  # rows whose targets are in, summed over the views

    @property
    def all_begun(self) -> bool:
        return self.begun == len(self.order)

    @property
    def complete(self) -> bool:
        return self.rows == len(self.order) * len(self.views)


@dataclass(frozen=True)
class _Encoding:
    """One view of a chunk, under way in a lane; position int64 and crc int64 of its good rows."""

    work: _Pass
    claim: Path
    unit: UnitBuilder
    rows: int  # bad ones included
    position: NDArray[np.int64]
    crc: NDArray[np.int64]
    targets: Future[tuple[dict[str, Arrays], float, float]]


class UnitLine:
    """From chunks to commits: batches are with the lanes, whole passes with the writer, and results are taken in order."""

    def __init__(
        self,
        cache: Cache,
        teacher: Teacher,
        config: Config,
        workers: int,
        claims: Claims,
        lanes: Lanes,
        writer: ThreadPoolExecutor,
        writers: int,
    ) -> None:
        self.images = self.units = 0  # whose targets are in, and committed
        self.unreadable = 0  # of the images
        self._first_chunk = self._last_commit = 0.0  # when it came, when it was done
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of each part, summed over all who do it
        self._cache, self._teacher, self._config, self._workers = cache, teacher, config, workers
        self._claims, self._lanes, self._writer, self._writers = claims, lanes, writer, writers
        self._claimed: deque[tuple[_Pass, Path]] = deque()  # passes whose chunks are still to come
        self._underway: deque[_Encoding] = deque()
        self._writing: deque[Future[tuple[int, float]]] = deque()

    @property
    def seconds(self) -> float:
        """From the first chunk of views to the last commit."""
        return max(0.0, self._last_commit - self._first_chunk)

    @property
    def pools(self) -> list[Pool]:
        """Who did what for how long."""
        return [
            Pool.of(max(1, self._workers), self._seconds, "decode", "augment"),
            Pool.of(self._lanes.count, self._seconds, "teacher", "encode"),
            Pool.of(self._writers, self._seconds, "write"),
        ]

    def tasks(self, passes: list[tuple[int, tuple[int, ...]]]) -> Iterator[Chunk]:
        """The tasks of every pass that no other process is at, each claimed when its first one is drawn: while those before
        it run."""
        cache, group = self._cache, self._cache.recipe.mix_group
        for block, views in passes:
            claim = self._claims.take(f"b{block:05d}.g{views[0] // group:04d}")
            if claim is None:
                continue
            views = tuple(v for v in views if cache.commit_of(block, v) is None)  # others may have made some since
            if not views:
                self._claims.release([claim])
                continue
            first, stop = cache.inventory.block_range(block)
            order = quads(stop - first, cache.recipe, cache.inventory.id, block, views[0] // group)
            units = [UnitBuilder(cache.inventory, cache.recipe, cache.codecs, v, first, order) for v in views]
            self._claimed.append((_Pass(block, first, order, units, views), claim))
            yield from chunks(block, views, first, order, self._teacher.batch)

    def feed(self, chunk: ChunkViews) -> None:
        """Begin the views of a chunk; returns when there is room for another. Raises what went wrong since the last call."""
        self._first_chunk = self._first_chunk or time.perf_counter()
        work, claim = self._claimed[0]
        self._seconds["decode"] += chunk.decode_seconds
        self._seconds["augment"] += chunk.augment_seconds
        position = chunk.task.position
        bad = {int(position[row]): reason for row, reason in chunk.bad.items()}
        work.quarantine |= bad
        refuse_too_many(
            work.quarantine, len(work.order), self._cache.inventory, work.first, self._config.cache.max_quarantine
        )
        good = np.array([row for row in range(len(position)) if row not in chunk.bad], np.int64)
        for v, unit in enumerate(work.units):
            unit.drop(np.array(list(bad), np.int64))
            mixing = tuple(torch.from_numpy(field) for field in unit.mixing_rows(position))
            targets = self._lanes.submit(self._targets, chunk, v, mixing, good)
            crc = chunk.crc[v][good]
            self._underway.append(_Encoding(work, claim, unit, len(position), position[good], crc, targets))
        work.begun += len(position)
        if work.all_begun:
            self._claimed.popleft()
        while len(self._underway) > self._lanes.room:
            self._collect()
        while self._writing and (self._writing[0].done() or len(self._writing) > self._writers):
            self._committed()

    def drain(self) -> None:
        """Wait for all that was begun, and its commits."""
        while self._underway:
            self._collect()
        while self._writing:
            self._committed()

    def _targets(
        self, chunk: ChunkViews, view: int, mixing: tuple[torch.Tensor, ...], good: NDArray[np.int64]
    ) -> tuple[dict[str, Arrays], float, float]:
        """In a lane: mix a view of a chunk as the student's input is mixed, run the teacher on it, padded to a fixed size, and
        encode the rows `good`.

        Returns: arrays by codec, and the seconds of teacher and encoding.
        """
        if len(good) == 0:
            dense_BKhw, global_BK = (torch.zeros(0, self._teacher.classes, *grid) for grid in (self._teacher.grid, ()))
            return {name: codec.encode(dense_BKhw, global_BK) for name, codec in self._cache.codecs.items()}, 0.0, 0.0
        begun, device = time.perf_counter(), self._teacher.device
        if isinstance(chunk.batch, DeviceBatch):
            chunk.batch.enter()
        inputs = [to_device(t, device) for t in (chunk.pixels[view], *mixing)]
        keep = to_device(torch.from_numpy(good), device)
        with self._lanes.launching():
            pixels = mix_pixels(*inputs)
            dense_BKhw, global_BK = self._teacher.in_batches(pixels)
            if len(good) < len(dense_BKhw):
                dense_BKhw, global_BK = dense_BKhw[keep], global_BK[keep]
        middle = time.perf_counter()
        encoded = {name: codec.encode(dense_BKhw, global_BK) for name, codec in self._cache.codecs.items()}
        return encoded, middle - begun, time.perf_counter() - middle

    def _collect(self) -> None:
        """Take the oldest batch's targets; the last one of a pass sends it to the writer."""
        batch = self._underway.popleft()
        encoded, forward, encode = batch.targets.result()
        batch.unit.add(batch.position, batch.crc, encoded)
        batch.work.rows += batch.rows
        self.images += batch.rows
        self.unreadable += batch.rows - len(batch.position)
        self._seconds["teacher"] += forward
        self._seconds["encode"] += encode
        if batch.work.complete:
            self._writing.append(self._writer.submit(self._commit, batch.work, batch.claim))

    def _commit(self, work: _Pass, claim: Path) -> tuple[int, float]:
        """In the writer: one commit a view, then the claim is given back. Returns units and seconds."""
        clock = time.perf_counter()
        for view, unit in zip(work.views, work.units, strict=True):
            self._cache.add_unit(work.block, view, *unit.finish(), work.quarantine)
        self._claims.release([claim])
        return len(work.views), time.perf_counter() - clock

    def _committed(self) -> None:
        units, seconds = self._writing.popleft().result()
        self.units += units
        self._seconds["write"] += seconds
        self._last_commit = time.perf_counter()
