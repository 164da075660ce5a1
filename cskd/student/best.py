"""The best weights of a run, by a score of its evaluations: a file per improvement next to the resume states.

Each resume state names the file that was the best at its step, and a file stays for as long as a state names it. So a run
that goes back to an earlier state goes back to that state's best, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cskd.errors import ConfigError
from cskd.files.read import file_sha256
from cskd.near import did_you_mean
from cskd.student.heads import score_head
from cskd.student.model import Student, head_names
from cskd.student.resume import put_weights


@dataclass(frozen=True)
class Best:
    """The highest score so far: `name` as in metrics.jsonl, in per cent, of the weights after `step` updates."""

    name: str
    score: float
    step: int
    sha256: str = ""  # of the file with the weights

    @classmethod
    def of(cls, record: Any) -> Best | None:
        """What `record` gave; None for anything else."""
        try:
            best = cls(str(record["name"]), float(record["score"]), int(record["step"]), str(record["sha256"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        return best if math.isfinite(best.score) and best.step >= 0 else None

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def prefix(self) -> str:
        """Which weights have the score: 'ema.' for the averaged ones, '' for the live ones."""
        return "ema." if self.name.split(".")[1] == "ema" else ""


class BestWeights:
    """The files in a folder, one per step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, best: Best) -> Path:
        return self.folder / f"best-{best.step:08d}.safetensors"

    def put(self, best: Best, student: Student) -> Best:
        """Write weights, durably. Returns: the best with the hash of its file. StudentError when the disk refuses."""
        put_weights(self.path(best), student.backbone.state_dict())
        return replace(best, sha256=file_sha256(self.path(best)))

    def holds(self, best: Best) -> bool:
        """Whether the file of a best is there and whole."""
        try:
            return file_sha256(self.path(best)) == best.sha256
        except OSError:
            return False

    def keep(self, bests: Collection[Best]) -> None:
        """Remove the files of all others, and what lies next to them under their names."""
        kept = {self.path(best).stem for best in bests}
        for path in (*self.folder.glob("best-*.safetensors"), *self.folder.glob("best-*.csv")):
            if path.stem not in kept:
                path.unlink(missing_ok=True)


def score_names(student: Student, averaged: bool) -> list[str]:
    """The scores an evaluation gives, as `train.best` may name them: 'top1.class', with an average 'top1.ema.class', ..."""
    prefixes = ("", "ema.") if averaged else ("",)
    return [f"{top}.{prefix}{head}" for top in ("top1", "top5") for prefix in prefixes for head in head_names(student)]


def score_asked(name: str | None, student: Student, averaged: bool) -> str:
    """The score that decides: the one named, or that of what timm's model of the export predicts with.

    Raises:  ConfigError for a name that no evaluation of this student gives.
    """
    names = score_names(student, averaged)
    if name is None:
        return f"top1.{'ema.' if averaged else ''}{score_head(student.trained)}"
    if name not in names:
        hint = did_you_mean(name, names)
        raise ConfigError(
            f"train.best is {name!r}, expected one of {', '.join(n for n in names if n[:4] == 'top1')}{hint and f'; {hint}'}"
        )
    return name
