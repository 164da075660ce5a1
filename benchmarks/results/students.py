"""Which students docs/RESULTS.md reports: every run by name, with the overrides that `cskd train` takes.

A run's name is its folder, QUESTION/METHOD/seedN, and the same name gives the same run on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.results import results_folder
from cskd.config import Config, load_config

HERE = Path(__file__).resolve().parent
METHODS = {  # name in tables -> loss section
    "none": ("loss.method=none",),
    "deit-hard": ("loss.method=deit-hard",),
    "deit-soft": ("loss.method=deit-soft",),
    "cskd-linear": ("loss.method=cskd-hard", "loss.decay=linear"),
    "cskd-quadratic": ("loss.method=cskd-hard", "loss.decay=quadratic"),
    "cskd-cosine": ("loss.method=cskd-hard", "loss.decay=cosine"),
    "cskd-soft": ("loss.method=cskd-soft", "loss.decay=linear"),
    "local": ("loss.method=cskd-hard", "loss.decay=local"),
    "global": ("loss.method=cskd-hard", "loss.decay=global"),
}
MAIN = ("none", "deit-hard", "cskd-linear", "local")  # those with most seeds
PLAIN = (  # a student without a distillation token, its class token read by the one head
    "student.model=vit_tiny_patch16_224",
)


@dataclass(frozen=True)
class StudentRun:
    """One student. `question`: few, all, or a variation of one of them; `rank`: those with lower ones are trained first."""

    question: str
    method: str
    seed: int
    config: str = "few.yaml"
    sets: tuple[str, ...] = field(default=(), repr=False)
    online: bool = False  # the teacher runs at every step, for the comparison with the cache
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.question}/{self.method}/seed{self.seed}{'-online' if self.online else ''}"

    @property
    def folder(self) -> Path:
        return results_folder() / "runs" / self.name

    @property
    def overrides(self) -> tuple[str, ...]:
        """What tells this run from the config it is a run of."""
        return (*METHODS[self.method], f"train.seed={self.seed}", *self.sets)

    def load(self, more: tuple[str, ...] = ()) -> Config:
        """The whole config of the run."""
        return load_config(HERE / self.config, [*self.overrides, f"train.output={self.folder}", *more])

    @property
    def command(self) -> str:
        """The line that trains it by hand, in the default folder."""
        sets = " ".join(f"--set {s}" for s in (*self.overrides, f"train.output=runs/results/runs/{self.name}"))
        return f"cskd train benchmarks/results/{self.config} {sets}{' --online' if self.online else ''}"


def all_runs() -> list[StudentRun]:
    """Every run of the sweep, in the order in which they are trained: paired seeds of the main methods first."""
    runs = [
        *(_main(StudentRun("few", m, s, rank=s)) for s in range(5) for m in MAIN),
        *(StudentRun("few", m, s, rank=s) for s in range(3) for m in METHODS if m not in MAIN),
        *(_views(v) for v in (1, 3, 9)),
        *(StudentRun("few-plain", m, s, sets=PLAIN, rank=2 + s) for s in range(2) for m in MAIN),
        *(_short(online) for online in (False, True)),
        *(StudentRun("all", m, s, "all.yaml", rank=3 + 3 * s) for s in range(3) for m in MAIN),
        *(StudentRun("all", m, 0, "all.yaml", rank=6) for m in METHODS if m not in MAIN and "soft" not in m),
        *(StudentRun("all-plain", m, 0, "all.yaml", sets=PLAIN, rank=7) for m in MAIN),
    ]
    return sorted(runs, key=lambda run: run.rank)


def _views(count: int) -> StudentRun:
    """CSKD from the first `count` views of the cache: each is used again and again."""
    return StudentRun(f"few-views{count}", "cskd-linear", 0, sets=(f"train.views={count}",), rank=2)


def _main(run: StudentRun) -> StudentRun:
    """Seed 0 keeps the states of all epochs, for benchmarks.results.analysis."""
    return run if run.seed else replace(run, sets=("train.keep=1000",))


def _short(online: bool) -> StudentRun:
    return StudentRun(
        "few-short", "cskd-linear", 0, sets=("train.epochs=4", "train.eval_every=4"), online=online, rank=2
    )
