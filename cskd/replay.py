"""The digest of a view: what stage 1 stores and every training sample is checked against."""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cskd.augment.recipe import RECIPE_CODE_VERSION
from cskd.errors import ReplayError


def pixel_crc(view_HWC: NDArray[np.uint8]) -> int:
    """crc32c of a view's final uint8 pixels, before mixing."""
    return int(google_crc32c.value(view_HWC.tobytes()))


def view_digest(pixels: int, mode: int, lam: int, box: NDArray[np.uint16], partner_hash: int) -> int:
    """crc32c over pixel digest, mixing mode, lambda (1/65536), box and partner's key hash (0 where unmixed)."""
    raw = struct.pack("<IBI4HQ", pixels, mode, lam, *(int(v) for v in box), partner_hash)
    return int(google_crc32c.value(raw))


def refuse(key: str, view: int, expected: int, found: int, changed: str) -> ReplayError:
    """The error for a view that is not what the teacher saw; `changed` says what is known about why."""
    return ReplayError(
        f"view {view} of sample '{key}' replays as digest {found:08x}, the cache holds {expected:08x}"
        f" (recipe code {RECIPE_CODE_VERSION}; {changed}); "
        "train with the versions the cache was made with, or cache the views again"
    )
