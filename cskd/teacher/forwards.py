"""What holds for every forward of a teacher: it has a fixed number of rows, and its images are counted.

Training reports how many there were meanwhile, which must be 0.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_images = 0
_lock = threading.Lock()  # forwards run in several threads


def count_teacher_images(n: int) -> None:
    """Called by `cskd.teacher.model` for every forward of n images."""
    global _images
    with _lock:
        _images += n


def teacher_images() -> int:
    """Images that went through any teacher of this process so far."""
    return _images


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """A tensor's first axis padded to `rows` with copies of its first row: teacher batches have one fixed size."""
    return x if len(x) == rows else torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])])
