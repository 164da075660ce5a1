"""A teacher that costs next to nothing, with random weights: for benchmarks of everything but the teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

TINY_TEACHER = f"{Path(__file__).resolve()}:build"  # as a config names it


class TinyNet(nn.Module):
    """One convolution of stride `patch`, and a linear classifier of its mean."""

    def __init__(self, classes: int, channels: int, patch: int) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, channels, patch, patch), nn.Linear(channels, classes)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        features: Tensor = self.body(x_BCHW)
        return features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.forward_features(x_BCHW).mean((2, 3)))
        return logits


def build(classes: int = 4, channels: int = 6, patch: int = 8) -> TinyNet:
    """The same network every time."""
    torch.manual_seed(1)
    return TinyNet(classes, channels, patch)
