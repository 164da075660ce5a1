"""The one list of what can be looked at before the work: used by stage 1, by `cskd check` and by stage 2.

    stage 1      all of it before the first unit: what stage 2 would refuse after days of the teacher is refused at once
    cskd check   all of it, and says of each line what was found; nothing is stopped by the first that is wrong
    stage 2      what is its own, of the parts that it then trains with

What a config leaves empty is no error: stage 1 may be all that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cskd.errors import ConfigError, CskdError, counted, shown
from cskd.files.paths import is_remote
from cskd.loading.targets import codec_for, refuse_unnamed, stage_codecs
from cskd.machine.launch import launched
from cskd.method.terms import idle_terms, needs, refuse_gaps, unread_keys
from cskd.pipeline.codec_tables import refuse_head
from cskd.pipeline.conflicts import as_begun, refuse_other_container, refuse_other_run, run_identity
from cskd.pipeline.outputs import refuse_cache_output, refuse_full, refuse_run_output, refuse_unfit, run_output
from cskd.pipeline.run_state import PROGRESS
from cskd.pipeline.setup import Setup, from_images, image_sizes, view_notes, with_best
from cskd.store.cache import open_cache, refuse_other_identity
from cskd.store.manifest import has_cache
from cskd.student.checkpoint import ResumeStates
from cskd.student.optim import refuse_schedule, schedule_notes
from cskd.student.warm_start import checkpoint_file
from cskd.teacher.build import weight_file
from cskd.views.fit import image_notes, refuse_views

Found = tuple[str, list[str]]  # what was found, and what a user should know of it
State = Literal["ok", "wrong", "open"]


@dataclass(frozen=True)
class Check:
    """name: the key or section that it is about. look: raises CskdError or OSError where it is wrong. needs: checks that must be ok
    for this one to be possible. of: 'data', 'cache' (stage 1), 'student' (stage 2), or 'machine' (stage 2 on this very machine)."""

    name: str
    look: Callable[[Setup], Found]
    of: Literal["data", "cache", "student", "machine"]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One line: ok, wrong, or open (could not be looked at, or is not asked for)."""

    check: Check
    state: State
    text: str
    notes: list[str]
    error: CskdError | OSError | None = None


@dataclass(frozen=True)
class Notes:
    """What a user should know: of the images, whoever learns from them; and of stage 2."""

    images: list[str]
    notes: list[str]


def findings(checks: Iterable[Check], setup: Setup) -> list[Finding]:
    """Each check with what was found, all of them whatever is wrong."""
    found: dict[str, Finding] = {}
    failed: set[str] = set()  # what is not asked for keeps nothing else from being looked at
    for check in checks:
        if why := _not_asked(check, setup):
            found[check.name] = Finding(check, "open", why, [])
            continue
        if waits := [name for name in check.needs if name in failed]:
            found[check.name] = Finding(check, "open", f"can't be looked at without {waits[0]}", [])
            failed.add(check.name)
            continue
        try:
            text, notes = check.look(setup)
            found[check.name] = Finding(check, "ok", text, notes)
        except (CskdError, OSError) as e:
            found[check.name] = Finding(check, "wrong", shown(e), [], e)
            failed.add(check.name)
    return list(found.values())


def refuse(checks: Collection[Check], setup: Setup) -> Notes:
    """Raise what is wrong, the first of it with how much more there is. Returns what a user should know.

    Of a cache that was begun already what is wrong with stage 2 is a note: its units can be finished all the same. Where stage 2
    can't run on this machine it is meant for another one, whose memory and devices are its own.
    """
    found = findings(checks, setup)
    wrong = [f for f in found if f.error is not None]
    running = setup.device is not None or setup.online
    if not running:
        wrong = [f for f in wrong if f.check.name != "train.device"]
    later = [] if running or not setup.begun else [f for f in wrong if f.check.of in ("student", "machine")]
    stops = [f for f in wrong if f not in later]
    if stops:
        error, more = stops[0].error, len(wrong) - 1
        assert error is not None
        if more and isinstance(error, CskdError):
            raise type(error)(f"{error} ({more} more: `cskd check` lists all)") from error
        raise error
    notes = [f"the cache is finished all the same, but training will be refused: {f.text}" for f in later]
    images = [note for f in found if f.check.of == "data" for note in f.notes]
    return Notes(images, notes + [note for f in found if f.check.of != "data" for note in f.notes])


def _not_asked(check: Check, setup: Setup) -> str:
    """Why a check is not for this config; '' where it is."""
    config = setup.config
    if check.of == "cache" and not setup.makes_cache:
        return "a cache is read, no teacher runs" if setup.source is not None else "no cache is made, no teacher runs"
    if check.name == "data.val":
        return "" if config.data.val else "empty: nothing is evaluated"
    if check.of in ("student", "machine") and not config.student.model:
        return "student.model is empty: stage 2 is not described"
    if check.name in ("train.output", "room for the run", "the run") and not config.train.output:
        return "empty: `cskd train` will ask for it"
    return ""


