"""Every check of the project, in one command: `python -m tests`. Further arguments go to pytest: `-n 0` for one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# The tests of a file stay together: they share what its fixtures made. By name: those of the benchmarks, the longest, come early.
PARALLEL = ("-n", str(min(8, CORES)), "--dist", "loadfile", "--no-loadscope-reorder")
CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("sphinx", "-W", "--keep-going", "-q", "docs", "build/site"),
    ("pytest", *PARALLEL, *sys.argv[1:]),  # last, so that its summary is the last thing seen
)


def main() -> int:
    failed = []
    for check in CHECKS:
        print(f"$ python -m {' '.join(check)}", flush=True)
        if subprocess.run([sys.executable, "-m", *check], cwd=ROOT).returncode:
            failed.append(check[0])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
