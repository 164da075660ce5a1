"""What a run may not change: recipe and teacher are the cache's, and a resumed run is the run that was begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cskd.augment.recipe import RECIPE_CODE_VERSION
from cskd.config import Config, to_dict
from cskd.devices import uses_bf16
from cskd.errors import CacheError, ConfigError
from cskd.files.folders import MARKER, mark
from cskd.files.writer import LOCK
from cskd.images import POLICY
from cskd.live import LiveViews
from cskd.store.cache import Cache, first_difference
from cskd.store.format import RESOLVED
from cskd.student.checkpoint import MODEL, MODEL_LAST
from cskd.untrusted import refuse_links

# Facts of the teacher that a config for training may repeat; weights may lie elsewhere, batch and device don't matter.
_TEACHER = ("model", "kwargs", "input_size", "mean", "std", "classes", "dense", "grid")
# Files of a run that replace what has their name; the folders beside them hold names of their own.
_RUN_FILES = (MODEL, MODEL_LAST, "config.json", "metrics.jsonl", "metrics.csv")
RUN_NAMES = (*_RUN_FILES, RESOLVED, "unreadable.json", "resume", "scratch", "tensorboard", MARKER, LOCK)
# Keys that don't change which numbers a run ends with: they may differ when it is resumed.
_FREE = ("output", "workers", "device", "eval_every", "keep", "save_every", "max_steps", "tensorboard", "prefetch")


def refuse_conflicts(config: Config, cache: Cache) -> None:
    """ConfigError for a key of the config that contradicts the cache; keys that were not written don't count."""
    for key in sorted(config.given):
        section, _, name = key.partition(".")
        if section == "recipe" or (section == "teacher" and name in _TEACHER):
            made = cache.identity["recipe"] if section == "recipe" else cache.manifest["config"]["teacher"]
            asked, cached = getattr(getattr(config, section), name), made[name]
            if key == "teacher.model":
                asked, cached = Path(asked).name, Path(cached).name
            if asked != cached:
                raise ConfigError(
                    f"{key} is {asked!r}, the cache {cache.root} was made with {cached!r}; leave it out or set it so"
                )


def refuse_other_code(cache: Cache) -> None:
    """CacheError when this version of the program reads or augments images in another way than stage 1 did."""
    now = {"recipe_code": RECIPE_CODE_VERSION, "images": POLICY}
    difference = first_difference({name: cache.identity.get(name) for name in now}, now)
    if difference:
        key, old, new = difference
        raise CacheError(
            f"{cache.root} was made with {key} = {old!r}, this version of cskd has {new!r}: its views would not replay; "
            "train with the version it was made with, or cache again"
        )


def usable_views(cache: Cache, wanted: int) -> int:
    """How many of a cache's first views a run feeds: `train.views`, or all of them.

    Raises:  CacheError while one of them lacks a unit, with the command that makes it; ConfigError past the last view.
    """
    if wanted > cache.views:
        raise ConfigError(f"train.views is {wanted}, {cache.root} has {cache.views}; cache more, or use fewer")
    views = wanted or cache.views
    missing = cache.missing(list(range(views)))
    if missing:
        (block, view), whole = missing[0], cache.blocks * views
        ready = min(v for _, v in missing)
        instead = f", or train on the first {ready} views with --set train.views={ready}" if ready else ""
        raise CacheError(
            f"{cache.root} lacks {len(missing)} of {whole} units, the first is block {block}, view {view}; "
            f"finish it with `cskd cache-teacher {cache.root / RESOLVED}`{instead}"
        )
    return views


def own_output(output: Path) -> None:
    """Make the folder of a run. ConfigError where it holds files of the names of a run's that are none of a run; OSError
    where one is a link: a config from elsewhere may say any folder, and this is all that it can do there."""
    output.mkdir(parents=True, exist_ok=True)
    refuse_links(output, RUN_NAMES, "train.output")
    foreign = [name for name in _RUN_FILES if (output / name).exists()]
    if foreign and not (output / RESOLVED).exists():
        raise ConfigError(
            f"train.output {output} holds {foreign[0]} of something else than a run; set another, --set train.output=..."
        )
    mark(output, "run")


def run_identity(
    config: Config, source: Cache | LiveViews, views: int, ranks: int, online: bool, device: torch.device
) -> dict[str, Any]:
    """What decides the numbers of a run: kept in its resume states. Of `autocast: auto` what it means on this device."""
    train = {k: v for k, v in to_dict(config.train).items() if k not in (*_FREE, "views")}
    train["autocast"] = "bf16" if uses_bf16(config.train.autocast, device) else "none"
    return {
        "cache": source.fingerprint,
        "views": views,
        "online": online,
        "student": to_dict(config.student),
        "loss": to_dict(config.loss),
        "train": train,
        "ranks": ranks,
    }


def refuse_other_run(begun: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """ConfigError when a resume state is of another run, with the field and both values."""
    difference = first_difference(begun, now)
    if difference:
        key, old, new = difference
        raise ConfigError(
            f"the run in {output} was begun with {key} = {old!r}, now it is {new!r}; set it back, or start another run "
            "with --set train.output=..."
        )
