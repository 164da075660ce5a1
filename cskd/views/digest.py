"""The digest of a view: what stage 1 stores and every training sample is checked against; and what a difference means."""

from __future__ import annotations

import importlib.metadata
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cskd.config import RecipeConfig
from cskd.dataset.images import decoder_versions
from cskd.dataset.inventory import Inventory
from cskd.errors import ReplayError
from cskd.views.mixing import NONE, drawn_fields
from cskd.views.recipe import RECIPE_CODE_VERSION

_FIELDS = {"seed": "seed", "mode": "mixing mode", "lam": "lambda", "box": "box", "partner": "partner"}  # in messages
# What a digest is of, 25 bytes.
_RAW = np.dtype([("pixels", "<u4"), ("mode", "u1"), ("lam", "<u4"), ("box", "<u2", (4,)), ("partner", "<u8")])
# Libraries whose version can change a pixel or a logit.
_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy", "zarr", "numcodecs")


@dataclass(frozen=True)
class Recorded:
    """What a cache recorded of its making, to check views against. bad: bool [n], its quarantined samples."""

    bad: NDArray[np.bool_]
    versions: dict[str, str]


def pixel_crc(view_HWC: NDArray[np.uint8]) -> int:
    """crc32c of a view's final uint8 pixels, before mixing."""
    return int(google_crc32c.value(view_HWC.tobytes()))


def view_digest(pixels: int, mode: int, lam: int, box: Sequence[int] | NDArray[np.uint16], partner_hash: int) -> int:
    """crc32c over pixel digest, mixing mode, lambda (1/65536), box and partner's key hash (0 where unmixed)."""
    raw = struct.pack("<IBI4HQ", pixels, mode, lam, *(int(v) for v in box), partner_hash)
    return int(google_crc32c.value(raw))


def view_digests(
    pixels: Sequence[int] | NDArray[Any],
    mode: NDArray[np.uint8],
    lam: NDArray[np.uint16],
    box: NDArray[np.uint16],
    partner_hash: NDArray[np.uint64],
) -> NDArray[np.uint32]:
    """`view_digest` of N views: uint32 [N]. Args: its, N of each, box [N, 4]."""
    raw = np.zeros(len(mode), _RAW)
    for name, values in zip(_RAW.names or (), (pixels, mode, lam, box, partner_hash), strict=True):
        raw[name] = values
    row, every = _RAW.itemsize, raw.tobytes()
    return np.array([google_crc32c.value(every[i : i + row]) for i in range(0, len(every), row)], np.uint32)


def check_view(
    inventory: Inventory,
    recipe: RecipeConfig,
    recorded: Recorded,
    sample: int,
    view: int,
    fields: Mapping[str, Any],
    partner: int,
    crc: int,
) -> None:
    """Refuse a view that is not, byte for byte, what the teacher saw.

    Args:    fields 'seed', 'mode', 'lam', 'box' as they are fed and 'digest', the cache's; partner the sample it is mixed
             with, not read where mode says unmixed; crc the `pixel_crc` found.
    Raises:  ReplayError with sample, view, both digests, and which of pixels, seed and mixing changed.
    """
    mode = int(fields["mode"])
    partner_hash = int(inventory.key_hash[partner]) if mode != NONE else 0
    found, expected = view_digest(crc, mode, int(fields["lam"]), fields["box"], partner_hash), int(fields["digest"])
    if found == expected:
        return
    fed = {**fields, "partner": partner if mode != NONE else -1}
    rule = _rule(inventory, recipe, recorded, sample, view)
    changed = [
        f"{text} is {_short(fed[name])}, the recipe says {_short(rule[name])}"
        for name, text in _FIELDS.items()
        if not np.array_equal(fed[name], rule[name])
    ]
    what = "; ".join(changed) or "seed and mixing are the recipe's, so the pixels differ"
    versions = changed_versions(recorded.versions) or "all library versions are those of the cache"
    raise ReplayError(
        f"view {view} of sample '{inventory.key(sample)}' replays as digest {found:08x}, the cache holds {expected:08x}: "
        f"{what} (recipe code {RECIPE_CODE_VERSION}; {versions}); "
        "go back to the code, images and versions the cache was made with, or cache the views again"
    )


def _rule(
    inventory: Inventory, recipe: RecipeConfig, recorded: Recorded, sample: int, view: int
) -> dict[str, NDArray[Any]]:
    """Seed and mixing of one sample by the recipe; 'partner' is a sample, or -1."""
    block = inventory.block_of(sample)
    first, stop = inventory.block_range(block)
    every = drawn_fields(inventory, recipe, block, view, recorded.bad[first:stop])
    rule = {name: array[sample - first] for name, array in every.items()}
    return {**rule, "partner": rule["partner"] + first if rule["mode"] != NONE else np.int64(-1)}


def _short(value: Any) -> str:
    return str(value.tolist()) if isinstance(value, np.ndarray) else str(int(value))


def library_versions() -> dict[str, str]:
    """Versions recorded next to the identity, those of the image decoders included; a change of them calls for a replay,
    not for a new cache."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found | {f"decoder {name}": version for name, version in decoder_versions().items()}


def changed_versions(recorded: dict[str, str]) -> str:
    """What is installed here in another version than `recorded`, in words; '' where nothing is."""
    now = library_versions()
    names = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    return ", ".join(f"{name} {recorded.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in names)
