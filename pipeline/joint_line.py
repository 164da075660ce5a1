"""Stage 1 of several teachers in one pass: each view is decoded and augmented once, and goes to the line of each teacher that lacks it.

What a line gets are the chunks that it would have made itself, in its own order: so its cache is, to the byte, the one that a run
of its own makes. A teacher that is ahead has nothing to do in a pass, and waits for the others.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cskd.config import Config, to_dict
from cskd.dataset.inventory import Inventory
from cskd.errors import ConfigError, shortened
from cskd.loading.stage1 import Chunk, ChunkViews
from cskd.machine.launch import Worker
from cskd.pipeline.unit_line import UnitLine
from cskd.store.cache import first_difference

Passes = list[dict[int, tuple[int, tuple[int, ...]]]]  # by teacher: the block and its missing views of one mixing group
SHARED = ("views", "workers", "threads", "device")  # keys of `cache` that all of them have alike


def refuse_apart(configs: Sequence[Config]) -> None:
    """ConfigError unless configs may run in one pass: one recipe, one size of batch, one way to run, a cache each."""
    first = _shared(configs[0])
    for config in configs[1:]:
        if difference := first_difference(first, _shared(config)):
            key, theirs, its = difference
            raise ConfigError(
                f"{key} is {shortened(repr(its), 40)} for cache.path {shortened(config.cache.path, 60)} and {shortened(repr(theirs), 40)} for "
                f"{shortened(configs[0].cache.path, 60)}; teachers in one pass share it: set both alike, or run them apart"
            )
    paths = [config.cache.path for config in configs]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ConfigError(f"cache.path {shortened(twice[0], 100)} is that of two configs; give each teacher its own")


def _shared(config: Config) -> dict[str, object]:
    cache = to_dict(config.cache)
    return {
        "recipe": to_dict(config.recipe),
        "teacher": {"batch": config.teacher.batch},
        "cache": {key: cache[key] for key in SHARED},
    }


def refuse_other_images(inventories: Sequence[Inventory], configs: Sequence[Config]) -> None:
    """ConfigError unless all are of the same images."""
    for inventory, config in zip(inventories[1:], configs[1:], strict=True):
        if inventory.id != inventories[0].id:
            raise ConfigError(
                f"data.train {shortened(config.data.train, 80)} holds other images than {shortened(configs[0].data.train, 80)} "
                f"({inventory.id[:12]} and {inventories[0].id[:12]}); teachers in one pass see the same"
            )


def joint_passes(lines: Sequence[UnitLine], worker: Worker) -> Passes:
    """The passes that any of the lines lacks, in the order of the first one that lacks any; none where none lacks any. A line that would
    wait for other processes holds up the rest only where these lack nothing, either. worker: see `UnitLine.missing`."""
    while True:
        found: defaultdict[tuple[int, int], dict[int, tuple[int, tuple[int, ...]]]] = defaultdict(dict)
        missing = [line.missing(worker) for line in lines]
        for i, (line, passes) in enumerate(zip(lines, missing, strict=True)):
            for block, views in passes or ():
                found[line.group_of(views), block][i] = block, views
        if found or None not in missing:
            return list(found.values())
        time.sleep(min(line.patience() for line, passes in zip(lines, missing, strict=True) if passes is None))


def joint_tasks(lines: Sequence[UnitLine], passes: Passes) -> Iterator[Chunk]:
    """Chunks with the views that any line lacks; each line has claimed its part of a pass before the first one of it."""
    for one in passes:
        by_place: defaultdict[int, list[tuple[UnitLine, Chunk]]] = defaultdict(list)
        for number, of_line in one.items():
            for chunk in lines[number].tasks([of_line]):
                by_place[chunk.place].append((lines[number], chunk))
        for place in sorted(by_place):
            if chunks := [chunk for line, chunk in by_place[place] if line.wants(chunk)]:
                views = {view for chunk in chunks for view in chunk.views}
                yield replace(chunks[0], views=tuple(sorted(views)))


def feed_all(lines: Sequence[UnitLine], chunk: ChunkViews) -> None:
    """Give a chunk to each line, which takes what it has asked for of it."""
    for line in lines:
        line.feed(chunk)
