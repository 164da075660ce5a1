"""Scratch of a run: on local disk, under the run's identity, gone at its end, never more than what is needed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import cskd.loading.node_scratch
from cskd.config import TrainConfig, from_dict
from cskd.errors import CacheError, CskdError
from cskd.files.scratch import clear_scratch, new_scratch, refuse_small
from cskd.loading.epoch_table import build_table, open_table
from cskd.loading.plan import PlanSpec, epoch_plan
from cskd.loading.sources import TargetSpec
from cskd.loading.stage2 import TrainTask
from cskd.loading.tasks import RunTasks
from cskd.pipeline.train import train
from cskd.store.cache import Cache
from tests.caches import make_tiny_cache

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    return tmp_path / "temp"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cache(tmp_path_factory.mktemp("scratch"), n=20).root


def settings(cache: Path, output: Path, epochs: int = 2) -> dict[str, Any]:
    kwargs = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
    return {
        "cache": {"path": str(cache)},
        "student": {"model": "deit_tiny_distilled_patch16_224", "kwargs": kwargs},
        "loss": {"method": "deit-hard"},
        "train": {
            **{"output": str(output), "epochs": epochs, "global_batch": 8, "warmup_epochs": 1},
            **{"workers": 0, "device": "cpu"},
        },
    }


def test_no_scratch_lies_in_the_output_and_none_is_left(
    made: Path, tmp_path: Path, temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an older version is cleared away, and so is what a dead run of this output left; another run's stays."""
    output = tmp_path / "run"
    (output / "scratch" / "rank000" / "epoch00000").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    left, others = new_scratch(output, 3), new_scratch(tmp_path / "other")
    seen: list[Path] = []

    def noted(*arguments: object) -> Path:
        seen.append(new_scratch(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(cskd.loading.node_scratch, "new_scratch", noted)
    train(from_dict(settings(made, output)), quiet=True)
    assert len(seen) == 1 and seen[0].parent == temp
    assert list(temp.iterdir()) == [others] and not left.exists()
    assert not (output / "scratch").exists()


def test_scratch_is_its_users_own_and_its_runs_own(tmp_path: Path, temp: Path) -> None:
    for name in ("run", "run2", "x"):
        (tmp_path / name).mkdir()
    one, two = new_scratch(tmp_path / "run", 1), new_scratch(tmp_path / "run2", 1)
    assert one.stat().st_mode & 0o077 == 0 and one.name.split("-")[1] != two.name.split("-")[1]
    assert new_scratch(tmp_path / "x" / ".." / "run", 1).name.split("-")[1] == one.name.split("-")[1]
    (tmp_path / "precious").mkdir()
    (temp / one.name.replace("rank001", "rank009")).symlink_to(tmp_path / "precious")
    clear_scratch(tmp_path / "run")
    assert not one.exists() and two.exists() and (tmp_path / "precious").is_dir()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()  # the same path in another container is another folder
    assert new_scratch(tmp_path / "run", 1).name.split("-")[1] != one.name.split("-")[1]


@pytest.mark.parametrize("kind", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_run_s_scratch_is_cleared_by_the_next_start(made: Path, tmp_path: Path, temp: Path, kind: int) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(settings(made, tmp_path / "run", 4000)))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temp)}
    command = [sys.executable, str(ROOT / "cli.py"), "train", str(tmp_path / "c.yaml"), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("resume/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(kind)
    process.wait(60)
    assert len(list(temp.glob("cskd-*"))) == (kind == signal.SIGKILL)
    step = max(int(p.stem.removeprefix("step-")) for p in (tmp_path / "run").glob("resume/step-*.safetensors"))
    more = settings(made, tmp_path / "run", 4000)
    more["train"]["max_steps"] = step + 1
    assert train(from_dict(more), quiet=True).steps == 1
    assert list(temp.glob("cskd-*")) == []


Usage = namedtuple("Usage", "total used free")


def test_a_small_disk_is_named_before_the_first_step_with_what_to_do(
    made: Path, tmp_path: Path, temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = Usage(1000, 900, 100), Usage(10**12, 0, 10**12)
    monkeypatch.setattr("shutil.disk_usage", lambda path: small if Path(path).is_relative_to(temp) else large)
    with pytest.raises(CacheError, match=r"GB free, the tables of the targets to come may take .*; set train.scratch"):
        train(from_dict(settings(made, tmp_path / "run")), quiet=True)
    assert not list((tmp_path / "run").glob("resume/*")) and list(temp.iterdir()) == []
    refuse_small(temp, 100, "x")


def test_a_disk_that_fills_up_ends_a_run_in_one_line(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file without room behind it would end the process by a signal."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = epoch_plan(spec_of(cache, 4), 0)
    build_table(cache, plan, TargetSpec("global", "int8", 0), 0, 4, tmp_path / "good")
    assert all(os.stat(p).st_blocks for p in (tmp_path / "good").glob("*.npy"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheError, match=r"no room for 0\.00 GB; set train.scratch"):
        build_table(cache, plan, TargetSpec("global", "int8", 0), 0, 4, tmp_path / "t")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_tiny_cache(tmp_path_factory.mktemp("cache"), codecs=("int8",), n=60)


def spec_of(cache: Cache, batch: int) -> PlanSpec:
    return PlanSpec.over(cache, TrainConfig(repeats=1, seed=0, global_batch=batch, window=1))


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_table_goes_when_no_result_can_need_it_and_not_before(cache: Cache, tmp_path: Path, ahead: int) -> None:
    """Soft targets come in many tables an epoch, of the codec's own arrays: all of them are 60 GB for ImageNet's int8."""
    spec = spec_of(cache, 4)
    under_way: list[TrainTask] = []
    most = 0
    soft = TargetSpec("soft", "int8", 0)
    with RunTasks(cache, spec, lambda _: soft, lambda _: [], tmp_path / "s", 0, 2 * spec.steps, ahead=ahead) as tasks:
        for task in tasks:
            assert isinstance(task, TrainTask)
            under_way = [*under_way, task][-ahead - 1 :]
            for t in under_way:
                assert open_table(t.table).columns["sample"].shape[0] >= t.stop
            most = max(most, len([p for p in (tmp_path / "s").glob("epoch*/*") if not p.name.startswith(".")]))
    assert (2 if ahead else 1) <= most <= 3 + ahead and not (tmp_path / "s").exists()


def test_scratch_lies_where_the_config_says_and_what_a_killed_run_left_there_goes(
    made: Path, tmp_path: Path, temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    killed = [new_scratch(tmp_path / "run", 0, where) for where in (str(tmp_path / "disk"), "")]
    (killed[0] / "epoch00000").mkdir()
    seen: list[list[Path]] = []
    plain = RunTasks.retire

    def noted(self: RunTasks, epoch: int) -> None:
        seen.append(list((tmp_path / "disk").iterdir()))
        plain(self, epoch)

    monkeypatch.setattr(RunTasks, "retire", noted)
    config = settings(made, tmp_path / "run")
    config["train"]["scratch"] = str(tmp_path / "disk")
    train(from_dict(config), quiet=True)
    assert [len(names) for names in seen] == [1, 1] and seen[0][0] not in killed
    assert list((tmp_path / "disk").iterdir()) == [] == list(temp.iterdir())


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "it is not there; expected a folder on a local disk"),
        ("file", "it is no folder"),
        ("sealed", "it may not be written to"),
        ("s3://bucket/x", r"is an address \(s3:\)"),
        ("cache", "is a cache; give a folder of its own"),
    ],
)
def test_scratch_that_is_none_is_refused_in_one_line(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    where = str(made) if kind == "cache" else kind if ":" in kind else str(tmp_path / kind)
    (tmp_path / "file").touch()
    (tmp_path / "sealed").mkdir()
    if kind == "sealed":
        monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path / "sealed")  # root may write anywhere
    config = settings(made, tmp_path / "run")
    config["train"]["scratch"] = where
    with pytest.raises(CskdError, match=words) as refused:
        with_local_paths = from_dict(config)
        train(with_local_paths, quiet=True)
    assert len(str(refused.value)) <= 300 and not (tmp_path / "run").exists()


def test_a_disk_without_room_for_a_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(CacheError, match=r"train\.scratch .*no folder can be made in it \(No space left on device\)"):
        new_scratch(tmp_path, 0, str(tmp_path))
