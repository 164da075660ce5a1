"""Random erasing: the noise of `erasing`, whose 64-bit integers wrap around in int64 as they do in uint64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cskd.seeds import GAMMA, MULTIPLIERS
from cskd.views.erasing import Erasure, noise_tables
from cskd.views.on_device.buffer import Slot, Writer


@dataclass(frozen=True)
class Erasures:
    """At most one rectangle of each view, n in all.

    box: int64 [n, 5], row of the batch, top, left, width and number of values; state: int64 [n], the bits from which
    its noise is expanded; tables: uint8 [m, 3, 65536]; table: int64 [n], which of them a rectangle's noise has; total:
    values of all rectangles.
    """

    box: Slot
    state: Slot
    table: Slot
    tables: Slot
    total: int

    @classmethod
    def put(
        cls, writer: Writer, erased: Sequence[tuple[int, Erasure, tuple[float, ...], tuple[float, ...]]]
    ) -> Erasures:
        """Of (row of the batch, rectangle, mean and std of its noise). No rectangle is empty."""
        kinds = sorted({(mean, std) for _, _, mean, std in erased})
        boxes = [(row, e.top, e.left, e.width, e.height * e.width * 3) for row, e, _, _ in erased]
        return cls(
            writer.put(np.array(boxes)),
            writer.put(np.array([e.noise for _, e, _, _ in erased], np.uint64).view(np.int64)),
            writer.put(np.array([kinds.index((mean, std)) for _, _, mean, std in erased])),
            writer.put(np.stack([np.stack(noise_tables(mean, std)) for mean, std in kinds])),
            sum(box[-1] for box in boxes),
        )

    def run(self, views: Tensor, words: Tensor) -> None:
        """In place: uint8 [B, S, S, 3]."""
        size = views.shape[1]
        box, state, table = self.box.of(words), self.state.of(words), self.table.of(words)
        count = box[:, 4]
        which = torch.arange(len(box), device=views.device).repeat_interleave(count, output_size=self.total)
        row, top, left, width, _ = box.index_select(0, which).unbind(1)
        place = torch.arange(self.total, device=views.device) - (count.cumsum(0) - count).index_select(0, which)
        bits = _mix64(state.index_select(0, which) + (place // 4 + 1) * _signed(GAMMA))
        draw = (bits >> (place % 4 * 16)) & 0xFFFF
        channel = table.index_select(0, which) * 3 + place % 3
        noise = self.tables.of(words).view(-1).index_select(0, (channel << 16) + draw)
        line, column = place // (width * 3), place % (width * 3)
        target = ((row * size + top + line) * size + left) * 3 + column
        views.view(-1).index_copy_(0, target, noise)


def _mix64(x: Tensor) -> Tensor:
    """`seeds.mix64_array` of int64."""
    x = (x ^ _shifted(x, 30)) * _signed(MULTIPLIERS[0])
    x = (x ^ _shifted(x, 27)) * _signed(MULTIPLIERS[1])
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in; `>>` copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the bits of a uint64."""
    return x - (1 << 64) if x >> 63 else x
