"""Shards of an object store that are copied to this machine before a worker asks for them, in the order of the plan.

`ahead` hands tasks on as they are drawn and copies, in threads, the shards that the next ones read: as far ahead as half of the
node cache allows, so that those in use are not evicted for those to come. On a machine with several ranks the first one does it
for all. Local data sets are handed on as they are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from cskd.dataset.inventory import Inventory
from cskd.errors import CskdError
from cskd.loading.plan import PlanSpec, epoch_plan
from cskd.loading.stage1 import Chunk
from cskd.machine.launch import launched
from cskd.storage.node_cache import GB, Held

T = TypeVar("T")
AT_ONCE = 4  # shards that are copied at the same time


class Need(NamedTuple):
    """A shard, and the place in the order of tasks from which on it is read."""

    place: int
    inventory: Inventory
    shard: int


def ahead(
    tasks: Iterable[T], needs: Iterable[Need], place: Callable[[T], int] | None = None, most: int | None = None
) -> Iterator[T]:
    """The tasks, while the shards that they will read are copied.

    Args:    needs: in the order of the tasks; only those of remote inventories count. place: of a task, in the numbers of `needs`;
             by default how many tasks were drawn before it. most: how many places ahead a shard is copied at most.
    """
    if launched().local:
        yield from tasks
        return
    copier = _Copier(needs, most)
    try:
        for drawn, task in enumerate(tasks):
            copier.reach(drawn if place is None else place(task))
            yield task
    finally:
        copier.close()


class _Copier:
    def __init__(self, needs: Iterable[Need], most: int | None) -> None:
        self._needs, self._most = iter(needs), most
        self._at, self._ended = 0, False
        self._change = threading.Condition()
        self._ahead: list[tuple[int, int]] = []  # place and bytes of what is copied for tasks that were not drawn yet
        self._held: list[tuple[int, Held]] = []
        self._thread = threading.Thread(target=self._run, name="shards ahead", daemon=True)
        self._thread.start()

    def reach(self, place: int) -> None:
        """The task of that place was drawn: a worker reads its shards from now on."""
        with self._change:
            self._at = place
            self._ahead = [(at, size) for at, size in self._ahead if at > place]
            self._held, done = (
                [one for one in self._held if one[0] > place],
                [one for one in self._held if one[0] <= place],
            )
            self._change.notify_all()
        for _, held in done:
            held.close()

    def close(self) -> None:
        """Copy no more. Waits for nothing: a garbage collector may call it in one of the threads here."""
        with self._change:
            self._ended = True
            self._change.notify_all()
        for _, held in self._held:
            held.close()

    def _run(self) -> None:
        # Where the disk or the plan fails: whoever reads or draws meets the same, and says so.
        with contextlib.suppress(CskdError, OSError), ThreadPoolExecutor(AT_ONCE, "shard") as pool:
            for need in self._needs:
                remote, size = need.inventory.remote, need.inventory.shards[need.shard].bytes
                if remote is None:
                    continue
                if not self._wait(need, size, remote.node.room() // 2):
                    return
                pool.submit(self._copy, need)

    def _wait(self, need: Need, size: int, room: int) -> bool:
        """Wait until a shard is so near, and so much was used, that it is its turn; False at the end."""

        def turn() -> bool:
            waiting = sum(bytes_ for _, bytes_ in self._ahead)
            near = self._most is None or need.place <= self._at + self._most
            return self._ended or (near and (not waiting or waiting + size <= room))

        with self._change:
            self._change.wait_for(turn)
            if need.place > self._at:
                self._ahead.append((need.place, size))
            return not self._ended

    def _copy(self, need: Need) -> None:
        assert need.inventory.remote is not None
        try:
            held = need.inventory.remote.copy(need.inventory, need.shard, lambda: self._ended)
        except (CskdError, OSError):
            return  # the worker that reads it meets the same, and says so
        with self._change:
            if need.place > self._at and not self._ended:
                self._held.append((need.place, held))
                return
        held.close()


def shards_of_passes(
    inventory: Inventory, passes: Sequence[tuple[int, tuple[int, ...]]], chunks: Iterable[Chunk], group: int
) -> Iterator[Chunk]:
    """The chunks of some passes of stage 1, see `ahead`, while the shards of the next pass are copied; more would be for nothing
    where another machine takes those passes. group: views of one."""
    place = {(block, views[0] // group): n for n, (block, views) in enumerate(passes)}

    def needs() -> Iterator[Need]:
        for n, (block, _) in enumerate(passes if inventory.remote else ()):
            first, stop = inventory.block_range(block)
            for shard in range(int(inventory.shard[first]), int(inventory.shard[stop - 1]) + 1):
                yield Need(n, inventory, shard)

    return ahead(chunks, needs(), lambda chunk: place[chunk.block, chunk.views[0] // group], 1)


def all_needs(inventory: Inventory, tasks: int) -> Iterator[Need]:
    """What so many tasks read that take all samples in order."""
    for shard in range(len(inventory.shards) if inventory.remote else 0):
        yield Need(shard * tasks // len(inventory.shards), inventory, shard)


def training_needs(
    inventory: Inventory, plan: PlanSpec, start: int, stop: int, val: Callable[[int], tuple[Inventory, int] | None]
) -> Iterator[Need]:
    """What steps start .. stop-1 of a run read, in order; place: tasks of one rank before that.

    val: epoch -> the images of the evaluation that follows it, and in how many tasks.
    """
    place = 0
    for epoch in range(start // plan.steps, -(-stop // plan.steps)):
        first, last = max(start - epoch * plan.steps, 0), min(stop - epoch * plan.steps, plan.steps)
        if inventory.remote is not None:
            samples = epoch_plan(plan, epoch).sample[first * plan.global_batch : last * plan.global_batch]
            shards, at = np.unique(inventory.shard[samples], return_index=True)
            for i in np.argsort(at).tolist():
                yield Need(place + int(at[i]) // plan.global_batch, inventory, int(shards[i]))
        place += last - first
        if (evaluated := val(epoch)) is not None:
            images, tasks = evaluated
            yield from (need._replace(place=place + need.place) for need in all_needs(images, tasks))
            place += tasks


def window_note(inventory: Inventory, plan: PlanSpec) -> list[str]:
    """What a user should know where the node cache is smaller than what an epoch reads at the same time."""
    if inventory.remote is None:
        return []
    sizes = np.array([shard.bytes for shard in inventory.shards])
    first = inventory.shard[plan.bounds[:-1]]
    blocks = np.add.reduceat(sizes, first)
    need, room = int(np.sort(blocks)[-plan.window :].sum()), inventory.remote.node.room()
    if need <= room // 2:
        return []
    return [
        f"data.node_cache_gb is {room / GB:.3g}, and train.window {plan.window} reads from {need / GB:.3g} GB of shards at once: they "
        f"are fetched again and again; set {2 * need / GB:.3g} or more, or a smaller window"
    ]
