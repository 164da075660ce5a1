"""What a run may not change: recipe and teacher are the cache's, and a resumed run is the run that was begun."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cskd.config import Config, LossConfig, StudentConfig, TrainConfig, to_dict
from cskd.config.schema import LossTerm
from cskd.dataset.inventory import Inventory
from cskd.errors import ConfigError
from cskd.files.folders import MARKER, mark
from cskd.files.hub import PINS, is_hub
from cskd.files.read import refuse_links
from cskd.files.writer import LOCK
from cskd.loading.sources import ViewSource
from cskd.machine.arithmetic import half
from cskd.method.terms import own_terms
from cskd.pipeline.show.trackers import RECORD
from cskd.store.cache import Cache, differences
from cskd.store.format import RESOLVED
from cskd.store.manifest import read_manifest
from cskd.student.checkpoint import MODEL, MODEL_BEST, MODEL_EMA, MODEL_LAST
from cskd.student.tokens import heads_file

# Facts of the teacher that a config for training may repeat; weights may lie elsewhere, batch and device don't matter.
_TEACHER = ("model", "kwargs", "input_size", "mean", "std", "classes", "dense", "grid")
# Files of a run that replace what has their name; the folders next to them hold names of their own.
RESULTS, CONFUSION, CONFUSION_TABLE, FIRST_BATCH = "results.png", "confusion.png", "confusion.csv", "train_batch0.png"
_RUN_FILES = (
    *(MODEL, MODEL_LAST, MODEL_EMA, MODEL_BEST),
    *(heads_file(Path(name)).name for name in (MODEL, MODEL_LAST, MODEL_EMA, MODEL_BEST)),
    *("config.json", "metrics.jsonl", "metrics.csv", RECORD),
    *(RESULTS, CONFUSION, CONFUSION_TABLE, FIRST_BATCH),
)
RUN_NAMES = (*_RUN_FILES, RESOLVED, PINS, "unreadable.json", "resume", "scratch", "tensorboard", "wandb", MARKER, LOCK)
# Keys that don't change which numbers a run ends with: they may differ when it is resumed.
_FREE = (
    "output", "scratch", "workers", "threads", "device", "eval_every", "keep", "save_every", "max_steps", "trackers", "prefetch",
    "export", "augment", "caches",  # of these the fingerprints decide
)  # fmt: skip
# What else may differ when a run is resumed, with what a note says of it: all of it is read again at every step, so the
# numbers from that step on are well-defined, but they are those of no run that was never interrupted.
_NOTED = {
    "train.lr": "",
    "train.lr_batch": "",
    "train.min_lr": "",
    "train.warmup_lr": "",
    "train.warmup_epochs": "",
    "train.clip_grad": "",
    "train.weight_decay": "",
    "train.ema": "",
    "train.ema_warmup": "",
    "train.best": "earlier epochs don't count for it",
    "train.eval_every": "other epochs count for the best",
    "train.compile": "results round otherwise",
    "train.tf32": "results round otherwise on a CUDA device",
    "train.micro_batch": "sums round otherwise, and drop path draws otherwise",
    "train.grad_checkpointing": "results may round otherwise",
    "student.init": "it is read at the start of a run only, so nothing changes",
    "val": "scores before are of other images",
    "ranks": "the same views are fed, and drop path draws the same; only sums are added up in another order",
    "threads": "sums round otherwise",
    "device": "results round otherwise, and drop path draws otherwise",
}
# Keys that came later, with what runs did before: a record without one of them stands for this. For other keys that a
# record lacks it stands for the default.
_BEFORE = {"train.ema_warmup": False, "train.best": None}
_SECTIONS = {"student": StudentConfig, "loss": LossConfig, "train": TrainConfig}


def refuse_conflicts(config: Config, cache: Cache) -> None:
    """ConfigError for a key of the config that contradicts the cache; keys that were not written don't count."""
    facts = cache.identity.teacher
    halved = facts.get("autocast", "none")
    runs_in = facts.get("dtype", "float32") if halved == "none" else halved
    if config.teacher.precision not in ("auto", runs_in) and "teacher.precision" in config.given:
        raise ConfigError(
            f"teacher.precision is {config.teacher.precision}, the cache {cache.location} was made in {runs_in}; leave it out "
            "or set it so, or make another cache"
        )
    for key in sorted(config.given):
        section, _, name = key.partition(".")
        if section == "recipe" or (section == "teacher" and name in _TEACHER):
            made = cache.identity.recipe if section == "recipe" else cache.manifest.config["teacher"]
            asked, cached = getattr(getattr(config, section), name), made[name]
            if key == "teacher.model":
                asked, cached = (str(m).partition("@")[0] if is_hub(m) else Path(m).name for m in (asked, cached))
            if asked != cached:
                raise ConfigError(
                    f"{key} is {asked!r}, the cache {cache.location} was made with {cached!r}; leave it out or set it so"
                )


