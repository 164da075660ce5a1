"""Training with the teacher beside the student: for comparison with a cache, and for people who want none.

Plan, views and mixing are those of the cache that `cskd cache-teacher` would make from the same config, so the two runs
differ in where the targets come from and in nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.codecs import get_codec
from cskd.config import Config
from cskd.dataset.inventory import Inventory, open_inventory
from cskd.errors import ConfigError, ImageError
from cskd.files.durable import put
from cskd.loading.live import LiveViews
from cskd.loading.stream import Stream
from cskd.loading.targets import LiveTargets
from cskd.machine.ranks import Ranks
from cskd.pipeline.clean_check import clean_check
from cskd.pipeline.measure_precision import measure_precision
from cskd.pipeline.precheck import look_ahead
from cskd.pipeline.show.progress import Notes, Progress
from cskd.store.identity import identity_of
from cskd.store.quarantine import refuse_too_many, refuse_too_many_in_all
from cskd.teacher.model import load_teacher
from cskd.views.maker import ViewMaker

UNREADABLE_FILE = "unreadable.json"
_STEP = 256  # images a task


@dataclass(frozen=True)
class Online:
    """What takes the cache's place."""

    views: LiveViews
    targets: LiveTargets


def open_online(config: Config, device: torch.device, ranks: Ranks, quiet: bool, notes: Notes) -> Online:
    """Load and check the teacher, and find the images that can't be decoded (once a run: kept in its output folder).

    notes: gets what a user should know, each before the work that it is about.
    """
    inventory = training_images(config)
    maker = ViewMaker(inventory, config.recipe)
    ahead = look_ahead(config, maker, online=True)
    teacher = load_teacher(config.teacher, inventory.classes, device, config.recipe.size)
    notes.add([*ahead.images, *teacher.notes, *ahead.notes, *ahead.on_grid(teacher.grid)])
    notes.say()
    check = clean_check(teacher, maker, config)
    notes.add([f"online: the teacher runs at every step; its top-1 is {check.text}", *check.notes])
    notes.add(measure_precision(teacher, maker, config.teacher).notes)
    notes.say()
    bad, left_out = decodable(maker, config, ranks, quiet)
    notes.add(left_out)
    codecs = [get_codec(name, teacher.classes, teacher.grid).name for name in config.cache.codecs]
    identity = identity_of(inventory, config.recipe, teacher.fingerprint.facts, teacher.grid, codecs)
    views = LiveViews(inventory, config.recipe, config.cache.views, teacher.grid, bad, identity.fingerprint)
    return Online(views, LiveTargets(teacher, config.loss, config.train.epochs))


def training_images(config: Config) -> Inventory:
    """The inventory of data.train. ConfigError where it is empty."""
    if not config.data.train:
        raise ConfigError(
            "data.train is empty; say which packed data set to train on, for example --set data.train=data/mine"
        )
    inventory = open_inventory(Path(config.data.train))
    inventory.check_shards()
    return inventory


def decodable(maker: ViewMaker, config: Config, ranks: Ranks, quiet: bool) -> tuple[NDArray[np.bool_], list[str]]:
    """Which images can't be decoded, bool [n], found once a run; and a note of how many they are, if any."""
    if ranks.first:
        _find_unreadable(maker, config, quiet)
    ranks.barrier()
    found = _unreadable(config, maker.inventory) or {}
    bad = np.zeros(len(maker.inventory), bool)
    bad[list(found)] = True
    where = Path(config.train.output) / UNREADABLE_FILE
    return bad, [
        f"{len(found)} of {len(bad)} images can't be decoded and are left out; {where} names them"
    ] if found else []


class _Check:
    """The worker that decodes images to find out whether they can be decoded."""

    def __init__(self, maker: ViewMaker) -> None:
        self.maker = maker

    def __call__(self, task: NDArray[np.int64]) -> dict[int, str]:
        bad = {}
        for sample in task.tolist():
            try:
                self.maker.image(sample)
            except ImageError as e:
                bad[sample] = str(e)
        return bad


def _find_unreadable(maker: ViewMaker, config: Config, quiet: bool) -> None:
    """Decode every image once and write down which ones can't be; too many in one block stop here, as in stage 1."""
    inventory = maker.inventory
    if _unreadable(config, inventory) is not None:
        return
    every = np.arange(len(inventory))
    tasks = [every[i : i + _STEP] for i in range(0, len(every), _STEP)]
    bad: dict[int, str] = {}
    with Progress("check images", len(every), quiet=quiet) as progress:
        for n, found in enumerate(Stream(_Check(maker), tasks, config.train.workers), 1):
            bad |= found
            progress.update(min(n * _STEP, len(every)))
    for first, stop in zip(inventory.blocks[:-1].tolist(), inventory.blocks[1:].tolist(), strict=True):
        here = {i - first: reason for i, reason in bad.items() if first <= i < stop}
        refuse_too_many(here, stop - first, inventory, first, config.cache.max_quarantine)
    refuse_too_many_in_all(len(bad), len(inventory), config.cache.max_quarantine)
    about = json.dumps({"inventory": inventory.id, "samples": bad})
    put(Path(config.train.output) / UNREADABLE_FILE, about.encode())


def _unreadable(config: Config, inventory: Inventory) -> dict[int, str] | None:
    """What an earlier start of the run wrote down: sample -> reason; None where nothing was, or of other data."""
    try:
        found = json.loads((Path(config.train.output) / UNREADABLE_FILE).read_text())
    except (OSError, ValueError):
        return None
    return {int(i): why for i, why in found["samples"].items()} if found.get("inventory") == inventory.id else None
