"""Stage 1 from chunks to commits: what is missing is claimed, batches go through the lanes, whole passes to the writer.

tasks    the missing passes that no other process is at, claimed one by one, as chunks for the workers
feed     a chunk's views, each a batch for a lane: mix, teacher, encode
collect  results, in order; the last one of a pass sends it to the writer
save     what is in of a pass that takes long, every `cache.save_seconds`, and where it is interrupted: drafts
look     where there are no claims, after each part of a pass: one that another process has committed is given up
commit   in the writer: one commit per view, then the claim is given back
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.config import Config
from cskd.files.claims import Claims, NoClaims
from cskd.loading.stage1 import Chunk, ChunkViews, chunks
from cskd.machine.launch import Worker
from cskd.machine.threads import Threads
from cskd.pipeline.encoding import Encoded, encoded_view
from cskd.pipeline.passes import LOOKS, Passes, Walk, has_claims, missing_passes
from cskd.pipeline.show.progress import Pool, duration, say
from cskd.store.cache import Cache
from cskd.store.commit import Commit
from cskd.store.draft import Rows, read_drafts, remove_drafts, write_draft
from cskd.store.seal import refuse_too_many
from cskd.store.unit_builder import UnitBuilder
from cskd.teacher.lanes import Lanes
from cskd.teacher.model import Teacher
from cskd.views.mixing import quads

PATIENCE = 600.0  # seconds that are waited at most for a pass of another process
WAIT = 1.5  # passes of this process; another one may be slower
UNKNOWN = 40.0  # seconds of a pass, where this process has made none yet
HELD = 4_000_000_000  # bytes of whole passes that writers have, or one pass; int8 maps of ImageNet: 1.3 GB a pass


@contextlib.contextmanager
def unit_line(
    cache: Cache,
    teacher: Teacher,
    config: Config,
    threads: Threads,
    quiet: bool = False,
    launch: Lock | None = None,
) -> Iterator[UnitLine]:
    """A line with its claims and threads. Where it is left by an exception, what the teacher is at is dropped, and what came
    before is written; after an interrupt a note says how much was dropped, unless quiet. launch: see `Lanes`."""
    writers, lost = writers_of(threads.share), ""
    writer = ThreadPoolExecutor(writers, "write")
    try:
        with Claims(cache.root) if has_claims(cache) else NoClaims() as claims, contextlib.ExitStack() as stack:
            stack.callback(writer.shutdown)
            lanes = stack.enter_context(Lanes(teacher.device, teacher.reentrant, launch))
            line = UnitLine(cache, teacher, config, threads.workers, claims, lanes, writer, writers)
            try:
                yield line
            except BaseException:
                lost = line.keep()
                raise
    except (KeyboardInterrupt, SystemExit):
        say([lost] if lost else [], quiet)
        raise


def writers_of(cores: int) -> int:
    """Threads that compress and commit, each a pass at a time. One keeps up with a CPU's teacher; a GPU's fills several with
    whole maps, which are a hundred times as large as envelopes."""
    return max(1, min(4, cores // 4))


@dataclass(eq=False)
class _Pass:
    """The units of one pass: the missing views of one mixing group of one block, made from one decoding of its images."""

    block: int
    first: int  # the block's first sample
    order: NDArray[np.int64]  # of the block's positions, as their quads come
    units: list[UnitBuilder]
    views: tuple[int, ...]
    claim: Path
    quarantine: dict[int, str] = field(default_factory=dict)  # position -> reason
    to_come: int = 0  # chunks
    came: dict[tuple[UnitBuilder, int], int] = field(
        default_factory=dict
    )  # unit, place of a batch -> rows whose targets are in
    draft: Future[_Written] | None = None  # the latest
    looks: int = 0  # that were begun
    look: Future[Commit | None] | None = None  # the latest: what another process has committed of it
    given_up: bool = False

    @property
    def rows(self) -> int:
        """Whose targets are in, summed over the views; a batch that an interrupt has count twice is there once."""
        return sum(self.came.values())

    @property
    def whole(self) -> int:
        """Rows of all of it."""
        return len(self.order) * len(self.views)

    @property
    def complete(self) -> bool:
        return self.rows == self.whole


class _Written(NamedTuple):
    """Of a call of a writer: units that it committed, passes or parts of them that another process had, and its time."""

    units: int
    twice: float
    seconds: float


@dataclass(frozen=True)
class _Encoding:
    """One view of a chunk, under way in a lane; position int64 and crc int64 of its good rows."""

    work: _Pass
    place: int
    unit: UnitBuilder
    rows: int  # bad ones included
    position: NDArray[np.int64]
    crc: NDArray[np.int64]
    targets: Future[Encoded]


class UnitLine:
    """From chunks to commits: batches are with the lanes, whole passes with the writer, and results are taken in order."""

    def __init__(
        self,
        cache: Cache,
        teacher: Teacher,
        config: Config,
        workers: int,
        claims: Claims | NoClaims,
        lanes: Lanes,
        writer: ThreadPoolExecutor,
        writers: int,
    ) -> None:
        self.images = self.units = 0  # whose targets are in, and committed
        self.unreadable = 0  # of the images
        self.met = False  # without claims: what another process makes was next
        self._walk: Walk | None = None
        self._asks_at = 0.0  # of time.monotonic(): not before, since it waits for other processes
        self.twice = 0.0  # passes, and parts of those given up, that another process had made meanwhile
        self.restored = 0  # views that a run before had made of passes it did not finish
        self._saved = time.monotonic()  # when the latest pass or draft was handed to a writer
        self._first_chunk = self._last_commit = 0.0  # when it came, when it was done
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of each part, summed over all who do it
        self._cache, self._teacher, self._config, self._workers = cache, teacher, config, workers
        self._claims, self._lanes, self._writer, self._writers = claims, lanes, writer, writers
        self._claimed: deque[_Pass] = deque()  # passes whose chunks are still to come
        self._asked: deque[Chunk] = deque()  # the chunks
        self._underway: deque[_Encoding] = deque()
        self._writing: deque[tuple[Future[_Written], int]] = deque()  # and the bytes of targets that it holds

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

    def missing(self, worker: Worker) -> Passes | None:
        """What is left to make, in this process's order: see `missing_passes`, `Walk`. None: others make it; ask after `patience`."""
        if has_claims(self._cache):
            return missing_passes(self._cache, worker.number)
        self.met, self._walk = False, self._walk or Walk(self._cache, worker)
        if self.patience() > 0:  # asked because of another teacher's line; what it waits for may just be begun
            return None
        self._walk.made = self.units / self._cache.recipe.mix_group
        passes = self._walk.following()
        if passes is None:
            self._asks_at = time.monotonic() + self._pass_seconds()
        return passes

    def patience(self) -> float:
        """Seconds that are left of the time in which another process makes a pass."""
        return max(0.0, self._asks_at - time.monotonic())

    def _pass_seconds(self) -> float:
        views = self._cache.inventory.n / self._cache.blocks * self._cache.recipe.mix_group
        one = self.seconds / self.images * views if self.images else UNKNOWN
        return min(PATIENCE, max(1.0, WAIT * one))

    def group_of(self, views: Sequence[int]) -> int:
        """The mixing group that the views of a pass are of."""
        return views[0] // self._cache.recipe.mix_group

    def tasks(self, passes: Passes) -> Iterator[Chunk]:
        """The tasks of every pass that no other process is at, each claimed when its first one is drawn: while those before
        it run."""
        cache, group = self._cache, self._cache.recipe.mix_group
        for block, views in passes:
            if self.met:
                return
            claim = self._claims.take(f"b{block:05d}.g{views[0] // group:04d}")
            if claim is None:
                continue
            left = tuple(v for v in views if cache.commit_of(block, v) is None)  # others may have made some since
            if left != views and not has_claims(cache):
                self.met = True
                return
            if not (views := left):
                self._claims.release([claim])
                continue
            first, stop = cache.inventory.block_range(block)
            order = quads(stop - first, cache.recipe, cache.inventory.id, block, views[0] // group)
            units = [UnitBuilder(cache.inventory, cache.recipe, cache.codecs, v, first, order) for v in views]
            work = _Pass(block, first, order, units, views, claim)
            todo = self._restored(work)
            work.to_come = len(todo)
            if work.complete:
                self._finish(work)
            else:
                self._claimed.append(work)
            for chunk in todo:
                self._asked.append(chunk)
                yield chunk

    def _restored(self, work: _Pass) -> list[Chunk]:
        """Go on from the drafts of a pass. Returns: its chunks that are still to be made."""
        batch, done = self._teacher.batch, dict[int, set[int]]()
        for view, unit in zip(work.views, work.units, strict=True):
            drafts, unreadable = read_drafts(self._cache, work.block, view, batch, work.order)
            done[view] = unit.restore(drafts)
            work.quarantine |= unreadable
            work.came |= {(unit, place): len(work.order[place : place + batch]) for place in done[view]}
        for unit in work.units:
            unit.drop(np.array(list(work.quarantine), np.int64))
        self.restored += work.rows
        return chunks(work.block, work.views, work.first, work.order, batch, done)

    def wants(self, chunk: Chunk) -> bool:
        """Whether a task of this line is still to be done: not of a pass that was given up."""
        return any(one is chunk for one in self._asked)

    def feed(self, chunk: ChunkViews) -> None:
        """Begin the views of a chunk that were asked for, and leave those of another teacher; returns when there is room for another.
        Raises what went wrong since the last call."""
        asked = self._asked[0] if self._asked else None
        same = asked is not None and (asked.block, asked.place) == (chunk.task.block, chunk.task.place)
        if asked is None or not same or not set(asked.views) <= set(chunk.task.views):
            return
        self._asked.popleft()
        self._first_chunk = self._first_chunk or time.perf_counter()
        work, place = self._claimed[0], chunk.task.place
        self._seconds["decode"] += chunk.decode_seconds
        self._seconds["augment"] += chunk.augment_seconds
        position = chunk.task.position
        bad = {int(position[row]): reason for row, reason in chunk.bad.items()}
        work.quarantine |= bad
        refuse_too_many(
            work.quarantine, len(work.order), self._cache.inventory, work.first, self._config.cache.max_quarantine
        )
        good = np.array([row for row, p in enumerate(position.tolist()) if p not in work.quarantine], np.int64)
        codecs = self._cache.codecs
        for view in asked.views:
            v = chunk.task.views.index(view)
            unit = work.units[work.views.index(view)]
            unit.drop(np.array(list(bad), np.int64))
            mixing = tuple(torch.from_numpy(field) for field in unit.mixing_rows(position))
            labels = torch.from_numpy(unit.label_rows(position[good]))
            targets = self._lanes.submit(
                encoded_view, self._teacher, codecs, self._lanes, chunk, v, mixing, good, labels
            )
            crc = chunk.crc[v][good]
            self._underway.append(_Encoding(work, place, unit, len(position), position[good], crc, targets))
        work.to_come -= 1
        if not work.to_come:
            self._claimed.popleft()
        while len(self._underway) > self._lanes.room:
            self._collect()
        while self._writing and (self._writing[0][0].done() or self._full()):
            self._committed()

    def _full(self) -> bool:
        """Whether the writers have as many passes as they may, or as many bytes of them."""
        held = [size for _, size in self._writing if size]
        return len(self._writing) > self._writers or (len(held) > 1 and sum(held) > HELD)

    def drain(self) -> None:
        """Wait for all that was begun, and its commits."""
        while self._underway:
            self._collect()
        while self._writing:
            self._committed()

    def keep(self) -> str:
        """After an interrupt or an error: have what is in written, without waiting. Returns: what is not in, in words."""
        with contextlib.suppress(Exception):  # of a lane or a writer; what ended the line is what a user should read
            while self._underway and self._underway[0].targets.done():
                self._collect()
        for work in {batch.work: None for batch in self._underway} | dict.fromkeys(self._claimed):
            self._save(work)
        if not self._first_chunk:
            return ""
        clock = time.perf_counter() - self._first_chunk
        lost = sum(batch.rows for batch in self._underway if not batch.work.given_up)
        seconds = f", about {duration(lost / (self.images / clock))} of work" if self.images else ""
        return f"interrupted: {lost:,} views that the teacher was at are lost{seconds}; those before them are kept"

    def _collect(self) -> None:
        """Take the oldest batch's targets; the last one of a pass sends it to the writer."""
        batch = self._underway[0]  # and taken away last: an interrupt may come at any line, and `keep` begins here
        encoded = batch.targets.result()
        if not batch.work.given_up:
            batch.unit.add(batch.position, batch.crc, encoded.targets, batch.place, encoded.errors)
            batch.work.came[batch.unit, batch.place] = batch.rows
        self.images += batch.rows
        self.unreadable += batch.rows - len(batch.position)
        self._seconds["teacher"] += encoded.teacher_seconds
        self._seconds["encode"] += encoded.encode_seconds
        if batch.work.given_up:
            pass
        elif batch.work.complete:
            self._finish(batch.work)
        elif not has_claims(self._cache):
            self._look(batch.work)
        elif time.monotonic() - self._saved >= self._config.cache.save_seconds:
            self._save(batch.work)
        self._underway.popleft()

    def _look(self, work: _Pass) -> None:
        """At the first batch of a pass, and after each part of it: has another process committed it? A writer asks the store, and
        what it found counts at a later batch."""
        if work.look is not None and work.look.done() and work.look.result() is not None:
            self._give_up()
        elif work.looks <= LOOKS * work.rows // work.whole:
            work.looks = LOOKS * work.rows // work.whole + 1
            work.look = self._writer.submit(self._cache.commit_of, work.block, work.views[0])

    def _give_up(self) -> None:
        """Drop all that was begun and is not complete: another process is here, and is ahead. Nothing of it was written."""
        self.met = True
        self._underway = deque(batch for batch in self._underway if not batch.targets.cancel())
        for work in {batch.work: None for batch in self._underway} | dict.fromkeys(self._claimed):
            work.given_up = True
            left = {(batch.unit, batch.place): batch.rows for batch in self._underway if batch.work is work}
            self.twice += sum((work.came | left).values()) / work.whole
        self._claimed.clear()
        self._asked.clear()

    def _finish(self, work: _Pass) -> None:
        """Send a pass that is complete to the writer."""
        self._writing.append((self._writer.submit(self._commit, work), sum(unit.nbytes for unit in work.units)))
        self._saved = time.monotonic()

    def _save(self, work: _Pass) -> None:
        """Send what is in of a pass, and in no draft yet, to the writer."""
        if not has_claims(self._cache):  # nor drafts: whoever makes the pass next can't know that this process does not
            return
        new = {view: rows for view, unit in zip(work.views, work.units, strict=True) if (rows := unit.unsaved())}
        if new:
            work.draft = self._writer.submit(self._write_drafts, work, new, dict(work.quarantine))
            self._writing.append((work.draft, 0))  # its rows are those of the pass
        self._saved = time.monotonic()

    def _write_drafts(self, work: _Pass, new: dict[int, list[Rows]], unreadable: dict[int, str]) -> _Written:
        """In the writer: a draft per view."""
        clock = time.perf_counter()
        for view, rows in new.items():
            write_draft(self._cache, work.block, view, self._teacher.batch, rows, unreadable)
        return _Written(0, 0.0, time.perf_counter() - clock)

    def _commit(self, work: _Pass) -> _Written:
        """In the writer: one commit per view, then the claim is given back."""
        if work.draft is not None:
            work.draft.exception()  # waits: another writer may be at it, and no draft may come after the commit
        clock, made = time.perf_counter(), 0
        for view, unit in zip(work.views, work.units, strict=True):
            if not has_claims(self._cache) and self._cache.commit_of(work.block, view) is not None:
                self.met = True
                continue
            self._cache.add_unit(work.block, view, *unit.finish(), work.quarantine, unit.errors)
            remove_drafts(self._cache, work.block, view)
            made += 1
        self._claims.release([work.claim])
        return _Written(made, 1 - made / len(work.views), time.perf_counter() - clock)

    def _committed(self) -> None:
        units, twice, seconds = self._writing.popleft()[0].result()
        self.units += units
        self.twice += twice
        self._seconds["write"] += seconds
        self._last_commit = time.perf_counter()
