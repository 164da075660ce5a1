"""Ranks that meet in a store that has served an earlier start agree on a part of it that is empty."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # in its documentation, not in its __all__

import cskd.machine.ranks
from cskd.errors import RankError
from cskd.machine.ranks import running_ranks
from cskd.machine.rendezvous import store_of_this_start

CPU = torch.device("cpu")


def met(store: Store, order: tuple[int, ...]) -> list[Store]:
    """What each rank gets, where they come in this order."""
    with ThreadPoolExecutor(len(order)) as pool:
        found = {}
        for rank in order:
            found[rank] = pool.submit(store_of_this_start, store, rank, len(order))
            time.sleep(0.05)
        return [found[rank].result(60) for rank in range(len(order))]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("before", [3, 4, 2])
def test_ranks_of_a_later_start_read_nothing_of_an_earlier_one(before: int, order: tuple[int, ...]) -> None:
    """Of more ranks, of fewer or of as many, of which one had died before it got its answer."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=60))
    for one in met(store, tuple(range(before))):
        one.set("address", "of a rank that is dead")
    store.set("cskd/rank/1", "drawn by a rank that died")
    parts = met(store, order)
    assert not any(part.check(["address"]) for part in parts)
    for rank, part in enumerate(parts):
        part.set(f"address/{rank}", "here")
    assert all(part.check([f"address/{rank}" for rank in order]) for part in parts)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peer_does_not_come_ends_in_one_line_after_the_stores_time(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rank of an earlier start left behind is no peer."""
    store = HashStore()
    met(store, (0, 1))
    monkeypatch.setattr(cskd.machine.ranks, "rendezvous", lambda *_, **about: iter([(store, rank, 2)]))
    monkeypatch.setattr(cskd.machine.ranks, "WAIT", timedelta(seconds=0.1))
    for name, value in {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(RankError, match=rf"rank {rank} did not meet all 2 at node1:29500") as caught,
        running_ranks(CPU),
    ):
        pass
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
