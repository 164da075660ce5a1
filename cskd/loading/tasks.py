"""The whole run as one lazy list of tasks: every step of every epoch, evaluation after an epoch, tables built ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from cskd.files.scratch import refuse_small
from cskd.files.shared_folder import SharedFolder
from cskd.loading.epoch_table import build_table, table_bounds
from cskd.loading.plan import PlanSpec, batch_part, epoch_plan
from cskd.loading.sources import TargetSpec, ViewSource
from cskd.loading.stage2 import EvalTask, TrainTask


@dataclass(frozen=True)
class Stretch:
    """Steps first .. stop-1 of an epoch, which share one epoch table."""

    epoch: int
    first: int
    stop: int


class RunTasks:
    """One rank's tasks from step `start` to the end, in the order the training loop consumes results.

    targets: epoch -> which targets to read. evaluate: epoch -> evaluation tasks that follow it. scratch: for the tables,
    removed by the last one that leaves it; where successive ranks share it, its tables hold the rows of all of them. ahead: how many results may be under way. The table after the one in use is built in a thread; one that
    no result can need any more is deleted once `ahead` tasks were drawn past it, or by `retire`. Where epochs are longer than
    that, tables of at most two are on the disk.
    """

    def __init__(
        self,
        source: ViewSource,
        plan: PlanSpec,
        targets: Callable[[int], TargetSpec],
        evaluate: Callable[[int], list[EvalTask]],
        scratch: Path | SharedFolder,
        start: int,
        stop: int,
        rank: int = 0,
        ahead: int | None = None,
    ) -> None:
        self.source, self.plan, self.targets, self.evaluate = source, plan, targets, evaluate
        self.scratch = scratch if isinstance(scratch, SharedFolder) else SharedFolder(scratch)
        self.start, self.stop, self.rank = start, stop, rank
        here = rank - self.scratch.number  # the first of the ranks that share the tables
        self.ours = self._rows(here)[0], self._rows(here + self.scratch.count - 1)[1]  # of every batch
        self.read_seconds = 0.0  # spent in reading the cache and building tables
        self.ahead = ahead
        self._pool, self._ended = ThreadPoolExecutor(1, "epoch-table"), Event()

    def __enter__(self) -> RunTasks:
        return self

    def __exit__(self, *error: object) -> None:
        # Here and not in the generator: a garbage collector may close that one in the very thread it would wait for.
        self._ended.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.scratch.leave()

    def __iter__(self) -> Iterator[TrainTask | EvalTask]:
        every, (first, stop) = self._every, self._rows(self.rank)
        stretches = self._stretches()
        coming: Future[tuple[Stretch, Path] | None] | None = self._pool.submit(next, stretches, None)
        drawn, consumed = 0, deque[tuple[int, Path]]()  # tables, and how many tasks were drawn when their last one was
        while coming is not None and (ready := coming.result()) is not None:
            (stretch, table), coming = ready, None
            for step in range(stretch.first, stretch.stop):
                drawn += 1
                while self.ahead is not None and consumed and drawn > consumed[0][0] + self.ahead:
                    self.scratch.discard(consumed.popleft()[1])
                if coming is None and self._room_for(stretch):
                    coming = self._pool.submit(next, stretches, None)
                at = (step - stretch.first) * every - self.ours[0]
                yield TrainTask(table, at + first, at + stop)
            consumed.append((drawn, table))
            coming = coming or self._pool.submit(next, stretches, None)
            if stretch.stop == self._end(stretch.epoch):
                yield from self.evaluate(stretch.epoch)

    def _rows(self, rank: int) -> tuple[int, int]:
        """Which rows of every batch are a rank's."""
        share = self.plan.share(rank)
        return share.start, share.start + share.rows

    @property
    def _every(self) -> int:
        """Rows of a step in the tables."""
        return self.ours[1] - self.ours[0]

    def _room_for(self, stretch: Stretch) -> bool:
        """Whether the table after this stretch may be built: one of the next epoch has to wait for that of the last one to go.

        It does not where all of an epoch may be under way, since what is waited for may be what is waiting.
        """
        last = stretch.stop == self._end(stretch.epoch)
        waits = last and self.ahead is not None and self.plan.steps > 2 * self.ahead
        return not waits or not self._folder(stretch.epoch - 1).exists()

    def _stretches(self) -> Iterator[tuple[Stretch, Path]]:
        """Build one table after the other, as they are asked for."""
        steps, every = self.plan.steps, self._every
        for epoch in range(self.start // steps, -(-self.stop // steps)):
            ours = batch_part(epoch_plan(self.plan, epoch), self.plan.global_batch, *self.ours)
            begin = (self.start - epoch * steps) * every if epoch == self.start // steps else None
            for first, stop in table_bounds(ours, self.targets(epoch), every, begin, self._end(epoch) * every):
                stretch = Stretch(epoch, first // every, stop // every)
                folder = self._folder(epoch) / f"{stretch.first:07d}"
                clock = time.perf_counter()
                table = build_table(
                    self.source, ours, self.targets(epoch), first, stop, folder, self._ended, self.scratch
                )
                self.read_seconds += time.perf_counter() - clock
                if begin == first:
                    longest = max(b - a for a, b in table_bounds(ours, self.targets(epoch), every))
                    self._refuse_small(table, stop - first, longest)
                yield stretch, table

    def _refuse_small(self, table: Path, rows: int, longest: int) -> None:
        """CacheError where this disk has no room for the tables to come, by the size of the run's first one.

        Three may be there at once, the one in use, the one before it and the one after it, but not those of three epochs.
        """
        every = self._every
        left = (self.stop - self.start) * every - rows
        most = min(3 * longest, 2 * self.plan.steps * every, left)
        size = sum(path.stat().st_size for path in table.iterdir()) / max(1, rows) * most
        refuse_small(table, size, "the tables of the targets to come")

    def _end(self, epoch: int) -> int:
        """How many steps of an epoch the run has."""
        return min(self.plan.steps, self.stop - epoch * self.plan.steps)

    def _folder(self, epoch: int) -> Path:
        return self.scratch.path / f"epoch{epoch:05d}"

    def retire(self, epoch: int) -> None:
        """Delete the tables of an epoch whose results have all been consumed."""
        for table in self._folder(epoch).glob("[0-9]*"):
            self.scratch.discard(table)
