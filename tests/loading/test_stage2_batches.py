"""Batches of stage 2: an image is decoded once for its views, and no view passes that the teacher has not seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd.config import TrainConfig
from cskd.errors import ReplayError
from cskd.loading.plan import PlanSpec
from cskd.loading.sources import TargetSpec
from cskd.loading.stage2 import BatchMaker, TrainTask
from cskd.loading.tasks import RunTasks
from cskd.store.cache import Cache
from cskd.views.maker import ViewMaker
from tests.caches import make_tiny_cache


def tasks_of(cache: Cache, scratch: Path, repeats: int, batch: int) -> Iterator[TrainTask]:
    """The tasks of an epoch; their tables are there until it ends."""
    plan = PlanSpec.over(cache, TrainConfig(repeats=repeats, seed=0, global_batch=batch, window=2))
    spec = TargetSpec("none", "envelope", 0)
    with RunTasks(cache, plan, lambda _: spec, lambda _: [], scratch, 0, plan.steps) as tasks:
        yield from (task for task in tasks if isinstance(task, TrainTask))


def test_an_image_is_decoded_once_for_its_views_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_tiny_cache(tmp_path, n=40)
    decoded: list[int] = []
    plain = ViewMaker.image

    def counting(self: ViewMaker, sample: int) -> Any:
        decoded.append(sample)
        return plain(self, sample)

    monkeypatch.setattr(ViewMaker, "image", counting)
    maker = BatchMaker(ViewMaker(cache.inventory, cache.recipe), None, 1.0, cache.recorded())
    for task in tasks_of(cache, tmp_path / "scratch", repeats=3, batch=12):
        decoded.clear()
        batch = maker(task)
        samples = batch["sample"].tolist()
        assert sorted(decoded) == sorted(set(samples))
        assert len(samples) == 12 and len(decoded) <= 6  # the plan puts the views of a quad side by side
        for row in range(12):  # each view stands in its own row all the same
            own = maker.train.view(
                plain(maker.train, samples[row]), seed_of(cache, samples[row], int(batch["view"][row]))
            )
            assert np.array_equal(batch["pixels"][row].numpy(), own)


def test_a_view_that_differs_in_any_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_tiny_cache(tmp_path, n=10)
    tasks = tasks_of(cache, tmp_path / "scratch", repeats=1, batch=8)
    task = next(tasks)
    plain = ViewMaker.view
    for bad_row in range(8):
        calls = iter(range(100))

        def drifting(self: ViewMaker, image: Any, seed: int) -> Any:
            out = plain(self, image, seed)
            return out ^ np.uint8(1) if next(calls) == bad_row else out  # noqa: B023

        monkeypatch.setattr(ViewMaker, "view", drifting)
        maker = BatchMaker(ViewMaker(cache.inventory, cache.recipe), None, 1.0, cache.recorded())
        with pytest.raises(ReplayError, match="so the pixels differ"):
            maker(task)


def seed_of(cache: Cache, sample: int, view: int) -> int:
    block = cache.inventory.block_of(sample)
    unit = cache.read(block, view, "envelope")
    row = int(np.flatnonzero(unit.position == sample - cache.inventory.block_range(block)[0])[0])
    return int(unit.fields["seed"][row])