def refuse_other_container(config: Config) -> None:
    """ConfigError where a config says another container than that of a cache which was begun; one that says none goes on."""
    asked, root = config.cache.container, config.cache.path
    there = read_manifest(root).container or "zarr"
    if "cache.container" in config.given and asked != there:
        raise ConfigError(
            f"cache.container is {asked}, {root} was begun in {there}; leave it out, or copy the cache with "
            f"`cskd export {root} OUT --container {asked}`"
        )


def own_output(output: Path) -> None:
    """Make the folder of a run. Raises as `refuse_foreign`."""
    refuse_foreign(output)
    output.mkdir(parents=True, exist_ok=True)
    mark(output, "run")


def refuse_foreign(output: Path) -> None:
    """ConfigError where a folder holds files of the names of a run's that are none of a run; OSError where one is a link: a
    config from elsewhere may say any folder, and this is all that it can do there."""
    refuse_links(output, RUN_NAMES, "train.output")
    foreign = [name for name in _RUN_FILES if (output / name).exists()]
    if foreign and not (output / RESOLVED).exists():
        raise ConfigError(
            f"train.output {output} holds {foreign[0]} of something else than a run; set another, --set train.output=..."
        )


def run_identity(
    config: Config,
    source: ViewSource,
    views: int,
    ranks: int,
    online: bool,
    device: torch.device,
    val: Inventory | None = None,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """What decides the numbers of a run: kept in its resume states. Of `autocast: auto` what it means on this device, of
    `micro_batch: null` how many views; `ranks` says only who computed them."""
    train = {k: v for k, v in to_dict(config.train).items() if k not in (*_FREE, "views")}
    if config.train.best is not None:
        train["eval_every"] = config.train.eval_every
    train |= {"autocast": half(config.train.autocast, device), "micro_batch": micro_batch or config.train.micro_batch}
    facts = {
        "cache": source.fingerprint,
        "views": views,
        "online": online,
        "student": to_dict(config.student),
        "loss": to_dict(config.loss),
        "train": train,
        "ranks": ranks,
        "device": device.type,
        "val": val.id if val is not None else None,
    }
    if own := own_terms(config.loss):
        facts["term_code"] = {term.name: term.sha256 for term in own}
    return dict(json.loads(json.dumps(facts)))


def as_begun(config: Config, begun: dict[str, Any] | None) -> tuple[Config, list[str]]:
    """A config with what an earlier version did where a run has a key from it, or no record of that key, and the user did not
    write it; and a note for each. begun: the record, None for a new run."""
    notes = []
    for key, value in _BEFORE.items() if begun is not None else ():
        section, _, name = key.partition(".")
        mine, record = getattr(config, section), (begun or {}).get(section)
        other = isinstance(record, dict) and record.get(name, value) != value
        unused = key == "train.ema_warmup" and config.train.ema is None
        if not (other or unused) and key not in config.given and getattr(mine, name) != value:
            mine = dataclasses.replace(mine, **{name: value})
            config = dataclasses.replace(config, **{section: mine})
            notes.append(f"{key} is {_written(value)}, as this run was begun")
    train = (begun or {}).get("train")
    best = train.get("best") if isinstance(train, dict) else None
    if best and config.train.best is None and config.data.val and "train.best" not in config.given:
        # Another export must not end the search: a later one of the best would find what was the best till now.
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, best=str(best)))
        notes.append(f"train.best is {_written(best)}, as this run was begun")
    return config, notes


def micro_batch_begun(record: Mapping[str, Any] | None) -> int | None:
    """Views of a micro-batch of the run that a record is of. One of an earlier version, where each rank had one, says how many
    ranks there were. None where there is no record, or none that says it."""
    train = (record or {}).get("train")
    train = train if isinstance(train, dict) else {}
    rows, batch, ranks = train.get("micro_batch"), train.get("global_batch"), (record or {}).get("ranks")
    if rows is None and type(batch) is int and type(ranks) is int and ranks > 0:
        rows = batch // ranks
    return rows if type(rows) is int else None


