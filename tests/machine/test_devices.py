"""The device that is asked for, and what it means for a process on the CPU."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cskd.errors import ConfigError
from cskd.machine.devices import autocast, keep_freed_memory, pick_device, uses_bf16

ROOT = Path(__file__).resolve().parent.parent.parent
GLIBC = platform.libc_ver()[0] == "glibc"
PAGES = """
import resource, sys, torch
from cskd.machine.devices import pick_device
if sys.argv[1] == "cpu":
    pick_device("cpu")
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):  # glibc 2.36 finds the freed piece again after seven at most: small ones lie between the large ones at first
    new_pages()
print(min(new_pages() for _ in range(3)))
"""


def test_a_name_gives_its_device_or_one_line() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:77"):
        with pytest.raises(ConfigError, match=f"device '{name}' is not usable here"):
            pick_device(name)


@pytest.mark.skipif(not GLIBC, reason="only glibc can be asked to keep memory")
def test_on_the_cpu_a_process_asks_the_system_for_the_memory_of_a_batch_once() -> None:
    assert keep_freed_memory()
    new = {}
    for how in ("cpu", "plain"):
        command = [sys.executable, "-c", PAGES, how]
        new[how] = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert new["cpu"] < 100 < new["plain"]


@pytest.mark.parametrize("has", [False, True])
def test_auto_is_bf16_on_processors_that_compute_in_it(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr("cskd.machine.devices.cpu_has_bf16", lambda: has)
    cpu = torch.device("cpu")
    assert [uses_bf16(setting, cpu) for setting in ("auto", "bf16", "none")] == [has, True, False]
    with autocast("auto", cpu):
        assert torch.is_autocast_enabled("cpu") == has
