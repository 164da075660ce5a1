"""What a command makes sure of before it writes: its output is a folder of its own kind, and no other process writes to it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch

from cskd.config import Config
from cskd.config.load import PATHS
from cskd.errors import CacheError, ConfigError, CskdError, DataError, PathError
from cskd.files import claims
from cskd.files.durable import NO_LINKS, hard_link_error, put
from cskd.files.folders import refuse_output
from cskd.files.hub import is_hub
from cskd.files.paths import is_remote, local_path, location_text
from cskd.files.scratch import clear_scratch, refuse_scratch
from cskd.files.writer import LOCK, Writer, by, sole_writer
from cskd.machine.ranks import Ranks
from cskd.pipeline.conflicts import RUN_NAMES, refuse_foreign
from cskd.pipeline.draw.confusion import to_csv
from cskd.pipeline.show.progress import say
from cskd.storage import Storage, open_storage
from cskd.storage.mirror import Mirror, working_folder
from cskd.storage.node_cache import use_node_cache
from cskd.storage.places import refuse_objects
from cskd.storage.posix import Posix
from cskd.store.format import MANIFEST, OWN_NAMES, PROBE
from cskd.student.optim import Optimisation, numbers_per_weight

LAST = ("resume",)  # a state is there once all that it tells of is
FIRST_SPEAKS = 3.0  # seconds: torchrun ends all ranks once one has ended, and the first one knows why
PAGE_START = b"<!doctype html>\n<!-- made by cskd inspect --html -->\n"
# Loose files that commands write: what they are, and how each begins. Only one that begins so is replaced.
_PNG = ("PNG", b"\x89PNG\r\n\x1a\n")
TABLE = "--confusion, its table"
FILES = {
    "--png": _PNG,
    "--confusion": _PNG,
    TABLE: ("table of `cskd eval --confusion`", to_csv([], [])),
    "--html": ("page of `cskd inspect`", PAGE_START),
}


def use_own_node_cache(config: Config) -> None:
    """`use_node_cache` as a config says. PathError, too, where it lies in what is still to be made: the same command goes on there."""
    node = config.data.node_cache
    use_node_cache(node, config.data.node_cache_gb)
    for key, text in (("cache.path", config.cache.path), ("train.output", config.train.output)):
        if not node or not text or is_remote(text) or is_hub(text):
            continue
        if Path(os.path.realpath(node)).is_relative_to(os.path.realpath(text)):
            raise PathError(f"data.node_cache {node} lies in {key} {text}; give a folder outside of it")


def refuse_cache_output(config: Config) -> None:
    """Refuse a `cache.path` that can't hold this cache, before the teacher is loaded. Raises PathError, CacheError.

    Several processes may make one cache; while one repairs it, no other does.
    """
    if is_remote(config.cache.path):
        others = _other_texts(config, "cache.path")
        refuse_objects(config.cache.path, "cache.path", "a cache", of_a_cache, MANIFEST, others)
        return
    root = Path(config.cache.path)
    refuse_output(root, "cache", "cache.path", inputs=_other_paths(config, "cache.path"), names=OWN_NAMES)
    mending = claims.holder(root / LOCK)
    if mending is not None and not (mending.is_here and mending.pid == os.getpid()):
        raise PathError(f"cache.path {root} is being repaired{by(mending)}; run the same command when that has ended")


def of_a_cache(key: str) -> bool:
    """Whether an object may be one of a cache. A probe is of a process that has died, or of one that begins at the same time."""
    return key.partition("/")[0] in OWN_NAMES or key.startswith(PROBE)


def refuse_run_output(config: Config) -> None:
    """Refuse a `train.output` that can't hold a run of this config; leaves nothing. Raises ConfigError, PathError, OSError."""
    output = run_output(config)
    refuse_scratch(config.train.scratch)
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers has {name}, which is not installed; run: pip install 'cskd[{name}]'")
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "no folder" if not there.is_dir() else "not writable"
        raise ConfigError(f"train.output {output}: {there} is {what}; set another, --set train.output=runs/x")
    if is_remote(config.train.output):
        mirror = Mirror(config.train.output, "run", "train.output")
        for key, text in _other_texts(config, "train.output").items():
            other = location_text(text, key) if is_remote(text) else text
            if f"{other}/".startswith(f"{mirror.location}/") or mirror.location.startswith(f"{other}/"):
                raise PathError(
                    f"train.output {mirror.location} and {key} {other} lie in each other; give each a place of its own"
                )
        mirror.names()
    refuse_output(output, "run", "train.output", inputs=_other_paths(config, "train.output"), names=RUN_NAMES)
    root = Path(config.cache.path)
    if (
        config.cache.path
        and not is_hub(root)
        and not is_remote(root)
        and os.path.realpath(root) in map(str, Path(os.path.realpath(output)).parents)
    ):
        raise PathError(f"train.output {output} lies in cache.path {root}; give a folder outside of it")
    try:
        tempfile.TemporaryDirectory(dir=there, prefix=".cskd-").cleanup()
    except OSError as e:
        raise ConfigError(
            f"train.output {output}: nothing can be made in {there} ({e.strerror}); set another, --set train.output=runs/x"
        ) from None
    refuse_foreign(output)