def changed_on_resume(begun: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, value it was begun with and value now of everything that differs and may, see `_NOTED`."""
    differing = differences(_filled(begun, now), now)
    return [d for d in differing if d[0] in _NOTED and not (d[0] == "threads" and d[2] is None)]  # none on a GPU


def change_note(key: str, old: Any, new: Any, step: int) -> str:
    """In words: 'train.lr changed from 30.0 to 0.1 at step 12'."""
    said = f"{key} changed from {_written(old)} to {_written(new)} at step {step}"
    return f"{said}: {_NOTED[key]}" if _NOTED.get(key) else said


def refuse_other_run(begun: dict[str, Any], now: dict[str, Any], output: Path, distilled: bool) -> None:
    """ConfigError when a resume state is of another run, with the field, both values and the key that sets it back.

    distilled: whether the student has a distillation token. Runs of earlier versions name no `loss.baseline_head`: their
    method none trained the mean of both heads where there were two.
    """
    loss = begun.get("loss")
    if isinstance(loss, dict) and "baseline_head" not in loss:
        had_choice = distilled and loss.get("method") == "none"
        begun = begun | {
            "loss": loss | {"baseline_head": "mean" if had_choice else now["loss"].get("baseline_head", "class")}
        }
    for key, old, new in differences(_filled(begun, now), now):
        if key in _NOTED:
            continue
        by_key = f"set it back with --set {'train.views' if key == 'views' else key}={_written(old)}"
        if isinstance(old, list) and isinstance(new, list):
            by_key = "set it back in the config"
            key, old, new = _within(key, old, new)
        back = {
            "cache": _cache_back(old, new, bool(now.get("online"))),
            "online": "start it with --online" if old else "start it without --online",
        }.get(key, by_key)
        raise ConfigError(
            f"the run in {output} was begun with {key} = {_written(old)}, now it is {_written(new)}; {back}, or start "
            "another run with --set train.output=..."
        )


def _within(key: str, old: list[Any], new: list[Any]) -> tuple[str, Any, Any]:
    """Where two lists of a key differ first: what is there, and both values."""
    for i, pair in enumerate(zip(old, new, strict=False)):
        for difference in differences(*pair, f"{key}[{i}]"):
            return difference
    return f"items of {key}", len(old), len(new)


def _cache_back(old: Any, new: Any, online: bool) -> str:
    """What sets the source of a run's views back."""
    alone = str(old).startswith("none"), str(new).startswith("none")
    if online or all(alone):
        return "restore data.train, recipe and teacher as they were"
    if alone[0]:
        return "it was begun on images alone: restore loss.method none"
    return "set cache.path to the cache that it was begun with"


def _filled(begun: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A record with what it stands for where it lacks a key of today's."""
    filled = dict(begun)
    for section, cls in _SECTIONS.items():
        if isinstance(begun.get(section), dict):
            before = {k.partition(".")[2]: v for k, v in _BEFORE.items() if k.startswith(f"{section}.")}
            brought = json.loads(json.dumps(to_dict(cls()))) | before
            known = {k: v for k, v in brought.items() if k in now[section]}
            if section == "loss" and isinstance(terms := begun["loss"].get("terms"), list):
                begun = begun | {"loss": begun["loss"] | {"terms": [_of_term(term) for term in terms]}}
            if section == "train" and (rows := micro_batch_begun(begun)) is not None:
                begun = begun | {"train": begun["train"] | {"micro_batch": rows}}
            filled[section] = known | {k: v for k, v in begun[section].items() if section != "train" or k not in _FREE}
    return {key: now[key] for key in _NOTED if key in now} | filled


def _of_term(term: Any) -> Any:
    """A recorded term of a loss with what keys that it lacks stand for, as `_filled`."""
    return json.loads(json.dumps(to_dict(LossTerm()))) | term if isinstance(term, dict) else term


def _written(value: Any) -> str:
    """A value as a config says it, cut to what fits a line."""
    text = (
        value if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value) else json.dumps(value, ensure_ascii=False)
    )
    return text if len(text) <= 60 else text[:57] + "..."
