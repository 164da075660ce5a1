"""Cores from affinity and control groups, threads from cores, how they wait, and that a run keeps their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cskd.pipeline.train_step
import cskd.pipeline.training_run
import cskd.pipeline.unit_line
from cskd.errors import ConfigError
from cskd.machine import cores as cores_module
from cskd.machine import threads as threads_module
from cskd.machine.cores import Cores, usable_cores
from cskd.machine.threads import (
    TURN,
    WAITING,
    Threads,
    begun_with,
    brief_turns,
    choose_threads,
    computing_with,
    wait_passively,
)
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.conflicts import refuse_other_run, run_identity
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from cskd.student.optim import reseed_step
from cskd.teacher.lanes import Lanes
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", *WAITING):
        monkeypatch.delenv(name, raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)


def groups(tmp_path: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A made-up /proc/self; MNT in mounts is a folder that holds `files`."""
    proc, mnt = tmp_path / "proc", tmp_path / "sys fs"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup)
    point = str(mnt).replace(" ", "\\040")
    (proc / "mountinfo").write_text("".join(line.replace("MNT", point) + "\n" for line in mounts))
    for name, text in files.items():
        path = mnt / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc


V2 = "41 31 0:38 / MNT rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / MNT/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_DOCKER = "32 31 0:29 /docker/0af MNT/cpu rw master:12 - cgroup cgroup rw,cpu"


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("cores", "gpu", "workers", "threads"),
    [(1, False, 2, 1), (2, False, 2, 2), (16, False, 4, 12), (2, True, 2, 1), (16, True, 15, 1), (192, True, 32, 160)],
)
def test_workers_are_chosen_from_the_cores_and_for_a_gpu_get_all_but_one(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpu: bool, workers: int, threads: int
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    chosen = choose_threads(workers=None, cores=Cores(cores), gpu=gpu)
    assert (chosen.workers, chosen.count) == (workers, threads)
    assert choose_threads(workers=0, cores=Cores(cores), gpu=gpu).workers == 0
    if cores == 192:  # each of eight ranks has an eighth of them
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        assert choose_threads(workers=None, cores=Cores(cores), gpu=gpu).workers == 23


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "quota"),
    [
        ("0::/\n", [V2], {"cpu.max": "150000 100000\n"}, 1.5),  # a container's own namespace
        ("0::/a/b\n", [V2], {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),  # of the one above
        ("0::/a/b\n", [V2], {"a/b/cpu.max": "200000 50000\n", "a/cpu.max": "600000 100000\n"}, 4.0),
        ("0::/a\n", [V2], {"a/cpu.max": "max 100000\n"}, None),
        ("0::/a\n", [V2], {"a/cpu.max": "max"}, None),
        ("0::/a\n", [V2], {"a/other": ""}, None),  # the controller is not enabled
        ("0::/a\n", [V2], {"a/cpu.max": "rubbish", "cpu.max": "300000 100000"}, 3.0),
        ("0::/a\n", [V2], {"a/cpu.max": "100000 0"}, None),
        ("0::/../../other\n", [V2], {"cpu.max": "250000 100000"}, 2.5),  # a process that was moved in from outside
        ("4:cpu,cpuacct:/a/b\n2:memory:/x\n", [V1], v1("cpu,cpuacct/a/b", -1) | v1("cpu,cpuacct/a", 250_000), 2.5),
        ("4:cpu,cpuacct:/a\n", [V1], v1("cpu,cpuacct/a", -1), None),
        ("3:cpu:/docker/0af\n", [V1_DOCKER], v1("cpu", 50_000), 0.5),  # as the host names it, seen in the container
        ("3:cpu:/docker/0af/in\n", [V1_DOCKER], v1("cpu", -1) | v1("cpu/in", 300_000), 3.0),
        ("3:cpu:/a\n0::/a\n", [V1, V2], {**v1("cpu,cpuacct/a", 350_000), "a/cgroup.procs": ""}, 3.5),  # a hybrid
        ("2:memory:/a\n", ["1 1 0:1 / MNT rw - cgroup cgroup rw,memory", V2], {}, None),
        ("", ["", "short", V2.replace(" - ", " ")], {"cpu.max": "100000 100000"}, None),
    ],
)
def test_a_quota_is_the_least_of_all_groups_above_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, mounts: list[str], files: dict[str, str], quota: Any
) -> None:
    machine(monkeypatch, 16)
    assert usable_cores(groups(tmp_path, cgroup, mounts, files)) == Cores(16, quota)


