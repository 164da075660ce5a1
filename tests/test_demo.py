"""What the demo asks for can be trained, whatever `--epochs` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.demo import STUDENTS, _config


@pytest.mark.parametrize("epochs", [1, 2, 40])
@pytest.mark.parametrize("student", STUDENTS)
def test_the_warm_up_is_shorter_than_the_training(tmp_path: Path, student: str, epochs: int) -> None:
    train = _config(tmp_path, student, epochs).train
    assert train.epochs == epochs
    assert train.warmup_epochs < epochs
    assert train.eval_every <= epochs
