"""What a config makes of both stages, part by part, each opened when it is first asked for.

Stage 1, `cskd check` and stage 2 open their parts here, so what one of them refuses the others refuse in the same words. The list
of what is looked at is in `precheck.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd.codecs import Codec, get_codec, known_own, of_map_alone
from cskd.config import Config, RecipeConfig, TrainConfig
from cskd.dataset.inventory import Inventory, evenly, open_inventory
from cskd.errors import CacheError, ConfigError, DataError, ImageError, StudentError, one_line
from cskd.files.hub import is_hub
from cskd.files.paths import is_remote
from cskd.loading.joined import JoinedCaches
from cskd.loading.need import PREFETCH, refuse_little_memory
from cskd.loading.plan import PlanSpec, views_needed
from cskd.loading.raw_batches import batch_bytes, refuse_device_views
from cskd.loading.shares import even_grain, largest, micro_batches
from cskd.loading.sources import LiveViews, ViewSource
from cskd.machine.arithmetic import half
from cskd.machine.devices import named_device, pick_device
from cskd.machine.launch import launched
from cskd.machine.threads import Threads, choose_threads
from cskd.method.features import MapShape
from cskd.method.losses import DistillationLoss
from cskd.method.terms import blocks_of, needs_teacher
from cskd.pipeline.conflicts import refuse_conflicts
from cskd.storage import Place
from cskd.store.cache import Cache, cache_place, open_cache
from cskd.store.identity import Identity, identity_of
from cskd.store.manifest import has_cache, read_manifest
from cskd.store.usable import refuse_other_code, usable_views
from cskd.student import Student, build_student
from cskd.student.best import score_asked
from cskd.student.optim import Optimisation
from cskd.student.projections import Projections, token_widths
from cskd.teacher.model import Teacher, load_teacher
from cskd.views.fit import evaluation_notes
from cskd.views.maker import ViewMaker

IMAGES = 32  # that are decoded to learn their size


@dataclass
class Setup:
    """The parts of a config.

    source: views of a cache, or those of a run; None: the ones that stage 1 would make. device: where stage 2 runs now; None: it
    does not, and the student takes no memory. threads: of that run. ranks: how many share it.
    """

    config: Config
    source: ViewSource | None = None
    device: torch.device | None = None
    threads: Threads | None = None
    ranks: int = 1
    online: bool = False  # the teacher runs at every step of stage 2
    maps: Mapping[str, MapShape] = field(default_factory=dict)  # feature maps that its loss reads, by cache
    begun_with: int | None = None  # views of a micro-batch of the run that goes on

    @property
    def begun(self) -> bool:
        """Whether `cache.path` holds a cache already."""
        return has_cache(self.config.cache.path)

    @property
    def makes_cache(self) -> bool:
        """Whether stage 1 is for this config: not for a baseline without a teacher, nor where a cache is read that is there."""
        config = self.config
        baseline = not needs_teacher(config.loss) and not (config.cache.path and config.teacher.model)
        return not (self.online or baseline or self.source is not None)

    @property
    def on_grid(self) -> bool:
        """Whether the loss compares cells of the student with the teacher's."""
        loss = DistillationLoss(self.config.loss)
        return loss.uses_patches or any(term.target == "features" for term in self.config.loss.terms)

    @cached_property
    def inventory(self) -> Inventory:
        return training_images(self.config) if self.source is None else self.source.inventory

    @property
    def recipe(self) -> RecipeConfig:
        return self.config.recipe if self.source is None else self.source.recipe

    @cached_property
    def maker(self) -> ViewMaker:
        return ViewMaker(self.inventory, self.recipe)

    @cached_property
    def val(self) -> Inventory | None:
        return open_val(self.config, self.inventory.classes, self.ranks)

    @cached_property
    def codecs(self) -> dict[str, Codec]:
        """Those that stage 1 will write."""
        classes = len(self.inventory.classes)
        codecs = {name: get_codec(known_own(name), classes, (1, 1)) for name in self.config.cache.codecs}
        names = Counter(codec.name for codec in codecs.values())
        if twice := [name for name, codec in codecs.items() if names[codec.name] > 1]:
            raise ConfigError(f"cache.codecs lists {' and '.join(twice)}, which are one codec; leave one of them out")
        if self.config.teacher.dense == "none":
            of_map_alone(codecs.values(), classified=True)  # whether it is, the teacher will show
        if not any(codec.has_classes for codec in codecs.values()):
            raise ConfigError(
                f"cache.codecs is {list(codecs)}: maps of stages, and no targets of classes, which each cache has; add envelope"
            )
        return codecs

    @cached_property
    def views(self) -> ViewSource:
        """What stage 2 feeds."""
        if self.source is not None:
            return self.source
        config = self.config
        if from_images(config):
            views = baseline_views(config)
        else:
            views = cached_views(config)
            if config.train.views > views:
                raise ConfigError(f"train.views is {config.train.views}, cache.views {views}; cache more, or use fewer")
        good = np.zeros(len(self.inventory), np.bool_)
        return LiveViews(self.inventory, config.recipe, views, (1, 1), good, "")

    @cached_property
    def plan(self) -> PlanSpec:
        return PlanSpec.over(self.views, self.config.train, self.ranks, self.micro_batch)

    @cached_property
    def micro_batch(self) -> int:
        return micro_batch_of(self.config.train, self.ranks, self.begun_with)

    @cached_property
    def student(self) -> Student:
        """With its heads as the loss trains them; on the device of the run, else on torch's meta device."""
        config, classes, size = self.config, len(self.inventory.classes), self.recipe.size
        if self.device is not None:
            torch.manual_seed(config.train.seed)
            student = build_student(config.student, classes, size).to(self.device)
        else:
            with torch.device("cpu" if config.student.init else "meta"):
                student = build_student(config.student, classes, size)
            student.to("meta")
        student.taught_by(config.loss)
        student.refuse_blocks(blocks_of(config.loss))
        if self.device is not None and self.device.type == "cpu" and half(config.train.autocast, self.device) == "bf16":
            student.unfuse_attention()
        if config.train.grad_checkpointing:
            student.checkpoint_gradients()
        if self.device is None:
            _refuse_images(student, size)
        return student

    @cached_property
    def optimisation(self) -> Optimisation:
        train = self.config.train if self.device is not None else dataclasses.replace(self.config.train, ema=None)
        return Optimisation(self.student, train, self.plan.steps, self.projections)

    @cached_property
    def projections(self) -> Projections | None:
        """Of terms of features; None where there are none, and where their teacher's width is not known yet."""
        if not self.maps:
            return None
        for term in self.config.loss.terms:
            if term.target == "features":
                self.student.check_grid(self.maps[term.cache].grid)
        loss, seed = self.config.loss, self.config.train.seed
        return Projections(loss, token_widths(self.student, loss), self.maps, seed).to(self.device)

    @cached_property
    def cache_device(self) -> tuple[torch.device, list[str]]:
        """Where stage 1 would run on this machine, and notes. ConfigError where it can't."""
        return device_of(self.config, "cache", pick=named_device)

    @cached_property
    def teacher(self) -> Teacher:
        """Loaded here, unless a stage that loads it itself has set it."""
        classes, device = self.inventory.classes, self.cache_device[0]
        return load_teacher(self.config.teacher, classes, device, self.config.recipe.size)

    @property
    def identity(self) -> Identity:
        """Of the cache that stage 1 makes."""
        facts, codecs = self.teacher.fingerprint.facts, self.config.cache.codecs
        return identity_of(self.inventory, self.config.recipe, facts, self.teacher.grid, codecs)

    @property
    def grid(self) -> tuple[int, int]:
        """h, w of the teacher's cells."""
        return self.teacher.grid if self.source is None else self.source.grid

    def named_views(self, alone: bool) -> ViewSource:
        """`views` with the fingerprint by which a run knows them. alone: see `from_images`."""
        if alone:
            name = baseline_name(self.inventory, self.recipe)
        elif self.source is not None or not isinstance(self.views, LiveViews):
            return self.views
        else:
            name = self.identity.fingerprint
        good = np.zeros(len(self.inventory), np.bool_)
        return LiveViews(self.inventory, self.recipe, self.views.views, (1, 1), good, name)

    def student_notes(self) -> list[str]:
        """What a user should know of the student on the teacher's grid. StudentError where the patches are too few."""
        return self.student.grid_notes(self.grid) if self.on_grid else []

    @cached_property
    def train_device(self) -> torch.device:
        """Where stage 2 would run on this machine. ConfigError where it can't."""
        return self.device or device_of(self.config, "train", pick=named_device)[0]

    @cached_property
    def pixels(self) -> int:
        """Of an image that is sent to the device that makes its views; 0 where the workers do."""
        return refuse_device_views(self.views, self.train_device) if self.config.train.augment == "device" else 0

    def refuse_train_memory(self) -> str:
        """ConfigError where the batches under way of stage 2 can't fit on this machine. Returns: its threads and workers."""
        train, side, gpu = self.config.train, self.recipe.size, self.train_device.type == "cuda"
        threads = self.threads or choose_threads(train.threads, "train.threads", train.workers, gpu=gpu)
        share = largest(train.global_batch, self.micro_batch, self.ranks)
        batch = batch_bytes(share, train.repeats, side, self.pixels)
        local = launched().local_count if self.device is not None else 1
        refuse_little_memory("train", threads.workers, train.prefetch, batch, local, pinned=gpu)
        return str(threads)

    def refuse_cache_memory(self) -> str:
        """The same of stage 1 and its chunks."""
        config, gpu = self.config, self.cache_device[0].type == "cuda"
        threads = choose_threads(config.cache.threads, "cache.threads", config.cache.workers, gpu=gpu)
        chunk = config.teacher.batch * min(config.recipe.mix_group, config.cache.views) * 3 * config.recipe.size**2
        refuse_little_memory("cache", threads.workers, PREFETCH, chunk, launched().local_count, pinned=gpu)
        return str(threads)