def _train_images(setup: Setup) -> Found:
    inventory = setup.inventory
    return _images_of(len(inventory), len(inventory.classes)), []


def _views(setup: Setup) -> Found:
    if not setup.begun:  # a cache is finished by the recipe that it was begun with
        refuse_views(setup.recipe)
    return f"views of {setup.recipe.size} x {setup.recipe.size} pixels", image_notes(
        image_sizes(setup.maker), setup.recipe
    )


def _cache_path(setup: Setup) -> Found:
    if not setup.config.cache.path:
        raise ConfigError("cache.path is empty; say where the cache goes, for example --set cache.path=caches/mine")
    refuse_cache_output(setup.config)
    if setup.begun:
        refuse_other_container(setup.config)
    return setup.config.cache.path, []


def _hard_links(setup: Setup) -> Found:
    """Tried with a file: only for a cache that has images to be made of."""
    return refuse_unfit(setup.config.cache.path), []


def _codecs(setup: Setup) -> Found:
    return ", ".join(setup.codecs), []


def _cache_device(setup: Setup) -> Found:
    device, notes = setup.cache_device
    return str(device), notes


def _cache_memory(setup: Setup) -> Found:
    return setup.refuse_cache_memory(), []


def _teacher(setup: Setup) -> Found:
    teacher = setup.teacher
    return "{}, {} x {} cells".format(setup.config.teacher.model, *teacher.grid), teacher.notes


def _begun_cache(setup: Setup) -> Found:
    refuse_head(setup.identity, setup.teacher)
    if not setup.begun:
        return "will be begun", []
    cache = open_cache(setup.config.cache.path, index=False)
    refuse_other_identity(cache, setup.identity)
    units = cache.blocks * cache.views
    return f"begun, {units - len(cache.missing()):,} of {units:,} units are there", []


def _val_images(setup: Setup) -> Found:
    val = setup.val
    assert val is not None  # `_not_asked`
    return _images_of(len(val), len(val.classes)), view_notes(setup.config, setup.recipe)


def _loss(setup: Setup) -> Found:
    loss = setup.config.loss
    found: list[str] = [loss.method]
    refuse_unnamed(loss, setup.config.train.caches)
    refuse_gaps(loss, setup.config.train.epochs)
    if setup.makes_cache:
        found.append(f"from codec {' and '.join(_read_codecs(setup))}")
    for name, path in setup.config.train.caches.items():
        if has_cache(path):  # else it is still to be made
            for look in (codec_for, stage_codecs):
                look(loss, open_cache(path, images=False).codecs, path, name)
    if unread := unread_keys(loss, setup.config.given):
        found.append(f"which does not read {', '.join(unread)}")
    return ", ".join(found), idle_terms(loss, setup.config.train.epochs)


def _read_codecs(setup: Setup) -> list[str]:
    loss = setup.config.loss
    hard, soft = codec_for(loss, setup.codecs, "cache.codecs")
    read = [hard] if needs(loss).hard != "none" or not soft else []
    stages = stage_codecs(loss, setup.codecs, "cache.codecs").values()
    return list(dict.fromkeys([*read, *([soft] if soft else []), *stages]))


def _train_output(setup: Setup) -> Found:
    refuse_run_output(setup.config)
    return setup.config.train.output, []


def _train_room(setup: Setup) -> Found:
    """For a new run, on the machine that writes it: one that goes on has its states already."""
    if not launched().speaks or any((run_output(setup.config) / "resume").glob("step-*.safetensors")):
        return "a run goes on", []
    return refuse_full(setup.config, setup.optimisation, setup.plan.steps), []


def _train_device(setup: Setup) -> Found:
    return str(setup.train_device), []


def _augment(setup: Setup) -> Found:
    return f"on the {'device' if setup.pixels else 'host'}", []


def _train_memory(setup: Setup) -> Found:
    return setup.refuse_train_memory(), []


def _weight_file(setup: Setup) -> Found:
    weights = setup.config.teacher.weights
    return str(weights if weights in (None, "hub") else weight_file(Path(weights))), []


def _init_file(setup: Setup) -> Found:
    init = setup.config.student.init
    return str(checkpoint_file(Path(init))) if init else "none: first weights are drawn from train.seed", []


def _schedule(setup: Setup) -> Found:
    refuse_schedule(setup.config.train)
    train = setup.config.train
    return f"{train.opt}, {train.epochs:,} epochs, {train.warmup_epochs:g} of them warm up", schedule_notes(train)


