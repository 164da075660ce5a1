"""Trackers: what they are told, that a resumed run goes on in the same one, and that no failure of theirs stops a run."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest

import cskd.pipeline.show.trackers as trackers
from cskd.config import Config, TrainConfig
from cskd.config.load import from_dict
from cskd.errors import ConfigError
from cskd.pipeline.outputs import refuse_run_output
from cskd.pipeline.show.trackers import OPEN, Tracked, Trackers

ROW = {"epoch": 3, "loss": 1.5, "top1.class": 60, "changed": "train.lr from 1 to 2"}


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self, tracked: Tracked) -> None:
        self.id = tracked.id or "new"
        self.tracked, self.rows, self.closed = tracked, list[Any](), False

    def log(self, row: trackers.Row, epoch: int) -> None:
        self.rows.append((epoch, dict(row)))

    def close(self) -> None:
        self.closed = True


def tell_to(lines: list[str], folder: Path, *names: str) -> Trackers:
    return Trackers(list(names), folder, 3, {"train": {"lr": 0.1}}, lines.append)


def test_a_tracker_gets_the_numbers_of_each_epoch_and_a_resumed_run_goes_on_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Told] = []
    monkeypatch.setitem(OPEN, "wandb", lambda tracked: made.append(Told(tracked)) or made[-1])  # type: ignore[func-returns-value]
    lines: list[str] = []
    for _ in range(2):
        run = tell_to(lines, tmp_path, "wandb")
        run.log(ROW)
        run.close()
    assert [told.rows for told in made] == [[(3, {"loss": 1.5, "top1.class": 60.0})]] * 2
    assert [told.tracked.id for told in made] == ["", "new"]
    assert all(told.closed for told in made)
    assert (made[0].tracked.start_epoch, made[0].tracked.config) == (3, {"train": {"lr": 0.1}})
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "new"}
    assert lines == []


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no network\nat all")

    def broken(tracked: Tracked) -> Told:
        told = Told(tracked)
        if where == "open":
            fail()
        setattr(told, where, fail)
        return told

    good: list[Told] = []
    monkeypatch.setitem(OPEN, "wandb", broken)
    monkeypatch.setitem(OPEN, "mlflow", lambda tracked: good.append(Told(tracked)) or good[-1])  # type: ignore[func-returns-value]
    lines: list[str] = []
    run = tell_to(lines, tmp_path, "wandb", "mlflow")
    for epoch in range(3):
        run.log({**ROW, "epoch": epoch})
    run.close()
    assert [epoch for epoch, _ in good[0].rows] == [0, 1, 2]
    assert len(lines) == 1
    assert "wandb failed" in lines[0]
    assert "the run goes on: RuntimeError: no network at all" in lines[0]


def test_a_tracker_that_hangs_keeps_no_run_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.05)
    never = threading.Event()
    monkeypatch.setitem(OPEN, "trackio", lambda tracked: never.wait(60) and Told(tracked))
    lines: list[str] = []
    run = tell_to(lines, tmp_path, "trackio")
    run.log(ROW)
    run.close()
    never.set()
    assert len(lines) == 1
    assert "trackio did not end within" in lines[0]


def test_a_rank_without_a_folder_has_no_tracker() -> None:
    run = Trackers(["wandb"], None, 0, {}, print)
    run.log(ROW)
    run.close()


def test_a_tracker_that_is_not_installed_or_unknown_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"has mlflow, which is not installed; run: pip install 'cskd\[mlflow\]'"):
        refuse_run_output(Config(train=TrainConfig(output="x", trackers=["mlflow"])))
    with pytest.raises(ConfigError, match=r"train\.trackers\[0\] is 'wandbb', expected .*did you mean 'wandb'"):
        from_dict({"train": {"trackers": ["wandbb"]}})
    with pytest.raises(ConfigError, match=r"train\.trackers is .*each once"):
        from_dict({"train": {"trackers": ["wandb", "wandb"]}})


def test_the_older_key_of_tensorboard_is_read() -> None:
    assert from_dict({"train": {"tensorboard": True}}).train.trackers == ["tensorboard"]
    assert from_dict({"train": {"tensorboard": False}}).train.trackers == []
    for wrong in ({"tensorboard": "yes"}, {"tensorboard": True, "trackers": ["wandb"]}):
        with pytest.raises(ConfigError, match=r"train\.tensorboard is .*one of train\.trackers now"):
            from_dict({"train": wrong})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of other packages, among themselves
@pytest.mark.parametrize("name", sorted(OPEN))
def test_the_real_ones_take_a_run_and_its_resume(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    lines: list[str] = []
    for epoch in range(2):
        run = tell_to(lines, tmp_path, name)
        run.log({**ROW, "epoch": epoch, "top1.class+distillation": 61.0})
        run.close()
    assert lines == []
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client, id = MlflowClient(), json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
        history = client.get_metric_history(id, "top1.class_distillation")
        assert [(m.step, m.value) for m in history] == [(0, 61.0), (1, 61.0)]
        assert client.get_run(id).data.params["train.lr"] == "0.1"