def _refuse_images(student: Student, size: int) -> None:
    """StudentError for shapes that timm finds out about at the first image. The student is on the meta device."""
    try:
        student(torch.empty(2, 3, size, size, device="meta"), (1, 1))
    except Exception as e:
        raise StudentError(
            f"{student.config.model} can't take views of {size} x {size} pixels ({one_line(e)}); mend student.kwargs or "
            "recipe.size"
        ) from None


def device_of(
    config: Config, section: str, pick: Callable[[str, str], torch.device] = pick_device
) -> tuple[torch.device, list[str]]:
    """Where a stage runs, by `device` of its section, and notes. Raises ConfigError as `pick`.

    Older caches recorded the device of the machine that began them, and a config made of that record has it. It says nothing of
    this machine: where it is not here, it stands for auto.
    """
    name, key, root = getattr(config, section).device, f"{section}.device", config.cache.path
    notes: list[str] = []
    try:
        device = pick(name, key)
    except ConfigError:
        recorded = None
        with contextlib.suppress(CacheError):
            recorded = read_manifest(root).config.get(section, {}).get("device") if has_cache(root) else None
        if recorded != name:
            raise
        device = pick("auto", key)
        notes.append(f"{key} {name}, which is recorded in {root}, can't be used here: this runs on {device}")
    return device, notes