def _student(setup: Setup) -> Found:
    student = setup.student
    rows, columns = student.patch_grid
    return f"{setup.config.student.model}, {rows} x {columns} {student.cells}", student.notes


def _plan(setup: Setup) -> Found:
    plan = setup.plan
    return f"{plan.steps:,} steps of {plan.global_batch:,} views in an epoch, {counted(plan.views, 'view')}", []


def _micro_batch(setup: Setup) -> Found:
    return f"{setup.micro_batch:,} views", []


def _optimiser(setup: Setup) -> Found:
    return type(setup.optimisation.optimizer).__name__, []


def _best(setup: Setup) -> Found:
    return str(with_best(setup.config, setup.student).train.best or "the last weights count"), []


def _grid(setup: Setup) -> Found:
    notes = setup.student_notes()
    if not setup.on_grid:
        return f"{setup.config.loss.method} reads the image's logits alone", notes
    student = setup.student
    return "{} x {} {} on {} x {} of the teacher".format(*student.patch_grid, student.cells, *setup.grid), notes


def _run(setup: Setup) -> Found:
    """A run that is in the folder must be one that goes on."""
    output = run_output(setup.config)
    if is_remote(setup.config.train.output) and setup.device is None:  # it is fetched when a run begins
        return "what lies there is looked at when the run begins", []
    begun = next(iter(ResumeStates(output / "resume").infos().items()), None)
    if begun is None:
        return "will be begun", []
    step, info = begun
    config = with_best(as_begun(setup.config, info)[0], setup.student)
    now = run_identity(
        config,
        setup.named_views(from_images(config, info)),
        setup.plan.views,
        setup.ranks,
        setup.online,
        setup.train_device,
        setup.val,
    )
    refuse_other_run({k: v for k, v in info.items() if k != PROGRESS}, now, output, setup.student.distilled)
    return f"goes on from step {step:,}", []


def _images_of(images: int, classes: int) -> str:
    return f"{images:,} images, {classes:,} classes"


CHECKS = (
    Check("cache.path", _cache_path, "cache"),  # before the data: no path of the config may be another one's
    Check("data.train", _train_images, "data"),
    Check("recipe", _views, "data", ("data.train",)),
    Check("its disk", _hard_links, "cache", ("cache.path", "data.train")),
    Check("cache.codecs", _codecs, "cache", ("data.train",)),
    Check("cache.device", _cache_device, "cache"),
    Check("cache.workers", _cache_memory, "cache", ("cache.device",)),
    Check("teacher.weights", _weight_file, "cache"),
    Check("teacher", _teacher, "cache", ("data.train", "cache.device", "teacher.weights")),
    Check("the cache", _begun_cache, "cache", ("its disk", "cache.codecs", "teacher")),
    Check("data.val", _val_images, "student", ("data.train",)),
    Check("loss", _loss, "student", ("cache.codecs",)),
    Check("train.output", _train_output, "student"),
    Check("train.device", _train_device, "machine"),
    Check("train.views", _plan, "student", ("data.train",)),
    Check("student.init", _init_file, "student"),
    Check("student", _student, "student", ("data.train", "recipe", "student.init")),
    Check("the grid", _grid, "student", ("teacher", "student")),
    Check("train.micro_batch", _micro_batch, "student"),
    Check("train.augment", _augment, "machine", ("train.device", "train.views")),
    Check("train.workers", _train_memory, "machine", ("train.device",)),
    Check("train.opt", _schedule, "student"),
    Check("the optimiser", _optimiser, "student", ("student", "train.views", "train.opt")),
    Check("room for the run", _train_room, "machine", ("train.output", "the optimiser")),
    Check("train.best", _best, "student", ("student",)),
    Check(
        "the run",
        _run,
        "machine",
        ("teacher", "the cache", "train.output", "train.device", "the optimiser", "train.best", "data.val"),
    ),
)
_OF_TEACHER = ("teacher", "the cache", "the grid", "the run")
BEFORE_TEACHER = tuple(c for c in CHECKS if c.name not in _OF_TEACHER)
# Of a plan, for which nothing is written: not where it would go.
PLANNED = tuple(c for c in BEFORE_TEACHER if c.of in ("data", "student") and c.name != "train.output")
ON_GRID = tuple(c for c in CHECKS if c.name == "the grid")
WITH_TEACHER = tuple(c for c in CHECKS if c.name in ("the cache", "the grid", "the run"))
# What a run opens its parts by; its output was looked at when it took the lock, its cache and its resume states come after.
TRAINING = tuple(
    c for c in CHECKS if c.of in ("student", "machine") and c.name not in ("loss", "train.output", "the run")
)
