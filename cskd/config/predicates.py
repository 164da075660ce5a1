"""What the values of some keys must be beyond type and range, each a predicate whose docstring is the bound in words."""

from __future__ import annotations

import re
from typing import Any

OF_MAPS = ("mse", "smooth_l1", "cosine")
HEADS = ("class", "distillation", "mean", "patches", "tokens")  # of a term of the loss, and block:N
KINDS = {  # of a term of the loss, by its target
    "label": ("ce",),
    "global": ("ce", "kl", "dkd"),
    "cells": ("ce", "kl"),
    "features": OF_MAPS,
    "pooled": OF_MAPS,
}


def rising(pair: list[float]) -> bool:
    """[low, high] with low <= high"""
    return pair[0] <= pair[1]


def span(pair: list[float | None]) -> bool:
    """[first, end] with 0 <= first <= end, end null = to the last"""
    first, end = pair
    return first is not None and first >= 0 and (end is None or first <= end)


def is_head(name: str) -> bool:
    """one of class, distillation, mean, patches, tokens, token:NAME, block:N, block:last"""
    return name in HEADS or re.fullmatch(r"block:(last|\d{1,4})|token:[a-z][a-z0-9_]{0,39}", name) is not None


def is_target(name: str) -> bool:
    """one of label, global, cells, features, pooled, stage:NAME"""
    return name in KINDS or re.fullmatch(r"stage:[A-Za-z0-9_][A-Za-z0-9_.]{0,63}", name) is not None


def distinct(codecs: list[str]) -> bool:
    """each codec once (topk10 is topk:10)"""
    return len({name.replace(":", "") for name in codecs}) == len(codecs)


def folders(caches: dict[str, Any]) -> bool:
    """a folder for each name of a-z, 0-9, _ and -"""
    return all(
        re.fullmatch("[a-z0-9_-]{1,40}", name) and isinstance(path, str) and path for name, path in caches.items()
    )


def tokens_named(names: list[str]) -> bool:
    """each once, of a-z, 0-9 and _, a letter first"""
    return once(names) and all(re.fullmatch("[a-z][a-z0-9_]{0,39}", name) for name in names)


def once(names: list[str]) -> bool:
    """each once"""
    return len(set(names)) == len(names)
