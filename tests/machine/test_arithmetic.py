"""Arithmetic by name: what a config's word means on a device, and TF32 on and off without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cskd.errors import ConfigError
from cskd.machine.arithmetic import computing_in, full_precision, precision_here, tf32_products

BACKENDS: Any = torch.backends
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def precisions() -> tuple[str, str, str]:
    return tuple(b.fp32_precision for b in (BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul))


def older_getters() -> tuple[bool, bool, str]:
    """What torch.compile reads; each raises where it does not fit what the newer ones say."""
    return BACKENDS.cudnn.allow_tf32, BACKENDS.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()


def test_tf32_is_on_and_off_as_asked_and_then_as_it_was() -> None:
    before, older = precisions(), older_getters()
    for on in (True, False):
        with tf32_products(on):
            assert [p == "tf32" for p in precisions()] == [on] * 3
            assert older_getters() == (on, on, "high" if on else "highest")
            with tf32_products(not on):
                assert [p == "tf32" for p in precisions()] == [not on] * 3
            assert [p == "tf32" for p in precisions()] == [on] * 3
        assert precisions() == before and older_getters() == older
    with pytest.raises(RuntimeError), tf32_products(True):
        raise RuntimeError
    assert precisions() == before


def test_what_a_program_set_by_the_newer_calls_comes_back() -> None:
    before = precisions()
    try:
        BACKENDS.cudnn.conv.fp32_precision = BACKENDS.cudnn.rnn.fp32_precision = "ieee"
        with tf32_products(True):
            assert [p == "tf32" for p in precisions()] == [True] * 3
        assert precisions()[:2] == ("ieee", "ieee")
    finally:
        for backend, precision in zip((BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn), before, strict=False):
            backend.fp32_precision = precision


def test_float32_is_ieee_on_cuda_unless_tf32_is_asked_for() -> None:
    seen = {}
    for precision in ("float32", "tf32", "float64"):
        with computing_in(precision, CUDA):
            seen[precision] = "tf32" in precisions()
            with full_precision(CUDA):
                assert "tf32" not in precisions()
    assert seen == {"float32": False, "tf32": True, "float64": False}


def test_halves_are_autocast_and_nothing_around_reaches_the_others() -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with computing_in(precision, CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
            with full_precision(CPU):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_word_is_what_the_device_has_or_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr("cskd.machine.arithmetic.cpu_has_bf16", lambda has=has: has)
        assert precision_here("auto", CPU, "k") == ("bf16" if has else "float32")
    assert precision_here("tf32", CUDA, "k") == "tf32"
    with pytest.raises(ConfigError, match=r"teacher.precision is tf32 on cpu, expected a CUDA device; set .* float32"):
        precision_here("tf32", CPU, "teacher.precision")
    with pytest.raises(ConfigError, match="is float64 on mps"):
        precision_here("float64", torch.device("mps"), "teacher.precision")
