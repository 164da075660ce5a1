"""The benchmark of faults finds none, counts what it did, and would find one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str, before: str = "") -> tuple[int, dict[str, int]]:
    code = f"{before}\nimport sys\nfrom benchmarks.faults.run import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--quick", "--seed", "1", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_nothing_goes_wrong_in_silence(tmp_path: Path) -> None:
    status, counts = run("--tally", str(tmp_path / "tally.json"))
    assert (status, counts["wrong"]) == (0, 0)
    assert counts["kills_wrong"] == counts["flips_missed"] == counts["hostile_failed"] == 0
    assert counts["kills"] >= 6 and counts["deaths"] == 8 and counts["flips"] == 75 and counts["races"] == 4
    assert counts["hostile"] >= 300
    tally = json.loads((tmp_path / "tally.json").read_text())
    assert counts | tally == counts


@pytest.mark.slow
def test_counts_of_several_runs_are_added(tmp_path: Path) -> None:
    tally = tmp_path / "tally.json"
    tally.write_text('{"swaps": 5, "kills": 7}')
    _, counts = run("--only", "swaps", "--tally", str(tally))
    assert (counts["swaps"], counts["kills"], counts["wrong"]) == (17, 7, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("flips", "import cskd.pipeline.care.verify as v; v.check_unit = lambda *a: None"),
        ("training", "import cskd.student.optim as o; import torch; o.reseed_step = lambda *a: torch.seed()"),
        (
            "races",  # the last record counts, as with a rename
            "import cskd.files.durable as d; put = d.put; d.put = lambda path, data, *, first=False: put(path, data)",
        ),
    ],
)
def test_what_is_broken_on_purpose_is_found(part: str, broken: str) -> None:
    status, counts = run("--only", part, before=broken)
    assert status == 1 and counts["wrong"] > 0
