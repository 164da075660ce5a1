"""What a command makes sure of before it writes: its output is a folder of its own kind, and no other process writes to it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
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
from cskd.files.paths import local_path
from cskd.files.scratch import clear_scratch, refuse_scratch
from cskd.files.writer import LOCK, Writer, by, sole_writer
from cskd.machine.ranks import Ranks
from cskd.pipeline.conflicts import RUN_NAMES, refuse_foreign
from cskd.pipeline.draw.confusion import to_csv
from cskd.pipeline.show.progress import say
from cskd.store.format import OWN_NAMES

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


def refuse_cache_output(config: Config) -> None:
    """Refuse a `cache.path` that can't hold this cache, before the teacher is loaded. Raises PathError, CacheError.

    Several processes may make one cache; while one repairs it, no other does.
    """
    root = Path(config.cache.path)
    refuse_output(root, "cache", "cache.path", inputs=_other_paths(config, "cache.path"), names=OWN_NAMES)
    mending = claims.holder(root / LOCK)
    if mending is not None and not (mending.is_here and mending.pid == os.getpid()):
        raise PathError(f"cache.path {root} is being repaired{by(mending)}; run the same command when that has ended")


def refuse_run_output(config: Config) -> None:
    """Refuse a `train.output` that can't hold a run of this config; leaves nothing. Raises ConfigError, PathError, OSError."""
    output = Path(config.train.output)
    refuse_scratch(config.train.scratch)
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers has {name}, which is not installed; run: pip install 'cskd[{name}]'")
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "no folder" if not there.is_dir() else "not writable"
        raise ConfigError(f"train.output {output}: {there} is {what}; set another, --set train.output=runs/x")
    refuse_output(output, "run", "train.output", inputs=_other_paths(config, "train.output"), names=RUN_NAMES)
    root = Path(config.cache.path)
    if (
        config.cache.path
        and not is_hub(root)
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


@contextlib.contextmanager
def sole_repair(cache: Path) -> Iterator[None]:
    """A cache for the process that repairs it alone. PathError naming the one that makes or repairs it."""
    if not cache.is_dir():
        yield  # there is nothing to lock, and nothing to repair
        return
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
    output, writer = Path(config.train.output), None
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


def refuse_without_links(root: Path) -> None:
    """CacheError where the file system of `cache.path`, which need not be there yet, has no hard links; OSError where nothing
    can be written there."""
    error = hard_link_error(next(path for path in (root, *Path(os.path.realpath(root)).parents) if path.exists()))
    if error is not None and error.errno in NO_LINKS:
        raise CacheError(
            f"cache.path {root}: its file system has no hard links ({error.strerror}), which let one of several writers win; "
            "put it on one that has (--set cache.path=...)"
        )
    if error is not None:
        raise error


def _other_paths(config: Config, output: str) -> dict[str, Path]:
    """What else a config reads or writes, by key."""
    paths = {}
    for key in sorted(key for key in PATHS if not key.endswith(".model")):
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if not isinstance(value, str) or is_hub(value) or (key, value) == ("teacher.weights", "hub"):
            continue
        if value and key not in (output, "train.scratch"):  # in which others may lie
            paths[key] = Path(value).expanduser()
    return paths
