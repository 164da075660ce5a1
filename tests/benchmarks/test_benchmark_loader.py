"""The loader's benchmark times both sides and prints what its docstring says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import benchmarks.loader as benchmark
from tests.caches import make_tiny_data

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_parts_of_a_view_are_timed_one_by_one(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data", n=8)
    found = benchmark.parts(tmp_path / "data", views=4, rounds=2)
    parts = np.array([found[f"{name}_us"] for name in ("decode", "augment", "digest")])
    assert (parts > 0).all() and found["views"] == 4
    assert found["digest_share"] == pytest.approx(parts[2] / parts.sum())


@pytest.mark.slow
def test_both_sides_load_the_sample(sample_data: Path) -> None:
    sizes = ["--rounds", "1", "--batches", "2", "--batch", "16", "--workers", "1", "--only", "crop_flip"]
    command = [sys.executable, "-m", "benchmarks.loader", *sizes]
    env = {**os.environ, "CSKD_DATA": str(sample_data)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for side in ("cskd", "timm"):
        assert all(result[f"crop_flip_{side}_{key}"] > 0 for key in ("images_s", "cpu_us", "pss_mb", "rss_mb"))
    assert result["ratio_crop_flip"] > 0
