"""Words for WordNet ids: ImageNet's classes are folders named n01440764, which no reader knows to be a tench."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_ID = re.compile(r"n\d{8}")
# timm ships the table as data; reading the file spares importing timm, and torch with it.
_TABLE = Path("data", "_info", "imagenet_synset_to_lemma.txt")


def readable(classes: Sequence[str]) -> list[str]:
    """Class names for people: the first word of each WordNet id where timm's table is there, other names unchanged."""
    table = _words() if any(_ID.fullmatch(name) for name in classes) else {}
    return [table.get(name, name) for name in classes]


@cache
def _words() -> dict[str, str]:
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return {}
    try:
        lines = (Path(spec.origin).parent / _TABLE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split("\t", 1) for line in lines if "\t" in line)
    return {synset: words.split(",")[0].strip() for synset, words in pairs}
