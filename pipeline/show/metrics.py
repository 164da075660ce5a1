"""Metrics of a run: JSON lines, and the same as CSV. A resumed run drops what it makes again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cskd.files.durable import put


class MetricsLog:
    """One row per epoch in `metrics.jsonl` and `metrics.csv`. `start_epoch`: rows of this and later epochs are dropped.

    folder None: of a rank that keeps no log.
    """

    def __init__(self, folder: Path | None, start_epoch: int) -> None:
        self.folder = folder
        self.rows = [r for r in read_metrics(folder) if r["epoch"] < start_epoch] if folder else []
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """One epoch's figures; `epoch` is required."""
        self.rows.append(row)
        self._write()

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


def reached(rows: Sequence[Mapping[str, Any]], score: str) -> str:
    """The top-1 of the last row that has one of the head `score`, and the best of all rows, in words; '' where none has.

    rows: of a log, each with `epoch`, from 0. 'top-1 57.10 % after epoch 6 (class), best 57.32 % after epoch 4'
    """
    scored = [(row[f"top1.{score}"], row["epoch"] + 1) for row in rows if f"top1.{score}" in row]
    if not scored:
        return ""
    (top1, epoch), (best, best_epoch) = scored[-1], max(scored, key=lambda at: at[0])
    return f"top-1 {top1:.2f} % after epoch {epoch} ({score}), best {best:.2f} % after epoch {best_epoch}"


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
