"""A teacher of another bias than a convolution's: a residual network for 32x32 images whose spatial layers are involutions.

A convolution has one kernel for all places and another for every channel. An involution makes a kernel for each place, from that
place's own channels, and shares it among the channels of a group.
Source: Li et al., Involution (arXiv 2103.06255, CVPR 2021): the operation, and the bottleneck of its RedNet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 16  # channels that share a kernel, as in RedNet
REDUCTION = 4  # of the channels on the way to a kernel, as in RedNet


class Involution(nn.Module):
    """[B, C, H, W] -> [B, C, H, W]: each place's neighbours, weighted by a kernel made from what stands there."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, max(1, channels // GROUP)
        self.reduce = nn.Conv2d(channels, max(1, channels // REDUCTION), 1, bias=False)
        self.bn = nn.BatchNorm2d(self.reduce.out_channels)
        self.span = nn.Conv2d(self.reduce.out_channels, self.groups * kernel**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        weights = self.span(F.relu(self.bn(self.reduce(x)))).view(B, self.groups, 1, self.kernel**2, H, W)
        padded = F.pad(x, (self.kernel // 2,) * 4).unflatten(1, (self.groups, C // self.groups))
        total = torch.zeros((), device=x.device, dtype=x.dtype)
        for place in range(self.kernel**2):  # half of the time that F.unfold takes on a CPU
            row, column = divmod(place, self.kernel)
            total = total + weights[:, :, :, place] * padded[..., row : row + H, column : column + W]
        return total.reshape(B, C, H, W)


class Bottleneck(nn.Module):
    """1x1 convolution, involution, 1x1 convolution, and a shortcut; a stride is a 2x2 mean before all of it."""

    def __init__(self, channels_in: int, channels: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(channels_in, channels // 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels // 2)
        self.involution = Involution(channels // 2, kernel)
        self.bn2 = nn.BatchNorm2d(channels // 2)
        self.conv3 = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.added = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        y = F.relu(self.bn2(self.involution(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + F.pad(x, (0, 0, 0, 0, 0, self.added)))


class InvolutionNet(nn.Module):
    """[B, 3, 32, 32] -> logits [B, num_classes], a linear layer on the mean of an 8x8 map.

    Args: as of `networks.CifarResNet`: blocks in each of three stages; widths, channels of a stage; kernels, pixels a
          side of a stage's involutions. The first convolution and the second stage have a stride of 2.
    """

    def __init__(
        self,
        blocks: int = 2,
        widths: Sequence[int] = (32, 96, 192),
        kernels: Sequence[int] = (3, 5, 5),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        stages = []
        for number, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            strides, inputs = [2 if number == 1 else 1] + [1] * (blocks - 1), [before] + [width] * (blocks - 1)
            made = [Bottleneck(i, width, s, kernel) for i, s in zip(inputs, strides, strict=True)]
            stages.append(nn.Sequential(*made))
            before = width
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(before, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> [B, channels, 8, 8]."""
        features: Tensor = self.stages(F.relu(self.bn1(self.conv1(images))))
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.forward_features(images).mean((2, 3)))
        return logits


build = InvolutionNet
