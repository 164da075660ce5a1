"""The teachers of docs/RESULTS.md: residual networks for 32x32 images, whose 8x8 cells see as much as one lets them.

A config names one as `benchmarks/results/networks.py:build`, with `kwargs`.
Source: He et al., Deep Residual Learning (arXiv 1512.03385), section 4.2; kernels of 1 as in BagNets (arXiv 1904.00760).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: every stride-th pixel, new channels zero."""

    def __init__(self, channels_in: int, channels: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.stride, self.added = stride, (channels - channels_in) // 2
        self.conv1 = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel, 1, kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.added, self.added)))


class CifarResNet(nn.Module):
    """[B, 3, 32, 32] -> logits [B, num_classes], a linear layer on the mean of an 8x8 map.

    Args: blocks in each of three stages of strides 1, 2, 2 (9 is ResNet-56, 3 ResNet-20); widths, channels of a stage;
          kernels, pixels a side of a stage's convolutions: 1 in the last keeps a cell's view as it was before it.
    """

    def __init__(
        self,
        blocks: int = 9,
        widths: Sequence[int] = (16, 32, 64),
        kernels: Sequence[int] = (3, 3, 3),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        stages = []
        for number, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            strides = [2 if number else 1] + [1] * (blocks - 1)
            inputs = [before] + [width] * (blocks - 1)
            stages.append(nn.Sequential(*(Block(i, width, s, kernel) for i, s in zip(inputs, strides, strict=True))))
            before = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(before, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> [B, channels, 8, 8]."""
        features: Tensor = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.forward_features(images).mean((2, 3)))
        return logits


build = CifarResNet
