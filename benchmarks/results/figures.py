"""Figures of docs/RESULTS.md from the tally: learning curves, and accuracy against the number of cached views.

python -m benchmarks.results.figures [--tally docs/results/tally.jsonl] [--out docs/results]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.results.students import MAIN
from benchmarks.results.sweep import TALLY, read_tally
from benchmarks.results.tables import Question, Row, score, varies_views

COLOURS = dict(zip(MAIN, ("#56595c", "#0072b2", "#d55e00", "#009e73"), strict=True))  # Okabe and Ito's; grey is none
TITLES = {"few": "5,000 images", "all": "50,000 images"}
SIZE = (7.5, 4.6)  # inches, at 130 dots per inch


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
    if len(found := [row for row in rows if varies_views(row)]) > 1:
        views(found, args.out / "views.png")
    return 0


def curve(of: Question, title: str, path: Path) -> None:
    """Score against epochs: a line is the mean over seeds, its band the smallest and the largest."""
    figure, axes = plt.subplots(figsize=SIZE, dpi=130)
    for method in MAIN:
        if method not in of.methods:
            continue
        runs = [of.rows[method, seed] for seed in of.seeds(method)]
        points = [
            [(p["epoch"] + 1, p[f"top1.{r['score']}"]) for p in r["curve"] if f"top1.{r['score']}" in p] for r in runs
        ]
        epochs = [epoch for epoch, _ in points[0]]
        tops = np.array([[top for _, top in run] for run in points])
        label = f"{method}, {len(runs)} seed{'s' * (len(runs) > 1)}: {np.mean([score(r) for r in runs]):.1f} %"
        axes.plot(epochs, tops.mean(0), color=COLOURS[method], label=label, linewidth=2)
        axes.fill_between(epochs, tops.min(0), tops.max(0), color=COLOURS[method], alpha=0.18, linewidth=0)
    _finish(figure, axes, path, f"ViT students on {title} of CIFAR-10", "epoch", "top-1 of 5,000 validation images, %")


def views(rows: Sequence[Row], path: Path) -> None:
    """Score of CSKD against the number of views that the cache holds, and what their targets weigh."""
    found = sorted((row["views"], score(row), row["target_bytes"] / 1e6) for row in rows)
    figure, axes = plt.subplots(figsize=SIZE, dpi=130)
    axes.plot(
        [v for v, _, _ in found], [top for _, top, _ in found], color=COLOURS["cskd-linear"], marker="o", linewidth=2
    )
    for count, top, size in found:
        axes.annotate(
            f"{size:.1f} MB", (count, top), textcoords="offset points", xytext=(0, -16), ha="center", fontsize=9
        )
    axes.set_xscale("log")
    axes.set_xticks([v for v, _, _ in found], [str(v) for v, _, _ in found])
    axes.minorticks_off()
    axes.margins(y=0.15)
    _finish(
        figure, axes, path, "How many cached views are enough: CSKD linear, 5,000 images", "views per image", "top-1, %"
    )


def _finish(figure: plt.Figure, axes: plt.Axes, path: Path, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
