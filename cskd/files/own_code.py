"""A user's own part, loaded by the place where it is: `path/to/file.py:name`, `package.module:name`, or an entry point.

It is the user's own program that runs here, named in a config or on the command line. Nothing that a cache or a checkpoint
says is ever looked up as a place: only as the name of an entry point, of a package that the user has installed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cskd.errors import CskdError, one_line
from cskd.files.read import read_file

# Teachers by `hub:` and the like are timm's: its two schemes that could be names of modules are no modules.
_IN_MODULE = re.compile(r"(?!timm:|hf_hub:)([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


@dataclass(frozen=True)
class OwnCode:
    """value: what was found; name: after the colon, or of the entry point; where: in words; place: text that finds it again from
    any folder; sha256: of the file it is in."""

    value: Any
    name: str
    where: str
    place: str
    sha256: str


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
    if value is None:
        raise error(f"{key}: {where} has no {kind} {name!r}; give the name of one that is in it")
    place = f"{Path(where).expanduser().resolve()}:{name}" if ".py:" in text else text
    return OwnCode(value, name, f"{where}:{name}", place, _sha256(module))


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
    return OwnCode(value, name, point.value, name, _sha256(sys.modules[point.module]))


def _of_file(path: Path, key: str, name: str, error: type[CskdError]) -> Any:
    """The module of a file, under a name made of its path and content: imported once, and again where it was changed."""
    try:
        data, place = read_file(path), str(path.resolve())
    except OSError as e:
        raise error(f"{key}: {path} can't be read ({e.strerror}); give path/to/file.py:{name}") from None
    module_name = f"cskd_own_{hashlib.sha256(place.encode() + b':' + data).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and torch.compile look modules up by name
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[module_name]
        raise error(f"{key}: importing {path} failed: {one_line(e)}; mend it") from None
    return module


def _sha256(module: Any) -> str:
    """Of the file of a module; '' of one without a file."""
    file = getattr(module, "__file__", None)
    return hashlib.sha256(read_file(Path(file))).hexdigest() if file else ""
