"""Metrics of a run outlive a write that fails, and a resumed run drops what it makes again."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from cskd.pipeline.show.metrics import MetricsLog, read_metrics


def test_a_write_that_fails_half_way_keeps_the_rows_there_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, 0)
    log.add({"epoch": 0, "loss": 1.0})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            log.add({"epoch": 1, "loss": 0.5})
    assert read_metrics(tmp_path) == [{"epoch": 0, "loss": 1.0}]


def test_a_resumed_run_drops_rows_it_makes_again_in_both_files(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for epoch in range(3):
        log.add({"epoch": epoch, "loss": 1.0})
    MetricsLog(tmp_path, 1).add({"epoch": 1, "loss": 0.5, "top1": 10.0})
    assert read_metrics(tmp_path) == [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5, "top1": 10.0}]
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [
            {"epoch": "0", "loss": "1.0", "top1": ""},
            {"epoch": "1", "loss": "0.5", "top1": "10.0"},
        ]
    assert sorted(os.listdir(tmp_path)) == ["metrics.csv", "metrics.jsonl"]
