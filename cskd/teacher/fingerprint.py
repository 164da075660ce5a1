"""Is this the same teacher as before? What decides its function from pixels to logits, and its outputs on synthetic images.

A cache is of one teacher, and is finished by no other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cskd.errors import TeacherError, one_line
from cskd.seeds import mix64_array, uniform_array

PROBE_CELLS = (2, 3, 4, 6, 9, 13, 20, 32)  # blocks along a side of each of the eight probe images
PROJECTIONS = 16  # numbers kept of each probe's global logits, and of its dense logits


@dataclass(frozen=True)
class Fingerprint:
    """Equal ones mean the same function, up to rounding. Raises TeacherError where kwargs are no plain values."""

    source: Mapping[str, Any]  # constructor and kwargs, or the hash of the user's file
    weights_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    input_size: int  # pixels of the network's input
    image_size: int  # of the views
    precision: str  # of the backbone, as it runs: float32 (IEEE's), tf32, bf16, fp16 or float64
    device: str  # kind of device: cpu, cuda, mps. Another one gives other last bits
    channels_last: bool
    compile: bool
    batch: int  # rows of a forward
    dense: str  # how dense logits were asked for, and how they are made
    head: str
    grid: tuple[int, int]
    classes: int
    class_map: str | None  # sha256 of the outputs that are kept, in order
    fold: bool

    def __post_init__(self) -> None:
        try:
            json.dumps({**vars(self), "source": dict(self.source)}, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise TeacherError(f"teacher.kwargs must be plain values, part of the fingerprint: {one_line(e)}") from None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """As JSON, for the identity of a cache, in the words of the first caches: the precision in two keys, and no key for
        what is new since then where it is as it was: `fold` where it is off, `device` where it is the CPU."""
        facts = {k: v for k, v in vars(self).items() if k not in ("source", "fold", "precision", "device")}
        facts["dtype"] = "float64" if self.precision == "float64" else "float32"
        facts["autocast"] = "none" if self.precision in ("float32", "float64") else self.precision
        newer: dict[str, Any] = {"fold": True} if self.fold else {}
        newer |= {"device": self.device} if self.device != "cpu" else {}
        return dict(json.loads(json.dumps({**self.source, **facts, **newer})))


def probe_images(size: int) -> NDArray[np.uint8]:
    """Images [len(PROBE_CELLS), size, size, 3] of seeded coloured blocks, coarse to fine, the same on any machine."""
    images = []
    for cells in PROBE_CELLS:
        counters = np.arange(cells * cells * 3, dtype=np.uint64)
        blocks = uniform_array(mix64_array(counters), f"probe image {cells}").reshape(cells, cells, 3) * 256.0
        at = np.arange(size) * cells // size
        images.append(blocks.astype(np.uint8)[at][:, at])
    return np.stack(images)


def project(logits: Tensor, purpose: str) -> list[list[float]]:
    """[B, ...] -> B lists of `PROJECTIONS` seeded random projections, each of the scale of one logit."""
    flat = logits.flatten(1).cpu().double().numpy()  # MPS has no float64
    n = flat.shape[1]
    seeds = mix64_array(np.arange(n * PROJECTIONS, dtype=np.uint64))
    signs = np.where(uniform_array(seeds, purpose) < 0.5, -1.0, 1.0).reshape(n, PROJECTIONS)
    return [[float(f"{v:.6g}") for v in row] for row in flat @ signs / math.sqrt(n)]


def compare_probe(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """How two `Teacher.probe` results differ, or None where only arithmetic noise does.

    What tells one probe image from another is the yardstick. Measured with MobileNetV2 at 224 pixels: another padding
    moves the logits by 160 % of it, another input size by 45 % or more, ImageNet's mean for 0.5 by 10 to 20 %, bf16 by
    8 %, another number of threads by 0.001 %.
    """
    tolerance = 0.02 if {a.get("autocast"), b.get("autocast")} <= {"none", "tf32"} else 0.15
    for name in ("global", "dense"):
        x, y = (np.asarray(p.get(name, []), dtype=np.float64) for p in (a, b))
        if x.shape != y.shape or x.size == 0:
            return f"{name} logits: probe of shape {list(x.shape)} against {list(y.shape)}"
        signal = math.sqrt(float(np.mean((x - x.mean(axis=0)) ** 2)))
        off = math.sqrt(float(np.mean((x - y) ** 2)))
        if not off <= tolerance * signal:
            return (
                f"{name} logits of the probe images differ by {100 * off / max(signal, 1e-30):.3g} % of their "
                f"variation, expected {100 * tolerance:g} % at most"
            )
    return None
