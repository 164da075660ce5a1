"""Calls that wait for a store, made ahead of who uses their results: many at the same time, in a limited amount of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
AT_ONCE = 32  # calls in flight
ROOM = 256 << 20  # bytes of results that wait


def ahead(
    items: Iterable[T],
    call: Callable[[T], R],
    size: Callable[[T], int] = lambda item: 0,
    at_once: int = AT_ONCE,
    room: int = ROOM,
) -> Generator[tuple[T, Future[R]], None, None]:
    """Each item with the result of its call, in order; what a call raises, its result raises.

    Args:    items: asked for from the caller's thread, at most `at_once` ahead. size: bytes of a result; all that wait take
             `room` at most, or are one alone.
    """
    waiting, held = deque[tuple[T, Future[R], int]](), 0
    pool = ThreadPoolExecutor(at_once, "ahead")
    try:
        for item in items:
            needs = size(item)
            while waiting and (len(waiting) == at_once or held + needs > room):
                before, result, freed = waiting.popleft()
                held -= freed
                yield before, result
            waiting.append((item, pool.submit(call, item), needs))
            held += needs
        while waiting:
            before, result, _ = waiting.popleft()
            yield before, result
    finally:
        pool.shutdown(cancel_futures=True)
