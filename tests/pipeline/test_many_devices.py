"""Stage 1 with a process a device: one cache, one exit code, whatever happens to one of the processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cskd.config import to_yaml
from cskd.errors import ConfigError, CskdError
from cskd.files.read import parse_json
from cskd.machine.devices import device_list
from cskd.machine.launch import DEVICE_OF, WORKER, WORKERS, Worker, launched, worker
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import verify
from cskd.pipeline.many_devices import cache_teacher_on
from cskd.pipeline.passes import missing_passes
from cskd.pipeline.show.report import print_report
from tests.caches import make_tiny_cache, make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config


@pytest.mark.parametrize(
    ("text", "seen", "named"),
    [
        ("all", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 1, ["cuda:0"]),
        ("3", 4, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:0,2", 3, ["cuda:0", "cuda:2"]),
        ("cuda:1", 2, ["cuda:1"]),
        (" cpu:2 ", 0, ["cpu:0", "cpu:1"]),
        ("cpu", 8, ["cpu:0"]),
    ],
)
def test_devices_are_named_as_a_user_counts_them(
    text: str, seen: int, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert device_list(text) == named


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("all", "this machine has 0 GPUs; write cpu:N"),
        ("cuda", "this machine has 0 GPUs"),
        ("2", "there is no cuda:1"),
        ("cuda:0", "there is no cuda:0"),
        *(
            (text, "names none")
            for text in ("0", "-1", "cpu:0", "cpu:-2", "gpu", "cuda:", "cuda:a", "cuda:0;1", "1.5", "cpu:1,2", ",")
        ),
    ],
)
def test_devices_that_are_not_here_are_refused_in_a_line(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=said) as caught:
        device_list(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_gpu_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match="names a GPU twice"):
        device_list("cuda:1,2,1")


def _array(number: int, first: int, step: int, count: int) -> dict[str, str]:
    said = {"ID": number, "MIN": first, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in said.items()}


_STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
_TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "number", "count"),
    [
        ({}, 0, 0),
        ({DEVICE_OF: "1/4"}, 1, 4),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4"}, 5, 8),
        (_STEP, 3, 4),
        (_STEP | _array(2, 0, 1, 5), 11, 20),
        (_STEP | {"SLURM_ARRAY_TASK_ID": "9"}, 39, 0),
        (_STEP | _array(2, 0, 1, 5) | {WORKER: "6", WORKERS: "7"}, 6, 7),
        (_STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, 3, 4),  # srun --mpi=pmi2
        (_STEP | {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6"}, 5, 6),  # mpirun starts its daemons by srun
        (_STEP | _TWO, 7, 8),
        (_array(2, 0, 1, 5) | _TWO, 5, 10),
        (_array(2, 0, 1, 5) | _TWO | {"LOCAL_WORLD_SIZE": "1"}, 1, 2),
        ({"JOB_COMPLETION_INDEX": "2", WORKERS: "5"} | _TWO, 5, 10),
        (_array(2, 0, 1, 5) | {"PMI_RANK": "1", "PMI_SIZE": "2"}, 5, 10),
        ({"SLURM_ARRAY_TASK_ID": "7"}, 7, 0),
        (_array(7, 1, 2, 8), 3, 8),
        (_array(7, 1, 1, 3), 7, 0),  # --array=1,3,7
        (_array(3, 0, 1, 8) | {DEVICE_OF: "1/4"}, 13, 32),
        ({"JOB_COMPLETION_INDEX": "2"}, 2, 0),
        ({"JOB_COMPLETION_INDEX": "2", WORKERS: "5"}, 2, 5),
        ({"JOB_COMPLETION_INDEX": "5", WORKERS: "5"}, 5, 0),
        ({"JOB_COMPLETION_INDEX": "2", DEVICE_OF: "1/4"}, 9, 0),
        ({"SLURM_ARRAY_TASK_ID": "x", DEVICE_OF: "3/4"}, 3, 4),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "3", "AWS_BATCH_JOB_ARRAY_SIZE": "10"}, 3, 10),
        ({"CLOUD_RUN_TASK_INDEX": "0", "CLOUD_RUN_TASK_COUNT": "2", DEVICE_OF: "3/4"}, 3, 8),
        ({"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2"}, 1, 2),
        ({"PBS_ARRAY_INDEX": "3"}, 3, 0),
        ({"SGE_TASK_ID": "5", "SGE_TASK_FIRST": "1", "SGE_TASK_LAST": "9", "SGE_TASK_STEPSIZE": "2"}, 2, 5),
        ({"SGE_TASK_ID": "undefined", DEVICE_OF: "3/4"}, 3, 4),
        ({"LSB_JOBINDEX": "8", "LSB_JOBINDEX_END": "8"}, 7, 8),
        ({"LSB_JOBINDEX": "0", "LSB_JOBINDEX_END": "0", DEVICE_OF: "3/4"}, 3, 4),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, 2, 4),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, 2, 4),
    ],
)
def test_a_process_knows_its_number_from_whoever_started_it(environ: dict[str, str], number: int, count: int) -> None:
    assert worker(environ) == Worker(number, count)
    if DEVICE_OF in environ:
        launch = launched(environ)
        assert (launch.local_count, launch.speaks) == (4, False)


def test_each_begins_elsewhere_and_all_make_the_same_passes(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, skip=[(0, 0), (1, 0), (1, 2)])
    passes = missing_passes(cache)
    assert passes == [(0, (0,)), (1, (0, 2))]
    assert missing_passes(cache, 1) == passes[::-1]
    assert missing_passes(cache, 2) == passes


def test_of_the_ranks_of_torchrun_the_first_one_speaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each makes what the others have not made, without a process group."""
    (tmp_path / "net.py").write_text(TEACHER)
    make_tiny_data(tmp_path / "train", n=10)
    for rank in "10":
        for name, value in (_TWO | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, value)
        print_report(cache_teacher(config(tmp_path, cache={"views": 1 + (rank == "0")})), True, None)
        said = capsys.readouterr()
        assert (said.out.count("\n"), bool(said.err)) == (int(rank == "0"), rank == "0")
    assert json.loads(said.out)["units"] == 1 and verify(tmp_path / "cache", quiet=True).sealed


