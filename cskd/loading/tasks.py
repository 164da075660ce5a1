"""The whole run as one lazy list of tasks: every step of every epoch, evaluation after an epoch, tables built ahead."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from cskd.files.scratch import refuse_small
from cskd.loading.epoch_table import build_table, table_bounds
from cskd.loading.plan import PlanSpec, epoch_plan, rank_share
from cskd.loading.sources import TargetSpec, ViewSource
from cskd.loading.stage2 import EvalTask, TrainTask
from cskd.machine.launch import launched


@dataclass(frozen=True)
class Stretch:
    """Steps first .. stop-1 of an epoch, which share one epoch table."""

    epoch: int
    first: int
    stop: int


class RunTasks:
    """One rank's tasks from step `start` to the end, in the order the training loop consumes results.

    targets: epoch -> which targets to read. evaluate: epoch -> evaluation tasks that follow it. scratch: for the tables,
    removed at the end. ahead: how many results may be under way. The table after the one in use is built in a thread; one
    that no result can need any more is deleted once `ahead` tasks were drawn past it, or by `retire`.
    """

    def __init__(
        self,
        source: ViewSource,
        plan: PlanSpec,
        targets: Callable[[int], TargetSpec],
        evaluate: Callable[[int], list[EvalTask]],
        scratch: Path,
        start: int,
        stop: int,
        rank: int = 0,
        ahead: int | None = None,
    ) -> None:
        self.source, self.plan, self.targets, self.evaluate = source, plan, targets, evaluate
        self.scratch, self.start, self.stop, self.rank = scratch, start, stop, rank
        self.read_seconds = 0.0  # spent in reading the cache and building tables
        self.ahead = ahead
        self._pool, self._ended = ThreadPoolExecutor(1, "epoch-table"), Event()

    def __enter__(self) -> RunTasks:
        return self

    def __exit__(self, *error: object) -> None:
        # Here and not in the generator: a garbage collector may close that one in the very thread it would wait for.
        self._ended.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def __iter__(self) -> Iterator[TrainTask | EvalTask]:
        share = self.plan.share(self.rank).rows
        stretches = self._stretches()
        coming = self._pool.submit(next, stretches, None)
        drawn, consumed = 0, deque[tuple[int, Path]]()  # tables, and how many tasks were drawn when their last one was
        while (ready := coming.result()) is not None:
            stretch, table = ready
            coming = self._pool.submit(next, stretches, None)
            for step in range(stretch.first, stretch.stop):
                at = (step - stretch.first) * share
                drawn += 1
                while self.ahead is not None and consumed and drawn > consumed[0][0] + self.ahead:
                    shutil.rmtree(consumed.popleft()[1], ignore_errors=True)
                yield TrainTask(table, at, at + share)
            consumed.append((drawn, table))
            if stretch.stop == self._end(stretch.epoch):
                yield from self.evaluate(stretch.epoch)

    def _stretches(self) -> Iterator[tuple[Stretch, Path]]:
        """Build one table after the other, as they are asked for."""
        steps, share = self.plan.steps, self.plan.share(self.rank).rows
        for epoch in range(self.start // steps, -(-self.stop // steps)):
            mine = rank_share(epoch_plan(self.plan, epoch), self.plan.share(self.rank))
            begin = (self.start - epoch * steps) * share if epoch == self.start // steps else None
            for first, stop in table_bounds(mine, self.targets(epoch), share, begin, self._end(epoch) * share):
                stretch = Stretch(epoch, first // share, stop // share)
                folder = self._folder(epoch) / f"{stretch.first:07d}"
                clock = time.perf_counter()
                table = build_table(self.source, mine, self.targets(epoch), first, stop, folder, self._ended)
                self.read_seconds += time.perf_counter() - clock
                if begin == first:
                    longest = max(b - a for a, b in table_bounds(mine, self.targets(epoch), share))
                    self._refuse_small(table, stop - first, longest)
                yield stretch, table

    def _refuse_small(self, table: Path, rows: int, longest: int) -> None:
        """CacheError where this disk has no room for the tables to come, by the size of the run's first one.

        Three may be there at once: the one in use, the one before it and the one after it.
        """
        share = self.plan.share(self.rank).rows
        left = (self.stop - self.start) * share - rows
        size = sum(path.stat().st_size for path in table.iterdir()) / max(1, rows) * min(3 * longest, left)
        here = launched().local_count  # ranks that share the disk
        refuse_small(table, here * size, "the tables of the targets to come")

    def _end(self, epoch: int) -> int:
        """How many steps of an epoch the run has."""
        return min(self.plan.steps, self.stop - epoch * self.plan.steps)

    def _folder(self, epoch: int) -> Path:
        return self.scratch / f"rank{self.rank:03d}" / f"epoch{epoch:05d}"

    def retire(self, epoch: int) -> None:
        """Delete the tables of an epoch whose results have all been consumed."""
        shutil.rmtree(self._folder(epoch), ignore_errors=True)
