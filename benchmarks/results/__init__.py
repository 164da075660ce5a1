"""What docs/RESULTS.md reports, made again: images, teachers, students, tables and figures."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def results_folder() -> Path:
    """Where images, teachers, caches and runs lie: $CSKD_RESULTS, else runs/results of the checkout."""
    return Path(os.environ.get("CSKD_RESULTS", ROOT / "runs" / "results"))
