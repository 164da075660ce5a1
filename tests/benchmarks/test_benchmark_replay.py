"""The replay benchmark counts what it says, finds no difference, and would find one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.replay as benchmark
import cskd.views.maker
from tests.caches import make_tiny_data

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = benchmark.Sizes(pairs=40, views=3, workers=0, many=(0, 1), batches=(12, 16, 24))


def prove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    make_tiny_data(tmp_path / "data", n=48, block=20, shard=10)
    status = benchmark.prove(tmp_path / "data", tmp_path, SIZES, size=32)
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_every_way_to_make_a_view_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = prove(tmp_path, capsys)
    assert (status, result["differences"], result["pairs"]) == (0, 0, 48 * 3)
    assert result["comparisons"] == sum(v["comparisons"] for v in result["variants"].values()) > 700
    assert {"workers 1", "start method spawn", "ranks 4", "batch 24", "repeats 3"} <= result["variants"].keys()


@pytest.mark.slow
def test_a_view_that_depends_on_its_worker_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    view, calls = cskd.views.maker.ViewMaker.view, iter(range(10**6))

    def drifting(self: Any, image: Any, seed: int) -> Any:
        out = view(self, image, seed)
        return out ^ np.uint8(1) if next(calls) == 200 else out  # in stage 1's second time over the data

    monkeypatch.setattr(cskd.views.maker.ViewMaker, "view", drifting)
    status, result = prove(tmp_path, capsys)
    assert (status, result["differences"]) == (1, 1)


@pytest.mark.slow
def test_on_real_images(sample_data: Path) -> None:
    command = [sys.executable, "-W", "ignore::UserWarning", "-m", "benchmarks.replay", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and result["differences"] == 0 and result["comparisons"] >= 2400
