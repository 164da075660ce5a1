"""The arithmetic of a network on a device: which numbers its products are made of, and how to have that and no other."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from cskd.errors import ConfigError
from cskd.machine.devices import HALF as HALF
from cskd.machine.devices import uses_bf16


def precision_here(precision: str, device: torch.device, key: str) -> str:
    """What a precision of the config is on a device: `auto` is bf16 where that is a gain, else float32.

    Raises:  ConfigError where the device has no such numbers. key: of the config, for the message.
    """
    if precision == "auto":
        return "bf16" if uses_bf16("auto", device) else "float32"
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"{key} is tf32 on {device.type}, expected a CUDA device; set {key}: float32")
    if precision == "float64" and device.type == "mps":
        raise ConfigError(f"{key} is float64 on mps, which has no such numbers; set {key}: float32")
    return precision


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Run what follows in bf16 or fp16 by autocast, else as its tensors are; products of float32 in TF32 if `tf32`, else in
    IEEE's float32 (on CUDA devices torch's default for convolutions is TF32). One thread at a time on CUDA devices."""
    half = HALF.get(precision)
    with torch.autocast(device.type, half, enabled=half is not None), float32_products(precision == "tf32", device):
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
