"""Names that people take for one: they differ in Unicode form, letter case, spaces or signs that nobody sees. No torch in here."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")
_SHOWN = 40  # characters of a name that `difference` quotes


def folded(name: str) -> str:
    """The name without what does not show: of equal ones, people think they are one name."""
    text = unicodedata.normalize("NFKC", name.translate(_DASHES)).casefold()
    seen = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Zs", "Cc"))
    return unicodedata.normalize("NFC", seen)


def difference(one: str, other: str) -> str:
    """How two names differ whose `folded` forms are equal, as the end of a sentence, with both in ASCII; empty for others."""
    if one == other or folded(one) != folded(other):
        return ""
    if same_form(one, other):
        what = f"Unicode form ({_form(one)} and {_form(other)})"
    elif one.strip() == other.strip():
        what = "a space at the end or the start"
    elif one.casefold() == other.casefold():
        what = "letter case"
    elif "".join(one.split()) == "".join(other.split()):
        what = "spaces"
    else:
        what = "signs that hardly show, letter case or spaces"
    return f"they differ only in {what}: {_ascii(one)} and {_ascii(other)}"


def same_form(one: str, other: str) -> bool:
    """Whether two names are one text in two Unicode forms, such as NFC and NFD: no screen shows a difference."""
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def look_alike(name: str, names: Iterable[str]) -> tuple[str, str] | None:
    """The first of the names that looks like `name` and is another, and their `difference`; None where there is none."""
    wanted = folded(name)
    for other in names:
        if other != name and folded(other) == wanted:
            return other, difference(name, other)
    return None


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each pair of the names that looks like one name, in their order."""
    first: dict[str, str] = {}
    return [(twin, name) for name in names if (twin := first.setdefault(folded(name), name)) != name]


def _form(name: str) -> str:
    return next((form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)), "neither NFC nor NFD")


def _ascii(name: str) -> str:
    return ascii(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")
