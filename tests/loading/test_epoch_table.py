"""Epoch tables: every row is its unit's, wherever a run begins or ends, and a run that ends waits for none."""

from __future__ import annotations

from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from cskd.codecs.base import BLEND_ONE, Arrays, Field
from cskd.errors import CacheError
from cskd.loading.epoch_table import build_table, open_table, table_bounds
from cskd.loading.plan import PlanSpec, epoch_plan
from cskd.loading.sources import TargetSpec
from cskd.loading.stage2 import EvalTask, TrainTask
from cskd.loading.tasks import RunTasks
from cskd.store.cache import Cache
from cskd.store.format import Unit
from tests.caches import make_tiny_cache

CELLS = TargetSpec("cells", "envelope", BLEND_ONE // 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_tiny_cache(tmp_path_factory.mktemp("cache"), n=30)


def spec_of(cache: Cache, batch: int = 4) -> PlanSpec:
    inventory = cache.inventory
    return PlanSpec(inventory.blocks, cache.quarantined(), inventory.id, cache.recipe, cache.views, 1, 0, batch, 2)


def rows(cache: Cache, start: int, stop: int, folder: Path) -> tuple[dict[str, list[np.ndarray]], list[EvalTask]]:
    """What the training steps start .. stop-1 read, and the evaluations among them."""
    spec = spec_of(cache)
    read: dict[str, list[np.ndarray]] = {}
    evaluations = []
    with RunTasks(cache, spec, lambda _: CELLS, lambda e: [EvalTask(e, e + 1)], folder, start, stop) as tasks:
        for task in tasks:
            if isinstance(task, TrainTask):
                for name, column in open_table(task.table).columns.items():
                    read.setdefault(name, []).append(np.array(column[task.start : task.stop]))
            else:
                evaluations.append(task)
    return read, evaluations


@pytest.mark.parametrize("unmap", [1, 32])
def test_a_row_is_its_units_row_and_its_cells_are_looked_up_at_the_blend(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmap: int
) -> None:
    monkeypatch.setattr("cskd.loading.epoch_table.UNMAP", unmap)
    plan = epoch_plan(spec_of(cache), 1)
    table = open_table(build_table(cache, plan, CELLS, 0, len(plan.sample), tmp_path / "table"))
    for i, (sample, view) in enumerate(zip(plan.sample.tolist(), plan.view.tolist(), strict=True)):
        block = cache.inventory.block_of(sample)
        unit = cache.read(block, view, "envelope")
        row = unit.position.tolist().index(sample - cache.inventory.block_range(block)[0])
        for name in ("seed", "digest", "mode", "lam", "box"):
            np.testing.assert_array_equal(table.columns[name][i], unit.fields[name][row])
        cells = cache.codecs["envelope"].hard(unit.targets, CELLS.blend)
        np.testing.assert_array_equal(table.columns["cell_class"][i], cells[row])


@pytest.mark.parametrize("wide", [0, 1])
def test_units_that_are_stored_in_other_widths_share_a_column(cache: Cache, tmp_path: Path, wide: int) -> None:
    """As those of `features:pca`: int8 where all numbers of a unit fit, else int16."""

    def read(block: int, view: int, codec: str) -> Unit:
        unit = cache.read(block, view, "envelope")
        array = np.full(len(unit.position), *((300, np.int16) if view == wide else (100, np.int8)))
        return replace(unit, targets={"x": array})

    class Codec:
        fields: ClassVar[dict[str, Field]] = {"x": Field(("int8", "int16"), ("sample",))}

        def take(self, arrays: Arrays, index: np.ndarray) -> Arrays:
            return {"x": arrays["x"][index]}

    source: Any = SimpleNamespace(inventory=cache.inventory, codecs={"narrowing": Codec()}, read=read)
    plan = epoch_plan(replace(spec_of(cache), repeats=3), 0)
    table = build_table(source, plan, TargetSpec("soft", "narrowing", 0), 0, len(plan.sample), tmp_path / "table")
    found = open_table(table).columns
    assert set(found["view"].tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(found["target.x"], np.where(found["view"] == wide, 300, 100))


@pytest.mark.parametrize("start, stop", [(0, 5), (1, 9), (2, 3), (4, 4), (7, 20)])
def test_a_run_from_any_step_to_any_other_reads_what_the_whole_run_reads(
    cache: Cache, tmp_path: Path, start: int, stop: int
) -> None:
    steps = spec_of(cache).steps
    whole, _ = rows(cache, 0, 20, tmp_path / "whole")
    part, evaluations = rows(cache, start, stop, tmp_path / "part")
    for name, batches in whole.items():
        assert len(batches) == 20
        np.testing.assert_array_equal(np.array(part.get(name, [])), np.array(batches[start:stop] or []))
    assert [task.start for task in evaluations] == list(range(start // steps, -(-stop // steps)))


def test_the_first_table_of_a_run_ends_with_its_window(cache: Cache) -> None:
    plan = epoch_plan(spec_of(cache), 0)
    n = len(plan.sample)
    window = -(-int(plan.ends[0]) // 4) * 4
    assert 4 < window < n, "the case is meant to have more windows than one"
    assert table_bounds(plan, CELLS, 4) == [(0, n)]
    assert table_bounds(plan, CELLS, 4, begin=0) == [(0, window), (window, n)]
    assert table_bounds(plan, CELLS, 4, begin=4) == [(4, window), (window, n)]
    assert table_bounds(plan, CELLS, 4, begin=window) == [(window, 20), (20, n)]
    assert table_bounds(plan, CELLS, 4, begin=0, end=4) == [(0, 4)]
    soft = table_bounds(plan, TargetSpec("soft", "envelope", 0), 4)
    assert soft[0] == (0, window) and soft[-1][1] == n and all(a[1] == b[0] for a, b in pairwise(soft))


def test_a_unit_that_quarantines_other_samples_than_the_plan_is_refused(tmp_path: Path) -> None:
    planned, other = make_tiny_cache(tmp_path / "a"), make_tiny_cache(tmp_path / "b", quarantine=[2])
    plan = epoch_plan(spec_of(planned), 0)
    with pytest.raises(CacheError, match="quarantines other samples than the run was planned with"):
        build_table(other, plan, CELLS, 0, len(plan.sample), tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_a_table_is_given_up_when_its_run_ends_and_leaves_nothing(cache: Cache, tmp_path: Path) -> None:
    ended = Event()
    ended.set()
    plan = epoch_plan(spec_of(cache), 0)
    with pytest.raises(CancelledError):
        build_table(cache, plan, CELLS, 0, len(plan.sample), tmp_path / "table", ended)
    assert list(tmp_path.iterdir()) == []
