"""A user's own part, loaded by the place where it is: `path/to/file.py:name`, `package.module:name`, or an entry point.

It is the user's own program that runs here, named in a config or on the command line. Nothing that a cache or a checkpoint
says is ever looked up as a place: only as the name of an entry point, of a package that the user has installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cskd.errors import CskdError, one_line
from cskd.files.read import read_file
from cskd.near import absent, did_you_mean

# Teachers by `hub:` and the like are timm's: its two schemes that could be names of modules are no modules.
_IN_MODULE = re.compile(r"(?!timm:|hf_hub:)([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


NEIGHBOURS = "_cskd_neighbours"  # attribute of a module that was loaded from a file


@dataclass(frozen=True)
class OwnCode:
    """value: what was found; name: after the colon, or of the entry point; where: in words; place: text that finds it again from
    any folder; file, and sha256 of it; neighbours: sha256 of each file of its folder that it imported, by its path there."""

    value: Any
    name: str
    where: str
    place: str
    file: Path | None
    sha256: str
    neighbours: dict[str, str] = field(default_factory=dict)


def names_own_code(text: str) -> bool:
    """Whether a text names a place: a file, or a module."""
    return ".py:" in text or _IN_MODULE.fullmatch(text) is not None


def load_own(text: str, key: str, group: str, kind: str, error: type[CskdError] = CskdError) -> OwnCode | None:
    """Load what a text names: a place, or an entry point of `group`; None where it is neither.

    Args:    key, of the config, and kind, 'function' or 'class', both for messages; error, the class of those.
    Raises:  `error` where there is no such file, module or name, or importing it fails.
    """
    if ".py:" in text:
        where, _, name = text.rpartition(":")
        module = _of_file(Path(where).expanduser(), key, name, error)
    elif match := _IN_MODULE.fullmatch(text):
        where, name = match.groups()
        try:
            module = importlib.import_module(where)
        except Exception as e:  # a user's module raises whatever it likes
            raise error(
                f"{key}: importing {where} failed: {one_line(e)}; install it, or give path/to/file.py:{name}"
            ) from None
    else:
        return _entry_point(text, key, group, error)
    value = getattr(module, name, None)
    if not callable(value):
        hint = did_you_mean(name, [known for known, one in vars(module).items() if callable(one)])
        raise error(f"{key}: {where} has no {kind} {name!r}; {hint or 'give the name of one that is in it'}")
    place = f"{Path(where).expanduser().resolve()}:{name}" if ".py:" in text else text
    return _own_code(value, name, f"{where}:{name}", place, module)


def entry_point_names(group: str) -> list[str]:
    """The names that installed packages offer."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=group)})


def _entry_point(name: str, key: str, group: str, error: type[CskdError]) -> OwnCode | None:
    found = {point.value: point for point in importlib.metadata.entry_points(group=group, name=name)}
    if not found:
        return None
    if len(found) > 1:
        raise error(f"{key}: {name!r} is offered by {' and '.join(sorted(found))[:150]}; name one of these instead")
    point = next(iter(found.values()))
    try:
        value = point.load()
    except Exception as e:
        raise error(f"{key}: loading {name!r} from {point.value} failed: {one_line(e)}; mend that package") from None
    return _own_code(value, name, point.value, name, sys.modules[point.module])


def _of_file(path: Path, key: str, name: str, error: type[CskdError]) -> Any:
    """The module of a file, under a name made of its path and content: imported once, and again where it was changed."""
    try:
        data, place = read_file(path), str(path.resolve())
    except OSError as e:
        said = f"no file {absent(path)}" if not path.exists() else f"{path} can't be read ({e.strerror})"
        raise error(f"{key}: {said}; give path/to/file.py:{name}") from None
    module_name = f"cskd_own_{hashlib.sha256(place.encode() + b':' + data).hexdigest()[:16]}"
    known = sys.modules.get(module_name)
    if known is not None and _unchanged(path, getattr(known, NEIGHBOURS)):
        return known
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and torch.compile look modules up by name
    with neighbours_of(path) as neighbours:
        try:
            spec.loader.exec_module(module)
        except SystemExit:
            del sys.modules[module_name]
            raise error(
                f"{key}: {path} ends the program when it is imported; put what it runs under if __name__ == '__main__'"
            ) from None
        except Exception as e:
            del sys.modules[module_name]
            raise error(f"{key}: importing {path} failed: {one_line(e)}; mend it") from None
    setattr(module, NEIGHBOURS, neighbours)
    return module


@contextlib.contextmanager
def neighbours_of(path: Path) -> Iterator[dict[str, str]]:
    """Lets a file import modules of its own folder; gives the sha256 of each by its path there, when the block has ended.

    They leave sys.modules again: another folder may have modules of the same names, and a second loading sees the files as
    they are then.
    """
    folder, before, found = path.resolve().parent, set(sys.modules), dict[str, str]()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield found
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = Path(getattr(sys.modules[name], "__file__", None) or "/").resolve()
            if file == path.resolve() or not file.is_relative_to(folder) or name.partition(".")[0] == "cskd":
                continue
            inside = file.relative_to(folder)
            if not any(part in ("site-packages", "dist-packages") or part.startswith(".") for part in inside.parts):
                found[inside.as_posix()] = hashlib.sha256(read_file(file)).hexdigest()
                del sys.modules[name]


def _unchanged(path: Path, neighbours: dict[str, str]) -> bool:
    with contextlib.suppress(OSError):
        folder = path.resolve().parent
        return all(hashlib.sha256(read_file(folder / file)).hexdigest() == known for file, known in neighbours.items())
    return False


def _own_code(value: Any, name: str, where: str, place: str, module: Any) -> OwnCode:
    file = Path(module.__file__) if getattr(module, "__file__", None) else None
    sha256 = hashlib.sha256(read_file(file)).hexdigest() if file else ""
    return OwnCode(value, name, where, place, file, sha256, dict(getattr(module, NEIGHBOURS, {})))
