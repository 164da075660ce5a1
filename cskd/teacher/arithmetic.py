"""What a teacher computes in, and what that changes of the hard targets: as a cache keeps it, and in words.

"Exact" targets are exact relative to the arithmetic the teacher ran in: a bf16 backbone moves its logits by about a hundredth,
and with them the winner of every cell that was nearly a tie. `cskd.teacher.precision` measures how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REFERENCE = "float32"  # IEEE's, of the network as it was built: not folded, fused or compiled
BLENDS = (1.0, 0.5, 0.0)  # each cell's own logits, half of the image's, the image's


@dataclass(frozen=True)
class Precision:
    """The arithmetic of a teacher, and what it changes."""

    backbone: str  # float32, tf32, bf16, fp16 or float64
    head: str  # of pooling and classifier: float32, float64, or tf32 of a model's own `forward_dense`
    differ: dict[str, float] | None  # blend -> share of hard targets that differ from REFERENCE; None: not measured
    views: int  # it was measured on

    @property
    def share(self) -> float | None:
        """Over all of BLENDS."""
        return None if self.differ is None else sum(self.differ.values()) / len(self.differ)

    @property
    def facts(self) -> dict[str, Any]:
        """JSON-able, for the manifest."""
        return {
            "backbone": self.backbone,
            "head": self.head,
            "reference": REFERENCE,
            "cells_differ": self.share,
            "by_blend": self.differ,
            "views": self.views,
        }

    @property
    def notes(self) -> list[str]:
        """What a user should know; nothing where it is plain float32, or as good as that."""
        if self.share == 0 and self.backbone == REFERENCE:
            return []
        if self.differ is None:
            return [f"{in_words(self.facts)}: the weights are others each time the teacher is built"]
        return [f"{in_words(self.facts)}; targets are exact relative to the arithmetic the teacher runs in"]


def in_words(facts: Mapping[str, Any]) -> str:
    """`Precision.facts` as part of a line."""
    runs = f"the teacher's backbone runs in {facts['backbone']}, its head in {facts['head']}"
    if facts["cells_differ"] is None:
        return f"{runs}; what that changes was not measured"
    if not facts["views"]:
        return runs
    each = ", ".join(
        f"{100 * share:.2g} at blend {blend}" for blend, share in sorted(facts["by_blend"].items(), reverse=True)
    )
    return f"{runs}; {100 * facts['cells_differ']:.2g} % of the hard targets differ from {REFERENCE} ({facts['views']} views; {each})"


def unchanged() -> Precision:
    """What `measure` would give of a teacher that runs as REFERENCE does; nothing is run."""
    return Precision(REFERENCE, REFERENCE, {f"{blend:g}": 0.0 for blend in BLENDS}, 0)
