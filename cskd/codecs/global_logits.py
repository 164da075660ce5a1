"""The `global` codecs: the logits of the image alone, for methods that teach no cells.

    global_class  uint16 [N]       exact
    label_class   uint16 [N, 2]    the label of the sample, and of the one it is mixed with (its own where unmixed)
    label_logit   float32 [N, 2]   their logits, exact: decoupled distillation sets the true classes apart
    mean, std     float32 [N]      of the K logits before they were reduced; std divides by K

`global:BITS` adds all K logits in equal steps from the smallest to the largest of each vector,

    packed        uint8 [N, ceil(K * BITS / 8)]   levels of BITS bits, the lowest bit first
    low, step     float32 [N]                     logit = low + level * step

and `global:topK` the k largest; the classes that are neither among them nor a label share their mass equally:

    top_class     uint16 [N, k]    the largest first
    top_logit     float16 [N, k]
    rest          float16 [N]      log of the sum of exp(logit) over the classes that share; 0 where there are none

Where no labels are known, as in `encode`, the image's class stands for both.

Shapes: N samples, B batch, K classes, k kept, h w teacher grid.
Source: decoupled distillation is arXiv 2203.08679, standardised logits arXiv 2403.01427.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from cskd.codecs.base import U16, Arrays, Codec, Field, Outputs, check_blend
from cskd.codecs.bits import MAX_BITS, MIN_BITS, pack_levels, packed_length, unpack_levels
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor


class GlobalCodec(Codec):
    """Soft and hard targets of the image. Every cell, where one is looked at, shows the image's."""

    exact_hard, soft, cells = False, True, False

    def __init__(self, name: str, classes: int, grid: tuple[int, int]) -> None:
        super().__init__(name, classes, grid)
        self.fields = {
            "global_class": Field(("uint16",), ("sample",)),
            "label_class": Field(("uint16",), ("sample", "whose")),
            "label_logit": Field(("float32",), ("sample", "whose")),
            "mean": Field(("float32",), ("sample",)),
            "std": Field(("float32",), ("sample",)),
        }

    def encode(self, dense_BKhw: Tensor, global_BK: Tensor) -> Arrays:
        """Float32 logits [B, K, h, w] and [B, K], on any device, as arrays. Raises CodecError as `validate_logits`."""
        return self.encode_outputs(Outputs(dense_BKhw, global_BK))

    def encode_outputs(self, outputs: Outputs) -> Arrays:
        """`encode`, with the labels. Raises CodecError as `validate_logits`, and for a logit that can't be stored."""
        dense_BKhw, global_BK = outputs.dense.detach(), outputs.image.detach()
        self.validate_logits(dense_BKhw, global_BK)
        image_class = global_BK.argmax(1)
        labels_B2 = image_class[:, None].expand(-1, 2) if outputs.labels is None else outputs.labels
        labels_B2 = labels_B2.to(global_BK.device)
        wide = global_BK.cpu().double()  # not every device has float64; the sum of float32 logits may overflow
        tensors = {
            "global_class": image_class.short(),  # same bits as uint16, which few torch operations know
            "label_class": labels_B2.short(),
            "label_logit": global_BK.gather(1, labels_B2),
            "mean": wide.mean(1).float(),
            "std": (wide - wide.mean(1, keepdim=True)).square().mean(1).sqrt().float(),
            **self._reduce(global_BK, labels_B2),
        }
        arrays = {name: np.ascontiguousarray(x.cpu().numpy()) for name, x in tensors.items()}
        if "rest" in arrays and not all(np.isfinite(arrays[name]).all() for name in ("top_logit", "rest")):
            raise CodecError(f"codec '{self.name}': a logit is beyond float16's 65504; cache 'global:16' instead")
        return arrays | {name: a.view(np.uint16) for name, a in arrays.items() if name.endswith("class")}

    @abstractmethod
    def _reduce(self, global_BK: Tensor, labels_B2: Tensor) -> dict[str, Tensor]:
        """What is kept of the logits, in addition to the fields that all global codecs have."""

    @abstractmethod
    def _restore(self, tensors: dict[str, Tensor]) -> Tensor:
        """All K logits of what `_reduce` kept: float32 [B, K], those of the labels apart."""

    def global_logits_torch(self, tensors: dict[str, Tensor]) -> Tensor:
        """Decode a batch on its device: float32 [B, K]; the labels' logits are exact."""
        labels_B2 = tensors["label_class"].long()
        return self._restore(tensors).scatter(1, labels_B2, tensors["label_logit"])

    def logits_torch(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`global_logits_torch` for every cell, float32 [B, K, h, w], and once, [B, K]."""
        global_BK = self.global_logits_torch(tensors)
        return global_BK[:, :, None, None].repeat(1, 1, *self.grid), global_BK

    def hard(self, arrays: Arrays, blend: int) -> U16:
        """The image's class in every cell, at every blend: uint16 [N, h, w]."""
        check_blend(blend)
        return np.broadcast_to(self.global_class(arrays)[:, None, None], (len(arrays["mean"]), *self.grid)).copy()

    def _length(self, dim: str, n: int) -> int | None:
        return 2 if dim == "whose" else super()._length(dim, n)


class GlobalBitsCodec(GlobalCodec):
    """All K logits of the image in 2 to 16 bits each."""

    def __init__(self, bits: int, classes: int, grid: tuple[int, int]) -> None:
        if not MIN_BITS <= bits <= MAX_BITS:
            raise CodecError(f"codec 'global:{bits}' has {bits} bits per logit, expected {MIN_BITS}..{MAX_BITS}")
        super().__init__(f"global{bits}", classes, grid)
        self.bits, self.fine_image = bits, bits == MAX_BITS
        self.error = f"a logit is off by at most (max - min of its vector) / {2 * (2**bits - 1)}; cells are not held"
        self.fields |= {
            "packed": Field(("uint8",), ("sample", "byte")),
            "low": Field(("float32",), ("sample",)),
            "step": Field(("float32",), ("sample",)),
        }

    def _reduce(self, global_BK: Tensor, labels_B2: Tensor) -> dict[str, Tensor]:
        packed, low, step = pack_levels(global_BK, self.bits)
        return {"packed": packed, "low": low, "step": step}

    def _restore(self, tensors: dict[str, Tensor]) -> Tensor:
        return unpack_levels(tensors["packed"], tensors["low"], tensors["step"], self.classes, self.bits)

    def _length(self, dim: str, n: int) -> int | None:
        return packed_length(self.classes, self.bits) if dim == "byte" else super()._length(dim, n)


class GlobalTopkCodec(GlobalCodec):
    """The k largest logits of the image, and those of the labels."""

    error = "a kept logit is off by float16's rounding (2^-11 of itself), all but the labels' and the k largest are \
replaced by one common value; cells are not held"

    def __init__(self, k: int, classes: int, grid: tuple[int, int]) -> None:
        if not 1 <= k < classes:
            raise CodecError(
                f"codec 'global:top{k}' keeps {k} of {classes} classes, expected 1..{classes - 1}; or use global:8"
            )
        super().__init__(f"globaltop{k}", classes, grid)
        self.k = k
        self.fields |= {
            "top_class": Field(("uint16",), ("sample", "rank")),
            "top_logit": Field(("float16",), ("sample", "rank")),
            "rest": Field(("float16",), ("sample",)),
        }

    def _reduce(self, global_BK: Tensor, labels_B2: Tensor) -> dict[str, Tensor]:
        logit, cls = global_BK.topk(self.k, dim=1)
        others = global_BK.scatter(1, cls, -math.inf).scatter(1, labels_B2, -math.inf)
        rest = others.logsumexp(1)
        rest = rest.masked_fill(others.isinf().all(1), 0.0)
        return {"top_class": cls.short(), "top_logit": logit.half(), "rest": rest.half()}

    def _restore(self, tensors: dict[str, Tensor]) -> Tensor:
        cls, labels = tensors["top_class"].long(), tensors["label_class"].long()
        kept = tensors["rest"].new_zeros(len(cls), self.classes, dtype=cls.dtype)
        sharing = self.classes - kept.scatter(1, cls, 1).scatter(1, labels, 1).sum(1)
        each = tensors["rest"].float() - sharing.clamp_min(1).log()
        return each[:, None].repeat(1, self.classes).scatter(1, cls, tensors["top_logit"].float())

    def _length(self, dim: str, n: int) -> int | None:
        return self.k if dim == "rank" else super()._length(dim, n)
