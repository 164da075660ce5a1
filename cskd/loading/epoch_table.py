"""The epoch table: what the workers need of the cache for a stretch of one epoch, in the order of the plan.

A folder of .npy columns, memory-mapped and shared by all workers, so that they never open a unit. Hard targets: one
table per epoch, the units evaluated once at the epoch's blend (h*w uint16 per sample), in two parts where a run begins. Soft
targets: the codec's own arrays, one table per window of blocks, decoded on the device. A loss may read both. The ranks of one
machine make one table together: each reads a share of the units, once, for the rows of all of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from itertools import islice
from mmap import MADV_DONTNEED, mmap
from pathlib import Path
from threading import Event
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cskd.codecs import Arrays
from cskd.errors import CacheError
from cskd.files.scratch import reserve, said_when_full
from cskd.files.shared_folder import SharedFolder
from cskd.loading.plan import EpochPlan
from cskd.loading.sources import TargetSpec, ViewSource
from cskd.store.format import Unit

UNMAP = 32  # units after which the pages written so far are left to the system: no table then grows the process
ABOUT = "table.json"  # of a table; the last of its files
COPIED = ("seed", "digest", "mode", "lam", "box")


@dataclass(frozen=True)
class EpochTable:
    """Columns, each with one row a planned (sample, view); `targets` names those that are teacher outputs."""

    columns: dict[str, NDArray[Any]]
    targets: list[str]


def table_bounds(
    plan: EpochPlan, spec: TargetSpec, batch: int, begin: int | None = None, end: int | None = None
) -> list[tuple[int, int]]:
    """(first, stop) positions of each table of an epoch, at batch borders: one for hard targets, one a window for soft.

    begin, end: batch borders, where a run begins or resumes within the epoch and where it ends. What lies beyond is left
    out, and what is left of the first window is a table of its own: the first step doesn't wait for the whole epoch's.
    """
    first, n = begin or 0, len(plan.sample) if end is None else end
    windows = sorted({stop for e in plan.ends if first < (stop := -(-int(e) // batch) * batch) < n} | {n})
    ends = (
        windows
        if any(of.arrays for of in spec.by_cache.values())
        else [n]
        if begin is None
        else sorted({windows[0], n})
    )
    return list(zip([first, *ends[:-1]], ends, strict=True))


def build_table(
    source: ViewSource,
    plan: EpochPlan,
    spec: TargetSpec,
    first: int,
    stop: int,
    folder: Path,
    ended: Event | None = None,
    shared: SharedFolder | None = None,
) -> Path:
    """Write the table of positions first .. stop-1 to `folder`, whole or not at all; an existing one is replaced.

    ended: once set, the table is given up, with a CancelledError. shared: of several processes that make it together, all with
    the same arguments; `folder` lies in it and is new. Each returns when the table is whole.
    """
    shared = shared or SharedFolder(folder.parent)
    temp = folder.with_name(f".{folder.name}.tmp")
    if shared.count == 1:
        shutil.rmtree(temp, ignore_errors=True)
    try:
        with said_when_full(folder.parent):
            _build(source, plan.sample[first:stop], plan.view[first:stop], spec, folder, temp, ended, shared)
    except Exception as e:
        if shared.count == 1:
            shutil.rmtree(temp, ignore_errors=True)
        elif not isinstance(e, CancelledError):
            shared.fail(e)
        raise
    return folder


def _build(
    source: ViewSource,
    sample: NDArray[np.int64],
    view: NDArray[np.int32],
    spec: TargetSpec,
    folder: Path,
    temp: Path,
    ended: Event | None,
    shared: SharedFolder,
) -> None:
    """The first one puts the table in place, once all have written their rows."""
    temp.mkdir(parents=True, exist_ok=True)
    targets = _fill(source, sample, view, spec, temp, ended, shared)
    (temp / f"part{shared.number}").touch()
    if shared.number:
        shared.wait((folder / ABOUT).exists, "an epoch table", ended)
        return
    for name, column in (("sample", sample), ("view", view)):
        _column(temp / f"{name}.npy", column, len(sample), shared)[:] = column
    (temp / ABOUT).write_text(json.dumps({"targets": targets}))
    parts = [temp / f"part{number}" for number in range(shared.count)]
    shared.wait(lambda: all(part.exists() for part in parts), "an epoch table", ended)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temp, folder)


def _fill(
    source: ViewSource,
    sample: NDArray[np.int64],
    view: NDArray[np.int32],
    spec: TargetSpec,
    temp: Path,
    ended: Event | None,
    shared: SharedFolder,
) -> list[str]:
    """Write the rows of this process's share of the units. Returns: the names of those columns that are targets."""
    columns: dict[str, NDArray[Any]] = {}
    targets: list[str] = []
    units = islice(_units(source.inventory.blocks, sample, view), shared.number, None, shared.count)
    for number, (block, of_view, rows) in enumerate(units):
        if ended is not None and ended.is_set():
            raise CancelledError
        position = sample[rows] - source.inventory.block_range(block)[0]
        unit, found = _read(source, block, of_view, spec.codec, position)
        copied, wanted = {name: unit.fields[name].take(found, 0) for name in COPIED}, dict[str, NDArray[Any]]()
        for cache, of_cache in spec.by_cache.items():
            arrays = {spec.codec: (unit.targets, found)}
            for codec in {of_cache.codec, *of_cache.arrays} - {"", *arrays}:
                arrays[codec] = _joined(source, block, of_view, codec, position, copied)
            taken = _targets(source, of_cache, arrays)
            wanted |= {prefixed(cache, name): column for name, column in taken.items()}
        targets = list(wanted)
        for name, value in (copied | wanted).items():
            if name not in columns:
                columns[name] = _column(temp / f"{name}.npy", value, len(sample), shared)
            columns[name][rows] = value
        if number % UNMAP == UNMAP - 1:
            for column in columns.values():
                cast(mmap, column.base).madvise(MADV_DONTNEED)
    return targets


