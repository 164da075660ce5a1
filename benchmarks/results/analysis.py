"""How does the spatial supervision guide training, and what may predict: one figure and its numbers for each question.

    python -m benchmarks.results.analysis OUT RUN [RUN ...] [--images 500] [--device auto]

RUN is an output folder of `cskd train` with a large train.keep, so that the weights of many epochs are there (set it when the
run begins); all runs share data.val, teacher and cache. Where a run has averaged weights that it exports, those are looked at.

    agreement.png            share of the cells in which the student's patch logits say the teacher's local class (hard target
                             at blend 1), its global class, or the label, after each epoch; the same where the first two differ
    agreement_cells.png      share that says the local class, cell by cell, at the first, a middle and the last epoch
    attention_distance.png   mean attention distance of each layer and head at the last epoch
    accuracy.png             every head and average through training, out of metrics.jsonl

Images are clean ones of data.val, the same for all, spread over its classes; student and teacher see the same pixels. A run
whose patch tokens are not taught (loss.method none, deit-*) has no patch predictions: the first two leave it out.

analysis.json in OUT, and the last line printed, hold all numbers: 'teacher' (see agreement.teacher_facts), 'runs' by name, each
with 'agreement' (see agreement.agreement), 'cells', 'attention' and 'accuracy', and 'left_out', what is missing and why.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results.agreement import Cells, agreement, agreement_map, teacher_cells, teacher_facts
from benchmarks.results.analysis_figures import draw
from benchmarks.results.attention import distances_by_layer, mean_distance, patch_distances
from benchmarks.results.runs import Run, accuracy, distinct_names, open_run
from cskd.config import RecipeConfig, TeacherConfig, load_config, to_dict
from cskd.dataset.inventory import Inventory, open_inventory
from cskd.errors import CacheError, ConfigError, CskdError, DataError, ImageError, PathError
from cskd.machine.devices import pick_device
from cskd.pipeline.clean_check import spread
from cskd.store.cache import open_cache
from cskd.store.format import MANIFEST, RESOLVED
from cskd.student import Student
from cskd.teacher.model import Teacher, load_teacher
from cskd.views.maker import ViewMaker, clean_view
from cskd.views.mix_pixels import normalise

BATCH = 50  # images a forward of a student: one with its attention is far larger than one without


@dataclass(frozen=True)
class Images:
    """Clean images of data.val as an evaluation makes them."""

    pixels: Tensor  # uint8 [n, 3, H, W]
    label: Tensor  # int64 [n]
    unreadable: int

    def batches(self, student: Student, device: torch.device) -> Iterator[Tensor]:
        """Normalised for a student: float32 [B, 3, H, W]."""
        for part in torch.split(self.pixels, BATCH):
            yield normalise(part.to(device).float(), student.mean, student.std)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    try:
        if options.images < 1:
            raise ConfigError(f"--images is {options.images}, expected at least 1")
        runs = [open_run(folder) for folder in options.runs]
        runs = [replace(run, name=name) for run, name in zip(runs, distinct_names(runs), strict=True)]
        facts = analyse(runs, options.images, pick_device(options.device))
        figures = write(options.out, facts)
    except CskdError as e:
        print(f"benchmarks/results/analysis.py: {e}", file=sys.stderr)
        return 1
    print(f"{platform.platform()}, torch {torch.__version__}, {facts['images']} images of {facts['data']}")
    print(f"{options.out}: {', '.join(figures)}")
    for line in [*facts["left_out"], *(_summary(name, run) for name, run in facts["runs"].items())]:
        print(line)
    print(json.dumps(facts))
    return 0


def analyse(runs: Sequence[Run], count: int, device: torch.device) -> dict[str, Any]:
    """All numbers.

    Raises:  ConfigError for runs that can't be compared; others where data, teacher or states can't be read.
    """
    refuse_differing(runs)
    inventory = open_inventory(Path(runs[0].config.data.val))
    inventory.check_shards()
    images = clean_images(inventory, count, runs[0].student.image_size[0], runs[0].crop_pct)
    taught = [run for run in runs if run.has_patches]
    cells, grid = None, (1, 1)
    if taught:
        _say(f"the teacher sees {len(images.label)} images")
        teacher = teacher_of(taught[0], inventory.classes, device)
        cells, grid = teacher_cells(teacher, images.pixels, images.label), teacher.grid
    facts: dict[str, Any] = {
        "images": len(images.label),
        "unreadable": images.unreadable,
        "data": runs[0].config.data.val,
        "crop_pct": runs[0].crop_pct,
        "device": str(device),
        "teacher": teacher_facts(cells) if cells else None,
        "runs": {},
        "left_out": [
            f"{run.name}: loss.method {run.config.loss.method} teaches no patch token, so no agreement"
            for run in runs
            if not run.has_patches
        ],
    }
    for run in runs:
        _say(f"{run.name}: {len(run.states)} states")
        run.student.to(device)
        of: dict[str, Any] = {
            "method": run.config.loss.method,
            "decay": run.config.loss.decay if run.has_patches else None,
            "weights": run.weights,
            "epochs": run.config.train.epochs,
        }
        if run.has_patches and cells:
            of |= _agreements(run, images, cells, grid, device)
        facts["runs"][run.name] = of | {"attention": _attention(run, images, device), "accuracy": accuracy(run)}
        run.student.cpu()
    return facts


def refuse_differing(runs: Sequence[Run]) -> None:
    """ConfigError for runs that do not share images, and, where patch tokens are taught, teacher and cache."""
    first = runs[0]
    if not first.config.data.val:
        raise ConfigError(f"{first.folder / RESOLVED} has no data.val; the analysis looks at validation images")
    taught = next((run for run in runs if run.has_patches), first)
    for run in runs:
        pairs: list[tuple[str, Any, Any]] = [
            ("data.val", run.config.data.val, first.config.data.val),
            ("view size", list(run.student.image_size), list(first.student.image_size)),
            ("train.eval_crop_pct", run.crop_pct, first.crop_pct),
        ]
        if run.has_patches:
            pairs += [
                ("teacher", to_dict(run.config.teacher), to_dict(taught.config.teacher)),
                ("cache.path", run.config.cache.path, taught.config.cache.path),
            ]
        for what, mine, other in pairs:
            if mine != other:
                raise ConfigError(
                    f"{run.folder} has another {what} than the runs before it ({str(mine)[:80]}, not {str(other)[:80]}); "
                    "analyse it on its own"
                )


def clean_images(inventory: Inventory, count: int, size: int, crop_pct: float) -> Images:
    """At most `count` images, spread over the classes; those that can't be decoded are left out and counted."""
    maker = ViewMaker(inventory, RecipeConfig(size=size))
    label, pixels, good = np.asarray(inventory.label, np.int64), [], []
    chosen = spread(label, count).tolist()
    for sample in chosen:
        try:
            pixels.append(torch.from_numpy(clean_view(maker.image(sample), size, crop_pct).copy()))
        except ImageError:
            continue
        good.append(sample)
    if not good:
        raise DataError(f"none of {len(chosen)} images of {inventory.root} can be decoded; run `cskd pack` again")
    stacked = torch.stack(pixels).permute(0, 3, 1, 2).contiguous()
    return Images(stacked, torch.from_numpy(label[good]), len(chosen) - len(good))


