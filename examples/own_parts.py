"""Parts of your own, named in a config by where they are: a teacher, a codec and a term of the loss.

    teacher: {model: "examples/own_parts.py:build", weights: mine.safetensors}
    cache:   {codecs: [envelope, "examples/own_parts.py:Float16"]}
    loss:    {method: cskd-hard, terms: [{own: "examples/own_parts.py:entropy", weight: 0.1}]}

An installed package says the same by entry points of the groups cskd.teachers, cskd.codecs and cskd.losses.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

import cskd


class Teacher(nn.Module):
    """A CNN whose head is linear and comes after the pooling: that is all a teacher needs."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(width, classes)

    def forward_features(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.forward_features(images).mean((2, 3)))
        return logits


def build(classes: int = 5, width: int = 12) -> nn.Module:
    """Arguments come from teacher.kwargs."""
    return Teacher(classes, width)


class Float16(cskd.Codec):
    """The whole map in float16. A codec gives itself a name, says which arrays it stores, and turns logits into them and back."""

    exact_hard, soft = False, True
    error = "a logit is off by float16's rounding"

    def __init__(self, classes: int, grid: tuple[int, int]) -> None:
        super().__init__("float16", classes, grid)
        self.fields = {
            "global_class": cskd.Field(("uint16",), ("sample",)),
            "dense": cskd.Field(("float16",), ("sample", "class", "row", "col")),
            "global": cskd.Field(("float16",), ("sample", "class")),
        }

    def encode(self, dense_BKhw: Tensor, global_BK: Tensor) -> cskd.Arrays:
        self.validate_logits(dense_BKhw, global_BK)
        dense, whole = (x.detach().half().cpu().numpy() for x in (dense_BKhw, global_BK))
        return {"global_class": global_BK.argmax(1).cpu().numpy().astype(np.uint16), "dense": dense, "global": whole}

    def logits_torch(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors["dense"].float(), tensors["global"].float()


def entropy(
    output: cskd.StudentOutput,
    labels: cskd.MixedLabels,
    targets: cskd.HardTargets | cskd.SoftTargets | None,
) -> Tensor:
    """A term that punishes a confident class head: the negative entropy of its prediction, mean over the batch."""
    log_p = output.cls_logits.log_softmax(1)
    return (log_p.exp() * log_p).sum(1).mean()
