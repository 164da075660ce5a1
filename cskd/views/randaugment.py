"""RandAugment and colour jitter: which operations an image gets, drawn from its seed, as data.

Source: RandAugment, arXiv 1909.13719, with timm's operations, ranges and noise on the magnitude (its 'rand' policies in
`timm/data/auto_augment.py`); colour jitter as torchvision's ColorJitter without hue. `ops` applies what is drawn here.
"""

from __future__ import annotations

from typing import NamedTuple

from cskd.config.rand_string import MAX_MAGNITUDE, RandSettings
from cskd.seeds import Draws

# timm's list. A draw is an index into it, so any change of it, at its end too, moves the draws of every seed: it needs another
# RECIPE_CODE_VERSION, and no cache of today fits it. An operation that timm does not have stands in a list of its own, which a
# part of the rand string selects.
TIMM_OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
_SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}  # at magnitude 10
_JITTER = ("Brightness", "Contrast", "Color")
_ENHANCED = ("Color", "Contrast", "Brightness", "Sharpness")


class Op(NamedTuple):
    """One operation on a view. The argument's meaning:

    Rotate: degrees counter-clockwise. ShearX, ShearY: pixels per pixel. TranslateX, TranslateY: share of the side. All
    five are bicubic, as timm's are where the crop is. Posterize: bits kept. Solarize: the first inverted value.
    SolarizeAdd: what values below 128 gain. Color, Contrast, Brightness, Sharpness: the factor, 1 = unchanged.
    AutoContrast, Equalize, Invert: None.
    """

    name: str
    argument: float | None


def operations_of(randaugment: str | None, color_jitter: float) -> tuple[str, ...]:
    """The names of all operations that views of a recipe may have."""
    if randaugment is not None:
        return TIMM_OPERATIONS
    return _JITTER if color_jitter else ()


def draw_randaugment(seed: int, settings: RandSettings) -> tuple[Op, ...]:
    """The operations of one view, in their order: those of the `settings.layers` drawn that are applied."""
    ops = []
    for layer in range(settings.layers):
        # A stream of its own for each decision, so that a layer more, or a draw more in one of them, moves no other.
        if Draws(seed, f"randaugment.{layer}.apply").uniform() < settings.prob:
            name = TIMM_OPERATIONS[Draws(seed, f"randaugment.{layer}.operation").integer(len(TIMM_OPERATIONS))]
            magnitude = _draw_magnitude(Draws(seed, f"randaugment.{layer}.magnitude"), settings)
            negative = Draws(seed, f"randaugment.{layer}.sign").uniform() < 0.5
            ops.append(Op(name, argument_of(name, magnitude, negative, settings.increasing)))
    return tuple(ops)


def _draw_magnitude(draws: Draws, settings: RandSettings) -> float:
    if settings.magnitude_std == float("inf"):
        return draws.uniform(0.0, settings.magnitude)
    noise = settings.magnitude_std * draws.normal() if settings.magnitude_std else 0.0
    return min(max(settings.magnitude + noise, 0.0), MAX_MAGNITUDE)


def argument_of(name: str, magnitude: float, negative: bool, increasing: bool) -> float | None:
    """What an operation gets at a magnitude.

    Args:    magnitude in 0..10; negative, whether an operation with two directions goes the other way; increasing,
             timm's `inc1`: Posterize, Solarize and the four factors get stronger with the magnitude.
    Returns: The argument of `Op`.
    """
    share = magnitude / MAX_MAGNITUDE
    if name in _SIGNED:
        return -share * _SIGNED[name] if negative else share * _SIGNED[name]
    if name in _ENHANCED:
        if not increasing:
            return share * 1.8 + 0.1
        return max(0.1, 1.0 - share * 0.9 if negative else 1.0 + share * 0.9)
    if name == "Posterize":
        return 4 - int(share * 4) if increasing else int(share * 4)
    if name == "Solarize":
        return 256 - int(share * 256) if increasing else int(share * 256)
    if name == "SolarizeAdd":
        return int(share * 110)
    return None


def draw_jitter(seed: int, strength: float) -> tuple[Op, ...]:
    """Brightness, contrast and saturation, each by a factor uniform in [max(0, 1 - strength), 1 + strength], in random
    order; nothing where strength is 0."""
    if strength == 0.0:
        return ()
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    names = list(_JITTER)
    order = Draws(seed, "jitter.order")
    for last in (2, 1):  # Fisher and Yates
        other = order.integer(last + 1)
        names[last], names[other] = names[other], names[last]
    return tuple(Op(name, Draws(seed, f"jitter.{name}").uniform(low, high)) for name in names)
