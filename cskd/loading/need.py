"""What the batches under way take of memory: known from the config, and looked at before the first one is made.

A worker writes its batches into `prefetch` + 1 shared buffers (`loading/shared.py`), which lie in /dev/shm. That is a file
system with a size of its own, 64 MB in a container of Docker; where it is full, a worker dies of SIGBUS. For a GPU the main
process page-locks the buffers, so that the system can't move them elsewhere.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cskd.errors import ConfigError, counted

PREFETCH = 4  # results that a worker keeps ready, where nobody says how many
# Results of all workers together: more only fill memory, since one that is late is waited for all the same.
MOST_AHEAD = 32
SHM = Path("/dev/shm")
GB = 1e9


def prefetch_of(workers: int, prefetch: int) -> int:
    """Results that each of so many workers keeps ready: those asked for, but all together at most MOST_AHEAD; of two, a worker
    makes one while the other waits to be read."""
    return min(prefetch, max(2, MOST_AHEAD // max(1, workers)))


def shared_bytes(workers: int, prefetch: int, batch: int) -> int:
    """Bytes in /dev/shm of a stream whose batches have `batch` bytes."""
    return workers * (prefetch_of(workers, prefetch) + 1) * batch


def refuse_little_memory(
    section: str, workers: int, prefetch: int, batch: int, local_count: int, pinned: bool, shm: Path = SHM
) -> None:
    """ConfigError where the batches under way can't fit: in the shared memory that is free, all local processes' in all of it,
    and page-locked in the machine's memory. section: of the config, whose keys mend it; batch: bytes of one."""
    if not workers:
        return
    shared = shared_bytes(workers, prefetch, batch)
    each = f"{counted(workers, 'worker')} x {prefetch_of(workers, prefetch) + 1} batches of {batch / 1e6:,.0f} MB"
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        room = min(usage.free, usage.total // local_count)
        if shared > room:
            least = 1 if section == "train" else prefetch  # stage 1 has no key for it
            fewer = next((n for n in range(workers, 0, -1) if shared_bytes(n, least, batch) <= room), 0)
            keys = f"{section}.workers={fewer}"
            if section == "train" and fewer:
                keys += f" and train.prefetch={max(1, min(prefetch, room // (fewer * batch) - 1))}"
            size = -(-local_count * shared // 10**9)
            raise ConfigError(
                f"{shm} has room for {room / GB:.2f} GB of batches, expected {shared / GB:.2f} ({each}); in a container start it "
                f"with --shm-size={size}g, or set {keys}"
            )
    if pinned and (memory := _memory()) is not None:
        need = local_count * shared
        if need > memory:
            raise ConfigError(
                f"batches under way take {need / GB:.1f} GB of page-locked memory ({each}, {local_count} local processes), the "
                f"machine has {memory / GB:.1f}; set {section}.workers lower than {workers}"
            )


def _memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