def _column(path: Path, like: NDArray[Any], rows: int, shared: SharedFolder) -> NDArray[Any]:
    """A column of so many rows, mapped; made, with all its room on the disk, by whoever comes first."""
    with shared.alone():
        if not path.exists():
            new = path.with_suffix(".new")
            np.lib.format.open_memmap(new, "w+", like.dtype, (rows, *like.shape[1:]))
            reserve(new)
            os.rename(new, path)
    column = np.lib.format.open_memmap(path, "r+")
    assert (column.dtype, column.shape) == (like.dtype, (rows, *like.shape[1:])), f"units differ in {path.stem}"
    return column


def open_table(folder: Path) -> EpochTable:
    """A table written by `build_table`, memory-mapped."""
    about = json.loads((folder / ABOUT).read_text())
    columns = {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in sorted(folder.glob("*.npy"))}
    return EpochTable(columns, list(about["targets"]))


def _units(
    bounds: NDArray[np.int64], sample: NDArray[np.int64], view: NDArray[np.int32]
) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """(block, view, its rows, rising) of every unit the rows need, in the order of their first rows."""
    block = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))[sample]
    unit = block * (int(view.max(initial=0)) + 1) + view
    narrow = unit.astype(np.min_scalar_type(int(unit.max(initial=0))))
    order = np.argsort(narrow, kind="stable")  # of 16-bit integers by radix: a tenth of the time
    by_unit = np.split(order, np.flatnonzero(np.diff(unit[order])) + 1) if len(order) else []
    for rows in sorted(by_unit, key=lambda rows: int(rows[0])):
        yield int(block[rows[0]]), int(view[rows[0]]), rows


def prefixed(cache: str, name: str) -> str:
    """A column of a further cache, by its name."""
    return f"{cache}.{name}" if cache else name


def _read(
    source: ViewSource, block: int, view: int, codec: str, position: NDArray[np.int64]
) -> tuple[Unit, NDArray[np.int64]]:
    """A unit, and its rows of these positions in the block. CacheError where it lacks one."""
    unit = source.read(block, view, codec)
    found = np.searchsorted(unit.position, position)
    if not np.array_equal(unit.position.take(found, mode="clip"), position):
        raise CacheError(
            f"block {block}, view {view} quarantines other samples than the run was planned with; "
            "`cskd verify` finds which of its units to make again"
        )
    return unit, found


def _joined(
    source: ViewSource,
    block: int,
    view: int,
    codec: str,
    position: NDArray[np.int64],
    first: dict[str, NDArray[Any]],
) -> tuple[Arrays, NDArray[np.int64]]:
    """Targets of a further codec, and their rows. CacheError where its teacher saw other pixels than the first one's."""
    unit, found = _read(source, block, view, codec, position)
    for name, column in first.items():
        if not np.array_equal(unit.fields[name].take(found, 0), column):
            raise CacheError(
                f"block {block}, view {view}: {codec.replace('/', ' and its codec ')} has another {name} than the first cache; "
                "its teacher saw other views: make it again from the same images, recipe and cskd"
            )
    return unit.targets, found


def _targets(
    source: ViewSource, spec: TargetSpec, arrays: dict[str, tuple[Arrays, NDArray[np.int64]]]
) -> dict[str, NDArray[Any]]:
    """Columns that a spec names; arrays: by codec, the targets of a unit and their rows."""
    wanted: dict[str, NDArray[Any]] = {}
    if spec.kind in ("global", "cells"):
        codec, (of_codec, found) = source.codecs[spec.codec], arrays[spec.codec]
        wanted["global_class"] = codec.global_class(of_codec)[found]
        if spec.kind == "cells":
            wanted["cell_class"] = codec.hard_at(of_codec, found, spec.blend)
        for decay, blend in spec.blends:
            wanted[f"cell_class.{decay}"] = codec.hard_at(of_codec, found, blend)
    for name in spec.arrays:
        codec = source.codecs[name]
        what = "target" if name == spec.soft_codec else f"map.{codec.name}"
        for key, array in codec.take(*arrays[name]).items():
            # A codec may store units narrower than others, and one column holds them all.
            widest = np.result_type(*codec.fields[key].dtypes)
            wanted[f"{what}.{key}"] = array.astype(widest, copy=False)
    return wanted
