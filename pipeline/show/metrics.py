"""Metrics of a run: JSON lines, the same as CSV, TensorBoard where asked for. A resumed run drops what it makes again."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from cskd.errors import ConfigError, one_line
from cskd.files.durable import put


class MetricsLog:
    """One row per epoch in `metrics.jsonl` and `metrics.csv`. `start_epoch`: rows of this and later epochs are dropped.

    folder None: of a rank that keeps no log.
    """

    def __init__(self, folder: Path | None, start_epoch: int, tensorboard: bool = False) -> None:
        self.folder = folder
        self.rows = [r for r in read_metrics(folder) if r["epoch"] < start_epoch] if folder else []
        self._board = _summary_writer(folder, start_epoch) if tensorboard and folder else None
        self._write()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()

    def add(self, row: dict[str, Any]) -> None:
        """One epoch's figures; `epoch` is required."""
        self.rows.append(row)
        self._write()
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()

    def _write(self) -> None:
        if self.folder is None:
            return
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        put(self.folder / "metrics.jsonl", lines.encode())
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(dict.fromkeys(name for row in self.rows for name in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        put(self.folder / "metrics.csv", table.getvalue().encode())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a torn line, and what follows it, is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append({**row, "epoch": int(row["epoch"])})
        except (ValueError, TypeError, KeyError):
            break
    return rows


def _summary_writer(folder: Path, start_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:  # it is there, `outputs.refuse_run_output` has seen it
        raise ConfigError(f"train.tensorboard: {one_line(e)}; run: pip install --upgrade tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_epoch)
