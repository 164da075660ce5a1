"""The `topk` codec: the k largest logits of every cell and of the image; the other classes share their mass equally.

    global_class  uint16 [N]             exact
    cell_class    uint16 [N, k, h, w]    classes of the k largest logits of a cell, the largest first
    cell_logit    float16 [N, k, h, w]   their logits
    cell_rest     float16 [N, h, w]      log of the sum of exp(logit) over all other classes
    top_class     uint16 [N, k], top_logit float16 [N, k], top_rest float16 [N]    the same of the global logits

Shapes: N samples, B batch, K classes, k kept, h w teacher grid.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cskd.codecs.base import Arrays, Codec, Field, shortest
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor


class TopkCodec(Codec):
    """Soft targets from k classes per cell: small, close where the teacher is sure; hard ones often wrong in between."""

    exact_hard, soft = False, True
    error = "a kept logit is off by float16's rounding (2^-11 of itself); the others are replaced by one common value"

    def __init__(self, k: int, classes: int, grid: tuple[int, int]) -> None:
        super().__init__(f"topk{k}", classes, grid)
        if not 1 <= k < classes:
            raise CodecError(f"codec 'topk:{k}' keeps {k} of {classes} classes, expected 1..{classes - 1}; or use int8")
        self.k = k
        self.fields = {
            "global_class": Field(("uint16",), ("sample",)),
            "cell_class": Field(("uint16",), ("sample", "rank", "row", "col")),
            "cell_logit": Field(("float16",), ("sample", "rank", "row", "col")),
            "cell_rest": Field(("float16",), ("sample", "row", "col")),
            "top_class": Field(("uint16",), ("sample", "rank")),
            "top_logit": Field(("float16",), ("sample", "rank")),
            "top_rest": Field(("float16",), ("sample",)),
        }

    def encode(self, dense_BKhw: Tensor, global_BK: Tensor) -> Arrays:
        """Float32 logits [B, K, h, w] and [B, K], on any device, as arrays.

        Raises:  CodecError as `validate_logits`, and for a logit to keep that float16 does not hold.
        """
        dense_BKhw, global_BK = dense_BKhw.detach(), global_BK.detach()
        self.validate_logits(dense_BKhw, global_BK)
        cell_class, cell_logit, cell_rest = self._largest(dense_BKhw)
        top_class, top_logit, top_rest = self._largest(global_BK)
        tensors = {
            "global_class": global_BK.argmax(1).short(),  # same bits as uint16, which few torch operations know
            "cell_class": cell_class.short(),
            "cell_logit": cell_logit,
            "cell_rest": cell_rest,
            "top_class": top_class.short(),
            "top_logit": top_logit,
            "top_rest": top_rest,
        }
        arrays = {name: np.ascontiguousarray(x.cpu().numpy()) for name, x in tensors.items()}
        for name in ("cell_logit", "cell_rest", "top_logit", "top_rest"):
            if not np.isfinite(arrays[name]).all():
                raise CodecError(f"codec '{self.name}': a logit is beyond float16's 65504 ({name}); cache int8 instead")
        return arrays | {name: a.view(np.uint16) for name, a in arrays.items() if name.endswith("class")}

    def logits_torch(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode a batch on its device: float32 dense [B, K, h, w] and global [B, K]."""
        dense = self._spread(tensors["cell_class"], tensors["cell_logit"], tensors["cell_rest"])
        return dense, self._spread(tensors["top_class"], tensors["top_logit"], tensors["top_rest"])

    def global_facts(self, arrays: Arrays, row: int) -> dict[str, list[float] | list[int] | float]:
        """`top_classes` and `top_logits`, the largest first, and `log_rest`, the log of the sum of exp(logit) of all others."""
        classes = [int(c) for c in arrays["top_class"][row]]
        (rest,) = shortest(arrays["top_rest"][row : row + 1])
        return {"top_classes": classes, "top_logits": shortest(arrays["top_logit"][row]), "log_rest": rest}

    def _length(self, dim: str, n: int) -> int | None:
        return self.k if dim == "rank" else super()._length(dim, n)

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes int64 and logits float16 of the k largest along axis 1, and the float16 log-mass of all others."""
        logit, cls = x.topk(self.k, dim=1)
        rest = x.scatter(1, cls, -math.inf).logsumexp(1)
        return cls, logit.half(), rest.half()

    def _spread(self, cls: Tensor, logit: Tensor, rest: Tensor) -> Tensor:
        """Logits of all K classes along axis 1, float32."""
        each = rest.float()[:, None] - math.log(self.classes - self.k)
        full = each.expand(len(each), self.classes, *each.shape[2:]).contiguous()
        return full.scatter_(1, cls.long(), logit.float())
