"""Where else the metrics of a run go: TensorBoard, Weights & Biases, Trackio, MLflow.

A tracker never stops a run: it works in a thread of its own, and one that fails or hangs is said and left out. A resumed
run goes on in the tracker's run of the same name, which `trackers.json` in the run's folder keeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cskd.errors import one_line
from cskd.files.durable import put

RECORD = "trackers.json"
PROJECT = "cskd"  # where the tracker's own variable (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME) names none
PATIENCE = 30.0  # seconds that the end of a run waits for a tracker
_MOST_AT_ONCE = 100  # parameters that MLflow takes in one call
_LONGEST = 500  # characters of a parameter that every version of MLflow takes
Row = Mapping[str, float]


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told at the start. id: of the tracker's run, '' for a new one. start_epoch: the first that is made, so
    rows of it and later ones, which an interrupted run may have sent, are sent again."""

    folder: Path
    config: dict[str, Any]
    start_epoch: int
    id: str


class Tracker(Protocol):
    """One that is connected; every method may raise anything. id: what a resumed run is found by."""

    id: str

    def log(self, row: Row, epoch: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run, by name in `OPEN`; without a folder (of another rank) none. tell: prints a line."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | None,
        start_epoch: int,
        config: dict[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._threads: list[_Thread] = []
        if folder is None:
            return
        ids, writing = _read(folder), threading.Lock()

        def keep(name: str, id: str) -> None:
            with writing:
                if id and ids.get(name) != id:
                    ids[name] = id
                    put(folder / RECORD, json.dumps(ids).encode())

        for name in names:
            self._threads.append(_Thread(name, Tracked(folder, config, start_epoch, ids.get(name, "")), keep, tell))

    def log(self, row: Mapping[str, Any]) -> None:
        """One epoch's figures; texts in it are left out."""
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k != "epoch"}
        for thread in self._threads:
            thread.work.put((numbers, row["epoch"]))

    def close(self) -> None:
        """Wait until all was sent, `PATIENCE` seconds at most."""
        for thread in self._threads:
            thread.end()
        self._threads.clear()


class _Thread:
    """One tracker, which is opened, told and closed outside of the run's own thread."""

    def __init__(
        self, name: str, tracked: Tracked, keep: Callable[[str, str], None], tell: Callable[[str], None]
    ) -> None:
        self.work: queue.SimpleQueue[tuple[Row, int] | None] = queue.SimpleQueue()
        self._name, self._tell = name, tell
        self._thread = threading.Thread(target=self._run, args=(tracked, keep), name=name, daemon=True)
        self._thread.start()

    def _run(self, tracked: Tracked, keep: Callable[[str, str], None]) -> None:
        try:
            tracker = OPEN[self._name](tracked)
            keep(self._name, tracker.id)
            while (item := self.work.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except Exception as e:
            self._tell(
                f"train.trackers: {self._name} failed and is left out from here on; the run goes on: {one_line(e)}"
            )

    def end(self) -> None:
        self.work.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._tell(
                f"train.trackers: {self._name} did not end within {PATIENCE:.0f} s, and may lack the last epochs"
            )


class _TensorBoard:
    """One event file per command in the run's folder; a resume marks what it makes again."""

    def __init__(self, tracked: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = ""
        self._board: Any = SummaryWriter(str(tracked.folder / "tensorboard"), purge_step=tracked.start_epoch)

    def log(self, row: Row, epoch: int) -> None:
        for name, value in row.items():
            self._board.add_scalar(name, value, epoch)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class _Wandb:
    """https://docs.wandb.ai/models/ref/python; WANDB_MODE=offline needs no account."""

    def __init__(self, tracked: Tracked) -> None:
        import wandb

        self.id = tracked.id or uuid.uuid4().hex[:12]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=tracked.folder.name,
            id=self.id,
            resume="allow",
            dir=str(tracked.folder),
            config=tracked.config,
        )
        # Steps of W&B only rise, and a resumed run sends an epoch again: so the epoch is a figure of its own.
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def log(self, row: Row, epoch: int) -> None:
        self._run.log({**row, "epoch": epoch})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """https://huggingface.co/docs/trackio; local unless TRACKIO_SPACE_ID is set."""

    def __init__(self, tracked: Tracked) -> None:
        import trackio

        self.id = tracked.id or f"{tracked.folder.name}-{uuid.uuid4().hex[:6]}"
        self._run: Any = trackio.init(project=PROJECT, name=self.id, resume="allow", config=tracked.config, embed=False)

    def log(self, row: Row, epoch: int) -> None:
        self._run.log({**row, "epoch": epoch}, step=epoch)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """https://mlflow.org/docs/latest/python_api; MLFLOW_TRACKING_URI says where."""

    def __init__(self, tracked: Tracked) -> None:
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        self.id = tracked.id or self._new(tracked)
        self._client.update_run(self.id, "RUNNING")

    def _new(self, tracked: Tracked) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(id, run_name=tracked.folder.name).info.run_id
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_LONGEST]) for key, value in _flat(tracked.config).items()]
        for first in range(0, len(params), _MOST_AT_ONCE):
            self._client.log_batch(run, params=params[first : first + _MOST_AT_ONCE])
        return str(run)

    def log(self, row: Row, epoch: int) -> None:
        for name, value in row.items():
            # Earlier versions of MLflow refuse colons, which the scores of tokens have.
            self._client.log_metric(self.id, re.sub(r"[^\w ./-]", "_", name), value, step=epoch)

    def close(self) -> None:
        self._client.set_terminated(self.id)


OPEN: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
}  # the names are those of the packages, too


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _read(folder: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {str(k): v for k, v in record.items() if isinstance(v, str)} if isinstance(record, dict) else {}
    return {}
