"""Calls made ahead of who uses their results."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cskd.storage.ahead import ahead


def test_results_come_in_order_with_so_many_calls_in_flight() -> None:
    together, asked = threading.Barrier(8, timeout=20), list[int]()

    def call(i: int) -> int:
        if i < 8:
            together.wait()  # all eight have to be there at once
        time.sleep(0.001 * (i % 3))
        return 2 * i

    def items() -> Iterator[int]:
        for i in range(40):
            asked.append(i)
            yield i

    for n, (item, result) in enumerate(ahead(items(), call, at_once=8)):
        assert (item, result.result()) == (n, 2 * n) and len(asked) <= n + 9


def test_what_waits_has_room_and_one_that_is_too_large_is_alone() -> None:
    sizes, held, most = [3, 3, 3, 20, 3, 4, 5, 1], 0, list[int]()

    def size(i: int) -> int:
        nonlocal held
        held += sizes[i]
        return sizes[i]

    for item, _ in ahead(range(len(sizes)), lambda i: i, size, room=10):
        most.append(held)
        held -= sizes[item]
    # what was let go comes before what did not fit is begun
    assert max(most) <= 10 + 20 and held == 0 and len(most) == len(sizes)


def test_an_error_is_its_items_own_and_who_stops_waits_for_no_more() -> None:
    begun = list[int]()

    def call(i: int) -> int:
        begun.append(i)
        if i == 1:
            raise FileNotFoundError(i)
        return i

    results = ahead(range(1000), call, at_once=4)
    assert next(results)[1].result() == 0
    with pytest.raises(FileNotFoundError):
        next(results)[1].result()
    assert next(results)[1].result() == 2
    results.close()
    assert len(begun) <= 8
