"""The files of `cskd launch` on a real SLURM and a real Ray, where they are installed: the cache of one process alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launch import on_ray, on_slurm
from benchmarks.launch.run import main


def result(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    code = main(["--only", name, "--folder", str(folder)])
    out = capsys.readouterr().out
    facts = json.loads(out.splitlines()[-1])
    assert code == 0 and facts["wrong"] == 0, out
    return facts["alone"], facts[name]


@pytest.mark.slow
@pytest.mark.skipif(bool(on_slurm.missing()), reason=on_slurm.missing() or "-")
def test_tasks_that_are_queued_again_make_the_cache_of_one_process_and_stage_2_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, slurm = result("slurm", tmp_path, capsys)
    assert slurm["content_root"] == alone
    assert (
        slurm["requeued"] == 2 and slurm["stage2_meanwhile"] == "PENDING (Dependency)" and slurm["stage2_after_stage1"]
    )


@pytest.mark.slow
@pytest.mark.skipif(bool(on_ray.missing()), reason=on_ray.missing() or "-")
def test_actors_that_are_killed_make_the_cache_of_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, ray = result("ray", tmp_path, capsys)
    assert ray["content_root"] == alone and ray["killed"] == 2
