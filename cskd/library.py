"""The stages as functions, by the names of the command line: for notebooks, and for programs that run them as a part.

What the command line prints these return; where it would exit they raise a CskdError of one line. Started by torchrun they are
one rank, and a rank that raised has to end its process, since the others wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from cskd.config import Config, load_config
from cskd.errors import CskdError, PathError, RankError, said
from cskd.files.paths import is_remote, local_path
from cskd.pipeline import cache_teacher as stage1
from cskd.pipeline import train as stage2
from cskd.pipeline.cache_teacher import CacheReport as CacheReport
from cskd.pipeline.look import inspect_cache
from cskd.pipeline.look.inspection import Inspection as Inspection
from cskd.pipeline.train import TrainReport as TrainReport

P = ParamSpec("P")
R = TypeVar("R")
AnyConfig = str | PathLike[str] | Mapping[str, Any] | Config
Overrides = Sequence[str] | Mapping[str, Any] | None


def _raises_one_kind(stage: Callable[P, R]) -> Callable[P, R]:
    """What the system refuses is a CskdError, too, and a rank that another one's end interrupts does not exit."""

    @functools.wraps(stage)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return stage(*args, **kwargs)
        except CskdError:
            raise
        except OSError as e:
            raise PathError(said(e)) from e
        except SystemExit as e:
            raise RankError(f"this rank was interrupted with exit code {e.code}; run it again to go on") from e

    return call


@_raises_one_kind
def cache_teacher(config: AnyConfig, overrides: Overrides = None, *, quiet: bool = False) -> CacheReport:
    """Stage 1: make, finish or extend the cache of a config; `cskd cache-teacher`.

    Args:    config, path of a YAML file, or a dict of its sections; overrides, ['teacher.batch=32'] or {'teacher.batch': 32};
             quiet, show no progress and no notes.
    Returns: counts and seconds of this run, the seal, and the notes.
    Raises:  CskdError; whatever was committed stays, and the same call goes on.
    """
    return stage1.cache_teacher(load_config(config, overrides), quiet=quiet)


@_raises_one_kind
def train(
    config: AnyConfig,
    overrides: Overrides = None,
    *,
    verify_replay: bool = True,
    online: bool = False,
    quiet: bool = False,
) -> TrainReport:
    """Stage 2: train, finish or resume the run of a config; `cskd train`.

    Args:    config, overrides, quiet as of `cache_teacher`; verify_replay, check the digest of every view; online, no cache: the
             teacher runs at every step.
    Returns: steps, seconds, top-1 of every head in per cent, and the notes; weights are in `train.output`.
    Raises:  CskdError; the last saved state stays, and the same call goes on.
    """
    return stage2.train(load_config(config, overrides), verify_replay=verify_replay, online=online, quiet=quiet)


@_raises_one_kind
def inspect(
    cache: str | PathLike[str],
    *,
    data: str | PathLike[str] | None = None,
    sample: str | int | Sequence[str | int] | None = None,
    view: int = 0,
    blend: float | None = None,
    png: str | PathLike[str] | None = None,
    html: str | PathLike[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    student: str | PathLike[str] | None = None,
) -> Inspection:
    """What a cache holds; `cskd inspect`.

    Args:    cache, its folder or its address on the hub; data, folder of the image shards where they have moved; sample, keys or numbers of those to
             describe, in this view and at this blend (1 = each cell's own output, which is the default with a student, else 0.5);
             png, write the picture of one, or a sheet of several, here; html, write a page here; samples, so many in all, the
             others chosen by `seed`; student, a run to compare with the teacher, cell by cell.
    Returns: the facts; `facts.facts` is them as JSON.
    Raises:  CskdError. What is wrong with single units is in `errors` instead.
    """
    shards, picture, page, run = (
        None if path is None else local_path(fspath(path), name)
        for path, name in ((data, "data"), (png, "png"), (html, "html"), (student, "student"))
    )
    return inspect_cache.inspect(
        Path(fspath(cache)) if is_remote(fspath(cache)) else local_path(fspath(cache), "cache", hub=True),
        data=shards,
        sample=sample,
        view=view,
        blend=blend,
        png=picture,
        html=page,
        samples=samples,
        seed=seed,
        student=run,
    )
