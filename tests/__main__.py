"""Every check of the project, in one command: `python -m tests`. Further arguments go to pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("pytest", *sys.argv[1:]),  # last, so that its summary is the last thing seen
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
