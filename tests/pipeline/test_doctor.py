"""What `cskd doctor` calls broken, what it warns of, and what it says of cores and threads."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

import cskd.machine.speed
import cskd.pipeline.doctor
from cskd import cli
from cskd.config import Config, DataConfig, RecipeConfig, StudentConfig, TrainConfig, from_dict
from cskd.config.schema import Tracker
from cskd.dataset.images import decode
from cskd.loading.raw_batches import batch_bytes
from cskd.machine.cores import Cores
from cskd.pipeline.doctor import (
    AS_IT_IS,
    OPTIONAL,
    PACKAGES,
    PROBES,
    Check,
    _batch_bytes,
    doctor,
    loader_row,
    worker_rates,
)
from cskd.pipeline.loader_speed import images_per_second, packed_raw, views_per_second
from tests.caches import make_tiny_data

ROOT = Path(__file__).resolve().parent.parent.parent


def probes(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(cskd.pipeline.doctor, "PROBES", {"made up": lambda config: iter(checks)})


def exit_code(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cskd", "doctor", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


OK, WARN, FAIL = (Check("row", "value", state, "advice") for state in ("ok", "warn", "fail"))


@pytest.mark.parametrize(
    ("checks", "ok", "warnings", "code"),
    [((OK,), True, 0, 0), ((OK, WARN, WARN), True, 2, 0), ((OK, FAIL), False, 0, 1), ((WARN, FAIL), False, 1, 1)],
)
def test_only_what_is_broken_is_not_ok_and_warnings_are_counted_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, checks: tuple[Check, ...], ok: bool, warnings: int, code: int
) -> None:
    probes(monkeypatch, *checks)
    assert exit_code(monkeypatch, "--json") == code
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["warnings"], len(report["checks"])) == (ok, warnings, len(checks))
    assert exit_code(monkeypatch) == code
    shown = capsys.readouterr().out
    assert all(check.state in shown for check in checks)


def test_shared_memory_is_sized_by_what_the_workers_send() -> None:
    config = Config(train=TrainConfig(global_batch=1024, repeats=3))
    assert _batch_bytes(config) == 1024 * 3 * 224**2
    on_device = replace(config, train=replace(config.train, augment="device"))
    assert _batch_bytes(on_device) == batch_bytes(1024, 3, 224, 375 * 500)
    assert _batch_bytes(replace(on_device, train=replace(on_device.train, repeats=1))) > 3 * _batch_bytes(config)


def test_a_missing_optional_package_is_ok_and_a_missing_required_one_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name in ("timm", "tensorboard", "scikit-learn"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    rows = {check.name: check for check in cskd.pipeline.doctor._versions(Config())}
    assert (rows["timm"].state, rows["timm"].advice) == ("fail", "pip install timm")
    assert rows["tensorboard"].state == rows["scikit-learn"].state == "ok"
    assert "only for cskd demo" in rows["scikit-learn"].advice


def test_every_dependency_is_looked_for_and_nothing_else_but_torchvision() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=~! ]", r)[0].lower() for r in requirements}

    assert set(PACKAGES) == names(project["dependencies"]) | {"torchvision"}
    extras = project["optional-dependencies"]
    assert set(OPTIONAL) == names(extras["demo"]) | set(get_args(Tracker))


def rows_with(
    monkeypatch: pytest.MonkeyPatch, cores: Cores, speeds: dict[int, float], user: str = ""
) -> dict[str, Check]:
    """The rows of cores and threads where the machine has these cores, and such a speed per number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if user:
        monkeypatch.setenv("OMP_NUM_THREADS", user)
    monkeypatch.setattr(cskd.pipeline.doctor, "usable_cores", lambda: cores)
    monkeypatch.setattr("cskd.machine.threads.usable_cores", lambda: cores)
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(cskd.machine.speed, "steps_per_second", lambda threads, seconds: speeds[threads])
    monkeypatch.setattr(cskd.machine.speed, "steps_elsewhere", lambda *_, **__: 7.0)
    return {
        c.name: c for probe in (cskd.pipeline.doctor._processes, cskd.pipeline.doctor._threads) for c in probe(Config())
    }


def test_cores_threads_and_their_speed_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_with(monkeypatch, Cores(2), {1: 100.0, 2: 180.0})
    assert rows["CPU cores"].value.startswith("2 cores (affinity)")
    assert rows["threads"].value.startswith("2 threads of 2 cores (affinity), ")
    assert rows["speed"].value == (
        "100 steps/s of a small network with 1 thread, 180 with 2, 7 if they spun at barriers"
    )
    assert {rows[name].state for name in ("CPU cores", "threads", "load", "speed")} == {"ok"}
    assert "CPU quota" not in rows


def test_threads_beyond_the_quota_and_threads_that_are_slower_than_one_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_with(monkeypatch, Cores(16, quota=1.5), {1: 100.0, 8: 20.0}, user="8")
    assert rows["CPU cores"].value.startswith("1 core (quota of 1.5 CPUs)")
    assert (rows["CPU quota"].state, rows["CPU quota"].value) == ("warn", "1.5 CPUs, affinity 16")
    assert rows["threads"].state == rows["speed"].state == "warn"
    assert "unset OMP_NUM_THREADS, or set it to 1" in rows["threads"].advice
    assert "slower than one on this machine: set train.threads: 1" in rows["speed"].advice


