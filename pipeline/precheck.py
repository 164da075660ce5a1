"""Before the first unit: everything that can be known of stage 2 by then, and how all sizes fit together.

images    a few of the data set: views that are enlarged, or that may hold nothing of their image
stage 2   its student, data, plan, method and output, as `cskd train` will open them; the student on the meta device, in no memory
grid      the student's patches on the teacher's cells, once the teacher is there

Stage 2 opens what it needs by the same functions. What a config leaves empty is no error: stage 1 may be all that is wanted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cskd.codecs import get_codec
from cskd.config import Config, LossConfig, RecipeConfig, TrainConfig
from cskd.dataset.inventory import Inventory, evenly, open_inventory
from cskd.errors import CacheError, ConfigError, CskdError, DataError, ImageError, StudentError
from cskd.loading.plan import PlanSpec
from cskd.loading.sources import LiveViews
from cskd.loading.targets import codec_for
from cskd.machine.arithmetic import half
from cskd.method.losses import DistillationLoss
from cskd.store.format import MANIFEST
from cskd.store.manifest import read_manifest
from cskd.student import Student, build_student
from cskd.student.best import score_asked
from cskd.student.optim import Optimisation
from cskd.views.fit import evaluation_notes, image_notes, refuse_views
from cskd.views.maker import ViewMaker

IMAGES = 32  # that are decoded to learn their size


@dataclass(frozen=True)
class Ahead:
    """Stage 2 as far as a config describes it; student None: it describes none, or one that can't be."""

    student: Student | None
    loss: LossConfig
    images: list[str]  # what a user should know of the views, whoever learns from them
    notes: list[str]  # and of stage 2
    refuses: bool  # what does not fit is refused; else noted, because the cache was begun

    def on_grid(self, grid: tuple[int, int]) -> list[str]:
        """What a user should know of the student on the teacher's grid. StudentError where they can't meet."""
        if self.student is None:
            return []
        try:
            return student_notes(self.student, grid, self.loss)
        except StudentError as e:
            return [_later(e, self.refuses)]


def look_ahead(config: Config, maker: ViewMaker, online: bool = False) -> Ahead:
    """Check images and stage 2 of a config, without its teacher.

    maker: of the images to train on. online: the teacher runs in stage 2, so no codec is needed.
    Raises:  ConfigError, DataError, PlanError, StudentError, each naming the key. Of a cache that was begun already what is wrong
             with stage 2 is a note: its units can be finished all the same.
    """
    refuse_views(config.recipe)
    refuses = online or not (Path(config.cache.path) / MANIFEST).exists()
    images, notes, student = image_notes(_image_sizes(maker), config.recipe), [], None
    try:
        student = _stage2(config, maker.inventory, online)
        if student is not None:
            notes += [*student.notes, *view_notes(config, config.recipe)]
    except CskdError as e:
        notes.append(_later(e, refuses))
    return Ahead(student, config.loss, images, notes, refuses)


def need_training_images(config: Config) -> None:
    """ConfigError where data.train is empty."""
    if not config.data.train:
        raise ConfigError("data.train is empty; say which packed data set, for example --set data.train=data/mine")


def training_images(config: Config) -> Inventory:
    """The inventory of data.train. Raises ConfigError as `need_training_images`, DataError."""
    need_training_images(config)
    inventory = open_inventory(Path(config.data.train))
    inventory.check_shards()
    return inventory


def open_val(config: Config, classes: list[str], ranks: int = 1) -> Inventory | None:
    """The validation images of a config, which have the classes trained on; None where it names none."""
    if not config.data.val:
        return None
    try:
        val = open_inventory(Path(config.data.val))
        val.check_shards()
    except DataError as e:
        raise DataError(f"data.val: {e}") from None
    if val.classes != classes:
        raise DataError(
            f"data.val {config.data.val} has other classes than the images trained on; pack it with --classes and their list"
        )
    if len(val) < ranks:
        raise DataError(
            f"data.val {config.data.val} has {len(val)} images for {ranks} ranks; expected one per rank or more"
        )
    return val


def with_best(config: Config, student: Student) -> Config:
    """The config with the score by which the best weights are kept by name. ConfigError where no evaluation gives it."""
    train = config.train
    if train.best is None and train.export != "best":
        return config
    if not config.data.val:
        asked = "train.export is best" if train.best is None else f"train.best is {train.best}"
        raise ConfigError(f"{asked} and data.val is empty; set it to a packed validation set, or leave the other out")
    best = score_asked(train.best, student, train.ema is not None)
    return dataclasses.replace(config, train=dataclasses.replace(train, best=best))


