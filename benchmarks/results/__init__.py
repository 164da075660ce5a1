"""What docs/RESULTS.md reports, made again: images, teachers, students, tables and figures."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def results_folder() -> Path:
    """Where images, teachers, caches and runs lie: $CSKD_RESULTS, else runs/results of the checkout."""
    return Path(os.environ.get("CSKD_RESULTS", ROOT / "runs" / "results"))


def shared_weights(name: str) -> Path | None:
    """A weight file of $CSKD_DATA (else `shared` beside the checkout), None where it is not there."""
    path = data_folder() / "teachers" / name
    return path if path.exists() else None


def data_folder() -> Path:
    """Where the tars of CIFAR-10 lie: $CSKD_DATA, else `shared` beside the checkout."""
    return Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared"))
