"""Training without a cache: with the teacher next to the student, or on labels alone, with no teacher at all.

With `train.caches` each of their teachers, which their manifests record, runs next to the student, too; their targets are not read.

Plan, views and mixing are those of the cache that `cskd cache-teacher` would make from the same config. So an online run
differs from one with a cache in where the targets come from, and a baseline in what is taught; in nothing else. A baseline
has as many views as it needs, or train.views; with `--online` cache.views, as the runs that it is compared with.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.config import Config
from cskd.dataset.inventory import Inventory
from cskd.errors import ImageError, shortened
from cskd.files.durable import put
from cskd.files.paths import is_remote
from cskd.loading.joined import joined_fingerprint, refuse_other_views
from cskd.loading.plan import views_needed
from cskd.loading.shards_ahead import ahead, all_needs
from cskd.loading.sources import LiveViews
from cskd.loading.stream import Stream
from cskd.loading.targets import LiveTargets, LiveTeachers, NoTargets
from cskd.machine.ranks import Ranks
from cskd.machine.threads import choose_threads
from cskd.near import absent
from cskd.pipeline.clean_check import clean_check
from cskd.pipeline.measure_precision import measure_precision
from cskd.pipeline.outputs import run_output
from cskd.pipeline.precheck import BEFORE_TEACHER, ON_GRID, refuse
from cskd.pipeline.recorded_teacher import recorded_teacher
from cskd.pipeline.setup import Setup, baseline_name, baseline_views, training_images
from cskd.pipeline.show.progress import Notes, Progress
from cskd.store.cache import cache_place, open_cache
from cskd.store.identity import identity_of
from cskd.store.manifest import has_cache
from cskd.store.seal import refuse_too_many, refuse_too_many_in_all
from cskd.teacher.model import load_teacher
from cskd.views.maker import ViewMaker

UNREADABLE_FILE = "unreadable.json"
_STEP = 256  # images per task


def open_online(
    config: Config, device: torch.device, ranks: Ranks, quiet: bool, notes: Notes
) -> tuple[LiveViews, LiveTargets | LiveTeachers]:
    """Views and targets of teachers that run live: load and check them, and find the images that can't be decoded, once a run.

    notes: gets what a user should know, each before the work that it is about.
    """
    setup = Setup(config, online=True)
    ahead = refuse(BEFORE_TEACHER, setup)
    inventory, maker = setup.inventory, setup.maker
    teacher = load_teacher(config.teacher, inventory.classes, device, config.recipe.size)
    setup.teacher = teacher
    notes.add([*ahead.images, *teacher.notes, *ahead.notes, *refuse(ON_GRID, setup).notes])
    notes.say()
    check = clean_check(teacher, maker, config)
    notes.add([f"online: the teacher runs at every step; its top-1 is {check.text}", *check.notes])
    notes.add(measure_precision(teacher, maker, config.teacher).notes)
    notes.say()
    bad, left_out = decodable(maker, config, ranks, quiet)
    notes.add(left_out)
    identity = identity_of(inventory, config.recipe, teacher.fingerprint.facts, teacher.grid, config.cache.codecs)
    paths = {name: cache_place(path, f"train.caches.{name}") for name, path in config.train.caches.items()}
    others = {name: open_cache(path, images=False) for name, path in paths.items()}
    for name, cache in others.items():
        refuse_other_views(name, cache, identity, "this config")
    teachers = {"": teacher, **{name: recorded_teacher(cache, device) for name, cache in others.items()}}
    name = joined_fingerprint({"": identity.fingerprint, **{name: of.fingerprint for name, of in others.items()}})
    name = name if others else identity.fingerprint
    views = LiveViews(inventory, config.recipe, config.cache.views, teacher.grid, bad, name)
    if others:
        return views, LiveTeachers(teachers, config.loss, config.train.epochs)
    return views, LiveTargets(teacher, config.loss, config.train.epochs)


def open_baseline(config: Config, ranks: Ranks, online: bool, quiet: bool) -> tuple[LiveViews, NoTargets, list[str]]:
    """Views of data.train, no targets, and notes. Finds the images that can't be decoded, once a run.

    Raises: ConfigError for a train.views that train.repeats does not divide, DataError and CacheError as a cache would.
    """
    inventory = training_images(config)
    views = config.train.views or config.cache.views if online else baseline_views(config)
    bad, left_out = decodable(ViewMaker(inventory, config.recipe), config, ranks, quiet)
    source = LiveViews(inventory, config.recipe, views, (1, 1), bad, baseline_name(inventory, config.recipe))
    return source, NoTargets(), [_baseline_note(config, views), *left_out]


def _baseline_note(config: Config, views: int) -> str:
    needed = views_needed(config.train)
    again = "none is used twice" if views >= needed else f"each is used up to {-(-needed // views)} times"
    path = config.cache.path
    gone = bool(path) and (not has_cache(path) if is_remote(path) else not Path(path).exists())
    said = path if is_remote(path) else absent(Path(path))
    where = f" (cache.path {shortened(said, 110)} is not there)" if gone else ""
    return (
        f"loss.method {config.loss.method}: no cache{where} and no teacher; views 0 to {views - 1} are made from data.train by the config's recipe, "
        f"as stage 1 would make them, and {again}"
    )


def decodable(maker: ViewMaker, config: Config, ranks: Ranks, quiet: bool) -> tuple[NDArray[np.bool_], list[str]]:
    """Which images can't be decoded, bool [n], found once a run; and a note of how many they are, if any."""
    if ranks.first:
        _find_unreadable(maker, config, quiet)
    ranks.barrier()
    found = _unreadable(config, maker.inventory) or {}
    bad = np.zeros(len(maker.inventory), bool)
    bad[list(found)] = True
    where = run_output(config) / UNREADABLE_FILE
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
    workers = choose_threads(workers=config.train.workers, gpu=True).workers  # the main process only waits for them
    with Progress("check images", len(every), quiet=quiet) as progress:
        for n, found in enumerate(
            Stream(_Check(maker.whole()), ahead(tasks, all_needs(inventory, len(tasks))), workers), 1
        ):
            bad |= found
            progress.update(min(n * _STEP, len(every)))
    for first, stop in zip(inventory.blocks[:-1].tolist(), inventory.blocks[1:].tolist(), strict=True):
        here = {i - first: reason for i, reason in bad.items() if first <= i < stop}
        refuse_too_many(here, stop - first, inventory, first, config.cache.max_quarantine)
    refuse_too_many_in_all(len(bad), len(inventory), config.cache.max_quarantine)
    about = json.dumps({"inventory": inventory.id, "samples": bad})
    put(run_output(config) / UNREADABLE_FILE, about.encode())


def _unreadable(config: Config, inventory: Inventory) -> dict[int, str] | None:
    """What an earlier start of the run wrote down: sample -> reason; None where nothing was, or of other data."""
    try:
        found = json.loads((run_output(config) / UNREADABLE_FILE).read_text())
    except (OSError, ValueError):
        return None
    return {int(i): why for i, why in found["samples"].items()} if found.get("inventory") == inventory.id else None
