"""Weights and logits that are no numbers any more: found before anything of them is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cskd.errors import StudentError


class NotFiniteError(StudentError):
    """A loss, weights or logits hold NaN or an infinity. `what` says which, `step` since which update where that is known;
    the message adds what to do."""

    def __init__(self, what: str, advice: str, step: int | None = None) -> None:
        super().__init__(f"{what}{'' if step is None else f' at step {step}'}; {advice}")
        self.what, self.step = what, step


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or an infinity; None where all are finite, or hold whole numbers.

    One pass over the values (smallest and largest: NaN spreads to both) and one transfer per device.
    """
    ends: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, t in tensors.items():
        if t.is_floating_point() and t.numel():
            ends.setdefault(t.device, []).append((name, torch.stack(torch.aminmax(t.detach())).isfinite().all()))
    bad = set()
    for found in ends.values():
        finite = torch.stack([ok for _, ok in found]).tolist()
        bad |= {name for (name, _), ok in zip(found, finite, strict=True) if not ok}
    return next((name for name in tensors if name in bad), None)
