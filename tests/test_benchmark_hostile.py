"""Mutated inputs of every kind are read or refused in one line; a reader that raises something else is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, before: str = "") -> tuple[int, dict[str, int], str]:
    code = f"import sys\nimport benchmarks.hostile as h\n{before}\nsys.exit(h.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--seed", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_every_kind_of_input_is_read_or_refused() -> None:
    status, counts, err = run("--count", "540")
    assert (status, counts["hostile"], counts["hostile_failed"]) == (0, 540, 0), err
    assert err == ""  # no library prints a traceback of its own either


def test_a_reader_that_breaks_hangs_or_escapes_is_found() -> None:
    broken = "h.decode = lambda data: {}[0]"
    assert run("--count", "5", "--only", "image", before=broken)[1]["hostile_failed"] == 5
    hanging = "import time; h.LIMIT_SECONDS = 1; h.decode = lambda data: time.sleep(30)"
    assert run("--count", "2", "--only", "image", before=hanging)[1]["hostile_failed"] == 2
    escaping = "h.load_config = lambda path: (path.parents[1] / 'canary').write_text('dead')"
    assert run("--count", "3", "--only", "config", before=escaping)[1]["hostile_failed"] == 3
    crashing = "import os; h.decode = lambda data: os.abort()"
    assert run("--count", "2", "--only", "image", before=crashing)[1]["hostile_failed"] == 1  # one child died
