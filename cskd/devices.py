"""Which device to use, and where bf16 autocast is a gain."""

from __future__ import annotations

import contextlib

import torch

from cskd.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """'auto' (CUDA, then Apple's MPS, then the CPU) or a torch device name. ConfigError when it is not there."""
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


def autocast(setting: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast for 'bf16', and for 'auto' on GPUs that compute in bf16; CPUs mostly lose by it."""
    use = setting == "bf16" or (setting == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16) if use else contextlib.nullcontext()
