"""The ranks of a machine make one table together: the same rows as alone, each unit read once."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from cskd.codecs.base import BLEND_ONE
from cskd.errors import CacheError, CskdError, RankError
from cskd.files import shared_folder
from cskd.files.shared_folder import SharedFolder
from cskd.loading.epoch_table import open_table
from cskd.loading.node_scratch import node_scratch
from cskd.loading.plan import PlanSpec
from cskd.loading.sources import TargetSpec
from cskd.loading.stage2 import TrainTask
from cskd.loading.tasks import RunTasks
from cskd.machine.launch import Launch
from cskd.machine.ranks import Ranks
from cskd.store.cache import Cache
from tests.caches import make_tiny_cache

CELLS = TargetSpec("cells", "envelope", BLEND_ONE // 3)
SOFT = TargetSpec("soft", "int8", 0)
Rows = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_tiny_cache(tmp_path_factory.mktemp("cache"), ("envelope", "int8"), n=64, block=30, quarantine=[3])


class Counting:
    """A cache that counts what is read of it, by unit, and keeps the most epochs that lay in a folder at a time."""

    def __init__(self, cache: Cache, folder: Path) -> None:
        self.cache, self.folder, self.reads, self.most = cache, folder, Counter[tuple[int, int]](), 0

    def read(self, block: int, view: int, codec: str) -> Any:
        self.reads[block, view] += 1
        self.most = max(self.most, len(list(self.folder.glob("epoch*"))))
        return self.cache.read(block, view, codec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def plan_of(cache: Cache, ranks: int, repeats: int = 1, micro: int = 0) -> PlanSpec:
    bad = cache.quarantined()
    return PlanSpec(
        cache.inventory.blocks, bad, cache.inventory.id, cache.recipe, 3, repeats, 0, 8, 1, ranks, micro=micro
    )


def rows_of(
    source: Any, plan: PlanSpec, spec: TargetSpec, rank: int, scratch: Any, step: Barrier | None = None
) -> Rows:
    """What each step of a rank reads in three epochs, from its second step on. step: where ranks wait for each other."""
    found = []
    with RunTasks(source, plan, lambda _: spec, lambda _: [], scratch, 1, 3 * plan.steps, rank, ahead=0) as tasks:
        for task in tasks:
            assert isinstance(task, TrainTask)
            columns = open_table(task.table).columns
            found.append({name: np.array(column[task.start : task.stop]) for name, column in columns.items()})
            if step is not None:
                step.wait()
    return found


def together(folder: Path, sources: list[Any], plan: PlanSpec, spec: TargetSpec, first: int = 0) -> list[Rows]:
    """Of each of the ranks `first` ... that share a folder."""
    folder.mkdir()
    shared = [SharedFolder(folder, number, len(sources)).enter() for number in range(len(sources))]
    step = Barrier(len(sources), timeout=60)
    with ThreadPoolExecutor(len(sources)) as pool:
        jobs = [pool.submit(rows_of, sources[i], plan, spec, first + i, shared[i], step) for i in range(len(sources))]
        return [job.result() for job in jobs]


# The last: three ranks with uneven shares, of 2, 2 and 4 rows, of which the second and the third are on one machine.
@pytest.mark.parametrize(
    "first, ranks, spec, repeats, micro",
    [(0, 2, CELLS, 1, 0), (2, 4, SOFT, 1, 0), (1, 4, CELLS, 3, 0), (1, 3, CELLS, 3, 2)],
)
def test_ranks_that_share_a_table_read_what_each_would_alone_and_each_unit_once(
    cache: Cache, tmp_path: Path, first: int, ranks: int, spec: TargetSpec, repeats: int, micro: int
) -> None:
    plan, shared = plan_of(cache, ranks, repeats, micro), tmp_path / "shared"
    sources = [Counting(cache, shared) for _ in range(2)]
    found = together(shared, sources, plan, spec, first)
    alone = [Counting(cache, tmp_path / "alone") for _ in range(2)]
    for i in range(2):
        expected = rows_of(alone[i], plan, spec, first + i, tmp_path / "alone")
        assert len(found[i]) == len(expected) == 3 * plan.steps - 1
        for step, wanted in zip(found[i], expected, strict=True):
            assert step.keys() == wanted.keys()
            for name in wanted:
                np.testing.assert_array_equal(step[name], wanted[name])
    once, twice = sum((s.reads for s in sources), Counter()), sum((s.reads for s in alone), Counter())
    assert once.keys() == twice.keys() and twice.total() >= 1.7 * once.total()
    assert min(s.reads.total() for s in sources) >= 0.3 * once.total()
    assert max(s.most for s in sources) <= 2 and not shared.exists()


def test_a_damaged_unit_ends_all_ranks_of_a_machine_and_each_says_why(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_folder, "LOOK", 0.05)

    class Damaged(Counting):
        def read(self, block: int, view: int, codec: str) -> Any:
            raise CacheError("unit is damaged")

    errors: list[CskdError] = []
    (tmp_path / "shared").mkdir()
    shared = [SharedFolder(tmp_path / "shared", number, 2).enter() for number in range(2)]

    def run(number: int) -> None:
        source = (Counting, Damaged)[number](cache, tmp_path)
        try:
            rows_of(source, plan_of(cache, 2), CELLS, number, shared[number])
        except CskdError as e:
            errors.append(e)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert sorted(map(str, errors)) == [
        "local rank 0 stops because local rank 1 failed: unit is damaged",
        "unit is damaged",
    ]
    assert any(isinstance(e, RankError) for e in errors) and not (tmp_path / "shared").exists()


def test_a_rank_that_died_while_the_table_was_made_ends_the_others(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_folder, "LOOK", 0.05)
    (tmp_path / "shared").mkdir()
    one, other = (SharedFolder(tmp_path / "shared", number, 2).enter() for number in range(2))
    other.leave()  # its lock goes, as that of a process that is killed
    with pytest.raises(RankError, match="local rank 1, which is gone and left no word"):
        rows_of(Counting(cache, tmp_path), plan_of(cache, 2), CELLS, 0, one)
    assert not (tmp_path / "shared").exists()


class Told(Ranks):
    """Ranks whose collectives are answered from a list."""

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        names = SENT
        names[self.rank] = x[0]
        return torch.stack([names.get(rank, torch.zeros_like(x[0])) for rank in range(self.count)])

    def barrier(self) -> None:
        pass


SENT: dict[int, torch.Tensor] = {}


def test_the_first_rank_of_each_machine_names_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SENT.clear()
    (tmp_path / "run").mkdir()
    folders = []
    for rank in range(4):
        launch = Launch(rank, 4, rank % 2, 2, "torchrun")
        folders.append(
            node_scratch(tmp_path / "run", str(tmp_path), Told(rank, 4, rank % 2), torch.device("cpu"), launch)
        )
    paths = [folder.path for folder in folders]
    assert paths[0] == paths[1] != paths[2] == paths[3] and all(path.parent == tmp_path for path in paths)
    assert [(f.number, f.count) for f in folders] == [(0, 2), (1, 2)] * 2
    for folder in folders:
        folder.leave()
    assert not any(path.exists() for path in paths)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alone = node_scratch(tmp_path / "run", "", Ranks(), torch.device("cpu"))
    assert alone.count == 1 and alone.path.parent == tmp_path
    shutil.rmtree(alone.path)
