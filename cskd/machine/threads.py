"""How many threads the main process computes with, and how they wait for each other. No torch is loaded by importing it.

Parallel loops end at barriers. By default OpenMP's threads spin there for milliseconds; where another process has one of the
cores, the thread that everybody waits for does not run, and a loop of 50 us takes as long as a time slice: on two cores, training
of a small student was 2 to 3 times slower than with one thread next to two busy processes, and 14 times under a load of ten
(`python -m benchmarks.threads`).
Here they look 2,000 times and then sleep. Not at once: sleeping and waking costs a small student on a
quiet machine all that its second thread gains.

OpenMP reads its settings once, when torch is loaded, so `wait_passively` comes before it: `pipeline/__init__.py` calls it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from cskd.errors import counted
from cskd.machine.cores import Cores, affinity, usable_cores
from cskd.machine.launch import launched

# GOMP_SPINCOUNT is for GNU's OpenMP, in torch's wheels for Linux; KMP_BLOCKTIME, in ms, for LLVM's and Intel's.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user says how many threads
MOST_THREADS = 1024
MOST_PER_CORE = 4  # a resumed run keeps its number of threads up to here
FEWEST_WORKERS = 2  # one makes views while the other waits for the disk or hands over a batch, even on two cores
MOST_WORKERS = 32  # that are chosen: each holds whole batches in shared memory
TURN = 0.0005  # seconds
_SHARE = 4  # loader workers are left at most one core in so many: a view costs a fraction of a student's step


@dataclass(frozen=True)
class Threads:
    """count: threads of arithmetic of the main process; cores: its CPUs, of which `share` are this rank's; why: who says how
    many, '' where they were chosen here."""

    count: int
    cores: Cores
    share: int
    workers: int = 0
    why: str = ""

    def __str__(self) -> str:
        per_rank = f", {self.share} per rank" if self.share < self.cores.count else ""
        parts = [f"{counted(self.count, 'thread')}{self.why and f' ({self.why})'} of {self.cores}{per_rank}"]
        if self.count > 1:
            parts.append(waiting())
        parts.append(counted(self.workers, "loader worker"))
        slow = ": more threads than cores, which is slow" if self.count > self.share else ""
        return ", ".join(parts) + slow


def wait_passively(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's threads wait briefly, then sleep, unless the user says how they wait; before torch is loaded."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in environ:
        for name, value in WAITING.items():
            environ.setdefault(name, value)


def waiting() -> str:
    """How the threads of this process wait, in words."""
    found = {name: os.environ[name] for name in WAITING if name in os.environ}
    if found == WAITING:
        return "waiting passively"
    if not found:
        return "spinning at barriers (torch was loaded first: set OMP_WAIT_POLICY=passive before the start)"
    return "waiting as set: " + " ".join(f"{name}={value[:20]}" for name, value in found.items())


def choose_threads(
    asked: int | None = None, key: str = "", workers: int | None = 0, cores: Cores | None = None, gpu: bool = False
) -> Threads:
    """Threads for the main process: what the config's `key` asks for, else the user's OMP_NUM_THREADS, else this rank's share
    of the cores, less one for each of its loader workers, which may have a quarter of them, and for a GPU all but one.

    workers: None has them chosen, too (`chosen_workers`). gpu: the main process only feeds one.
    """
    cores = cores or usable_cores()
    share = _share(cores)
    workers = chosen_workers(share, gpu) if workers is None else workers
    if asked is not None:
        return Threads(asked, cores, share, workers, key)
    if (user := users_count()) is not None:
        return Threads(user[1], cores, share, workers, user[0])
    left = max(1, share - workers) if gpu else share - min(workers, share // _SHARE)
    return Threads(left, cores, share, workers)


def chosen_workers(share: int, gpu: bool) -> int:
    """Loader workers on so many cores. For a GPU all cores but the main process's, since views are all that the CPU makes, up
    to MOST_WORKERS; for a student or teacher on the CPU the quarter that `choose_threads` leaves them. At least FEWEST_WORKERS."""
    return max(FEWEST_WORKERS, min(MOST_WORKERS, share - 1) if gpu else share // _SHARE)


def users_count() -> tuple[str, int] | None:
    """The environment variable by which the user says how many threads, and the number; not torchrun's own OMP_NUM_THREADS=1."""
    for name in COUNTS:
        value = os.environ.get(name, "").partition(",")[0].strip()  # '4,2': of nested loops
        number = int(value[:9]) if value.isascii() and value.isdigit() else 0
        if 0 < number <= MOST_THREADS and not _set_by_torchrun(name, value):
            return name, int(value)
    return None


def begun_with(recorded: object, now: Threads, asked: bool) -> tuple[Threads, list[str]]:
    """The threads of work that is taken up again, and notes: sums are split over threads, so that another number of them
    gives other last bits.

    Args:    recorded: how many it was begun with; None: not known, as of older versions. asked: the config says how many.
    """
    if type(recorded) is not int or not 0 < recorded <= MOST_THREADS:
        return now, [f"with how many threads this was begun is not recorded; with {now.count} last bits may differ"]
    if recorded == now.count:
        return now, []
    if asked:
        begun = counted(recorded, "thread")
        return now, [f"begun with {begun}, {now.why} is {now.count}: last bits differ from here on"]
    if recorded > MOST_PER_CORE * now.share:
        return now, [
            f"begun with {recorded} threads, too many for {now.cores}: it goes on with {now.count}, and last bits differ from "
            "here on"
        ]
    return replace(now, count=recorded, why="as it was begun"), []


@contextlib.contextmanager
def computing_with(count: int) -> Iterator[None]:
    """So many threads of arithmetic inside; as many as before after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def brief_turns(gpu: bool) -> Iterator[None]:
    """On a GPU, have a thread that launches get the interpreter back at once, for the whole process.

    Every launch lets go of it, and a thread that computes in Python would keep it for 5 ms each time: 246 launches a second, and
    35,700 with turns of 0.5 ms (a core of an AMD EPYC; with nothing else to do: 331,000).
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, TURN) if gpu else before)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _share(cores: Cores) -> int:
    """The cores of one of the processes that torchrun or srun started here. Where each was given CPUs of its own, those, if they are fewer
    than its part of what their parent has."""
    ranks = launched().local_count
    if ranks == 1:
        return cores.count
    whole = replace(cores, allowed=max(cores.allowed, affinity(os.getppid()) or 0))
    return max(1, min(cores.count, whole.count // ranks))


def _set_by_torchrun(name: str, value: str) -> bool:
    """torchrun sets OMP_NUM_THREADS=1 where the user did not; what it was started with tells."""
    if name != "OMP_NUM_THREADS" or value != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with.split(b"\0"))
