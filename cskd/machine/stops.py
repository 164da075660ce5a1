"""A request to stop that may wait: SIGTERM, and SIGUSR1 by which SLURM gives notice, set a flag where someone looks at it.

Outside of `heeded` nothing looks, and the signals unwind at once, see `ending`. Only the signal handlers of the command line call
`ask`: a program that uses the library has its own.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

ASKS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # of this system
EXIT = 128 + signal.SIGTERM  # exit code of whoever stops so: the same command goes on

_heeding = 0
_asked = False


@contextmanager
def heeded() -> Iterator[None]:
    """Inside, someone looks at `asked` every now and then, and leaves in good order by `SystemExit(EXIT)`."""
    global _heeding
    _heeding += 1
    try:
        yield
    finally:
        _heeding -= 1


def ask() -> bool:
    """Ask for a stop. Returns: whether anyone looks, or has looked."""
    global _asked
    _asked = _asked or _heeding > 0
    return _asked


def asked() -> bool:
    return _asked
