"""How a command ends: interrupts, the exit code, and the one line that says why.

Exit codes: 0; 1 failed, and says why in one line; 2 usage; 130 / 143 interrupted, and prints the line that resumes. 143 is that
of SIGTERM and of SIGUSR1; training then saves a state first, see `stops`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import cskd
from cskd.errors import CskdError, fitted, limit_said, one_line, said
from cskd.machine import stops
from cskd.machine.launch import command_line, launched

GRACE = 20.0  # seconds a run that was interrupted has to end by itself

_SIGNALS = (signal.SIGINT, *stops.ASKS)
_leaving = threading.Lock()  # never given back


def ended(command: Callable[[], object]) -> NoReturn:
    """Run a command of the program, and leave with its exit code; whatever it raises is told in one line."""
    code: object = 0
    try:
        with _interrupts():
            code = command() or 0
    except (CskdError, OSError) as e:
        _debugged(e)
        print(fitted(f"cskd: {e if isinstance(e, CskdError) else said(e)}"), file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit as e:
        code = e.code or 0
    except Exception as e:
        code = _usage_or_bug(e)
    if code in (130, 143):
        _say_how_to_go_on()
    _leave_ranks(code)
    sys.exit(code if isinstance(code, int) else 1)


def _interrupted(signum: int, frame: FrameType | None) -> None:
    """The first Ctrl-C, SIGTERM or SIGUSR1 unwinds, unless it waits; see `_second_signal` for what ends a run that does not."""
    if signum in stops.ASKS and stops.ask():
        return
    for kind in _SIGNALS:
        signal.signal(kind, _leave)
    raise SystemExit(_code(signum))


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 end what runs inside, in GRACE seconds at most; a second one ends it at once, unless it only says
    again what waits already: a batch system sends to all processes, and torchrun passes on what it gets.

    Python runs handlers between two steps of the main thread, which a long call into a library holds up; a signal's number
    is written to a socket at once, and a thread reads it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_second_signal, args=(reader,), name="interrupts", daemon=True)
    watch.start()
    for kind in _SIGNALS:
        signal.signal(kind, _interrupted)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        watch.join()
        reader.close()


def _second_signal(reader: socket.socket) -> None:
    """Leave at the second signal, or when the first was GRACE seconds ago: a library may have swallowed it, or hang while it
    ends its threads. Every file of a run is whole or absent at any moment, so nothing is lost."""
    first, end = 0, 0.0
    while True:
        try:
            reader.settimeout(max(0.01, end - time.monotonic()) if first else None)
            numbers = reader.recv(64)
        except TimeoutError:
            _leave(first, None)
        if not numbers:  # the run has ended
            return
        for number in numbers:
            if number not in _SIGNALS or (first and number in stops.ASKS and stops.asked()):
                continue
            if first:
                _leave(number, None)
            first, end = number, time.monotonic() + GRACE


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    """At once, and with one line: the handler and the thread that watches may both come here."""
    if _leaving.acquire(timeout=1.0):
        _say_how_to_go_on()
        # Of its own, and not waited for: what holds the main thread up may hold a lock of the tracker, too.
        tidying = threading.Thread(target=_unlink_semaphores, daemon=True)
        tidying.start()
        tidying.join(1.0)
    os._exit(_code(signum))


def _unlink_semaphores() -> None:
    """Of the queues between this process and its workers: whoever leaves without it has Python's resource tracker print that they
    leaked."""
    synchronize, util = sys.modules.get("multiprocessing.synchronize"), sys.modules.get("multiprocessing.util")
    if synchronize is None or util is None:
        return
    for finalizer in list(util._finalizer_registry.values()):
        if getattr(finalizer, "_callback", None) is synchronize.SemLock._cleanup:
            with contextlib.suppress(OSError):
                finalizer()


def _code(signum: int) -> int:
    """The exit code of a signal: one for all that ask for a stop."""
    return stops.EXIT if signum in stops.ASKS else 128 + signum


def _say_how_to_go_on() -> None:
    """One line, by the first of several ranks."""
    if launched().speaks:
        print(f"\ninterrupted; go on with: {command_line(sys.argv[1:])}", file=sys.stderr, flush=True)


def _leave_ranks(code: object) -> None:
    """End here where this is a rank that others wait for, or that waits for others: it has said what it had to say."""
    if (ranks := sys.modules.get("cskd.machine.ranks")) is not None:
        ranks.leave(code if isinstance(code, int) else 1)


def _debugged(error: Exception) -> None:
    """With --debug, raise it again; in a rank, show it and leave."""
    if "--debug" in sys.argv:
        if "cskd.machine.ranks" in sys.modules:
            traceback.print_exception(error)
            _leave_ranks(1)
        raise error


def _usage_or_bug(error: Exception) -> int:
    """Click's own errors show themselves; anything else is ours: a line that names the file with the traceback."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return int(error.exit_code)
    if type(error).__name__ in ("Exit", "Abort"):
        return 130 if type(error).__name__ == "Abort" else int(getattr(error, "exit_code", 0))
    _debugged(error)
    if limit := limit_said(error):
        print(fitted(f"cskd: {limit}"), file=sys.stderr)
        return 1
    print(fitted(f"cskd: unexpected {one_line(error, 100)}; {logged(error)}"), file=sys.stderr)
    return 1


def logged(error: Exception) -> str:
    """Where the traceback of a bug is, in words: a file of its own among the temporary ones."""
    import tempfile

    told = "".join(traceback.format_exception(error))
    try:
        number, name = tempfile.mkstemp(prefix="cskd-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"cskd {cskd.__version__}, Python {sys.version}\n{command_line(sys.argv[1:])}\n\n{told}")
    except OSError:
        return "run `cskd --debug ...` for the traceback"
    return f"the traceback is in {name}, please report it"
