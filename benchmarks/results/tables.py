"""Tables of docs/RESULTS.md from the tally, put between its markers; nothing is written there by hand.

    python -m benchmarks.results.tables [--tally docs/results/tally.jsonl] [--write docs/RESULTS.md]

Without --write the tables are printed. A block of the page is replaced from `<!-- table NAME -->` to `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.marked import fill
from benchmarks.results.students import METHODS, PRESETS, all_runs
from benchmarks.results.sweep import TALLY, read_tally
from cskd.pipeline.intervals import Difference, paired_difference

REFERENCES = ("none", "deit-hard", "cskd-linear", "cskd")  # that every method is compared with
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tally", type=Path, default=TALLY)
    parser.add_argument("--write", type=Path, help="page whose blocks are replaced")
    args = parser.parse_args(arguments)
    rows = read_tally(args.tally)
    tables = all_tables(rows)
    if args.write is None:
        print("\n\n".join("\n".join([name, "", *table]) for name, table in tables.items()))
        return 0
    try:
        args.write.write_text(fill(args.write.read_text(), tables, str(args.write)))
    except KeyError as e:
        print(f"benchmarks/results/tables.py: {e.args[0]}", file=sys.stderr)
        return 1
    return 0


def all_tables(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Name -> lines of Markdown. Of a question: the scores, every head, and the epochs it took."""
    tables: dict[str, list[str]] = {}
    for question in dict.fromkeys([*(run.question for run in all_runs()), *(row["question"] for row in rows)]):
        of = Question([row for row in rows if row["question"] == question and not row["online"]])
        parts = {"": of.scores, "-heads": of.heads, "-epochs": of.epochs}
        tables |= {
            question + part: make() if of.methods else ["No run is finished yet."] for part, make in parts.items()
        }
    return tables | {"views": views_table(rows), "online": online_table(rows)}


def said(d: Difference) -> str:
    """A paired difference in words: with its 95 % interval, and whether that holds 0."""
    if d.pairs < 2:
        return f"{d.mean:+.1f} (one pair)"
    noise = ", noise" if d.low <= 0 <= d.high else ""
    return f"{d.mean:+.1f} ± {(d.high - d.low) / 2:.1f}{noise}"


class Question:
    """The runs of one question, by method and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {(row["method"], row["seed"]): row for row in rows}
        self.methods = [m for m in dict.fromkeys([*METHODS, *PRESETS]) if any(method == m for method, _ in self.rows)]

    def seeds(self, *methods: str) -> list[int]:
        """Seeds that all the methods have."""
        return sorted(set.intersection(*({s for m, s in self.rows if m == method} for method in methods)))

    def values(self, method: str, of: Callable[[Row], float], seeds: Sequence[int]) -> list[float]:
        return [of(self.rows[method, seed]) for seed in seeds]

    def scores(self) -> list[str]:
        """Mean and spread of the score, and what it is above each reference over the seeds both have."""
        references = [method for method in REFERENCES if method in self.methods]
        lines = [
            "| method | seeds | top-1 % | sd | of head | "
            + " | ".join(f"minus {r}" for r in references)
            + " | s, fastest |",
            "|---|---|---|---|---|" + "---|" * len(references) + "---|",
        ]
        for method in self.methods:
            seeds = self.seeds(method)
            tops = self.values(method, score, seeds)
            spread = f"{np.std(tops, ddof=1):.2f}" if len(tops) > 1 else "-"
            against = [self._against(method, other) for other in references]
            seconds = min(self.values(method, lambda row: row["seconds"], seeds))
            head = self.rows[method, seeds[0]]["score"]
            cells = [method, str(len(seeds)), f"{np.mean(tops):.2f}", spread, head, *against, f"{seconds:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def heads(self) -> list[str]:
        """Mean top-1 of every trained head and average, over all seeds of a method."""
        names = list(dict.fromkeys(n for r in self.rows.values() for n in r["top1"] if not n.endswith(".untrained")))
        lines = [f"| method | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for method in self.methods:
            rows = [self.rows[method, seed] for seed in self.seeds(method)]
            cells = [f"{np.mean([r['top1'][n] for r in rows]):.2f}" if n in rows[0]["top1"] else "-" for n in names]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        return lines

    def epochs(self) -> list[str]:
        """Epochs until the score, evaluated while training, first reached an accuracy: mean over seeds."""
        marks = list(self._marks())
        lines = ["| method | " + " | ".join(f"{m} %" for m in marks) + " |", "|---|" + "---|" * len(marks)]
        for method in self.methods:
            found = [[epochs_to(self.rows[method, s], m) for s in self.seeds(method)] for m in marks]
            cells = [
                f"{np.mean([f for f in each if f]):.1f}" if all(each) else "never" if not any(each) else "some"
                for each in found
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        return lines

    def _marks(self) -> Iterator[int]:
        """Accuracies that tell methods apart: six, up to the best mean."""
        best = max(float(np.mean(self.values(m, score, self.seeds(m)))) for m in self.methods)
        yield from range(int(best) - 20, int(best) + 1, 4)

    def _against(self, method: str, other: str) -> str:
        if method == other or other not in self.methods or not (seeds := self.seeds(method, other)):
            return "-"
        return said(paired_difference(self.values(method, score, seeds), self.values(other, score, seeds)))


def score(row: Row) -> float:
    """Top-1 in per cent of what timm computes from the checkpoint."""
    return float(row["top1"][row["score"]])


def epochs_to(row: Row, mark: float) -> int | None:
    """Epochs trained when the score was first evaluated at `mark` per cent or more."""
    key = f"top1.{row['score']}"
    return next((point["epoch"] + 1 for point in row["curve"] if point.get(key, -1.0) >= mark), None)


def views_table(rows: Sequence[Row]) -> list[str]:
    """Accuracy against the number of cached views, and what they weigh."""
    found = {row["views"]: row for row in rows if varies_views(row)}
    lines = ["| views | MB of targets | top-1 % |", "|---|---|---|"]
    for count, row in sorted(found.items()):
        lines.append(f"| {count} | {row['target_bytes'] / 1e6:.1f} | {score(row):.2f} |")
    return lines


def varies_views(row: Row) -> bool:
    few = row["question"] == "few" or row["question"].startswith("few-views")
    return bool(few and row["method"] == "cskd-linear" and row["seed"] == 0)


def online_table(rows: Sequence[Row]) -> list[str]:
    """Weights from the cache and with the teacher running: their hashes."""
    lines = ["| run | teacher forwards | sha256 of the weights | s |", "|---|---|---|---|"]
    for row in rows:
        if row["question"] == "few-short":
            lines.append(
                f"| {'online' if row['online'] else 'cached'} | {row['teacher_forwards']} | {row['weights_sha256'][:16]} "
                f"| {row['seconds']:.0f} |"
            )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
