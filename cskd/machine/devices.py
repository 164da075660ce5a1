"""Which device to use, and the memory of a process on the CPU."""

from __future__ import annotations

import ctypes
import re

import torch

from cskd.errors import ConfigError, counted
from cskd.machine.launch import Launch, launched


def pick_device(name: str, key: str = "device") -> torch.device:
    """'auto' (CUDA, else the CPU) or a torch device name, with an index on CUDA, where it becomes the current device.

    Of the processes that torchrun or srun started on this machine each gets a GPU of its own: 'auto' and 'cuda' are the one of
    its local rank, or the only one that it sees, where each was given one. MPS is used where it is named: nobody has run it yet.
    Where it is the CPU, the process keeps the memory it frees from now on.

    Raises:  ConfigError naming the config's `key` when it is not there, or is one GPU for several processes.
    """
    device = named_device(name, key)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what a library allocates without naming a device, and `compile`, follow it
    if device.type == "cpu":
        keep_freed_memory()
    return device


def named_device(name: str, key: str = "device") -> torch.device:
    """The device that `pick_device` gives, which it also makes this process's own. Raises as that."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    launch = launched()
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            seen = torch.cuda.device_count()
            if device.index is None:
                device = torch.device("cuda", _gpu_of(launch, seen, key))
            elif launch.local_count > 1 and seen > 1:
                raise ConfigError(
                    f"{key} is {name}, one GPU for the {launch.local_count} processes that {launch.by} started here; set {key} "
                    "to auto, which gives each its own"
                )
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("its tensors hold no numbers")
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"{key} {name!r} is not usable here ({_first_sentence(e)}); use auto or cpu") from None
    return device


def _first_sentence(error: Exception) -> str:
    """Of a text of torch's, which may fill a screen."""
    return str(error).split("\n")[0].split(". ")[0][:120]


def _gpu_of(launch: Launch, seen: int, key: str) -> int:
    """Which of the GPUs that this process sees is its own."""
    if launch.count == 1:
        return torch.cuda.current_device()
    if seen > 1 and launch.local >= seen:
        raise ConfigError(
            f"{key}: {launch.by} started {launch.local_count} processes here, which see {seen} GPUs; start at most {seen} per "
            f"machine, or set {key}=cpu"
        )
    return launch.local if seen > 1 else 0


def device_list(text: str) -> list[str]:
    """The devices that `--devices` names, each for a process of its own: `all` GPUs, `N` of them, `cuda:0,2`, `cpu:N`.

    Raises:  ConfigError for one that is not here, or is named twice, and for any other text.
    """
    seen, word = torch.cuda.device_count(), text.strip()
    here = f"this machine has {counted(seen, 'GPU')}"
    if word in ("all", "cuda"):
        if seen:
            return [f"cuda:{i}" for i in range(seen)]
        raise ConfigError(f"--devices {word}: {here}; write cpu:N for N processes on the CPU")
    if match := re.fullmatch(r"cpu(?::([1-9]\d{0,2}))?", word):
        return [f"cpu:{i}" for i in range(int(match[1] or 1))]
    if re.fullmatch(r"[1-9]\d{0,3}", word):
        listed = list(range(int(word)))
    elif match := re.fullmatch(r"cuda:(\d{1,4}(?:,\d{1,4})*)", word):
        listed = [int(part) for part in match[1].split(",")]
    else:
        raise ConfigError(f"--devices {text[:40]!r} names none; write all, a number of GPUs, cuda:0,2 or cpu:2")
    if (most := max(listed)) >= seen:
        raise ConfigError(f"--devices {word[:40]}: there is no cuda:{most}, {here}; name others, or cpu:N")
    if len(set(listed)) < len(listed):
        raise ConfigError(f"--devices {word[:40]} names a GPU twice; name each once")
    return [f"cuda:{i}" for i in listed]


def keep_freed_memory() -> bool:
    """Have this process keep the memory it frees for what it allocates next, instead of handing it back to the system.

    Batches and activations on a CPU are tens of MB each, which glibc maps again every time: the kernel clears and faults in
    each page, 2 ms an image in a loader of 224-pixel float batches, measured on a virtual machine. Returns whether the C
    library could be asked (glibc only; others stay as they are). The heap grows for the first few batches (glibc 2.36: seven,
    of 64 MB each) before freed pieces lie side by side and are used again; then it stays.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc; TypeError: Windows has no library of the process itself
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # parameters of mallopt(3)
    # One arena for all threads: the others are made of pieces of 64 MB, which are handed back whenever one is empty.
    return all(bool(mallopt(what, value)) for what, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)))
