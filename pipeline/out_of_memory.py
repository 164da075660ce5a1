"""Where memory ends, on a device or on the machine: one line that says what fits, and which keys make it less.

What fits is found by trying: the work that failed is done again with smaller batches, once all that was computed is let go.
"""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

import torch

from cskd.errors import OutOfMemoryError

# What torch's allocator for CPUs says; and drivers and libraries of products. Allocators of devices have a type of their own.
_OF_THE_MACHINE = ("can't allocate memory", "not enough memory")
_TEXTS = (*_OF_THE_MACHINE, "out of memory", "STATUS_ALLOC_FAILED")
PATIENCE = 10.0  # seconds after which no smaller batch is begun

Attempt = Callable[[int], object]
Probe = Callable[[Iterable[int], Attempt], int | None]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, CUDA or numpy says that there is too little memory."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS))


def _of_the_machine(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OF_THE_MACHINE)


@contextlib.contextmanager
def explained(device: torch.device, advise: Callable[[Probe], str]) -> Iterator[None]:
    """Turn what torch raises in this block where memory ends into an OutOfMemoryError of one line.

    advise: the rest of that line, asked for after the tensors of the functions that were called in the block are let go. It
    gets a function that tries batches of descending sizes, and gives the first that there is memory for; None where there is none,
    where trying took too long, and on a CPU, where a try would take as long as the work and may end the process. It is not asked
    where the machine's own memory ended, as in a loader worker, while the work is on another device.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        if device.type != "cpu" and _of_the_machine(e):
            raise OutOfMemoryError(
                f"out of memory on the machine, not on {device}; use fewer loader workers, or end what else holds its memory"
            ) from e
        on_device, where = isinstance(e, torch.OutOfMemoryError), memory_of(device)
        _let_go(e, device)
        told = advise(lambda sizes, attempt: _largest(sizes, attempt, device) if on_device else None)
        raise OutOfMemoryError(f"out of memory on {where}{told}") from e


def nothing_to_lower(key: str) -> Callable[[Probe], str]:
    """Advice where no batch is at work yet: the network alone does not fit."""
    return lambda _: f", before the first batch; end what else holds its memory, or set {key} to another device"


def memory_of(device: torch.device) -> str:
    """A device and, where it has memory of its own, how much, and how much of that this process did not ask for."""
    if device.type != "cuda":
        return str(device)
    free, total = torch.cuda.mem_get_info(device)
    others = max(0, total - free - torch.cuda.memory_reserved(device))
    return f"{device} ({total / 2**30:.1f} GiB, {others / 2**30:.1f} of them held by others and the driver)"


def _largest(sizes: Iterable[int], attempt: Attempt, device: torch.device) -> int | None:
    until = time.monotonic() + PATIENCE
    for size in sizes:
        if time.monotonic() > until:
            break
        try:
            attempt(size)
            return size
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                break  # what went wrong first is what the user is told
            _let_go(e, device)
        finally:
            _free(device)
    return None


def _let_go(error: BaseException | None, device: torch.device) -> None:
    """Drop the locals of the functions that an exception came through, and what torch keeps of freed tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    _free(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