@pytest.mark.parametrize(
    ("allowed", "quota", "count"),
    [(16, None, 16), (16, 0.25, 1), (16, 1.0, 1), (16, 1.5, 1), (16, 2.0, 2), (16, 3.9, 3), (2, 8.0, 2), (1, 0.01, 1)],
)
def test_fractions_of_a_core_are_rounded_down_and_never_to_none(allowed: int, quota: float | None, count: int) -> None:
    assert Cores(allowed, quota).count == count


def test_without_affinity_or_groups_the_machine_s_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 3)
    assert usable_cores(tmp_path / "absent") == Cores(3)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert str(usable_cores(tmp_path / "absent")) == "6 cores (of the machine)"
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path / "absent").count == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_a_process_that_was_given_one_cpu_counts_one() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from cskd.machine.threads import choose_threads; print(choose_threads().count)"
    assert run_python(code).stdout == "1\n"


@pytest.mark.parametrize(
    ("cores", "workers", "count"),
    [(1, 0, 1), (1, 4, 1), (2, 0, 2), (2, 2, 2), (4, 2, 3), (8, 0, 8), (8, 1, 7), (8, 2, 6), (8, 16, 6), (64, 8, 56)],
)
def test_loader_workers_are_left_cores_a_quarter_of_them_at_most(cores: int, workers: int, count: int) -> None:
    chosen = choose_threads(workers=workers, cores=Cores(cores))
    assert (chosen.count, chosen.why, chosen.workers) == (count, "", workers)


def test_the_config_decides_before_the_environment_and_both_before_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = Cores(8, quota=4.0)
    assert choose_threads(cores=cores).count == 4
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    assert choose_threads(cores=cores).count == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert (choose_threads(cores=cores).count, choose_threads(cores=cores).why) == (3, "OMP_NUM_THREADS")
    assert choose_threads(7, "train.threads", cores=cores).count == 7
    for odd in ("", "0", "-1", "many", "1e3", "99999999999999999999", "²"):
        monkeypatch.setenv("OMP_NUM_THREADS", odd)
        monkeypatch.setenv("MKL_NUM_THREADS", odd)
        assert choose_threads(cores=cores).count == 4, odd


@pytest.mark.parametrize(("ranks", "count"), [("1", 8), ("2", 4), ("3", 2), ("8", 1), ("64", 1), ("x", 8), ("0", 8)])
def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch, ranks: str, count: int) -> None:
    machine(monkeypatch, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert choose_threads(cores=Cores(8)).count == count


def test_ranks_that_were_given_cpus_of_their_own_keep_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 64)  # of torchrun
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert choose_threads(cores=Cores(8)).count == 8
    assert choose_threads(cores=Cores(32)).count == 8  # half of the machine for four ranks each
    assert choose_threads(cores=Cores(64, quota=16.0)).count == 2  # a quota is of all ranks together


@pytest.mark.slow
def test_torchrun_s_own_single_thread_is_not_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, 8)
    script = tmp_path / "rank.py"
    script.write_text(
        "import os\nfrom cskd.machine import threads\nfrom cskd.machine.cores import Cores\n"
        "threads.affinity = lambda pid: 8\n"
        "open(os.environ['RANK'], 'w').write(str(threads.choose_threads(cores=Cores(8)).count))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    for user, counts in (({}, ["4", "4"]), ({"OMP_NUM_THREADS": "1"}, ["1", "1"])):
        env = {**os.environ, "PYTHONPATH": str(ROOT), **user}
        done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert [(tmp_path / rank).read_text() for rank in "01"] == counts


def test_what_is_said_names_threads_cores_waiting_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "spinning at barriers (torch was loaded first" in str(Threads(2, Cores(2), 2))
    for name, value in WAITING.items():
        monkeypatch.setenv(name, value)
    assert str(Threads(2, Cores(2), 2, 2)) == "2 threads of 2 cores (affinity), waiting passively, 2 loader workers"
    assert str(Threads(1, Cores(8, 1.5), 1, 1)) == "1 thread of 1 core (quota of 1.5 CPUs), 1 loader worker"
    assert str(Threads(3, Cores(8), 4, 0, "train.threads")) == (
        "3 threads (train.threads) of 8 cores (affinity), 4 per rank, waiting passively, 0 loader workers"
    )
    assert str(Threads(9, Cores(8), 8, 0, "OMP_NUM_THREADS")).endswith(
        "workers: more threads than cores, which is slow"
    )
    monkeypatch.setenv("GOMP_SPINCOUNT", "9" * 500)
    assert "waiting as set: OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=9999" in str(Threads(2, Cores(2), 2))
    assert len(str(Threads(2, Cores(2), 2))) < 300


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_threads_load_no_torch_and_the_stages_set_how_they_wait_before_they_load_it() -> None:
    run_python("import sys, cskd.machine.threads, cskd.machine.speed; assert not {'torch', 'numpy'} & set(sys.modules)")
    code = "import os, sys, pipeline; from cskd.machine.threads import WAITING; assert 'torch' not in sys.modules\n"
    code += "assert WAITING.items() <= os.environ.items()"
    run_python(code)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch's wheels for Linux bring GNU's OpenMP")
def test_openmp_reads_how_long_to_spin() -> None:
    shown = run_python("import cli, cskd.pipeline.train", OMP_DISPLAY_ENV="verbose").stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown
    assert f"GOMP_SPINCOUNT = '{WAITING['GOMP_SPINCOUNT']}'" in shown


def test_what_the_user_says_about_waiting_stands() -> None:
    for given in ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "passive"}):
        shown = run_python("import os, pipeline; print(dict(os.environ))", **given).stdout
        assert "GOMP_SPINCOUNT" not in shown and str(given)[1:-1] in shown
    shown = run_python("import os, pipeline; print(dict(os.environ))", GOMP_SPINCOUNT="7").stdout
    assert "'GOMP_SPINCOUNT': '7'" in shown and "'OMP_WAIT_POLICY': 'passive'" in shown
    late: dict[str, str] = {}
    wait_passively(late)  # torch is loaded here, and would not look
    assert late == {}