def open_cached(config: Config) -> Cache | JoinedCaches:
    """The caches that stage 2 reads, which the config must not contradict. Raises CacheError, ConfigError, DataError."""
    for name in config.cache.codecs:
        known_own(name)
    cache = _open_one(config, config.cache.path, first=True)
    if not config.train.caches:
        return cache
    paths = {name: cache_place(path, f"train.caches.{name}") for name, path in config.train.caches.items()}
    return JoinedCaches(cache, {name: _open_one(config, path) for name, path in paths.items()})


def _open_one(config: Config, path: Place, first: bool = False) -> Cache:
    cache = open_cache(path, data=Path(config.data.train) if config.data.train else None)
    cache.inventory.check_shards()
    if first:
        refuse_conflicts(config, cache)
    refuse_other_code(cache)
    usable_views(cache, config.train.views)
    return cache


def baseline_name(inventory: Inventory, recipe: RecipeConfig) -> str:
    """What tells a baseline's views, which no teacher names, from those of other images or another recipe."""
    return f"none, {identity_of(inventory, recipe, {}, (1, 1), []).fingerprint[:16]}"


def from_images(config: Config, begun: Mapping[str, Any] | None = None) -> bool:
    """Whether a run makes its views from data.train alone: a baseline without a cache, or one that was begun without.

    begun: the record of the run that goes on. Its views stay what they were when a cache is made meanwhile.
    """
    if needs_teacher(config.loss):
        return False
    if not config.cache.path or (begun is not None and is_baseline_name(begun.get("cache"))):
        return True
    path = config.cache.path
    if is_remote(path):
        return not has_cache(path)
    return not is_hub(path) and not Path(path).exists()


