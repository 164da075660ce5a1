"""The names of classes: how many there may be, and the file that lists them, one a line, in label order. No torch in here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cskd.dataset.look_alikes import difference, look_alikes, same_form
from cskd.errors import DataError

MAX_CLASSES = 65535  # labels, class ids and argmaxes are stored as uint16
MAX_CLASS_BYTES = 1 << 23  # of a class file: 65,535 names of 128 bytes
MAX_CLASS_NAME = 512  # characters
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def classes_text(names: Sequence[str], origin: str) -> bytes:
    """A class file, which `parse_classes` reads as these names. DataError for one that it would not: of outer spaces, or several lines."""
    if odd := next((name for name in names if _lines(name.encode()) != [name]), None):
        raise DataError(
            f"class {odd[:40]!r} of {origin} would be another one in a list of names, one a line (spaces around it, or an end of line in "
            "it); rename it"
        )
    return "".join(f"{name}\n" for name in names).encode()


def _lines(data: bytes) -> list[str]:
    return [line.strip() for line in data.decode("utf-8-sig").rstrip().splitlines()]


def parse_classes(data: bytes, origin: str) -> list[str]:
    """The names in a class file; empty lines at the end are ignored. `origin` says where the file is.

    Raises:  DataError for no names, an empty line between names, a name that occurs twice, also in two Unicode forms, or text that is not UTF-8.
    """
    try:
        names = _lines(data)
    except UnicodeDecodeError:
        raise DataError(f"{origin} is not UTF-8 text; expected one class name a line, in label order") from None
    if not names:
        raise DataError(f"{origin} is empty; expected one class name a line, in label order")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{origin} has {len(names)} names, expected at most {MAX_CLASSES} (labels are kept as uint16)")
    seen: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{origin}, line {line} is empty; expected one class name a line, in label order")
        if CONTROL.search(name) or len(name) > MAX_CLASS_NAME:
            raise DataError(
                f"{origin}, line {line} is {name[:40]!r} of {len(name)} characters, expected at most {MAX_CLASS_NAME} and "
                "none that controls a terminal; mend it"
            )
        if name in seen:
            raise DataError(f"{origin} has '{name}' in lines {seen[name]} and {line}; every class must occur once")
        seen[name] = line
    for one, other in look_alikes(names):
        if same_form(one, other):
            lines = f"lines {seen[one]} and {seen[other]}"
            raise DataError(
                f"{origin} has '{one[:40]}' in {lines}: {difference(one, other)}; every class must occur once"
            )
    return names
