"""The device that is asked for, and what it means for a process on the CPU."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cskd.errors import ConfigError
from cskd.machine.arithmetic import autocast, half
from cskd.machine.devices import keep_freed_memory, pick_device

ROOT = Path(__file__).resolve().parent.parent.parent
GLIBC = platform.libc_ver()[0] == "glibc"
PAGES = """
import os, resource, torch
from cskd.machine.devices import pick_device
if os.fork():
    os.wait()
    pick_device("cpu")
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):  # glibc 2.36 finds the freed piece again after seven at most: small ones lie between the large ones at first
    new_pages()
print(min(new_pages() for _ in range(3)), flush=True)
"""


def test_a_name_gives_its_device_or_one_line() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:77", "meta", "mps:77"):  # of the last one torch's own text fills a screen
        with pytest.raises(ConfigError, match=f"device '{name}' is not usable here") as error:
            pick_device(name)
        assert len(str(error.value)) <= 300


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """A machine with so many GPUs, in a process that was started so. Returns: which of them became the current one."""

    def machine(count: int, **environ: str) -> list[int]:
        chosen: list[int] = []
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
        monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
        return chosen

    return machine


TORCHRUN = {"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("started", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_each_local_process_has_a_gpu_of_its_own(
    gpus: Callable[..., list[int]], name: str, started: dict[str, str]
) -> None:
    for count, own in ((4, 3), (8, 3), (1, 0)):  # 1: of several tasks each was given one
        chosen = gpus(count, **started)
        assert pick_device(name) == torch.device("cuda", own)
        assert chosen == [own]
    gpus(2, **started)
    with pytest.raises(ConfigError, match="started 4 processes here, which see 2 GPUs; start at most 2 per machine"):
        pick_device(name)


def test_one_gpu_by_its_number_is_for_one_process(gpus: Callable[..., list[int]]) -> None:
    chosen = gpus(8)
    assert pick_device("cuda:5") == torch.device("cuda:5") and pick_device("auto") == torch.device("cuda:0")
    assert chosen == [5, 0]
    gpus(8, **TORCHRUN)
    with pytest.raises(
        ConfigError, match=r"train\.device is cuda:0, one GPU for the 4 processes that torchrun started"
    ):
        pick_device("cuda:0", "train.device")
    gpus(1, **TORCHRUN)
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_mps_is_used_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.skipif(not GLIBC, reason="only glibc can be asked to keep memory")
def test_on_the_cpu_a_process_asks_the_system_for_the_memory_of_a_batch_once() -> None:
    assert keep_freed_memory()
    said = subprocess.run([sys.executable, "-c", PAGES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    plain, on_the_cpu = map(int, said.split())
    assert on_the_cpu < 100 < plain


@pytest.mark.parametrize("has", [False, True])
def test_auto_is_bf16_on_processors_that_compute_in_it(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr("cskd.machine.arithmetic.cpu_has_bf16", lambda: has)
    cpu = torch.device("cpu")
    assert [half(setting, cpu) == "bf16" for setting in ("auto", "bf16", "none")] == [has, True, False]
    with autocast("auto", cpu):
        assert torch.is_autocast_enabled("cpu") == has
