"""The pool of workers: a stream that is left ends its workers at once."""

from __future__ import annotations

import time

from cskd.loading.stream import Stream


class Slow:
    """Sleeps for so many seconds."""

    def __call__(self, task: float) -> float:
        time.sleep(task)
        return task


def test_a_stream_that_is_left_does_not_wait_for_what_its_workers_are_at() -> None:
    """As at Ctrl-C; torch would wait five seconds for each of them."""
    results = iter(Stream(Slow(), [0.0, 60.0, 60.0, 60.0], workers=2))
    assert next(results) == 0.0
    clock = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    del results
    assert time.monotonic() - clock < 9
