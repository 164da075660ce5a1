"""The error that a codec makes, measured on a few views of each batch when stage 1 encodes it.

Shapes: B batch, K classes, h w teacher grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cskd.codecs.base import Arrays, Codec, Outputs
from cskd.codecs.features import FeaturesCodec
from cskd.codecs.stages import StageCodec

BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS = 4  # views of a batch: 1 % of stage 1's time on a CPU with a MobileNetV2


class Measured(NamedTuple):
    """Of so many views: the mean over cells and blends of KL(teacher || decoded) at temperature 1, in nats; the share of hard
    targets that are others than the teacher's; the largest error of a logit, both centred over the classes, which is all a
    softmax sees. Of a codec without cells all three are of the image."""

    views: int
    kl: float
    wrong: float
    largest: float

    @property
    def facts(self) -> dict[str, float]:
        """As a commit record has it: six digits, so that the order of summing does not show."""
        return _facts(self)


class MeasuredMap(NamedTuple):
    """Of a stage's map, over so many views: the share of its variance about the mean of each channel that is lost; the largest
    error of a number."""

    views: int
    lost: float
    largest: float

    @property
    def facts(self) -> dict[str, float]:
        """As `Measured.facts`."""
        return _facts(self)


AnyMeasured = Measured | MeasuredMap


def _facts(of: AnyMeasured) -> dict[str, float]:
    return {name: value if name == "views" else float(f"{value:.6g}") for name, value in of._asdict().items()}


def from_facts(raw: Any) -> AnyMeasured:
    """From JSON of anyone. Raises ValueError unless it is what `facts` gives."""
    kind = next((k for k in (Measured, MeasuredMap) if isinstance(raw, dict) and set(raw) == set(k._fields)), None)
    if kind is None:
        raise ValueError(f"a measured error is {str(raw)[:40]}, expected {', '.join(Measured._fields)}")
    return from_numbers([raw[name] for name in kind._fields])


def from_numbers(numbers: list[Any]) -> AnyMeasured:
    """From its numbers, in order. Raises ValueError unless they are finite and can be an error."""
    plain = all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers)
    if plain and type(numbers[0]) is int and len(numbers) == 3:
        return MeasuredMap(*numbers)
    if not plain or type(numbers[0]) is not int or len(numbers) != 4 or numbers[2] > 1:
        raise ValueError(f"a measured error is {str(numbers)[:80]}, expected finite numbers")
    return Measured(*numbers)


def measure(codec: Codec, arrays: Arrays, outputs: Outputs, count: int = ROWS) -> AnyMeasured | None:
    """What a codec's arrays of a batch make of its outputs, on `count` of its views. None for an exact codec, and where there
    is no view."""
    import torch

    of_map = isinstance(codec, StageCodec) or (isinstance(codec, FeaturesCodec) and not codec.soft)
    if codec.exact_hard or not (codec.soft or of_map) or not len(outputs.image):
        return None
    rows = np.unique(np.linspace(0, len(outputs.image) - 1, count).round().astype(np.int64))
    stored, index = codec.take(arrays, rows), torch.from_numpy(rows).to(outputs.image.device)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)).to(index.device) for name, a in stored.items()}
    if of_map:
        if isinstance(codec, StageCodec):
            true, decoded = outputs.stages[codec.stage][index], codec.map_torch(tensors)
        else:
            assert isinstance(codec, FeaturesCodec) and outputs.features is not None
            true, decoded = outputs.features[index], codec.features_torch(tensors)
        off = decoded - true
        spread = float((true - true.mean((0, 2, 3), keepdim=True)).square().sum())
        return MeasuredMap(len(rows), float(off.square().sum()) / max(spread, 1e-30), float(off.abs().max()))
    image = outputs.image[index]
    if codec.cells:
        dense = outputs.dense[index]
        found_dense, found_image = codec.logits_torch(tensors)
    else:
        dense, found_image = image[:, :, None, None], codec.global_logits_torch(tensors)
        found_dense = found_image[:, :, None, None]
    kl, wrong = 0.0, 0.0
    for a in BLENDS:
        p, q = (
            (a * x + (1 - a) * g[:, :, None, None]).log_softmax(1)
            for x, g in ((dense, image), (found_dense, found_image))
        )
        kl += float((p.exp() * (p - q)).sum(1).mean().clamp_min(0))
        wrong += float((p.argmax(1) != q.argmax(1)).float().mean()) if a else 0.0  # the image's class is stored
    pairs = ((dense, found_dense), (image, found_image)) if codec.cells else ((image, found_image),)
    errors = [found - true for true, found in pairs]
    largest = max(float((e - e.mean(1, keepdim=True)).abs().max()) for e in errors)
    return Measured(len(rows), kl / len(BLENDS), wrong / len(BLENDS) if codec.cells else 0.0, largest)


def together(parts: Iterable[AnyMeasured]) -> AnyMeasured | None:
    """The error over all views of several, which are of one kind; None of none."""
    parts = list(parts)
    views = sum(part.views for part in parts)
    if not views:
        return None
    shares = [sum(part.views * part[i] for part in parts) / views for i in range(1, len(parts[0]) - 1)]
    return from_numbers([views, *shares, max(part.largest for part in parts)])
