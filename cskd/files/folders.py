"""Every folder that cskd writes is of a kind, and holds nothing of another kind: a new run can't be put into a cache.

    data    packed or indexed shards     known by inventory/inventory.json, and the shards it lists
    cache   outputs of a teacher         known by two of manifest.json, its copy, commits/ and units/
    run     of training                  known by the marker `.cskd`; before there were markers, by what it holds
    demo    all three, made by the demo  known by the marker; likewise
    export  targets for webdataset       known by the marker

An output folder may not be of another kind, lie in a folder of another kind, or hold one, within DEPTH folders; but in a demo
there may be anything. One that is of its kind already goes on, wherever it lies. Links and `..` are followed first.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from cskd.errors import PathError
from cskd.files.durable import put
from cskd.files.paths import local_path
from cskd.files.read import parse_json, read_file

MARKER = ".cskd"
MARKER_VERSION = 1
DEPTH = 3  # of folders below an output that are looked at
MOST_LOOKED_AT = 2_000  # names in them that are looked at: a folder of a million images is no reason to wait
_KIND_NAMES = {
    "data": "a packed data set",
    "cache": "a cache",
    "run": "the folder of a run",
    "demo": "the folder of a demo",
    "export": "an export of `cskd export`",
    "inventory": "an inventory without its shards",  # of a cache without a manifest yet, or of data whose shards are gone
    **{"config": "a config", "weights": "a file of weights", "tar": "a tar file"},
    **{"page": "a page for a browser", "picture": "a picture"},
}
_SUFFIXES = {
    **dict.fromkeys((".yaml", ".yml"), "config"),
    **dict.fromkeys((".safetensors", ".pt", ".pth", ".ckpt", ".bin"), "weights"),
    ".tar": "tar",
    **dict.fromkeys((".html", ".htm"), "page"),
    **dict.fromkeys((".png", ".jpg", ".jpeg"), "picture"),
}
_TAKEN = {
    **{"config": "a config, which is a YAML file", "run": "the folder of a run", "weights": "its weights"},
    **{"cache": "a cache", "data": "a packed data set"},
    **{"images": "images in folders or archives", "shards": "webdataset shards"},
}
# What may be done with a thing of a kind, and the keys of a config that name one.
_NEXT = {
    "config": "`cskd check {0}` looks at it",
    "run": "`cskd eval {0} DATA` gives its scores",
    "weights": "`cskd eval {0} DATA` gives their scores",
    "cache": "`cskd inspect {0}` shows it",
    "data": "`cskd verify {0} --images` looks at it",
    "demo": "give one of the folders in it",
    "export": "a training loop of your own reads it, see docs/howto/webdataset.md",
    "tar": "`cskd pack {0} OUT` makes a data set of it",
    "page": "open it in a browser",
}
OF_DATA = ("data", "inventory")  # what is given as data: its shards may be gone, or lie elsewhere
_KEYS = {"cache": "cache.path", "data": "data.train", "run": "train.output"}


def mark(folder: Path, kind: str) -> None:
    """Have a folder say of which kind it is; one that says so already is left alone."""
    data = marker(kind)
    with contextlib.suppress(OSError):
        if read_file(folder / MARKER) == data:
            return
    put(folder / MARKER, data)


def marker(kind: str) -> bytes:
    """What the file MARKER holds of a folder of a kind."""
    return (json.dumps({"kind": kind, "version": MARKER_VERSION}) + "\n").encode()


def kind_of(folder: Path) -> str | None:
    """The kind of a folder; None where it is none of ours, is not there, or may not be looked at."""
    there = {name for name in (MARKER, *_TELLING) if os.path.lexists(folder / name)}
    if MARKER in there and (kind := _marked(folder / MARKER)):
        return kind
    if len(there & _OF_A_CACHE) > 1:
        return "cache"
    if "inventory" in there and os.path.isfile(folder / "inventory" / "inventory.json"):
        return "data" if _has_shards(folder) else "inventory"
    if "resolved.yaml" in there and there & _OF_A_RUN:
        return "run"
    if {"images", "data"} <= there and all(os.path.isdir(folder / name) for name in _OF_A_DEMO):
        return "demo"
    return None


_OF_A_CACHE = {"manifest.json", "manifest.copy.json", "commits", "units"}
_OF_A_RUN = {"resume", "metrics.jsonl", "model.safetensors", "unreadable.json", "scratch"}
_TELLING = {*_OF_A_CACHE, *_OF_A_RUN, "inventory", "resolved.yaml", "images", "data"}
_OF_A_DEMO = ("images/train", "data/train/inventory")


def refuse_other_kind(path: str | Path, found: str | None, what: str, takes: Collection[str], command: str) -> None:
    """PathError for an input that is of a kind which a command doesn't take: what it is, what is taken, and the next step. What
    is of no kind that is known is left to its reader.

    Args:    found: its kind, as of `kind_of_input`. what: the argument. takes: kinds.
    """
    option = f" {what}" if what.startswith("--") else ""
    if said := _other_kind(path, found, takes):
        kind, taken, steps = said
        raise PathError(f"{what} {path} is {kind}, and `cskd {command}{option}` takes {taken}; {steps}")


def other_kind(path: str | Path, takes: Collection[str], found: str | None = None) -> str | None:
    """Why what lies at a path that a config names is of another kind than those: what it is, what is expected and the next step, in
    words that follow the path; None where it is of none that is known. found: its kind, where that is known."""
    if (found := found or kind_of_input(Path(path))) is not None:
        said = _other_kind(path, found, takes)
        return said and "is {}, expected {}; {}".format(*said)
    # The folder above several is often given.
    if inside := sorted(p.name for p, kind in _below(Path(path), 1) if kind in takes):
        some = ", ".join(inside[:3]) + ", ..." * (len(inside) > 3)
        return f"is the folder above {some}, expected {_taken(takes)}; give {path}/{inside[0]}"
    return None


def _other_kind(path: str | Path, found: str | None, takes: Collection[str]) -> tuple[str, str, str] | None:
    """What it is, what is taken, and the next step."""
    if found is None or found in takes:
        return None
    steps = [_NEXT.get(found, "give another path").format(path)]
    config = path if found == "config" else Path(path) / "resolved.yaml" if found in ("run", "cache") else None
    if config is not None and os.path.isfile(config):
        if "config" in takes:
            steps.insert(0, f"its config is {config}")
        elif found != "cache" and (keys := [_KEYS[kind] for kind in takes if kind in _KEYS]):
            steps.insert(0, f"{' or '.join(keys)} in {config} may be what is meant")
    return _said(found), _taken(takes), ", ".join(steps)


def _taken(takes: Collection[str]) -> str:
    return " or ".join(_TAKEN[kind] for kind in takes if kind in _TAKEN)


def called(path: str | Path) -> str | None:
    """What lies at a path, in words; None where it is of no kind that is known."""
    kind = kind_of_input(Path(path))
    return kind and _said(kind)


def kind_of_input(path: Path) -> str | None:
    """The kind of a folder, or that which the name of a file says."""
    return kind_of_name(path.name) if path.is_file() else kind_of(path)


def kind_of_name(name: str) -> str | None:
    """What the name of a file says that it is."""
    return _SUFFIXES.get(os.path.splitext(name)[1].lower())


def refuse_output(
    folder: Path, kind: str | None, what: str, *, inputs: Mapping[str, Path] | None = None, names: Collection[str] = ()
) -> None:
    """Refuse an output folder that is another's; called before anything is written, or a teacher is loaded.

    Args:    kind: what would be written; None: a loose file, for which only the folder itself and those above it count.
             what: the config key or argument that names the folder. inputs: what is read, by key or argument.
             names: what would be written into the folder: neither an input nor an output of the same kind may lie in these.
    Raises:  PathError.
    """
    real = Path(os.path.realpath(local_path(folder, what)))
    if real.is_file():
        raise PathError(f"{what} {folder} is {called(real) or 'a file'}, expected a folder; give another one")
    given = {key: Path(os.path.realpath(path)) for key, path in (inputs or {}).items()}
    for key, path in given.items():
        if _same(real, path):
            raise PathError(f"{what} and {key} are both {folder}; give each a folder of its own")
        if path.is_relative_to(real) and path.relative_to(real).parts[0] in names:
            raise PathError(f"{key} {path} is a name that {what} {folder} writes; give another folder")
    own = kind_of(real)
    if own == "inventory" and kind in ("data", "cache"):
        own = kind
    if own not in (None, kind) and not (own == "demo" and kind is None):
        raise PathError(f"{what} {folder} is {_said(str(own))}; give a folder of its own")
    if own is None or kind is None:
        _refuse_inside(real, kind, f"{what} {folder}", given, names)
    if own is None and kind is not None:
        for path, found in [
            *((p, kind_of(p)) for p in given.values() if real in p.parents and p.is_dir()),
            *_below(real),
        ]:
            if found not in (None, kind):
                raise PathError(f"{what} {folder} holds {_said(str(found))}, {path}; give a folder of its own")


def _refuse_inside(
    real: Path, kind: str | None, shown: str, inputs: Mapping[str, Path], names: Collection[str]
) -> None:
    for above in real.parents:
        found, first = kind_of(above), real.relative_to(above).parts[0]
        if found not in (None, "demo", kind) or (found is not None and found == kind and first in names):
            raise PathError(f"{shown} lies in {above}, {_said(str(found))}; give a folder outside of it")
        for key, path in inputs.items():
            if _same(above, path) and path.is_dir() and found is None:
                raise PathError(f"{shown} lies in {key} {path}; give a folder outside of it")


def _below(folder: Path, depth: int = DEPTH) -> Iterator[tuple[Path, str | None]]:
    """The folders below one, so deep, with their kinds; what a folder of ours holds is its own affair."""
    level, left = [folder], MOST_LOOKED_AT
    for _ in range(depth):
        deeper: list[Path] = []
        for path in level:
            with contextlib.suppress(OSError), os.scandir(path) as entries:
                for entry in entries:
                    left -= 1
                    if left < 0:
                        return
                    if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
                        continue
                    kind = kind_of(Path(entry.path))
                    yield Path(entry.path), kind
                    if kind is None:
                        deeper.append(Path(entry.path))
        level = deeper


def _marked(path: Path) -> str | None:
    try:
        about = parse_json(read_file(path, 1 << 12))
    except (OSError, ValueError):
        return None
    kind = about.get("kind") if isinstance(about, dict) else None
    return kind[:40] if isinstance(kind, str) and kind else None


def _has_shards(folder: Path) -> bool:
    """Whether the shards that an inventory lists are there: a cache has a copy of it, and no shards."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        header = parse_json(read_file(folder / "inventory" / "inventory.json"))
        return (folder / str(header["shards"][0]["name"])).is_file()
    return True


def _same(one: Path, other: Path) -> bool:
    """Whether two real paths are one folder: by name, or, where both exist, however the disk spells them."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def _said(kind: str) -> str:
    return _KIND_NAMES.get(kind, f"a folder of kind {kind!r}")