def test_threads_are_as_many_inside_and_as_before_after_it() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ConfigError), computing_with(before + 2):
        assert torch.get_num_threads() == before + 2
        raise ConfigError("stop")
    assert torch.get_num_threads() == before


NOW = Threads(2, Cores(2), 2)


@pytest.mark.parametrize(
    ("recorded", "asked", "count", "note"),
    [
        (2, False, 2, None),
        (8, False, 8, None),  # slower, and the same numbers
        (1, False, 1, None),
        (9, False, 2, "begun with 9 threads, too many for 2 cores (affinity): it goes on with 2"),
        (4, True, 2, "begun with 4 threads, train.threads is 2: last bits differ from here on"),
        (None, False, 2, "is not recorded; with 2 last bits may differ"),
        (0, False, 2, "is not recorded"),
        (True, False, 2, "is not recorded"),
        ("8", False, 2, "is not recorded"),
        (10**9, True, 2, "is not recorded"),
    ],
)
def test_a_resumed_run_keeps_its_threads_or_says_so(recorded: Any, asked: bool, count: int, note: str | None) -> None:
    threads, notes = begun_with(recorded, Threads(2, Cores(2), 2, 0, "train.threads" if asked else ""), asked)
    assert threads.count == count
    assert len(notes) == (note is not None) and (note or "") in "".join(notes)
    assert ("as it was begun" in str(threads)) == (count != NOW.count)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=40, block=20, shard=10)
    make_tiny_data(folder / "val", n=8, block=8, shard=8)
    cache_teacher(config(folder), quiet=True)
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads at each training step."""
    seen: list[int] = []

    def recording(*arguments: Any) -> None:
        seen.append(torch.get_num_threads())
        reseed_step(*arguments)

    monkeypatch.setattr(cskd.pipeline.train_step, "reseed_step", recording)
    return seen


def test_a_run_computes_with_the_threads_it_says_and_records_them(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: list[int]
) -> None:
    def run(steps: int, **settings: Any) -> str:
        counts.clear()
        settings |= {"output": str(tmp_path / "run"), "max_steps": steps, "save_every": 1}
        return "; ".join(train(config(base, train=settings), quiet=True).notes)

    before = torch.get_num_threads()
    monkeypatch.setattr(threads_module, "usable_cores", lambda: Cores(3))
    assert "3 threads of 3 cores (affinity), " in run(1)
    assert set(counts) == {3}
    monkeypatch.setattr(threads_module, "usable_cores", lambda: Cores(2))  # the run goes on elsewhere
    assert "3 threads (as it was begun) of 2 cores (affinity), " in run(2)
    assert set(counts) == {3}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the shell: weaker than what the run was begun with
    assert "(as it was begun)" in run(3)
    assert set(counts) == {3}
    assert "threads changed from 3 to 2 at step 3: sums round otherwise" in run(4, threads=2)
    assert set(counts) == {2}
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "begun" not in run(5)
    assert set(counts) == {2}
    assert torch.get_num_threads() == before


def test_a_state_without_threads_is_of_the_same_run_and_is_noted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"output": str(tmp_path / "run"), "max_steps": 1}
    monkeypatch.setattr(cskd.pipeline.training_run, "run_identity", lambda *a: Older(run_identity(*a)))
    train(config(base, train=settings), quiet=True)
    monkeypatch.undo()
    notes = train(config(base, train={**settings, "max_steps": 2}), quiet=True).notes
    assert any("with how many threads this was begun is not recorded" in note for note in notes)


class Older(dict[str, Any]):
    """An identity of a version that recorded no threads."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "threads":
            super().__setitem__(key, value)


