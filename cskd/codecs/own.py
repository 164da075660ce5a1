"""Codecs of users: a subclass of `Codec`, made by `Class(classes, grid)`, known by the `name` that it gives itself.

A config names one by its place, `cache.codecs: [path/to/file.py:Mine]`. A cache holds only its name, since the folder of a
stranger must not say which code runs: whoever opens the cache says where the codec is, by the config (`cskd train`), by an
entry point of the group `cskd.codecs` in an installed package, or by CSKD_CODECS, places with commas between them.
"""

from __future__ import annotations

import copyreg
import os
import re
from typing import Any

from cskd.codecs.base import Codec
from cskd.dataset.classes import MAX_CLASSES
from cskd.errors import CodecError, one_line
from cskd.files.own_code import OwnCode, load_own, names_own_code

GROUP = "cskd.codecs"
VARIABLE = "CSKD_CODECS"
_KEY = "cache.codecs"
_TAKEN = r"(?:envelope|int8|topk\d*|global(?:top)?\d*|features(?:pca)?\d*(?:b\d*)?)"  # by the package
_NAME = re.compile(rf"(?!{_TAKEN}$)[a-z0-9]{{1,32}}")  # as part of a file name
_OF_PACKAGE = re.compile(
    r"(?:topk|global|features):?(?:top|pca)?:?[\d:]*|stage:.*"
)  # where a colon stands before no class
_known: dict[str, OwnCode] = {}


def register_codec(text: str) -> str:
    """Load a codec by its place or the name of its entry point, and know it by its name from now on, which is returned.

    A text that names neither is returned as it is.

    Raises:  CodecError where it can't be loaded, is no codec, or has the name of another one.
    """
    own = load_own(text, _KEY, GROUP, "class", CodecError)
    if own is None:
        return text
    codec = _made(own, MAX_CLASSES, (1, 1))
    lacks = [fact for fact in ("exact_hard", "soft", "error", "fields") if not hasattr(codec, fact)]
    if lacks:
        raise CodecError(f"{_KEY}: {own.where} lacks {', '.join(lacks)}; see cskd/codecs/base.py for what each says")
    if not _NAME.fullmatch(codec.name):
        raise CodecError(
            f"{_KEY}: {own.where} is named {codec.name!r}, expected up to 32 of a-z and 0-9, and no name of the package's"
        )
    other = _known.get(codec.name)
    if other is not None and other.place != own.place and other.sha256 != own.sha256:
        raise CodecError(f"{_KEY}: {own.where} and {other.where} are both named {codec.name!r}; rename one of them")
    _known[codec.name] = own
    # In a process started anew a class out of a file can't be imported by its name.
    copyreg.pickle(type(codec), lambda c: (_again, (own.place, c.classes, c.grid)))
    return codec.name


def own_codec(name: str, classes: int, grid: tuple[int, int]) -> Codec | None:
    """A user's codec by its own name; None where nobody has said where it is. Raises CodecError as `register_codec`."""
    if name not in _known:
        for place in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
            register_codec(place)
    if name not in _known and _NAME.fullmatch(name):
        register_codec(name)
    return _made(_known[name], classes, grid) if name in _known else None


def own_codec_hash(name: str) -> str | None:
    """sha256 of the file that a user's codec is in; None of one of the package's."""
    return _known[name].sha256 if name in _known else None


def known_own(text: str) -> str:
    """The name of the codec that a config's text means. Raises CodecError as `register_codec`."""
    return register_codec(text) if names_own_code(text) and not _OF_PACKAGE.fullmatch(text) else text


def _made(own: OwnCode, classes: int, grid: tuple[int, int]) -> Codec:
    try:
        codec = own.value(classes, grid)
    except CodecError:
        raise
    except Exception as e:  # a user's constructor raises whatever it likes
        raise CodecError(f"{_KEY}: {own.where}({classes}, {grid}) failed: {one_line(e)}; mend it") from None
    if not isinstance(codec, Codec):
        raise CodecError(f"{_KEY}: {own.where} makes a {type(codec).__name__}, expected a cskd.Codec")
    return codec


def _again(place: str, classes: int, grid: tuple[int, int]) -> Any:
    return own_codec(register_codec(place), classes, grid)
