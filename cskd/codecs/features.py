"""The `features` codecs: the teacher's last feature map, from which its classifier gives the logits of every cell again.

For a teacher whose head is a mean over the cells and one linear layer. The classifier, and what else all units share, is a file
of the cache (`cskd.store.tables`): float32 `weight` [K, C] and `bias` [K]. Of a teacher without logits of cells
(`teacher.dense: none`: a ViT, DINO) the features are all there is: no logits come of them, the tables hold int32 `channels` [1]
in place of the classifier, and without any classifier `global_class` means nothing.

`features:BITS` holds each number of the map in 2 to 16 bits,

    global_class  uint16 [N]                          exact
    packed        uint8 [N, h, w, ceil(C * BITS / 8)]   levels of BITS bits, the lowest bit first, channel by channel
    low, step     float32 [N, h, w]                   feature = low + level * step

and `features:pcaR`, in `cskd.codecs.features_pca`, what of it the logits depend on.

Shapes: N samples, B batch, C channels, K classes, h w teacher grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cskd.codecs.base import U16, Arrays, Field, Outputs, check_blend
from cskd.codecs.bits import MAX_BITS, MIN_BITS, packed_length
from cskd.codecs.tabled import MAP_FIELDS, TabledCodec, checked_map, finite, pack_map, unpack_map
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor


class FeaturesCodec(TabledCodec):
    """Soft targets, and the features themselves; hard targets nearly."""

    exact_hard, soft, reads_features = False, True, True

    def of_map_alone(self, classified: bool) -> None:
        """From here on of a teacher without logits of cells. classified: it has some of the image."""
        self.soft = self.cells = False
        self.has_classes = classified

    def fit(self, classifier: tuple[Tensor, Tensor] | None, features: Iterable[Tensor]) -> Arrays:
        """The tables of a new cache.

        Args:    classifier weight [K, C] and bias [K]; None: of a map alone. features: float32 batches [B, C, h, w] of the views
                 that come first; read once.
        """
        if classifier is None:
            return {"channels": np.array([next(iter(features)).shape[1]], np.int32)}
        weight_KC, bias_K = classifier
        return {"weight": weight_KC.float().cpu().numpy(), "bias": bias_K.float().cpu().numpy()}

    @property
    def channels(self) -> int:
        tables = self.tables()
        return int(tables["weight"].shape[1] if self.soft else tables["channels"])

    def global_class(self, arrays: Arrays) -> U16:
        if not self.has_classes:
            raise CodecError(f"codec '{self.name}' holds no class: its teacher has no classifier; read its features")
        return super().global_class(arrays)

    def hard(self, arrays: Arrays, blend: int) -> U16:
        """As of every codec; of a map alone the image's class in every cell."""
        if self.soft:
            return super().hard(arrays, blend)
        check_blend(blend)
        image = self.global_class(arrays)
        return np.broadcast_to(image[:, None, None], (len(image), *self.grid)).copy()

    def _refuse_logits(self) -> None:
        if not self.soft:
            raise CodecError(
                f"codec '{self.name}' holds features alone: its teacher has no logits of cells (teacher.dense: none)"
            )

    def encode(self, dense_BKhw: Tensor, global_BK: Tensor) -> Arrays:
        """Raises CodecError: see `encode_outputs`."""
        raise CodecError(f"codec '{self.name}' stores the teacher's features, not its logits; encode by encode_outputs")

    def features_torch(self, tensors: dict[str, Tensor]) -> Tensor:
        """The feature maps of a batch, on its device: float32 [B, C, h, w]."""
        raise NotImplementedError

    def _check_tables(self, arrays: Arrays) -> None:
        """CodecError unless the tables are of this codec."""
        if not self.soft:
            channels = arrays.get("channels", np.zeros(0))
            if channels.dtype != np.int32 or channels.shape != (1,) or int(channels[0]) < 1:
                raise CodecError(
                    f"codec '{self.name}': its tables don't say how many channels there are; run cskd verify"
                )
            return
        weight, K = arrays.get("weight", np.zeros(0)), self.classes
        if weight.ndim != 2 or len(weight) != K or arrays.get("bias", weight).shape != (K,):
            raise CodecError(f"codec '{self.name}': its tables hold no classifier of {K} classes; run cskd verify")
        finite(self, arrays)

    def _validated(self, outputs: Outputs) -> Tensor:
        """The features of a batch. Raises CodecError unless they and the logits are finite float32 of the codec's shapes."""
        self.validate_logits(outputs.dense, outputs.image)
        return checked_map(self, outputs.features, (len(outputs.dense), self.channels, *self.grid), "features are")


class FeaturesBitsCodec(FeaturesCodec):
    """Every number of the map in 2 to 16 bits."""

    def __init__(self, bits: int, classes: int, grid: tuple[int, int]) -> None:
        if not MIN_BITS <= bits <= MAX_BITS:
            raise CodecError(f"codec 'features:{bits}' has {bits} bits per number, expected {MIN_BITS}..{MAX_BITS}")
        super().__init__(f"features{bits}", classes, grid)
        self.bits = bits
        self.error = f"a feature is off by at most (max - min of its cell) / {2 * (2**bits - 1)}"
        self.fields = {
            "global_class": Field(("uint16",), ("sample",)),
            **MAP_FIELDS,
        }

    def encode_outputs(self, outputs: Outputs) -> Arrays:
        """A batch as arrays. Raises CodecError for what is not finite float32 of the codec's shapes."""
        image_class = outputs.image.argmax(1).cpu().numpy().astype(np.uint16)
        return {"global_class": image_class} | pack_map(self._validated(outputs), self.bits)

    def features_torch(self, tensors: dict[str, Tensor]) -> Tensor:
        return unpack_map(tensors, self.channels, self.bits)

    def logits_torch(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode a batch on its device: float32 dense [B, K, h, w] and global [B, K]."""
        import torch

        self._refuse_logits()
        x, tables = self.features_torch(tensors), self.tables(tensors["packed"].device)
        dense = torch.nn.functional.conv2d(x, tables["weight"][:, :, None, None], tables["bias"])
        return dense, x.mean((2, 3)) @ tables["weight"].T + tables["bias"]

    def _length(self, dim: str, n: int) -> int | None:
        return packed_length(self.channels, self.bits) if dim == "byte" else super()._length(dim, n)
