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
from numpy.typing import NDArray

from cskd.config import Config, load_config
from cskd.dataset.inventory import evenly
from cskd.errors import CskdError, StudentError
from cskd.files.paths import local_path
from cskd.loading.joined import joined_fingerprint
from cskd.machine.arithmetic import float32_products
from cskd.machine.devices import pick_device
from cskd.method.terms import AGREEMENT
from cskd.pipeline.look.inspection import EpochAgreement, StudentFacts
from cskd.pipeline.look.views_shown import Look, Said
from cskd.pipeline.show.metrics import read_metrics
from cskd.store.cache import Cache
from cskd.store.format import MANIFEST, RESOLVED
from cskd.store.manifest import read_manifest
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


class Compared:
    """A student that was opened for a cache. Raises StudentError for weights that are missing, damaged, or do not fit the cache."""

    def __init__(self, cache: Cache, path: Path) -> None:
        self.cache, self.run = cache, _open(cache, path)
        self.device = pick_device("auto")
        self.run.student.to(self.device)

    @torch.no_grad()
    def say(self, pixels: Sequence[NDArray[np.float32]]) -> list[Said]:
        """What the student says of each cell of views, float32 [S, S, 3] each, RGB in 0..255."""
        student, found = self.run.student.eval(), list[Said]()
        with float32_products(False, self.device):
            for i in range(0, len(pixels), BATCH):
                images = torch.from_numpy(np.stack(pixels[i : i + BATCH])).permute(0, 3, 1, 2).to(self.device)
                patch_NKhw = student(normalise(images, student.mean, student.std), self.cache.grid).patch_logits
                assert patch_NKhw is not None
                probability, classes = patch_NKhw.double().softmax(1).max(1)
                found += [Said(c, p) for c, p in zip(classes.cpu().numpy(), probability.cpu().numpy(), strict=True)]
        return found

    def compare(self, looks: Sequence[Look]) -> tuple[list[Look], StudentFacts]:
        """The views with what the student says of them, and its facts. Raises as `Look.mixed` for a view that can't be replayed."""
        run, pixels = self.run, [look.mixed for look in looks]
        found = [replace(look, said=said) for look, said in zip(looks, self.say(pixels), strict=True)]
        by_epoch, notes = self._epochs(found, pixels)
        step = run.about.get("step")
        done = [row["epoch"] + 1 for row in read_metrics(run.folder) if row.get("step") == step]
        return found, StudentFacts(
            run=run.name,
            weights=str(run.about.get("weights", "weights")),
            epochs_done=done[-1] if done else None,
            epochs=None if run.config is None else run.config.train.epochs,
            patch_grid=list(run.student.patch_grid),
            agreement=float(np.mean([look.agreement for look in found])),
            views=len(found),
            by_epoch=by_epoch,
            notes=[*run.notes, *notes],
        )

    def _epochs(
        self, looks: Sequence[Look], pixels: Sequence[NDArray[np.float32]]
    ) -> tuple[list[EpochAgreement], list[str]]:
        """Agreement after each epoch of which there is a log or a state, and notes on what there is not."""
        run, notes = self.run, list[str]()
        rows = [row for row in read_metrics(run.folder) if isinstance(row.get("step"), int)]
        states = ResumeStates(run.folder / "resume")
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
            agree = [replace(look, said=said).agreement for look, said in zip(looks, self.say(pixels), strict=True)]
            shown[epoch_of[step]] = float(np.mean(agree))
        logged = {row["epoch"] + 1: _share(row.get(AGREEMENT)) for row in rows}
        if rows and "patches" in run.student.trained and not any(logged.values()):
            notes.append("its log has no agreement: an earlier version of cskd trained it")
        if len(kept) < len(rows):
            notes.append(f"it kept the states of {len(kept)} of {len(rows)} epochs; train.keep says how many")
        epochs = [e for e in logged if logged[e] is not None or e in shown]
        return [EpochAgreement(e, logged[e], shown.get(e)) for e in epochs], notes


def _share(value: Any) -> float | None:
    """A share of a log, which others may have written to."""
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


def _open(cache: Cache, path: Path) -> Run:
    path = local_path(path, "--student")
    folder = path if path.is_dir() else path.parent
    if (path / MANIFEST).is_file() or (path.is_file() and path.suffix in (".yaml", ".yml", ".json", ".jsonl", ".csv")):
        what = "a cache" if path.is_dir() else f"a {path.suffix} file"
        raise StudentError(
            f"--student {path} is {what}; give the output folder of `cskd train`, or a weight file in it"
        )
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
    if trained_from is not None and trained_from not in (cache.fingerprint, _joined(cache, config)):
        notes.append(f"it was trained from another cache than {cache.root}, so these views were none of its own")
    if "patches" not in student.trained:
        notes.append(f"loss.method {run.about.get('method', 'unknown')} did not teach its patch tokens")
    return run


def _joined(cache: Cache, config: Config | None) -> str:
    """By what a run of several caches knows its views, where this is one of them; '' of others."""
    if config is None or not config.train.caches:
        return ""
    try:
        paths = {"": config.cache.path, **config.train.caches}
        prints = {
            name: read_manifest(local_path(p, "cache", hub=True)).identity.fingerprint for name, p in paths.items()
        }
    except (CskdError, OSError):
        return ""
    return joined_fingerprint(prints) if cache.fingerprint in prints.values() else ""


def _refuse_other_classes(cache: Cache, path: Path, names: Sequence[str]) -> None:
    if list(names) == list(cache.classes):
        return
    if len(names) != len(cache.classes):
        what = f"{len(names):,} classes, {cache.root} has {len(cache.classes):,}"
    else:
        at = next(i for i, both in enumerate(zip(names, cache.classes, strict=True)) if both[0] != both[1])
        what = f"{names[at]!r} as class {at}, {cache.root} has {cache.classes[at]!r}"
    raise StudentError(f"{path} has {what}; give a run that was trained with this cache's classes in this order")
