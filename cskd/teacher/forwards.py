"""How many images went through any teacher of this process: training reports those of a run, which must be 0."""

from __future__ import annotations

import threading

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
