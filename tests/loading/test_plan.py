"""The epoch plan: coverage, pairs, shares of ranks, refusals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cskd.config import RecipeConfig, TrainConfig
from cskd.errors import PlanError
from cskd.loading.plan import PlanSpec, epoch_plan, epoch_views, rank_share, views_needed
from cskd.seeds import view_seeds
from cskd.views.mixing import mixing, quads


def spec(sizes: list[int], bad: tuple[int, ...] = (), **changes: Any) -> PlanSpec:
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    flags = np.zeros(int(bounds[-1]), bool)
    flags[list(bad)] = True
    values: dict[str, Any] = {"views": 6, "repeats": 1, "seed": 0, "global_batch": 4, "window": 2} | changes
    return PlanSpec(bounds, flags, "inventory", RecipeConfig(), **values)


def pairs(plan_spec: PlanSpec, epoch: int) -> list[tuple[int, int]]:
    plan = epoch_plan(plan_spec, epoch)
    return list(zip(plan.sample.tolist(), plan.view.tolist(), strict=True))


@pytest.mark.parametrize("repeats", [1, 3])
def test_every_view_of_every_sample_is_used_once_before_any_is_used_twice(repeats: int) -> None:
    s = spec([40, 32, 36], repeats=repeats, global_batch=12)  # every count divides: nothing is cut
    used = Counter(p for epoch in range(6) for p in pairs(s, epoch))
    assert len(used) == 108 * 6
    assert set(used.values()) == {1}


def test_a_random_third_is_drawn_anew_for_every_epoch_and_gets_the_next_views() -> None:
    """RASampler of DeiT: R views of a random 1/R of the images; here quads are drawn, a third of each block."""
    sizes, epochs = [40, 32, 36], 12
    s = spec(sizes, repeats=3, global_batch=12, views=3 * epochs, draw="random")
    taken = []
    for epoch in range(epochs):
        items = pairs(s, epoch)
        assert {v for _, v in items} == set(range(3 * epoch, 3 * epoch + 3))
        counts = Counter(sample for sample, _ in items)
        assert set(counts.values()) == {3} and len(counts) == 36
        taken.append(frozenset(counts))
    assert len(set(taken)) == epochs
    seen = Counter(sample for epoch in taken[:3] for sample in epoch)
    assert len(seen) < 108 and max(seen.values()) > 1  # with `cover` three epochs take every image once
    for draw, needed in (("cover", 12), ("random", 30)):
        assert views_needed(TrainConfig(epochs=10, repeats=3, repeats_draw=draw)) == needed  # type: ignore[arg-type]


def test_views_wrap_round_when_there_are_fewer_than_epochs() -> None:
    s = spec([40], views=3)
    assert [epoch_views(s, e) for e in range(7)] == [[0], [1], [2], [0], [1], [2], [0]]
    assert {v for _, v in pairs(s, 4)} == {1}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    repeats=st.sampled_from([1, 3]),
    batch=st.sampled_from([2, 4, 6, 10]),
    bad=st.sets(st.integers(0, 5), max_size=3),
    epoch=st.integers(0, 20),
)
def test_every_epoch_has_the_same_number_of_whole_batches_and_no_bad_sample(
    sizes: list[int], repeats: int, batch: int, bad: set[int], epoch: int
) -> None:
    bad = {b for b in bad if b < sum(sizes)}
    try:
        s = spec(sizes, tuple(bad), repeats=repeats, global_batch=batch)
    except PlanError:
        return
    items = pairs(s, epoch)
    assert len(items) == s.steps * batch
    assert max(Counter(items).values()) == 1
    assert not bad & {sample for sample, _ in items}


def test_mixing_partners_are_neighbours_and_never_straddle_a_batch() -> None:
    s = spec([41, 30], bad=(7,), global_batch=6)
    for epoch in range(6):
        items = pairs(s, epoch)
        where = {sample: i for i, (sample, _) in enumerate(items)}
        for block in range(2):
            first, n = int(s.bounds[block]), int(s.bounds[block + 1] - s.bounds[block])
            hashes = np.arange(first, first + n, dtype=np.uint64)
            order = quads(n, s.recipe, "inventory", block, epoch // 3)
            fields = mixing(view_seeds(0, "inventory", hashes, epoch), order, s.bad[first : first + n], s.recipe, epoch)
            for i, partner in enumerate(fields.partner.tolist()):
                if partner >= 0 and first + i in where:
                    assert where[first + partner] == where[first + i] ^ 1


def test_a_quad_gives_each_sample_another_partner_in_every_view_of_a_group() -> None:
    n, recipe = 40, RecipeConfig()
    order = quads(n, recipe, "inventory", 0, 0)
    hashes = np.arange(n, dtype=np.uint64)
    met = [mixing(view_seeds(0, "x", hashes, v), order, np.zeros(n, bool), recipe, v).partner for v in range(3)]
    for i in range(n):
        assert len({int(p[i]) for p in met}) == 3
        assert all(int(p[int(p[i])]) == i for p in met)


def test_ranks_share_each_global_batch_without_changing_it() -> None:
    s = spec([64, 64], global_batch=16, ranks=2)
    whole = epoch_plan(s, 1)
    shares = [rank_share(whole, s.share(rank)) for rank in range(2)]
    for step in range(s.steps):
        joined = np.concatenate([p.sample[step * 8 : step * 8 + 8] for p in shares])
        assert np.array_equal(joined, whole.sample[step * 16 : step * 16 + 16])


def test_epochs_differ_in_order_and_the_same_epoch_never_does() -> None:
    s = spec([64, 64])
    assert pairs(s, 2) == pairs(s, 2)
    assert [i for i, _ in pairs(s, 0)] != [i for i, _ in pairs(s, 3)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"repeats": 2}, "use 1"),
        ({"repeats": 3, "views": 7}, "cache 9 views or use 6"),
        ({"global_batch": 5}, "use 4"),
        ({"global_batch": 6, "ranks": 2}, "use 8"),
        ({"global_batch": 7, "micro": 2}, "use 8"),
        ({"global_batch": 4, "ranks": 3, "micro": 2}, "use 6"),
        ({"global_batch": 4000}, "at most 40"),
    ],
)
def test_combinations_that_can_not_work_are_refused_with_the_nearest_that_does(
    changes: dict[str, int], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        spec([40], bad=(), **changes)