def test_threads_alone_never_make_it_another_run(tmp_path: Path) -> None:
    refuse_other_run({"cache": "a"}, {"cache": "a", "threads": 2}, tmp_path, True)
    with pytest.raises(ConfigError, match="begun with cache"):
        refuse_other_run({"cache": "a"}, {"cache": "b", "threads": 2}, tmp_path, True)


@pytest.mark.parametrize("section", ["train", "cache"])
@pytest.mark.parametrize("value", [0, -1, 1025])
def test_a_number_of_threads_that_can_t_be_is_refused_by_its_key(base: Path, section: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.threads is {value}, expected from 1 to "):
        config(base, "run", **{section: {"threads": value}})


def test_stage_1_says_its_threads_and_a_cache_of_own_code_keeps_them(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own network runs one batch at a time on all cores; a forward that is split otherwise has other last bits."""
    seen: list[int] = []
    launching = Lanes.launching

    def recording(self: Any) -> Any:
        seen.append(torch.get_num_threads())
        return launching(self)

    monkeypatch.setattr(Lanes, "launching", recording)
    monkeypatch.setattr(threads_module, "usable_cores", lambda: Cores(3))
    cache = {"path": str(tmp_path / "cache"), "views": 1}
    notes = cache_teacher(config(base, cache=cache), quiet=True).notes
    assert notes[-1].startswith("3 threads of 3 cores (affinity), ")
    assert set(seen) == {3}
    assert open_cache(tmp_path / "cache").manifest.threads == 3
    monkeypatch.setattr(threads_module, "usable_cores", lambda: Cores(2))
    seen.clear()
    notes = cache_teacher(config(base, cache={**cache, "views": 2}), quiet=True).notes
    assert notes[-1].startswith("3 threads (as it was begun) of 2 cores (affinity), ")
    assert set(seen) == {3}


def test_the_content_of_a_cache_does_not_depend_on_threads(base: Path, tmp_path: Path) -> None:
    teacher = {
        "model": "resnet18",
        "kwargs": {"channels": [8, 8, 8, 16], "num_classes": 5},
        "batch": 8,
        "min_top1": 0.0,
    }
    roots = set()
    for threads in (1, 3):
        torch.manual_seed(0)  # the weights
        cache = {"path": str(tmp_path / f"{threads}"), "views": 1, "threads": threads}
        roots.add(
            cache_teacher(config(base, teacher=teacher, cache=cache, student={"model": ""}), quiet=True).content_root
        )
        assert open_cache(tmp_path / f"{threads}").manifest.threads == 1  # of a forward: a lane has one
    assert len(roots) == 1


def test_eval_computes_with_the_threads_of_the_cores(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"output": str(tmp_path / "run"), "max_steps": 1}
    train(config(base, train=settings), quiet=True)
    monkeypatch.setattr(threads_module, "usable_cores", lambda: Cores(3))
    seen: list[int] = []
    score = cskd.pipeline.evaluate.score_heads

    def recording(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return score(*arguments)

    monkeypatch.setattr(cskd.pipeline.evaluate, "score_heads", recording)
    evaluate_checkpoint(tmp_path / "run", base / "val", 8, 0, None, "cpu", quiet=True)
    assert seen == [3]


def test_a_loader_worker_computes_with_one_thread() -> None:
    from cskd.loading.stream import Stream

    assert list(Stream(count_threads, [0], workers=1)) == [1]


def count_threads(task: int) -> int:
    return torch.get_num_threads()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or usable_cores().count < 2, reason="GNU's OpenMP, and threads that wait")
def test_next_to_busy_processes_training_is_faster_than_with_threads_that_spin() -> None:
    command = [sys.executable, "-m", "benchmarks.threads", "--rounds", "3", "--seconds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Measured: 1.4 to 2.1, and 0.7 to 1.05.
    assert found["busy: cskd / default"] > 1.2 and found["busy: cskd / one"] > 0.6
    assert set(found["steps_per_second"]) == {"quiet", "loaders", "busy"}


def test_cores_of_this_machine_are_read_without_an_error() -> None:
    assert 1 <= usable_cores().count <= (os.cpu_count() or 1)
    assert cores_module.affinity(2**22 + 1) is None  # no such process


def test_turns_are_brief_on_a_gpu_alone_and_then_as_before() -> None:
    before = sys.getswitchinterval()
    with brief_turns(gpu=True):
        assert sys.getswitchinterval() == pytest.approx(TURN)
    with brief_turns(gpu=False):
        assert sys.getswitchinterval() == before
    assert sys.getswitchinterval() == before
