"""Files of an object store as files of this machine: copies in its node cache. No torch in here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path, PurePosixPath

from cskd.errors import DataError, PathError
from cskd.files.durable import sync
from cskd.files.paths import local_path, location_text
from cskd.files.read import MAX_TEXT, parse_json
from cskd.storage import Range, Stat, Storage, is_remote, join, open_storage
from cskd.storage.node_cache import Held, NodeCache, copy_name, node_cache

PIECE = 8 << 20  # bytes of one request
AT_ONCE = 4  # requests of one object in flight: so many pieces are in memory
# What a folder of weights may hold that is read, in the order in which they are looked for.
WEIGHTS = (
    *("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    "config.json",
)
_held: dict[tuple[NodeCache, str], Held] = {}  # copies that were handed out as paths: they stay as long as this process


def download(storage: Storage, key: str, size: int, path: Path, stop: Callable[[], bool] = lambda: False) -> int:
    """The first `size` bytes of an object, to a file. Returns: how many there were.

    Args:    stop: asked between the requests; InterruptedError where it says so.
    """
    pieces = [Range(key, at, min(PIECE, size - at)) for at in range(0, max(size, 1), PIECE)]
    with path.open("wb") as file:
        if len(pieces) == 1 or not storage.ranges:
            file.write(storage.get(key)[:size])
            return file.tell()
        file.write(storage.get(*pieces[0]))
        for at in range(1, len(pieces), AT_ONCE) if storage.ranges else ():
            if stop():
                raise InterruptedError
            for data in storage.get_many(pieces[at : at + AT_ONCE]):
                file.write(data)
        if not storage.ranges:
            file.seek(0)
            file.write(storage.get(key)[:size])
        return file.tell()


def fetched(path: str | Path, what: str, names: Sequence[str] = WEIGHTS) -> Path:
    """A path that is only read, on this machine: itself, of an address of the hub its copy, of one of an object store that in the
    node cache, fetched again where the object was written since.

    Args:    what names the key or argument. names: of what is read of a folder. After a file's name may be `:KEY`.
    Raises:  PathError, HubError, StorageError; ConfigError where the node cache is too small.
    """
    if not is_remote(path):
        return local_path(path, what, hub=True)
    location = location_text(str(path), what)
    rest = location.partition("://")[2]
    above, name, key = location, "", ""
    if "/" in rest:
        above, _, name = location.rpartition("/")
        name, colon, key = name.partition(":")
        key = f"{colon}{key}"
        storage = open_storage(above, what)
        if (stat := storage.stat(name)) is not None:
            return _copy(storage, _with_parts(storage, [name, "config.json"], {name: stat}), location) / f"{name}{key}"
    inside = open_storage(join(above, name) if name else location, what)
    if not (found := _with_parts(inside, names)):
        raise PathError(
            f"{what} {location}: there is no such object, nor a folder with {names[0]}; give the address of one that exists"
        )
    return Path(f"{_copy(inside, found, location)}{key}")


def _with_parts(storage: Storage, names: Sequence[str], known: dict[str, Stat] | None = None) -> list[Stat]:
    """Those of the names that are there, and the parts that an index among them lists."""
    found = dict(known or {})
    for name in names:
        if name not in found and (stat := storage.stat(name)) is not None:
            found[name] = stat
    for name in [name for name in found if name.endswith(".index.json")]:
        with contextlib.suppress(
            ValueError, LookupError, TypeError, AttributeError
        ):  # what is wrong with it its reader says
            for part in sorted(set(parse_json(storage.get(name, limit=MAX_TEXT))["weight_map"].values())):
                if part == PurePosixPath(part).name and (stat := storage.stat(part)) is not None:
                    found[part] = stat
    return list(found.values())


def _copy(storage: Storage, stats: Sequence[Stat], what: str) -> Path:
    """The folder with these objects, by their names."""
    node, name = node_cache(), copy_name(storage.location, *map(astuple, stats))
    if (node, name) not in _held:
        _held[node, name] = node.fetch(name, sum(s.size for s in stats), lambda to: _fill(storage, stats, to), what)
    return _held[node, name].path


def _fill(storage: Storage, stats: Sequence[Stat], folder: Path) -> None:
    for stat in stats:
        path = folder / PurePosixPath(stat.key).name
        if (found := download(storage, stat.key, stat.size, path)) != stat.size:
            raise DataError(
                f"{join(storage.location, stat.key)} has {stat.size} bytes, and {found} came; run the same command again"
            )
        # The pieces that came may be of two; the servers behind one address of the web may differ in what they say of a file
        if not storage.location.startswith("http") and storage.stat(stat.key) != stat:
            raise DataError(
                f"{join(storage.location, stat.key)} was written to while it was copied; run the same command again"
            )
        sync(path)  # its reader has no checksum to see by what a crash of the machine left of it
