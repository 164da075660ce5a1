"""How often: a number of steps, or a time."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TIME = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?(s|min|h)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Every:
    """`steps` from one time to the next, or `seconds`; 0 and 0: never."""

    steps: int = 0
    seconds: float = 0.0


def every(value: int | str) -> Every:
    """What `500`, `15min`, `90s` or `2h` says. ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Every(steps=value)
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None or not float(found[1]):
        raise ValueError(f"{value!r} is neither a number of steps nor a time")
    return Every(seconds=float(found[1]) * _SECONDS[found[2]])


def interval(value: int | str) -> bool:
    """a number of steps, a time such as 15min, 90s or 2h, or 0 for none"""
    try:
        every(value)
    except ValueError:
        return False
    return True
