"""What the demo asks for can be trained, whatever `--epochs` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cskd.config import to_yaml
from cskd.errors import ConfigError
from pipeline.demo import STUDENTS, _config, run_demo


@pytest.mark.parametrize("epochs", [1, 2, 40])
@pytest.mark.parametrize("student", STUDENTS)
def test_the_warm_up_is_shorter_than_the_training(tmp_path: Path, student: str, epochs: int) -> None:
    train = _config(tmp_path, student, epochs).train
    assert train.epochs == epochs
    assert train.warmup_epochs < epochs
    assert train.eval_every <= epochs


def test_students_of_other_epochs_are_named_before_anything_is_made(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "cskd"
    run.mkdir(parents=True)
    (run / "resolved.yaml").write_text(to_yaml(_config(tmp_path, "cskd", 3)), encoding="utf-8")
    with pytest.raises(ConfigError, match="has students of 3 epochs, asked for 2; give another folder"):
        run_demo(tmp_path, epochs=2, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
