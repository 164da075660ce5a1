"""crc32c of the pixels of every view of a batch, where the views are: `digest.pixel_crc` by look-ups and XOR.

A CRC without its first and last inversion is linear over XOR: that of a message is the XOR of what each byte, followed
by zeros, gives by itself. A line's bytes are looked up in a table for each position, then each line's sum in tables of
the lines that follow it; the inversions add a constant, the CRC of as many zeros.
Source: Koopman, 32-bit cyclic redundancy codes, 2002; Castagnoli's polynomial as in RFC 3720, bits reflected.
"""

from __future__ import annotations

import functools

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Shapes: B views of a batch, S lines of a view, N = 3 * S bytes of a line

_POLYNOMIAL = 0x82F6_3B78  # Castagnoli's, reflected
_BYTE = np.arange(256, dtype=np.uint32)
U32 = NDArray[np.uint32]


def pixel_crcs(views: Tensor) -> Tensor:
    """`pixel_crc` of each view.

    Args:    views uint8 [B, S, S, 3], contiguous.
    Returns: int64 [B] on the views' device, each in 0 .. 2^32 - 1.
    """
    n, size = views.shape[:2]
    tables = _device_tables(size, views.device)
    of_bytes = torch.arange(size * 3, device=views.device, dtype=torch.int32) * 256
    where = views.view(n * size, size * 3) + of_bytes
    lines = _xor(tables[0].index_select(0, where.view(-1)).view(where.shape))  # [B * S], each line followed by nothing
    parts = (lines.view(n, size, 1) >> torch.arange(0, 32, 8, device=views.device, dtype=torch.int32)) & 255
    parts += torch.arange(size * 4, device=views.device, dtype=torch.int32).view(size, 4) * 256
    crc = _xor(tables[1].index_select(0, parts.view(-1)).view(n, size * 4))
    zeros = int(google_crc32c.value(bytes(size * size * 3)))
    return (crc.to(torch.int64) & 0xFFFF_FFFF) ^ zeros


def _xor(values: Tensor) -> Tensor:
    """XOR along the last dimension: [n, m] to [n]."""
    while values.shape[-1] > 1:
        half, odd = divmod(values.shape[-1], 2)
        folded = values[:, :half] ^ values[:, half : 2 * half]
        if odd:
            folded[:, 0] ^= values[:, -1]
        values = folded
    return values[:, 0]


@functools.lru_cache(maxsize=4)
def _device_tables(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(t.view(np.int32)).to(device) for t in _tables(size))  # type: ignore[return-value]


def _tables(size: int) -> tuple[U32, U32]:
    """uint32 [N * 256]: the CRC of a byte at each place of a line; [S * 4 * 256]: what byte j of a line's CRC, by its
    value, becomes by the lines below."""
    one = _BYTE
    for _ in range(8):
        one = np.where(one & 1, (one >> np.uint32(1)) ^ np.uint32(_POLYNOMIAL), one >> np.uint32(1))
    places = np.empty((size * 3, 256), np.uint32)
    state = one
    for place in reversed(places):
        place[:] = state
        state = _followed(state, one)
    line = np.stack([_BYTE << np.uint32(8 * j) for j in range(4)])  # [4, 256]: each register with one byte set
    lines: U32 = np.empty((size, 4, 256), np.uint32)
    step = line
    for _ in range(size * 3):
        step = _followed(step, one)
    for below in reversed(lines):
        below[:] = line
        moved = [step[j][(line >> np.uint32(8 * j)) & 255] for j in range(4)]
        line = np.bitwise_xor.reduce(moved)
    return places.reshape(-1), lines.reshape(-1)


def _followed(state: U32, one: U32) -> U32:
    """The CRC after one more byte of zeros."""
    followed: U32 = (state >> np.uint32(8)) ^ one[state & 255]
    return followed
