"""A trained student next to the teacher: what it says of each cell of the views that `cskd inspect` shows, and how often it agrees.

open      the exported weights, checked against the cache: classes, size of the views, grid
say       its class head on its patch tokens, pooled to the teacher's grid as in training
epochs    what training logged, and the states it kept, on the same views

Shapes: N views, K classes, h w teacher grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd.config import Config, load_config
from cskd.dataset.inventory import evenly
from cskd.errors import CskdError, StudentError
from cskd.files.paths import local_path
from cskd.machine.arithmetic import float32_products
from cskd.machine.devices import pick_device
from cskd.method.agreement import AGREEMENT
from cskd.pipeline.look.inspection import EpochAgreement, StudentFacts
from cskd.pipeline.look.views_shown import Look, Said
from cskd.pipeline.show.metrics import read_metrics
from cskd.store.cache import Cache
from cskd.store.format import RESOLVED
from cskd.student import Student
from cskd.student.checkpoint import MODEL, ResumeStates, load_student
from cskd.views.mix_pixels import normalise

BATCH = 32  # views of one forward
MOST_STATES = 12  # of a run that are looked at, spread evenly, the first and the last among them


@dataclass(frozen=True)
class Run:
    """A run as far as it is needed here. folder: of its files; config: None where only weights are there."""

    name: str
    folder: Path
    student: Student
    facts: dict[str, Any]  # of config.json
    config: Config | None
    notes: list[str]

    @property
    def about(self) -> dict[str, Any]:
        """What cskd wrote into config.json; nothing of somebody else's."""
        about = self.facts.get("cskd", {})
        return about if isinstance(about, dict) else {}


def compare(cache: Cache, path: Path, looks: Sequence[Look]) -> tuple[list[Look], StudentFacts]:
    """The views with what a student says of them, and the facts of it.

    Args:    path, the output folder of `cskd train`, or a weight file in it.
    Raises:  StudentError for weights that are missing, damaged, or do not fit the cache; as `Look.seen` for a view that can't be
             replayed.
    """
    run = _open(cache, path)
    device = pick_device("auto")
    run.student.to(device)
    with float32_products(False, device):
        said = _say(run.student, looks, cache, device)
        by_epoch, left = _epochs(run, looks, cache, device)
    found = [replace(look, said=one) for look, one in zip(looks, said, strict=True)]
    step, rows = run.about.get("step"), read_metrics(run.folder)
    done = [row["epoch"] + 1 for row in rows if row.get("step") == step]
    facts = StudentFacts(
        run=str(path),
        weights=str(run.about.get("weights", "weights")),
        epochs_done=done[-1] if done else None,
        epochs=None if run.config is None else run.config.train.epochs,
        patch_grid=list(run.student.patch_grid),
        agreement=float(np.mean([look.agreement for look in found])),
        views=len(found),
        by_epoch=by_epoch,
        notes=[*run.notes, *left],
    )
    return found, facts


def _open(cache: Cache, path: Path) -> Run:
    path = local_path(path, "--student")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / RESOLVED).is_file() and not (path / MODEL).exists():
        raise StudentError(
            f"{path} has no {MODEL} yet: a run writes it after its first epoch; go on with `cskd train {path / RESOLVED}`"
        )
    student, facts = load_student(path)
    _refuse_other_classes(cache, path, facts["label_names"])
    size = cache.recipe.size
    if tuple(student.image_size) != (size, size):
        height, width = student.image_size
        raise StudentError(
            f"{path} sees {height} x {width} pixels, the views of {cache.root} have {size} x {size}; give a run that was "
            "trained on this size"
        )
    notes = student.grid_notes(cache.grid)
    config = None
    if (folder / RESOLVED).is_file():
        try:
            config = load_config(folder / RESOLVED)
        except CskdError as e:
            notes.append(f"{folder / RESOLVED} can't be read, so epochs are not known: {e}")
    run = Run(str(path), folder, student, facts, config, notes)
    trained_from = next((info.get("cache") for info in ResumeStates(folder / "resume").infos().values()), None)
    if trained_from is not None and trained_from != cache.fingerprint:
        notes.append(f"it was trained from another cache than {cache.root}, so these views were none of its own")
    if "patches" not in student.trained:
        notes.append(f"loss.method {run.about.get('method', 'unknown')} did not teach its patch tokens")
    return run


def _refuse_other_classes(cache: Cache, path: Path, names: Sequence[str]) -> None:
    if list(names) == list(cache.classes):
        return
    if len(names) != len(cache.classes):
        what = f"{len(names):,} classes, {cache.root} has {len(cache.classes):,}"
    else:
        at = next(i for i, both in enumerate(zip(names, cache.classes, strict=True)) if both[0] != both[1])
        what = f"{names[at]!r} as class {at}, {cache.root} has {cache.classes[at]!r}"
    raise StudentError(f"{path} has {what}; give a run that was trained with this cache's classes in this order")


@torch.no_grad()
def _say(student: Student, looks: Sequence[Look], cache: Cache, device: torch.device) -> list[Said]:
    """What the student says of each cell of each view."""
    student.eval()
    found = []
    for i in range(0, len(looks), BATCH):
        for look in looks[i : i + BATCH]:
            _ = look.seen  # raises where there is nothing to see
        pixels_NHWC = np.stack([look.pixels for look in looks[i : i + BATCH] if look.pixels is not None])
        images = torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).to(device)
        patch_NKhw = student(normalise(images, student.mean, student.std), cache.grid).patch_logits
        assert patch_NKhw is not None
        probability, classes = patch_NKhw.double().softmax(1).max(1)
        found += [Said(c, p) for c, p in zip(classes.cpu().numpy(), probability.cpu().numpy(), strict=True)]
    return found


def _epochs(
    run: Run, looks: Sequence[Look], cache: Cache, device: torch.device
) -> tuple[list[EpochAgreement], list[str]]:
    """Agreement after each epoch of which there is a log or a state, and notes on what there is not."""
    rows = [row for row in read_metrics(run.folder) if isinstance(row.get("step"), int)]
    states, notes = ResumeStates(run.folder / "resume"), []
    epoch_of = {row["step"]: row["epoch"] + 1 for row in rows}
    kept = sorted(step for step in states.infos() if step in epoch_of)
    train = None if run.config is None else run.config.train
    part = "ema" if train is not None and train.ema is not None and train.export != "live" else "model"
    shown: dict[int, float] = {}
    for step in sorted({kept[i] for i in evenly(len(kept), MOST_STATES)} | set(kept[-1:])):
        try:
            run.student.backbone.load_state_dict(states.weights(step, part, run.student))
        except StudentError as e:
            notes.append(str(e))
            continue
        said = _say(run.student, looks, cache, device)
        shown[epoch_of[step]] = float(
            np.mean([(s.classes == look.cells).mean() for s, look in zip(said, looks, strict=True)])
        )
    logged = {row["epoch"] + 1: row.get(AGREEMENT) for row in rows}
    if rows and "patches" in run.student.trained and not any(logged.values()):
        notes.append("its log has no agreement: an earlier version of cskd trained it")
    if rows and len(kept) < len(rows):
        notes.append(f"it kept the states of {len(kept)} of {len(rows)} epochs; train.keep says how many")
    epochs = [e for e in logged if logged[e] is not None or e in shown]
    return [EpochAgreement(e, logged[e], shown.get(e)) for e in epochs], notes