def refuse_full(config: Config, optimisation: Optimisation, steps: int) -> str:
    """ConfigError where the disk of a new run can't hold what it keeps: exported weights, and resume states with their averages, the
    optimiser's numbers and the best weights; one state more than `train.keep`, since the new one is there before the oldest goes.

    Args:    steps: updates of an epoch, after each of which a state is saved. Returns: how much that is, in words.
    """
    train, output = config.train, run_output(config)
    weights = sum(t.numel() * t.element_size() for t in optimisation.student.backbone.state_dict().values())
    trained = sum(p.numel() * p.element_size() for g in optimisation.optimizer.param_groups for p in g["params"])
    averaged, best = train.ema is not None, train.best is not None or train.export == "best"
    epochs = min(train.epochs, -(-train.max_steps // steps) if train.max_steps else train.epochs)
    state = weights * (1 + averaged) + int(trained * numbers_per_weight(train))
    need = state * min(train.keep + 1, epochs) + weights * (1 + averaged + 2 * best)
    free = shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.exists())).free
    if free < need:
        raise ConfigError(
            f"train.output {output}: its disk has {free / 1e6:,.0f} MB free, and the run takes {need / 1e6:,.0f} MB, a resume state "
            f"{state / 1e6:,.0f} MB of that; make room, set a smaller train.keep, or another --set train.output=..."
        )
    return f"{need / 1e6:,.1f} MB, {free / 1e6:,.0f} MB are free"


def run_output(config: Config) -> Path:
    """The folder of this machine that a run writes to: `train.output`, or what is mirrored to that address."""
    return working_folder(config.train.output)


@contextlib.contextmanager
def mirrored_run(config: Config, ranks: Ranks, device: torch.device, quiet: bool) -> Iterator[Mirror | None]:
    """The run that lies at the address `train.output`, fetched to this machine, for `Mirror.put` of the first rank; None where that is
    a folder. What the run leaves is put there at the end, and where it stops with an error.

    Raises:  PathError where something else lies there, StorageError.
    """
    if not is_remote(config.train.output):
        yield None
        return
    mirror, refused = Mirror(config.train.output, "run", "train.output"), list[Exception]()
    try:
        if ranks.local == 0:
            mirror.fetch()
        if ranks.first:
            mirror.take(lambda line: say([line], quiet))
    except (CskdError, OSError) as e:
        refused.append(e)
    if ranks.sum(torch.tensor([float(bool(refused))], device=device)).item():
        raise (
            refused[0]
            if refused
            else PathError(f"rank {ranks.rank}: another rank was refused train.output; see its line")
        )
    try:
        yield mirror
    except CskdError:
        if ranks.first:
            with contextlib.suppress(CskdError, OSError):
                mirror.put(LAST)
        raise
    else:
        if ranks.first:
            mirror.put(LAST)
    finally:
        if ranks.first:
            mirror.end()
        elif ranks.local == 0:
            mirror.clear()


@contextlib.contextmanager
def sole_repair(storage: Storage) -> Iterator[None]:
    """A cache for the process that repairs it alone. PathError naming the one that makes or repairs it. An object store has no
    locks: what several make or repair there at once counts once."""
    if not isinstance(storage, Posix) or not storage.root.is_dir():
        yield  # there is nothing to lock, or nothing to repair
        return
    cache = storage.root
    with sole_writer(cache, "repair it then"):
        for path in (cache / claims.CLAIMS).glob("[!.]*"):
            if (maker := claims.holder(path)) is not None:
                raise PathError(f"{cache} is being made{by(maker)}; wait for it or end it, and repair then")
        yield


