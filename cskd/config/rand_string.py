"""RandAugment's settings as timm writes them in one string: `rand-m9-mstd0.5-inc1`. Configs read it: no numpy."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cskd.errors import ConfigError

MAX_MAGNITUDE = 10.0  # magnitudes are clipped to 0..10
_UNIFORM_STD = 100.0  # a wider spread than this stands for "uniform", as in timm
_PART = re.compile(r"(mstd|inc|m|n|p)(inf|\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class RandSettings:
    """What the string says; the defaults are timm's for a part that is left out."""

    magnitude: float = 10.0  # m, in 0..10
    magnitude_std: float = 0.0  # mstd, of the normal noise on m; infinity: uniform in [0, m]
    layers: int = 2  # n, operations drawn for an image, with replacement
    prob: float = 0.5  # p, that a drawn operation is applied
    increasing: bool = False  # inc, operations get stronger with the magnitude


def parse_rand_string(text: str) -> RandSettings:
    """The settings of a string such as `rand-m9-mstd0.5-inc1`, parts in any order.

    Raises:  ConfigError that names the part which is not understood, repeated or out of range.
    """
    head, *parts = text.split("-")
    if head != "rand":
        raise _refusal(text, head, "the string to start with 'rand'")
    given: dict[str, float] = {}
    for part in parts:
        match = _PART.fullmatch(part)
        if match is None or (match[2] == "inf" and match[1] != "mstd"):
            raise _refusal(text, part, "one of m<0..10>, mstd<number or inf>, n<count>, p<0..1>, inc<0 or 1>")
        key, value = match[1], float(match[2])
        if key in given:
            raise _refusal(text, part, f"'{key}' once")
        given[key] = value
        if key == "m" and value > MAX_MAGNITUDE:
            raise _refusal(text, part, "a magnitude in 0..10")
        if key == "n" and not (1 <= value <= 100 and value == int(value)):
            raise _refusal(text, part, "a whole number of operations, 1 to 100")
        if key == "p" and value > 1.0:
            raise _refusal(text, part, "a probability in 0..1")
        if key == "inc" and value not in (0.0, 1.0):
            raise _refusal(text, part, "inc0 or inc1")
    std = given.get("mstd", 0.0)
    return RandSettings(
        magnitude=given.get("m", 10.0),
        magnitude_std=std if std <= _UNIFORM_STD else float("inf"),
        layers=int(given.get("n", 2)),
        prob=given.get("p", 0.5),
        increasing=bool(given.get("inc", 0.0)),
    )


def _refusal(text: str, part: str, expected: str) -> ConfigError:
    return ConfigError(f"recipe.randaugment is '{text}': its part '{part}' is not usable, expected {expected}")
