"""Logits that came out of a lossy codec, made to agree with the class that is known to be the largest of the true ones.

The true logits lie in the convex set {x: x_c >= x_k for all k}. The nearest point of that set to the decoded ones is never farther
from the true ones than they are: what is known of the class costs no byte and can only help, in the sense of squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the logits' size: how far the class is above those that it was raised to, so that it is the largest.
MARGIN = 2.0**-20


def agreed(logits_NK: Tensor, class_N: Tensor) -> Tensor:
    """The nearest logits of which class `class_N` is the largest, but for MARGIN: float32 [N, K].

    All that were above the class, and the class, get their common mean, those just below it too where that is lower: the
    projection of least squares. A row that agrees already is left as it is.

    Args:    logits_NK float [N, K]; class_N int64 [N].
    """
    own_N1 = logits_NK.gather(1, class_N[:, None])
    wrong = (logits_NK.argmax(1) != class_N).nonzero()[:, 0]
    if not len(wrong):
        return logits_NK
    x, own, cls = logits_NK[wrong], own_N1[wrong], class_N[wrong][:, None]
    others = x.scatter(1, cls, -torch.inf).sort(1, descending=True).values[:, :-1]
    count = torch.arange(1, others.shape[1] + 1, device=x.device)
    mean = (own + others.cumsum(1)) / (count + 1)
    # The first mean that is no less than the next of the others; after the last one there is none.
    enough = mean >= torch.nn.functional.pad(others[:, 1:], (0, 1), value=-torch.inf)
    level = mean.gather(1, enough.int().argmax(1, keepdim=True))
    above = level + MARGIN * level.abs().clamp_min(1.0)
    return logits_NK.index_copy(0, wrong, torch.minimum(x, level).scatter(1, cls, above))
