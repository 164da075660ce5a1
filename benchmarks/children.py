"""Work in forked children, which may be killed, and say what came of it: for `benchmarks.faults` and `benchmarks.hostile`."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

from cskd.errors import CskdError

KILLED = -signal.SIGKILL
Child = tuple[int, int]  # process number, and the pipe its answer comes through


def start_child(function: Callable[[], Any]) -> Child:
    """Run in a forked child: a copy of this process, which has no threads and has imported everything."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.close(read)
    status = 1  # whatever happens, this copy of the process ends here
    try:
        try:
            result: Any = {"value": function()}
        except (CskdError, OSError) as e:
            result = {"error": f"{type(e).__name__}: {e}"}
        with os.fdopen(write, "w") as out:
            json.dump(result, out)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end_child(child: Child) -> tuple[int, Any]:
    """Its exit status, and {"value": ...} or {"error": ...}; None where it ended before it could say."""
    pid, read = child
    with os.fdopen(read) as answer:  # ends when the child's own workers have ended too
        text = answer.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(text) if text else None


def in_child(
    function: Callable[[], Any], kill_after: float | None = None, armed: Callable[[], bool] = lambda: True
) -> tuple[int, Any]:
    """Run in a forked child to its end, or kill it so many seconds after `armed`: then its status is -9, if it still lived."""
    child = start_child(function)
    if kill_after is not None:
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT  # its status is left for `end_child`
        while not armed() and os.waitid(os.P_PID, child[0], ended) is None:
            time.sleep(0.0002)
        time.sleep(kill_after)
        os.kill(child[0], signal.SIGKILL)
    return end_child(child)