def teacher_of(run: Run, classes: Sequence[str], device: torch.device) -> Teacher:
    """The teacher of a run's config, or of its cache where the config names none.

    Raises:  CacheError where the cache was made with other weights; others as `load_teacher`.
    """
    config: TeacherConfig = run.config.teacher
    root = Path(run.config.cache.path) if run.config.cache.path else None
    cached = root is not None and (root / MANIFEST).exists()
    if not config.model:
        if root is None or not cached:
            raise ConfigError(f"{run.folder / RESOLVED} names no teacher, and there is no cache that does")
        config = load_config(root / RESOLVED).teacher
    teacher = load_teacher(replace(config, compile=False), classes, device, run.student.image_size[0])
    if root is not None and cached:
        made_with = open_cache(root, images=False).identity.teacher
        for name in ("weights_sha256", "grid"):
            if made_with[name] != teacher.fingerprint.facts[name]:
                raise CacheError(
                    f"{root} was made with a teacher of {name} {made_with[name]}, that of {run.folder / RESOLVED} has "
                    f"{teacher.fingerprint.facts[name]}; restore the file it was made with"
                )
    return teacher


def _agreements(
    run: Run, images: Images, cells: Cells, grid: tuple[int, int], device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """Shares after each epoch that has a state; maps at the first, a middle and the last of them."""
    rows, maps = [], []
    chosen = sorted({0, len(run.states) // 2, len(run.states) - 1})
    for place, state in enumerate(run.states):
        said_nhw = said(run.load(state), images, grid, device)
        at = {"epoch": state.epoch, "step": state.step, "blend": run.blend(state)}
        rows.append(at | agreement(said_nhw, cells))
        if place in chosen:
            maps.append(at | {"local": agreement_map(said_nhw, cells.local)})
    return {"agreement": rows, "cells": maps}


@torch.no_grad()
def said(student: Student, images: Images, grid: tuple[int, int], device: torch.device) -> Tensor:
    """The class of each cell by the student's patch logits: int64 [n, h, w]."""
    parts = []
    for batch in images.batches(student, device):
        patch_BKhw = student(batch, grid).patch_logits
        assert patch_BKhw is not None
        parts.append(patch_BKhw.argmax(1).cpu())
    return torch.cat(parts)


def _attention(run: Run, images: Images, device: torch.device) -> dict[str, Any]:
    """Mean attention distance at the last state, pixels: 'heads' [layers][H], 'mean' [layers]; 'uniform': of equal weights."""
    last = run.states[-1]
    student = run.load(last)
    heads_LH = distances_by_layer(student, images.batches(student, device))
    grid, size = student.patch_grid, student.image_size
    distance_NN = patch_distances(grid, (size[0] / grid[0], size[1] / grid[1]))
    return {
        "epoch": last.epoch,
        "heads": heads_LH.tolist(),
        "mean": heads_LH.mean(1).tolist(),
        "uniform": float(mean_distance(torch.ones(1, 1, *distance_NN.shape), distance_NN)[0]),
    }


def write(out: Path, facts: dict[str, Any]) -> list[str]:
    """Figures and analysis.json. Returns: their names. PathError where they can't be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        figures = draw(out, facts)
        (out / "analysis.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise PathError(f"{out} can't be written ({e.strerror or e}); give another folder") from None
    return [*figures, "analysis.json"]


def _summary(name: str, run: dict[str, Any]) -> str:
    """One run in a line."""
    parts = [f"{name} ({run['method']}{', ' + run['decay'] if run['decay'] else ''}, {run['weights']} weights):"]
    if "agreement" in run:
        for at in (run["agreement"][0], run["agreement"][-1]):
            differ = at.get("differ", {"local": float("nan"), "global": float("nan")})
            parts.append(
                f"epoch {at['epoch']} local {100 * at['all']['local']:.1f} % global {100 * at['all']['global']:.1f} % label "
                f"{100 * at['all']['label']:.1f} % (where they differ: local {100 * differ['local']:.1f} %, global "
                f"{100 * differ['global']:.1f} %);"
            )
    means = run["attention"]["mean"]
    return " ".join([*parts, f"attention {means[0]:.1f} px in the first layer, {means[-1]:.1f} px in the last"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
