"""Runs of `cskd train` as an analysis reads them: config, metrics, and the weights after each epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cskd.codecs.base import BLEND_ONE
from cskd.config import Config, load_config
from cskd.errors import ConfigError
from cskd.files.paths import local_path
from cskd.method.ckf import blend_at
from cskd.pipeline.show.metrics import read_metrics
from cskd.store.format import RESOLVED
from cskd.student import Student
from cskd.student.checkpoint import ResumeStates, load_student


@dataclass(frozen=True)
class State:
    """Weights at the end of an epoch."""

    path: Path
    step: int  # updates done
    epoch: int  # epochs done


@dataclass(frozen=True)
class Run:
    """An output folder of `cskd train`."""

    name: str
    folder: Path
    config: Config
    student: Student  # in evaluation mode
    crop_pct: float  # share of the short side that its evaluation sees
    rows: list[dict[str, Any]]  # of metrics.jsonl
    states: list[State]  # rising
    weights: str  # which of a state's weights are looked at: model (the live ones) or ema

    @property
    def has_patches(self) -> bool:
        """Whether its patch tokens were taught to predict."""
        return "patches" in self.student.trained

    def blend(self, state: State) -> float:
        """Share of the local class in the targets of the last epoch before a state."""
        return blend_at(state.epoch - 1, self.config.train.epochs, self.config.loss.decay) / BLEND_ONE

    def load(self, state: State) -> Student:
        """The student with the weights of a state. StudentError for one that is damaged or of another student."""
        states = ResumeStates(state.path.parent)
        self.student.backbone.load_state_dict(states.weights(state.step, self.weights, self.student))
        return self.student.eval()


def open_run(folder: Path) -> Run:
    """Read a run.

    Raises:  ConfigError for what is no output folder, or has no metrics or states; StudentError as `load_student`.
    """
    folder = local_path(folder, "RUN")
    if not (folder / RESOLVED).is_file():
        raise ConfigError(f"{folder} has no {RESOLVED}; give an output folder of `cskd train`")
    config = load_config(folder / RESOLVED)
    student, facts = load_student(folder)
    rows = read_metrics(folder)
    epoch_of = {int(row["step"]): int(row["epoch"]) + 1 for row in rows if "step" in row}
    states = [
        State(folder / "resume" / f"step-{step:08d}.safetensors", step, epoch_of[step])
        for step in sorted(ResumeStates(folder / "resume").infos())
        if step in epoch_of  # others were saved inside an epoch
    ]
    if not states:
        raise ConfigError(
            f"{folder / 'resume'} has no state of an epoch's end that {folder / 'metrics.jsonl'} knows; train with a large "
            "train.keep, which keeps them"
        )
    averaged = config.train.ema is not None and config.train.export != "live"
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        student=student,
        crop_pct=float(facts["pretrained_cfg"]["crop_pct"]),
        rows=rows,
        states=states,
        weights="ema" if averaged else "model",
    )


def accuracy(run: Run) -> dict[str, Any]:
    """Top-1 of each head through training, of the weights that are looked at.

    Returns: 'epoch', epochs done at each evaluation; 'heads', name as in metrics.jsonl -> per cent of data.val, as many.
    """
    prefix = "top1.ema." if run.weights == "ema" else "top1."
    rows = [row for row in run.rows if any(name.startswith(prefix) for name in row)]
    names = dict.fromkeys(name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix))
    heads = [name for name in names if not name.startswith("ema.")]
    return {
        "epoch": [row["epoch"] + 1 for row in rows],
        "heads": {head: [row.get(prefix + head) for row in rows] for head in heads},
    }


def distinct_names(runs: list[Run]) -> list[str]:
    """Names of runs, with that of the folder above where two would be the same."""
    names = [run.name for run in runs]
    return [f"{run.folder.resolve().parent.name}/{run.name}" if names.count(run.name) > 1 else run.name for run in runs]
