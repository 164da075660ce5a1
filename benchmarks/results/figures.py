"""Figures of docs/RESULTS.md from the tally: learning curves, and accuracy against the number of cached views.

python -m benchmarks.results.figures [--tally docs/results/tally.jsonl] [--out docs/results]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.results.students import MAIN
from benchmarks.results.sweep import TALLY, read_tally
from benchmarks.results.tables import Question, Row, score, varies_views
from cskd.pipeline.demo_curve import Curve, draw_curves

TITLES = {"few": "5,000 images", "all": "50,000 images"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tally", type=Path, default=TALLY)
    parser.add_argument("--out", type=Path, default=TALLY.parent)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = read_tally(args.tally)
    for question, title in TITLES.items():
        if any(row["question"] == question for row in rows):
            curve(Question([r for r in rows if r["question"] == question]), title, args.out / f"{question}_curve.png")
    if len(found := [row for row in rows if varies_views(row)]) > 2:
        views(found, args.out / "views.png")
    return 0


def curve(of: Question, title: str, path: Path) -> None:
    """Score against epochs of the main methods."""
    curves = {}
    for method in (m for m in MAIN if m in of.methods):
        runs = [of.rows[method, seed] for seed in of.seeds(method)]
        key = f"top1.{runs[0]['score']}"
        points = [[point for point in run["curve"] if key in point] for run in runs]
        epochs = np.array([point["epoch"] + 1 for point in points[0]], np.int64)
        top1 = np.array([[point[key] for point in run] for run in points], np.float64)
        curves[f"{method}, {len(runs)} seed{'s' * (len(runs) > 1)}:"] = Curve(epochs, top1)
    draw_curves(path, curves, None, f"ViT students on {title} of CIFAR-10, mean and range of the seeds")


def views(rows: Sequence[Row], path: Path) -> None:
    """Score of CSKD against the number of views that the cache holds, and what their targets weigh."""
    found = sorted((row["views"], score(row), row["target_bytes"] / 1e6) for row in rows)
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([v for v, _, _ in found], [top for _, top, _ in found], color="#0072b2", marker="o", linewidth=2)
    for count, top, size in found:
        axes.annotate(
            f"{size:.1f} MB", (count, top), textcoords="offset points", xytext=(0, -16), ha="center", fontsize=9
        )
    axes.set_xscale("log")
    axes.set_xticks([v for v, _, _ in found], [str(v) for v, _, _ in found])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set(
        title="How many cached views are enough: CSKD linear, 5,000 images", xlabel="views per image", ylabel="top-1, %"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    raise SystemExit(main())