def is_baseline_name(fingerprint: object) -> bool:
    """Whether a recorded fingerprint is one of `baseline_name`."""
    return str(fingerprint).startswith("none, ")


def cached_views(config: Config) -> int:
    """Views of the cache that stage 1 makes: cache.views, or more where it has more already."""
    views = config.cache.views
    with contextlib.suppress(CacheError):  # there is none yet
        views = max(views, read_manifest(config.cache.path).views)
    return views


def baseline_views(config: Config) -> int:
    """train.views; or those that cache.path would hold; or, where that is empty, as many as all epochs feed: each run of
    `repeats` epochs takes `repeats` of them."""
    views, repeats = config.train.views, config.train.repeats
    if views % repeats:
        above = -(-views // repeats) * repeats
        raise ConfigError(
            f"train.views is {views} and train.repeats {repeats}, which must divide it; set train.views={above}, or 0"
        )
    if config.cache.path:
        return views or cached_views(config)
    return views or views_needed(config.train)


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


def micro_batch_of(settings: TrainConfig, ranks: int = 1, begun_with: int | None = None) -> int:
    """Views of one forward and backward: `train.micro_batch`; where that is null what the run was begun with, as long as every
    rank gets a micro-batch, or an even share. ConfigError where ranks would go without, with a number that does.

    begun_with: by the record of the run that goes on; None: it is a new one.
    """
    batch, asked = settings.global_batch, settings.micro_batch
    if batch % 2 or batch < 2 * ranks:  # of which the plan tells
        return asked or 2
    if asked is None:
        if begun_with is None or begun_with % 2 or not 2 <= begun_with <= batch:  # of a record that is none
            return even_grain(batch, ranks)
        return begun_with if micro_batches(batch, begun_with) >= ranks else even_grain(batch, ranks)
    if asked > batch or micro_batches(batch, asked) < ranks:
        count = micro_batches(batch, asked)
        raise ConfigError(
            f"train.micro_batch is {asked}: train.global_batch {batch} has {count} of that size for {ranks} rank(s), expected one "
            f"per rank or more; use {even_grain(batch, ranks)} or less, or null for the views of a rank at once"
        )
    return asked


def half_notes(autocast: str, device: torch.device) -> list[str]:
    """What a user should know of training in fp16."""
    if half(autocast, device) != "fp16":
        return []
    why = f"train.autocast auto is fp16: {device} has no bf16" if autocast == "auto" else "train.autocast is fp16"
    why += ", which is slower than float32 on a CPU" if device.type == "cpu" else ""
    return [f"{why}; the loss is scaled, and steps whose gradients overflow are left out: skipped_steps in the metrics"]


def even_divisors(batch: int) -> list[int]:
    """The micro-batches that a rank's batch can be made of, descending: even, so that a mixed pair stays together."""
    return [n for n in range(batch, 1, -1) if batch % n == 0 and n % 2 == 0]


def view_notes(config: Config, recipe: RecipeConfig) -> list[str]:
    """What a user should know of the views a student trains on and those it is evaluated on."""
    return evaluation_notes(config.train.eval_crop_pct, recipe) if config.data.val else []


def image_sizes(maker: ViewMaker) -> list[tuple[int, int]]:
    """(height, width) of a few images from all over the data set, without those that can't be decoded."""
    sizes = []
    for i in evenly(len(maker.inventory), IMAGES).tolist():
        with contextlib.suppress(ImageError):
            height, width = maker.image(i).shape[:2]
            sizes.append((height, width))
    return sizes
