"""The `int8` codec: the whole map in one byte a logit, for soft targets and for looking at.

    global_class  uint16 [N]           exact
    dense         int8 [N, K, h, w]    logit = dense_low + (dense + 128) * dense_step, both float32 [N, h, w]
    global        int16 [N, K]         logit = global_low + (global + 32768) * global_step, both float32 [N]

Shapes: N samples, B batch, K classes, h w teacher grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cskd.codecs.base import Arrays, Codec, Field, shortest

if TYPE_CHECKING:
    from torch import Tensor


class Int8Codec(Codec):
    """Soft targets from the whole map; hard ones nearly."""

    exact_hard, soft, fine_image = False, True, True
    error = "a dense logit is off by at most (max - min of its cell) / 510, a global one by (max - min) / 131070"

    def __init__(self, classes: int, grid: tuple[int, int]) -> None:
        super().__init__("int8", classes, grid)
        self.fields = {
            "global_class": Field(("uint16",), ("sample",)),
            "dense": Field(("int8",), ("sample", "class", "row", "col")),
            "dense_low": Field(("float32",), ("sample", "row", "col")),
            "dense_step": Field(("float32",), ("sample", "row", "col")),
            "global": Field(("int16",), ("sample", "class")),
            "global_low": Field(("float32",), ("sample",)),
            "global_step": Field(("float32",), ("sample",)),
        }

    def encode(self, dense_BKhw: Tensor, global_BK: Tensor) -> Arrays:
        """Float32 logits [B, K, h, w] and [B, K], on any device, as arrays. Raises CodecError as `validate_logits`."""
        dense_BKhw, global_BK = dense_BKhw.detach(), global_BK.detach()
        self.validate_logits(dense_BKhw, global_BK)
        dense, dense_low, dense_step = _quantise(dense_BKhw, 255)
        whole, global_low, global_step = _quantise(global_BK, 65535)
        tensors = {
            "global_class": global_BK.argmax(1).short(),  # same bits as uint16, which few torch operations know
            "dense": dense.char(),
            "dense_low": dense_low,
            "dense_step": dense_step,
            "global": whole.short(),
            "global_low": global_low,
            "global_step": global_step,
        }
        arrays = {name: np.ascontiguousarray(x.cpu().numpy()) for name, x in tensors.items()}
        return arrays | {"global_class": arrays["global_class"].view(np.uint16)}

    def logits_torch(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode a batch on its device: float32 dense [B, K, h, w] and global [B, K]."""
        dense_BKhw = (tensors["dense"].float() + 128) * tensors["dense_step"][:, None] + tensors["dense_low"][:, None]
        low_B1, step_B1 = tensors["global_low"][:, None], tensors["global_step"][:, None]
        global_BK = (tensors["global"].float() + 32768) * step_B1 + low_B1
        return dense_BKhw, global_BK

    def global_facts(self, arrays: Arrays, row: int) -> dict[str, list[float] | list[int] | float]:
        """`logits`, of all classes."""
        levels = arrays["global"][row].astype(np.float32) + np.float32(32768)
        return {"logits": shortest(levels * arrays["global_step"][row] + arrays["global_low"][row])}


def _quantise(x: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Axis 1 in equal steps from its minimum to its maximum: whole numbers around 0 as float32, minimum, step."""
    low, high = x.amin(1), x.amax(1)
    step = high / steps - low / steps  # the difference of the two could overflow
    level = ((x - low[:, None]) / step.clamp_min(2.0**-126)[:, None]).round_().clamp_(0, steps)
    return level - (steps + 1) // 2, low, step
