"""The benchmark of the teacher's arithmetic on a tiny data set: a row for each, plain ones near nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import precision
from cskd.config import to_dict
from tests.caches import make_tiny_data
from tests.teachers import tiny_teacher


def test_every_arithmetic_is_compared_with_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_data(tmp_path / "data", n=8, block=8, shard=8)
    sections = {
        "data": {"train": str(tmp_path / "data")},
        "teacher": to_dict(tiny_teacher(tmp_path)),
        "recipe": {"size": 64},
        "cache": {"device": "cpu"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(sections))
    assert precision.main([str(tmp_path / "c.yaml"), "--views", "8"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts.keys() == precision.ROWS.keys() and all(row["views"] == 8 for row in facts.values())
    assert max(facts["float64"]["cells_differ"], facts["float32, folded"]["cells_differ"]) < 0.01
    assert precision.main([str(tmp_path / "c.yaml"), "--set", "data.train=nowhere"]) == 1