def micro_batch_of(settings: TrainConfig, ranks: int = 1) -> int:
    """Views of one forward and backward of a rank. ConfigError where they don't divide its batch, with the nearest that do."""
    share, asked = settings.global_batch // ranks, settings.micro_batch
    if asked is None:
        return share
    if share % asked:
        near = max((n for n in even_divisors(share) if n <= asked), default=2)
        raise ConfigError(
            f"train.micro_batch is {asked}, expected a divisor of the {share} views that a rank has of train.global_batch "
            f"{settings.global_batch} on {ranks} rank(s); use {near}, or null for all of them at once"
        )
    return asked


def half_notes(autocast: str, device: torch.device) -> list[str]:
    """What a user should know of training in fp16."""
    if half(autocast, device) != "fp16":
        return []
    why = f"train.autocast auto is fp16: {device} has no bf16" if autocast == "auto" else "train.autocast is fp16"
    return [f"{why}; the loss is scaled, and steps whose gradients overflow are left out: skipped_steps in the metrics"]


def even_divisors(batch: int) -> list[int]:
    """The micro-batches that a rank's batch can be made of, descending: even, so that a mixed pair stays together."""
    return [n for n in range(batch, 1, -1) if batch % n == 0 and n % 2 == 0]


def view_notes(config: Config, recipe: RecipeConfig) -> list[str]:
    """What a user should know of the views a student trains on and those it is evaluated on."""
    return evaluation_notes(config.train.eval_crop_pct, recipe) if config.data.val else []


def student_notes(student: Student, grid: tuple[int, int], loss: LossConfig) -> list[str]:
    """What a user should know of a student on the teacher's grid, which only some methods teach.

    Raises:  StudentError where the patches are too few.
    """
    return student.grid_notes(grid) if DistillationLoss(loss).uses_patches else []


def _stage2(config: Config, inventory: Inventory, online: bool) -> Student | None:
    """Open what `cskd train` will open, as far as there is no cache yet."""
    codecs = {name: get_codec(name, len(inventory.classes), (1, 1)) for name in config.cache.codecs}
    open_val(config, inventory.classes)
    if not config.student.model:
        return None
    if not online:
        codec_for(config.loss.method, codecs, "cache.codecs")
    check_output(config.train)
    views = config.cache.views
    with contextlib.suppress(CacheError):  # there is none yet
        views = max(views, read_manifest(Path(config.cache.path)).views)
    if config.train.views > views:
        raise ConfigError(f"train.views is {config.train.views}, cache.views {views}; cache more, or use fewer")
    good = np.zeros(len(inventory), np.bool_)
    plan = PlanSpec.over(LiveViews(inventory, config.recipe, views, (1, 1), good, ""), config.train)
    size = config.recipe.size
    with torch.device("cpu" if config.student.init else "meta"):
        student = build_student(config.student, len(inventory.classes), size)
    student.to("meta")
    student.taught_by(config.loss)
    if config.train.grad_checkpointing:
        student.checkpoint_gradients()
    with_best(config, student)
    Optimisation(student, dataclasses.replace(config.train, ema=None), plan.steps)
    try:
        student(torch.empty(2, 3, size, size, device="meta"), (1, 1))
    except Exception as e:  # shapes that timm finds out about at the first image
        raise StudentError(
            f"{config.student.model} can't take views of {size} x {size} pixels ({' '.join(str(e).split())[:120]}); mend "
            "student.kwargs or recipe.size"
        ) from None
    return student


def check_output(settings: TrainConfig) -> None:
    """ConfigError where results can't be written; makes nothing."""
    for name in settings.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers has {name}, which is not installed; run: pip install 'cskd[{name}]'")
    if not settings.output:
        return
    there = Path(settings.output)
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "no folder" if not there.is_dir() else "not writable"
        raise ConfigError(f"train.output {settings.output}: {there} is {what}; set another, --set train.output=runs/x")


def _image_sizes(maker: ViewMaker) -> list[tuple[int, int]]:
    """(height, width) of a few images from all over the data set, without those that can't be decoded."""
    sizes = []
    for i in evenly(len(maker.inventory), IMAGES).tolist():
        with contextlib.suppress(ImageError):
            height, width = maker.image(i).shape[:2]
            sizes.append((height, width))
    return sizes


def _later(error: CskdError, refuses: bool) -> str:
    """What stage 2 would refuse, as a note; raised at once where there is nothing to finish."""
    if refuses:
        raise error
    return f"the cache is finished all the same, but training will be refused: {error}"
