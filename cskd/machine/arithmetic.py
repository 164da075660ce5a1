"""The arithmetic of a network on a device: which numbers its products are made of, and how to have that and no other."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from cskd.errors import ConfigError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Compute capability of the first CUDA devices with fast products of such numbers.
_FP16, _BF16 = (7, 0), (8, 0)


def precision_here(precision: str, device: torch.device, key: str) -> str:
    """What a precision of the config is on a device: `auto` is bf16 where that is a gain, else float32.

    Raises:  ConfigError where the device has no such numbers. key: of the config, for the message.
    """
    if precision == "auto":
        return "bf16" if _gains_by_bf16(device) else "float32"
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"{key} is tf32 on {device.type}, expected a CUDA device; set {key}: float32")
    if precision == "float64" and device.type == "mps":
        raise ConfigError(f"{key} is float64 on mps, which has no such numbers; set {key}: float32")
    return precision


def half(setting: str, device: torch.device) -> str:
    """What a config's 'autocast' means here: 'bf16', 'fp16' or 'none'. 'auto' is bf16 where the device multiplies such numbers,
    not only imitates it, else fp16 on CUDA devices that gain by it."""
    if setting != "auto":
        return setting
    if _gains_by_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP16 else "none"


def _gains_by_bf16(device: torch.device) -> bool:
    if device.type == "cuda":  # torch.cuda.is_bf16_supported asks the current device, which may be another one
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= _BF16
    return device.type == "cpu" and cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether the processor has AVX512-BF16 or AMX. There a forward of MobileNetV2 takes 0.6 of the time, a training step of
    DeiT-Ti 0.4 (2 cores of an AMD EPYC). Other kinds count as without: nothing was measured on them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def autocast(setting: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast in what `half` says, else nothing."""
    kind = half(setting, device)
    return contextlib.nullcontext() if kind == "none" else torch.autocast(device.type, HALF[kind])


def arithmetic(setting: str, device: torch.device) -> str:
    """The arithmetic of a student's forward under a config's 'autocast', for reports: 'bf16', 'fp16', 'float32', or 'float32' with
    what is tf32 at present."""
    if (kind := half(setting, device)) != "none":
        return kind
    backends: Any = torch.backends
    tf32 = {"convolutions": backends.cudnn.conv, "matrix products": backends.cuda.matmul}
    rounded = [what for what, backend in tf32.items() if backend.fp32_precision == "tf32"]
    return f"float32, {' and '.join(rounded)} tf32" if rounded and device.type == "cuda" else "float32"


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Run what follows in bf16 or fp16 by autocast, else as its tensors are; products of float32 in TF32 if `tf32`, else in
    IEEE's float32 (on CUDA devices torch's default for convolutions is TF32). One thread at a time on CUDA devices."""
    dtype = HALF.get(precision)
    with torch.autocast(device.type, dtype, enabled=dtype is not None), float32_products(precision == "tf32", device):
        yield


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Float32 in IEEE's float32: no autocast, and no TF32 in convolutions and matrix products of CUDA devices."""
    return computing_in("float32", device)


def float32_products(tf32: bool, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """`tf32_products` on CUDA devices; others have no such choice."""
    return tf32_products(tf32) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def tf32_products(on: bool) -> Iterator[None]:
    """Convolutions and matrix products of float32 on CUDA devices in TF32, or not; for the whole process.

    Through the calls of before torch 2.9: torch.compile reads those, and raises where the newer ones alone were set (pytorch
    issue 166387).
    """
    backends: Any = torch.backends
    own = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [backend.fp32_precision for backend in own]
    _set_tf32(on, on)
    try:
        yield
    finally:
        _set_tf32(before[0] == "tf32", before[2] == "tf32")
        for backend, precision in zip(own, before, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _set_tf32(convolutions: bool, products: bool) -> None:
    backends: Any = torch.backends
    _warn_once()
    if (backends.cudnn.conv.fp32_precision == "tf32") != convolutions:
        backends.cudnn.allow_tf32 = convolutions
    if (backends.cuda.matmul.fp32_precision == "tf32") != products:
        torch.set_float32_matmul_precision("high" if products else "highest")


@functools.cache
def _warn_once() -> None:
    """Let torch say now, unheard, what it says once a process about these calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
