"""What a run leaves for people: pictures of its results, its mistakes and its first batch, and a model card.

All of it is made from the files of the run, so that a resumed run has all epochs, and the command of a finished run draws it
again. Nothing here ever stops a run: what fails is said once.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd.config import to_dict
from cskd.errors import one_line
from cskd.files.durable import put
from cskd.files.read import parse_json, read_file
from cskd.loading.joined import JoinedCaches
from cskd.machine.cores import usable_cores
from cskd.method.ckf import hard_targets
from cskd.method.losses import AnyTargets, BothTargets, HardTargets, SoftTargets, logit_targets
from cskd.method.terms import needs
from cskd.pipeline.conflicts import CONFUSION, CONFUSION_TABLE, FIRST_BATCH, RESULTS
from cskd.pipeline.draw.confusion import Confusion, draw_confusion, from_csv, to_csv
from cskd.pipeline.draw.first_batch import SHOWN, SeenBatch, draw_batch
from cskd.pipeline.draw.pictures import Picture, png
from cskd.pipeline.draw.results import draw_results
from cskd.pipeline.draw.wordnet import readable
from cskd.pipeline.evaluate import Found
from cskd.pipeline.model_card import CARD, About, model_card, put_card
from cskd.pipeline.train_step import TrainStep
from cskd.pipeline.training_run import TrainingRun
from cskd.store.cache import Cache
from cskd.student.best import BestWeights
from cskd.student.checkpoint import exported_prefix
from cskd.views.mix_pixels import mixed_pixels
from cskd.views.mixing import NONE

SHARE = 0.01  # of a run's time that pictures may take before its end


class RunFolder:
    """Pictures and card of a run. Only the first rank draws. tell: prints a line."""

    def __init__(self, run: TrainingRun, tell: Callable[[str], None]) -> None:
        self._run, self._tell = run, tell
        self._names = readable(run.views.inventory.classes)
        self._begun, self._spent = time.perf_counter(), 0.0
        self._failed = set[str]()
        self.found: dict[str, Found] = {}  # of the latest evaluation, by the prefix of the weights

    def first_batch(self, step: TrainStep) -> None:
        """Draw what the first step of the run was fed, right after it. `step.begun` is forgotten."""
        begun, step.begun = step.begun, None
        if begun is None or not self._writes():
            return
        with self._making(FIRST_BATCH):
            batch, targets = begun
            blends = self._run.blend(0)
            seen = _seen(batch, targets, bool(blends))
            blend = f", blend {next(iter(blends.values())):.2f}" if seen.cells is not None else ""
            taught = "views with their labels" if targets is None else f"views with labels and targets (epoch 1{blend})"
            self._save(FIRST_BATCH, draw_batch(seen, self._names, f"first batch as the student saw it: {taught}"))

    def evaluated(self, step: int) -> None:
        """Keep what the evaluation after `step` updates took each image for; of the best weights as long as they are kept."""
        found, self.found = self.found, {}
        if not self._writes():
            return
        with self._making(CONFUSION_TABLE):
            run = self._run
            best, last = run.state.shown, found[exported_prefix(run.config, None)]
            kept = [Confusion.of("last", step, last.label, last.predicted)]
            if best is not None:
                path = BestWeights(run.states.folder).path(best).with_suffix(".csv")
                if best.step == step:
                    of_best = Confusion.of("best", step, found[best.prefix].label, found[best.prefix].predicted)
                    put(path, to_csv([of_best], run.views.inventory.classes))
                    kept = [of_best, *kept]
                elif path.exists():
                    kept = [*from_csv(read_file(path), run.views.inventory.classes), *kept]
            put(run.output / CONFUSION_TABLE, to_csv(kept, run.views.inventory.classes))

    def draw(self, rows: Sequence[Mapping[str, Any]], last: bool = False) -> None:
        """The card and the pictures of the epochs so far, the latter where this takes no more than `SHARE` of the time, and at the end
        of the run."""
        if not self._writes():
            return
        run = self._run
        if last or self._spent <= SHARE * (time.perf_counter() - self._begun):
            self._pictures(rows)
        with self._making(CARD):  # after the pictures that it shows
            facts = parse_json(read_file(run.output / "config.json"))
            kept = put_card(run.output, model_card(run.output, facts, rows, run.config, self._about()))
            if kept and last:
                self._tell(kept)

    def _pictures(self, rows: Sequence[Mapping[str, Any]]) -> None:
        run = self._run
        with self._making(RESULTS):
            if rows:
                title = f"{run.config.student.model}, {run.config.loss.method}: {rows[-1]['epoch'] + 1} of {run.config.train.epochs} epochs"
                self._save(RESULTS, draw_results(rows, title))
        with self._making(CONFUSION):
            table = run.output / CONFUSION_TABLE
            if table.exists():
                confusions = from_csv(read_file(table), run.views.inventory.classes)
                self._save(CONFUSION, draw_confusion(confusions, self._names))

    def _about(self) -> About:
        run = self._run
        reads, spec, views = needs(run.config.loss), run.targets.spec(0), run.views
        taught = not reads.nothing
        caches = [views] if isinstance(views, Cache) else []
        if isinstance(views, JoinedCaches):
            caches = [views.first, *views.others.values()]
        codecs = [
            name for s in (spec, *(other for _, other in spec.others)) for name in (s.codec, s.soft_codec, *s.maps)
        ]
        teachers = [_teacher(c.manifest.config["teacher"], c.manifest.clean_top1) for c in caches]
        gpu = f", {torch.cuda.get_device_name(run.device)}" if run.device.type == "cuda" else ""
        return About(
            images=len(run.views.inventory),
            val_images=len(run.val) if run.val is not None else 0,
            views=run.plan.views,
            teacher="; ".join(teachers or [_teacher(to_dict(run.config.teacher), None)]) if taught else "",
            cache="; ".join(f"{c.location.rpartition('/')[2]}, fingerprint {c.fingerprint[:16]}" for c in caches),
            codec=", ".join(dict.fromkeys(filter(None, codecs))) if taught else "",
            online=run.targets.runs_teacher and not any(codecs),
            ranks=run.ranks.count,
            machine=f"{platform.system()} {platform.machine()}, {usable_cores().count} cores{gpu}",
            changes=run.state.said(),
        )

    def _writes(self) -> bool:
        """Whether this is the rank that writes. PathError where another machine took the folder over."""
        if self._run.writer is not None:
            self._run.writer.check()
        return self._run.writer is not None

    def _save(self, name: str, picture: Picture) -> None:
        put(self._run.output / name, png(picture))

    @contextlib.contextmanager
    def _making(self, name: str) -> Iterator[None]:
        """Whatever goes wrong with one file is said once, and its time is counted."""
        clock = time.perf_counter()
        try:
            yield
        except Exception as e:
            if name not in self._failed:
                self._failed.add(name)
                self._tell(f"{self._run.output / name} could not be made, the run goes on: {one_line(e)}")
        finally:
            self._spent += time.perf_counter() - clock


def _teacher(config: Mapping[str, Any], clean_top1: float | None) -> str:
    """A teacher in words; clean_top1: a share, as a manifest has it."""
    weights, known = (
        Path(str(config.get("weights") or "")).name,
        f", top-1 {100 * (clean_top1 or 0):.2f} % on clean images",
    )
    return (
        Path(str(config.get("model", ""))).name
        + (f" with {weights}" if weights else "")
        + known * (clean_top1 is not None)
    )


def _seen(batch: Mapping[str, torch.Tensor], targets: AnyTargets, cells: bool) -> SeenBatch:
    """The first `SHOWN` views of a batch, an even number, in which partners stand next to each other."""
    few = {name: t[:SHOWN] for name, t in batch.items() if name not in ("seconds",) and not name.startswith("target.")}
    pixels = mixed_pixels(few, few["pixels"].device).permute(0, 2, 3, 1).round().to(torch.uint8)
    found = class_map = None
    if isinstance(targets, Mapping):  # of several caches: those of the first
        targets = targets[""]
    targets = logit_targets(targets)
    if isinstance(targets, BothTargets):
        shown = targets.hard.cell_class is not None or targets.hard.more
        targets = targets.hard if shown else targets.soft
    if isinstance(targets, HardTargets):
        found = targets.global_class[:SHOWN]
        class_map = next((c[:SHOWN] for c in (targets.cell_class, *targets.more.values()) if c is not None), None)
    elif isinstance(targets, SoftTargets):
        image, blend = targets.global_logits[:SHOWN], next(iter((*targets.more.values(), targets.blend)))
        found = image.argmax(1)
        if targets.dense_logits is not None and blend is not None:
            class_map = hard_targets(targets.dense_logits[:SHOWN], image, blend)
    return SeenBatch(
        pixels=np.ascontiguousarray(pixels.cpu().numpy()),
        label=few["label"].cpu().numpy(),
        partner=few["partner_label"].cpu().numpy(),
        share=few["share"].double().cpu().numpy(),
        mixed=(few["mode"] != NONE).cpu().numpy(),
        image_class=None if found is None else found.cpu().numpy(),
        cells=class_map.cpu().numpy() if cells and class_map is not None else None,
    )
