"""What the demo asks for can be trained, whatever `--epochs` says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cskd.config import Config, from_dict, to_dict, to_yaml
from cskd.errors import ConfigError
from cskd.pipeline.demo import STUDENTS, DemoReport, StudentResult, _config, _student, render, run_demo
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import TrainReport, train
from tests.caches import make_tiny_data


@pytest.mark.parametrize("epochs", [1, 2, 40])
@pytest.mark.parametrize("student", STUDENTS)
def test_the_warm_up_is_shorter_than_the_training(tmp_path: Path, student: str, epochs: int) -> None:
    train = _config(tmp_path, student, epochs).train
    assert train.epochs == epochs
    assert train.warmup_epochs < epochs
    assert train.eval_every <= epochs


def test_the_table_names_the_head_that_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the baseline the class head: the mean with a head that was never trained is no result."""
    small = {"kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}}

    def short(config: Config, quiet: bool) -> TrainReport:
        values = {**to_dict(config), "cache": {"path": ""}, "data": {"train": str(data), "val": str(data)}}
        values["student"] |= small
        values["train"] |= {"global_batch": 8}
        return train(from_dict(values), quiet=quiet)

    data = tmp_path / "data"
    make_tiny_data(data, n=12)
    monkeypatch.setattr("cskd.pipeline.demo.train", short)
    baseline = _student(_config(tmp_path, "none", 1), quiet=True)
    assert (baseline.head, baseline.teacher_forwards) == ("class", 0)
    row = read_metrics(tmp_path / "runs" / "none")[-1]
    assert baseline.top1 == row["top1.class"]
    students = {"none": baseline, "cskd": StudentResult(50.0, "class+distillation", 1.0, 0)}
    out = io.StringIO()
    render(DemoReport(99.0, students, 200.0, 5.0, {}), Console(file=out, width=120))
    cells = [[cell.strip() for cell in line.split("\u2502")] for line in out.getvalue().splitlines()]
    assert [row[3] for row in cells if len(row) > 4 and row[1] in students] == ["class", "class+distillation"]


def test_students_of_an_earlier_version_are_not_shown_as_todays(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "none"
    run.mkdir(parents=True)
    old = to_yaml(_config(tmp_path, "none", 3)).replace("  baseline_head: class\n", "")
    (run / "resolved.yaml").write_text(old, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"earlier version, whose baseline was trained on the mean of two heads.*folder"
    ):
        run_demo(tmp_path, epochs=3, quiet=True)


def test_students_of_other_epochs_are_named_before_anything_is_made(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "cskd"
    run.mkdir(parents=True)
    (run / "resolved.yaml").write_text(to_yaml(_config(tmp_path, "cskd", 3)), encoding="utf-8")
    with pytest.raises(ConfigError, match="has students of 3 epochs, asked for 2; give another folder"):
        run_demo(tmp_path, epochs=2, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
