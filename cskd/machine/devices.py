"""Which device to use, and where autocast in bf16 or fp16 is a gain."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch

from cskd.errors import ConfigError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FP16 = 7, 0  # compute capability of the first CUDA devices with fast products of fp16


def pick_device(name: str) -> torch.device:
    """'auto' (CUDA, then Apple's MPS, then the CPU) or a torch device name. ConfigError when it is not there.

    Where it is the CPU, the process keeps the memory it frees from now on.
    """
    device = _named_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _named_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device {name!r} is not usable here ({str(e).splitlines()[0]}); use auto or cpu") from None
    return device


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


def autocast(setting: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast in what `half` says, else nothing."""
    kind = half(setting, device)
    return contextlib.nullcontext() if kind == "none" else torch.autocast(device.type, HALF[kind])


def half(setting: str, device: torch.device) -> str:
    """What a config's 'autocast' means here: 'bf16', 'fp16' or 'none'. 'auto' is bf16 where `uses_bf16`, else fp16 on CUDA
    devices that gain by it."""
    if setting != "auto":
        return setting
    if uses_bf16(setting, device):
        return "bf16"
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP16 else "none"


def uses_bf16(setting: str, device: torch.device) -> bool:
    """What a config's 'autocast' means here: 'auto' is bf16 on devices that multiply such numbers, not only imitate it."""
    if setting == "auto":
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return device.type == "cpu" and cpu_has_bf16()
    return setting == "bf16"


def arithmetic(setting: str, device: torch.device) -> str:
    """The arithmetic of a student's forward under a config's 'autocast', for reports: 'bf16', 'fp16', 'float32', or 'float32' with
    what is tf32 at present."""
    if (kind := half(setting, device)) != "none":
        return kind
    backends: Any = torch.backends
    tf32 = {"convolutions": backends.cudnn.conv, "matrix products": backends.cuda.matmul}
    rounded = [what for what, backend in tf32.items() if backend.fp32_precision == "tf32"]
    return f"float32, {' and '.join(rounded)} tf32" if rounded and device.type == "cuda" else "float32"


def cpu_has_bf16() -> bool:
    """Whether the processor has AVX512-BF16 or AMX. There a forward of MobileNetV2 takes 0.6 of the time, a training step of
    DeiT-Ti 0.4 (2 cores of an AMD EPYC). Other kinds count as without: nothing was measured on them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