def test_the_speed_is_that_of_a_real_network_here_and_in_a_process_with_other_settings() -> None:
    assert cskd.machine.speed.steps_per_second(1, 0.01) > 0
    assert (cskd.machine.speed.steps_elsewhere(1, 0.01, {"OMP_WAIT_POLICY": "active"}) or 0) > 0
    assert cskd.machine.speed.steps_elsewhere(0, 0.01, {}) is None


def test_the_loader_row_says_how_many_cores_the_gpu_needs_and_what_would_need_fewer() -> None:
    enough = loader_row("deit", 3000.0, {AS_IT_IS: 200.0}, 16)
    assert enough == Check(
        "loader", "the GPU takes 3,000 images/s of deit, a core makes 200 views/s: 15 cores, here are 16"
    )
    few = loader_row("deit", 3000.0, {AS_IT_IS: 190.0, "raw": 400.0, "rawer": 3000.0, "no help": 189.0}, 15)
    assert few.state == "warn" and few.value.endswith("16 cores, here are 15")
    assert few.advice.startswith("training waits for views: raw (8 cores), rawer (1 core), more cores for each GPU, or")


def test_a_core_is_measured_on_the_images_of_the_config(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data", n=24, bad=[4])
    config = Config(data=DataConfig(train=str(tmp_path / "data")), recipe=RecipeConfig(size=32))
    images = cskd.pipeline.doctor._some_images(config)
    assert len(images) == 11 and all(decode(data).shape[2] == 3 for data in images)
    assert not cskd.pipeline.doctor._some_images(Config(data=DataConfig(train=str(tmp_path / "absent"))))
    rates = worker_rates(config, 0.05)
    assert list(rates) == [AS_IT_IS, "shards packed with --raw --short-side 36", "train.augment: device"]
    there = replace(config, train=TrainConfig(augment="device"))
    assert "train.augment: device" not in worker_rates(there, 0.05)


def test_a_gpu_that_others_fill_is_no_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("cskd.machine.devices.pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("cskd.pipeline.loader_speed.images_per_second", full)
    (row,) = PROBES["loader"](Config())
    assert row.state == "warn" and row.value.startswith("not measured: there is no memory for 256 images of deit_tiny")


def test_both_rates_are_measured_on_the_real_loader_and_a_real_student() -> None:
    tiny = StudentConfig(model="deit_tiny_distilled_patch16_224", kwargs={"depth": 1, "embed_dim": 24, "num_heads": 2})
    for student in (tiny, replace(tiny, model="deit_tiny_patch16_224", tokens=["a"])):
        assert images_per_second(student, 32, 4, "none", torch.device("cpu"), 0.01) > 0
    recipe = RecipeConfig(randaugment="rand-m9-mstd0.5-inc1")
    assert 2000 > views_per_second(recipe, 0.2) > 5
    assert views_per_second(recipe, 0.2, packed_raw([], 256), augment=False) > 3 * views_per_second(recipe, 0.2)


def test_shared_memory_is_asked_for_as_the_config_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("shared memory is elsewhere here")
    usage = SimpleNamespace(total=64 << 20, free=64 << 20, used=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    found = []
    for batch in (64, 1024):
        config = Config(train=TrainConfig(workers=4, global_batch=batch), recipe=RecipeConfig(size=32))
        found += [row for row in cskd.pipeline.doctor._storage(config) if row.name == "shared memory"]
    assert [row.state for row in found] == ["ok", "ok"] and 4 * 5 * 1024 * 3 * 32**2 < 64 << 20
    config = Config(train=TrainConfig(workers=4))
    (row,) = [row for row in cskd.pipeline.doctor._storage(config) if row.name == "shared memory"]
    assert row.state == "warn" and "4 workers hand batches over in 3.1 GB" in row.advice and "=4g" in row.advice


def test_the_doctor_itself_looks_at_everything_and_finds_this_installation_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = doctor()
    assert report.ok, [row for row in report.checks if row.state == "fail"]
    assert report.warnings == sum(row.state == "warn" for row in report.checks)
    assert {"CPU cores", "threads", "load", "speed"} <= {row.name for row in report.checks}


def test_images_that_are_not_there_are_a_failure_with_what_to_do(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data")
    found = from_dict({"data": {"train": str(tmp_path / "data"), "val": str(tmp_path / "none")}})
    train, val = PROBES["images"](found)
    assert (train.state, train.value) == ("ok", f"10 images in {tmp_path / 'data'}")
    assert (val.name, val.state, val.advice) == ("data.val", "fail", "make one with 'cskd pack' or 'cskd index'")
    assert f"no inventory at {tmp_path / 'none'}" in val.value
    (tmp_path / "data" / "00000.tar").unlink()
    gone, _ = PROBES["images"](found)
    assert gone.state == "fail" and "00000.tar" in gone.value and gone.advice
    assert list(PROBES["images"](Config())) == []