def test_under_torchrun_devices_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started 2 here; leave --devices out"):
        cache_teacher_on(config(tmp_path), "cpu:2", quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=200, block=20, shard=10)
    return folder


@pytest.mark.slow
def test_two_processes_make_the_cache_that_one_makes(base: Path) -> None:
    one = cache_teacher(config(base, cache={"path": str(base / "one"), "views": 6}), quiet=True)
    settings = config(base, cache={"path": str(base / "two"), "views": 6})
    both = cache_teacher_on(settings, "cpu:2", quiet=True)
    assert both.content_root == one.content_root
    assert (both.units, both.images) == (one.units, one.images)
    assert cache_teacher_on(settings, "cpu:2", quiet=True).units == 0


@pytest.mark.slow
def test_the_first_error_has_its_device_and_ends_all(base: Path) -> None:
    wrong = config(base, cache={"path": str(base / "wrong")}, teacher={"min_top1": 0.99})
    with pytest.raises(CskdError, match=r"^cpu:0: .*min_top1"):
        cache_teacher_on(wrong, "cpu:2", quiet=True)


def begun(base: Path, name: str, **cache: Any) -> tuple[subprocess.Popen[bytes], Path]:
    """The command on a cache that takes a while, when its units have begun to come."""
    root = base / name
    settings = config(base, cache={"path": str(root), "views": 30, **cache})
    (base / f"{name}.yaml").write_text(to_yaml(settings))
    command = [
        sys.executable,
        "-m",
        "cskd.cli",
        "cache-teacher",
        str(base / f"{name}.yaml"),
        "--devices",
        "cpu:2",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not owners(root):  # the first process is at work; the second one may still be loading torch
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.5)
    return process, root


def owners(root: Path) -> set[int]:
    """Processes that have claims."""
    found = set()
    for claim in (root / "claims").glob("b*"):
        try:
            found.add(int(claim.read_text().split()[1]))
        except (OSError, IndexError):
            continue
    return found


@pytest.mark.slow
def test_the_work_of_a_process_that_was_killed_is_taken_up(base: Path) -> None:
    process, root = begun(base, "killed")
    os.kill(min(owners(root)), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    report = parse_json(out)
    assert any("killed by SIGKILL" in note for note in report["notes"])
    assert verify(root, quiet=True).sealed


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False])
def test_an_interrupt_ends_all_and_the_same_command_goes_on(base: Path, everyone: bool) -> None:
    """Ctrl-C reaches the whole group; SIGTERM of a batch system only the command."""
    process, root = begun(base, f"interrupted-{everyone}")
    workers = owners(root)
    os.killpg(process.pid, signal.SIGINT) if everyone else process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if everyone else 143)
    text = err.decode()
    assert text.count("interrupted; go on with: cskd cache-teacher") == 1 and "Traceback" not in text
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert owners(root) == set()
    settings = config(base, cache={"path": str(root), "views": 30})
    cache_teacher(settings, quiet=True)
    assert verify(root, quiet=True).sealed
