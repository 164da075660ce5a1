"""Curated and mutated inputs of every kind are read or refused in one line; a reader that does something else is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hostile.base import Base
from benchmarks.hostile.cli import cli_cases

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str, before: str = "") -> tuple[int, dict[str, int], str]:
    code = (
        "import sys\nimport benchmarks.hostile.run as h, benchmarks.hostile.mutations as m, benchmarks.hostile.curated_data as d, benchmarks.hostile.curated_images as i\n"
        f"{before}\nsys.exit(h.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--seed", "1", "--no-cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_every_kind_of_mutated_input_is_read_or_refused() -> None:
    status, counts, err = run("--count", "420", "--no-curated")
    assert (status, counts["hostile"], counts["hostile_failed"]) == (0, 420, 0), err
    assert "Traceback" not in err


@pytest.mark.slow  # the test above reads mutated inputs in every run of the tests
@pytest.mark.parametrize(
    ("only", "least"),
    [
        (["pack: tar", "index:"], 100),
        (["pack: folder", "pack: gz", "image: png with", "image: jpeg with", "image: tiff with"], 40),
        (["config:", "classes:"], 60),
        (["inventory:", "manifest:", "commit:"], 120),
        (["cache:", "gc:", "unit:"], 55),
        (["weights:", "run:"], 75),
    ],
)
def test_curated_inputs_come_to_what_they_should(only: list[str], least: int) -> None:
    status, counts, err = run("--count", "0", "--only", *only)
    assert (status, counts["curated_failed"]) == (0, 0), err
    assert counts["curated"] >= least


@pytest.mark.slow
def test_a_dozen_go_through_the_real_command_line(tmp_path: Path) -> None:
    assert len(cli_cases(Base(tmp_path))) >= 12
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.hostile", "--count", "0", "--only", "cli: pack of names", "cli: index"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert json.loads(done.stdout.splitlines()[-1])["curated"] == 2, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_that_breaks_hangs_or_escapes_is_found() -> None:
    broken = "m.decode = lambda data: {}[0]"
    assert run("--count", "5", "--only", "image", "--no-curated", before=broken)[1]["hostile_failed"] == 5
    hanging = "import time; h.LIMIT_SECONDS = 1; m.decode = lambda data: time.sleep(30)"
    assert run("--count", "2", "--only", "image", "--no-curated", before=hanging)[1]["hostile_failed"] == 2
    escaping = "m.load_config = lambda path: (path.parents[1] / 'canary').write_text('dead')"
    assert run("--count", "3", "--only", "config", "--no-curated", before=escaping)[1]["hostile_failed"] >= 3
    crashing = "import os; m.decode = lambda data: os.abort()"
    assert (
        run("--count", "2", "--only", "image", "--no-curated", before=crashing)[1]["hostile_failed"] == 1
    )  # the child
    growing = "m.decode = lambda data: bytearray(3 << 30)"
    assert run("--count", "1", "--only", "image", "--no-curated", before=growing)[1]["hostile_failed"] == 1
    wrong = "i.decode = lambda data: None"  # reads what it should refuse
    assert run("--count", "0", "--only", "image: no bytes", before=wrong)[1]["curated_failed"] == 1
    leaving = "d.read_pack = lambda source, *a: (source.parent / 'x').write_text('y')"
    assert run("--count", "0", "--only", "pack: gz as", before=leaving)[1]["curated_failed"] == 1
