"""How ranks end: one that fails says why, the others say which one failed, and no end of the process group holds a line up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # in its documentation, not in its __all__

import cskd.machine.ranks
from cskd.errors import ConfigError, RankError
from cskd.machine.launch import Launch, command_line, launched, restart_notes
from cskd.machine.ranks import _Heard, _Words, running_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
# The command line with one command of its own. Leaving the group takes longer than anyone waits, as NCCL's may.
SCRIPT = """
import ctypes, os, signal, sys, time
import torch
import torch.distributed as dist
from cskd import cli
from cskd.errors import DataError
from cskd.machine.ranks import running_ranks

how = sys.argv[1]

def stuck():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # nothing interrupts a kernel of NCCL
    ctypes.CDLL(None).sleep(100)

def app(standalone_mode):
    with running_ranks(torch.device("cpu")) as ranks:
        ranks.barrier()
        if how == "fine":
            return
        if ranks.rank == 1:
            if how in ("error", "hang"):
                raise DataError("shard 7 is cut off")
            if how == "bug":
                raise KeyError("colour")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            stuck()
        if how == "wait":
            sys.stdout.write("here\\n")
            sys.stdout.flush()
            time.sleep(100)
        ranks.sum(torch.zeros(1))

def destroy():
    print("group taken down", file=sys.stderr, flush=True)
    time.sleep(40)

if how != "fine":
    dist.destroy_process_group = destroy
cli.app = app
cli.main()
"""


def torchrun(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    script, pipe = tmp_path / "ranks.py", subprocess.PIPE
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), how]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(run, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def lines(text: str) -> list[str]:
    """Those of ours."""
    return [line for line in text.splitlines() if line.startswith(("cskd:", "interrupted"))]


@pytest.mark.parametrize(
    "how", ["error", pytest.param("bug", marks=pytest.mark.slow), pytest.param("hang", marks=pytest.mark.slow)]
)
def test_the_rank_that_fails_says_why_and_the_other_names_it(tmp_path: Path, how: str) -> None:
    """And takes no group down; the other ends by itself, before torchrun kills it, or it would not have said so."""
    process = torchrun(tmp_path, how)
    _, err = process.communicate(timeout=100)
    why = "KeyError: 'colour'" if how == "bug" else "shard 7 is cut off"
    own = "cskd: unexpected KeyError: 'colour'; the traceback is in " if how == "bug" else f"cskd: {why}"
    first, second = sorted(lines(err))
    assert (first, second[: len(own)]) == (f"cskd: rank 0 stops because rank 1 failed: {why}", own), err
    assert process.returncode == 1 and "group taken down" not in err


@pytest.mark.slow
def test_a_rank_that_is_killed_is_said_to_be_gone(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "kill")
    _, err = process.communicate(timeout=100)
    (line,) = lines(err)
    # torchrun interrupts the others at once: then they are interrupted, and torchrun says why.
    assert line.startswith(("cskd: rank 0 stops because another rank is gone", "interrupted; go on with: torchrun")), (
        err
    )
    assert "Signal 9 (SIGKILL)" in err


@pytest.mark.parametrize("kind", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_torchrun_prints_its_own_line_once(tmp_path: Path, kind: signal.Signals) -> None:
    process = torchrun(tmp_path, "wait")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    process.send_signal(kind)
    _, err = process.communicate(timeout=100)
    assert lines(err) == ["interrupted; go on with: torchrun --nproc-per-node 2 --no-python cskd wait"], err


@pytest.mark.slow
def test_ranks_that_finish_leave_in_good_order(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "fine")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0 and not lines(err), err


def test_a_rank_that_is_interrupted_while_it_asks_why_another_is_gone_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun interrupts it as soon as the other has failed, which may be before the store has answered."""

    class Interrupted(_Words):
        def __init__(self, *_: int) -> None:
            self.rank, self.ended = 0, threading.Event()
            self.answers = iter(list[SystemExit | _Heard]([SystemExit(143), _Heard(1, 1, "shard 7 is cut off")]))

        def heard(self, seconds: float) -> _Heard | None:
            answer = next(self.answers)
            if isinstance(answer, SystemExit):
                raise answer
            return answer

        def watch(self) -> None: ...

    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cskd.machine.ranks, "rendezvous", lambda *_, **about: iter([(HashStore(), 0, 2)]))
    monkeypatch.setattr(cskd.machine.ranks, "store_of_this_start", lambda *_: None)
    monkeypatch.setattr(cskd.machine.ranks, "_Words", Interrupted)
    monkeypatch.setattr(cskd.machine.ranks.Ranks, "total", lambda *_: 1)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **about: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with (
        pytest.raises(RankError, match="rank 0 stops because rank 1 failed: shard 7 is cut off"),
        running_ranks(torch.device("cpu")),
    ):
        raise RuntimeError("[gloo] Connection closed by peer")


def test_two_ranks_on_one_gpu_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: str, **about: object) -> None:
        assert (backend, about["device_id"]) == ("nccl", torch.device("cuda:0"))
        raise dist.DistBackendError(
            "NCCL error ... Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 18000"
        )

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cskd.machine.ranks, "rendezvous", lambda *_, **about: iter([(HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with (
        pytest.raises(ConfigError, match="rank 1 was given the GPU cuda:0, which another rank has"),
        running_ranks(torch.device("cuda:0")),
    ):
        pass


def test_the_environment_tells_torchrun_srun_and_a_process_alone() -> None:
    ranks = {"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    step = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "1"}
    step["SLURM_STEP_TASKS_PER_NODE"] = "1,2(x2)"
    assert launched(ranks) == launched(step | ranks) == Launch(9, 16, 1, 8, "torchrun")
    assert launched(step) == Launch(4, 5, 1, 2, "srun")
    batch = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # a batch script, outside of any srun
    assert launched({}) == launched(batch) == Launch()


def test_ranks_that_start_again_on_several_machines_say_what_machines_that_come_later_need() -> None:
    """Neither on one machine, nor where nothing starts again, nor where it is so already."""
    again = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    (note,) = restart_notes(again)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in note
    for other in (
        {"GROUP_WORLD_SIZE": "1"},
        {"TORCHELASTIC_MAX_RESTARTS": "0"},
        {"TORCHELASTIC_USE_AGENT_STORE": "False"},
    ):
        assert restart_notes({**again, **other}) == []
    assert restart_notes({}) == []


def test_the_line_to_go_on_with_has_as_many_ranks_and_machines() -> None:
    one = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}
    two = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
    arguments = ["train", "my config.yaml"]
    assert command_line(arguments, {}) == "cskd train 'my config.yaml'"
    assert command_line(arguments, one) == "torchrun --nproc-per-node 8 --no-python cskd train 'my config.yaml'"
    assert command_line(arguments, two) == (
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node1:29400 --nproc-per-node 8 --no-python "
        "cskd train 'my config.yaml' (on each of the 2 machines)"
    )
    elastic = command_line(arguments, {**two, "TORCHELASTIC_MAX_RESTARTS": "10", "TORCHELASTIC_RUN_ID": "my run"})
    assert "torchrun --max-restarts 10 --rdzv-id 'my run' --nnodes 2" in elastic
    assert elastic.endswith("(on each machine, with the --nnodes and --rdzv-endpoint that it had)")
