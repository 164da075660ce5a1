"""The known name that a wrong one is nearest to, in the words that end a message."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Collection
from pathlib import Path

_LONGEST = 80  # characters of a name that are compared: difflib's time grows with the square of it
_MOST = 4000  # names that are compared
_BEGUN = 0.9  # ratio from which a name is taken for the beginning of a longer one


def did_you_mean(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """`did you mean 'epochs'?`; of a name that looks like a known one, in what it differs; '' where none is near.

    Args:    cutoff of difflib's ratio, from 0 (anything) to 1 (equal).
    """
    like = alike(name)
    for one in known:
        if one != name and alike(one) == like:
            return f"it is {one!r} but for {_difference(name, one)}"
    near = nearest(name, known, cutoff)
    return f"did you mean {near!r}?" if near is not None else ""


def nearest(name: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like one, whatever their case; None where none is near."""
    wanted, names = alike(name)[:_LONGEST], list(known)[:_MOST]
    words = wanted.count("_") + 1
    longest_first = sorted(names, key=lambda one: (-len(one), one)) if words > 1 else []  # so that the shortest stays
    begins = {_begin(one, words): one for one in longest_first}
    whole = {alike(one)[:_LONGEST]: one for one in names}
    for shown, limit in ((begins, max(cutoff, _BEGUN)), (whole, cutoff)):
        if found := difflib.get_close_matches(wanted, list(shown), n=1, cutoff=limit):
            return shown[found[0]]
    return None


def _begin(name: str, words: int) -> str:
    """The first words of a name, so that `deit_tny` is like `deit_tiny_patch16_224`."""
    return "_".join(alike(name)[:_LONGEST].split("_")[:words])


def alike(name: str) -> str:
    """A name without what a reader does not see: Unicode form, case, invisible characters, kinds of dashes, outer space."""
    plain = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) not in ("Cf", "Cc", "Mn"))
    return "".join("-" if unicodedata.category(c) == "Pd" else c for c in plain).strip().casefold()


def absent(path: str | Path) -> str:
    """A path that is not there, as a message says it: what was looked at, where its name is relative, and the nearest name.

    Relative paths are of the folder that the program was started in.
    """
    tried = Path(os.path.abspath(path))
    said = str(path) if Path(path).is_absolute() else f"{path} (looked for {tried}: relative to the working folder)"
    if not str(path).isascii() or str(path) != str(path).strip():
        said += f", written {str(path)!a}"
    there = next((above for above in (tried, *tried.parents) if above.exists()), tried)
    try:
        names = os.listdir(there) if there != tried else []
    except OSError:
        names = []
    hint = did_you_mean(tried.relative_to(there).parts[0], names, 0.75) if names else ""
    return f"{said}; {hint.rstrip('?')} (in {there})" if hint else said


def _difference(name: str, known: str) -> str:
    if name.strip() == known or name == known.strip():
        return "a space at its end"
    if name.casefold() == known.casefold():
        return "upper and lower case"
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", known):
        return "its Unicode form: accents are composed in one and not in the other"
    odd = next((c for c in name if c not in known), None) or next((c for c in known if c not in name), None)
    return (
        "where its characters stand"
        if odd is None
        else f"the character U+{ord(odd):04X}, {unicodedata.name(odd, 'unnamed')}"
    )