@contextlib.contextmanager
def sole_run(config: Config, ranks: Ranks, device: torch.device, quiet: bool) -> Iterator[Writer | None]:
    """The folder of a run for this process alone: locked by the first rank (None on the others), refused on all or on none.

    Raises:  PathError naming the other process, or why the folder is none for a run; OSError where it can't be made.
    """
    if not config.train.output:
        raise ConfigError("train.output is empty; say where results go, for example --set train.output=runs/mine")
    output, writer = run_output(config), None
    refused: Exception | None = None
    with contextlib.ExitStack() as held:
        try:
            if ranks.first:
                refuse_run_output(config)
                cure = "set another folder, --set train.output=..."
                writer = held.enter_context(sole_writer(output, cure, tell=lambda line: say([line], quiet)))
            elif ranks.local == 0:
                refuse_scratch(config.train.scratch)
        except (CskdError, OSError) as e:
            refused = e
        if ranks.sum(torch.tensor([float(refused is not None)], device=device)).item():
            if refused is None:
                time.sleep(FIRST_SPEAKS)
            raise refused or PathError(
                f"rank {ranks.rank}: the first rank was refused train.output, or one train.scratch; see its line"
            )
        if writer is not None:
            for left in (*output.glob(".*.tmp"), *(output / "resume").glob(".*.tmp")):  # of a killed run's writers
                left.unlink(missing_ok=True)
        if ranks.local == 0:
            clear_scratch(output, config.train.scratch)
        yield writer


def refuse_file(path: Path, option: str) -> None:
    """PathError for a file that `option` would write into a folder of ours, or in the place of a file of another kind."""
    refuse_output(local_path(path, option).parent, None, option)
    kind, start = FILES[option]
    if path.is_dir():
        raise PathError(f"{option} {path} is a folder, expected the path of a {kind}")
    if path.exists() and (not path.is_file() or path.read_bytes()[: len(start)] not in (start, b"")):
        raise PathError(f"{option} {path} is there and is no {kind}; give another path")


def save_file(path: Path, option: str, content: bytes) -> None:
    """Put what `option` asked for in place, whole or not at all. DataError where it can't be written, PathError while another
    process is at it."""
    try:
        with sole_writer(path.parent, "give another path", name=f".{path.name}{LOCK}"):
            put(path, content)
    except OSError as e:
        raise DataError(f"{path} can't be written: {e.strerror or e}; give another path with {option}") from None


def refuse_unfit(location: str, what: str = "cache.path") -> str:
    """Refuse a place for a cache where no commit could be made: a file system without hard links, which need not be there yet, or an
    object store without conditional writes. Returns: what was found, in words. Raises CacheError, StorageError, and OSError where
    nothing can be written there."""
    storage = open_storage(location)
    if not isinstance(storage, Posix):
        probe = f"{PROBE}{uuid.uuid4().hex}"
        try:
            won = [storage.create(probe, content) for content in (b"first", b"second")]
        finally:
            storage.delete(probe)
        if won != [True, False]:
            raise CacheError(
                f"{what} {location}: its store let a second writer replace what a first one had made; take one with conditional "
                "writes (If-None-Match), as S3, Google, Azure, R2 and MinIO have them"
            )
        return "writable, has conditional writes"
    root = storage.root
    error = hard_link_error(next(path for path in (root, *Path(os.path.realpath(root)).parents) if path.exists()))
    if error is not None and error.errno in NO_LINKS:
        raise CacheError(
            f"{what} {root}: its file system has no hard links ({error.strerror}), which let one of several writers win; "
            "put it on one that has (--set cache.path=...)"
        )
    if error is not None:
        error.filename = str(root)  # not the name of what was tried
        raise error
    return "writable, has hard links"


def _other_paths(config: Config, output: str) -> dict[str, Path]:
    """What else a config reads or writes on this machine, by key."""
    return {key: Path(text).expanduser() for key, text in _other_texts(config, output).items() if not is_remote(text)}


def _other_texts(config: Config, output: str) -> dict[str, str]:
    """What else a config reads or writes, but for the hub, by key."""
    paths = {}
    for key in sorted(key for key in PATHS if not key.endswith(".model")):
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if not isinstance(value, str) or is_hub(value) or (key, value) == ("teacher.weights", "hub"):
            continue
        if value and key not in (output, "train.scratch"):  # in which others may lie
            paths[key] = value
    return paths
