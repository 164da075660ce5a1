"""A line about what is being waited for, where an answer from another machine takes longer than a moment: those who ask for it try
again in silence, some of them for minutes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from cskd.errors import fitted

SOON = 2.0  # seconds until the line: of a first answer, which comes within one where there is a network
AGAIN = 300.0  # seconds in which a process does not repeat a line
_said: dict[str, float] = {}
_one_says = threading.Lock()  # of many requests at once


@contextlib.contextmanager
def said_when_long(what: str, cure: str, after: float = SOON) -> Iterator[None]:
    """Say on standard error what this context waits for, where it takes longer than `after` seconds.

    Args:    what: and from where. cure: what to do where no answer comes.
    """
    timer = threading.Timer(after, _say, (f"note: waiting for {what}; {cure}",))
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # while the interpreter ends there are no new threads
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(line: str) -> None:
    now = time.monotonic()
    if sys.stderr is None:  # closed by who called: print would take standard output
        return
    with _one_says:
        if now - _said.get(line, -AGAIN) >= AGAIN:
            _said[line] = now
            print(fitted(line), file=sys.stderr, flush=True)
