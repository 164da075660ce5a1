"""What a pass has made of a unit that is not whole yet, so that a kill loses seconds of the teacher's work, not a pass of it.

A draft is a file next to the units. No commit record speaks of it, so that for every reader of a cache, and for `cskd gc`, it
is what a kill left. It holds batches of the teacher for one view of one block: the crc32c of their readable views, the targets
of every codec, and why the other images can't be read. One that is damaged, or was made by other library versions, is passed
over: its batches are made again. When the unit is committed its drafts go, and the unit has the bytes it would have had.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.codecs import Arrays
from cskd.codecs.measured import AnyMeasured, from_numbers, together
from cskd.errors import CskdError
from cskd.files.durable import put
from cskd.files.read import parse_json
from cskd.store.cache import Cache
from cskd.store.format import draft_file
from cskd.store.unit import pack_unit, read_unit
from cskd.views.digest import library_versions


@dataclass(frozen=True)
class Rows:
    """Rows of one view as they come: `places`, where in the pass's order their batches begin; position int64 [n] in the block
    and crc int64 [n] of the readable ones; targets by codec."""

    places: tuple[int, ...]
    position: NDArray[np.int64]
    crc: NDArray[np.int64]
    targets: dict[str, Arrays]
    errors: dict[str, AnyMeasured] = field(default_factory=dict)  # by codec, measured when they were encoded


def write_draft(
    cache: Cache, block: int, view: int, batch: int, parts: Sequence[Rows], unreadable: Mapping[int, str]
) -> None:
    """Put some rows of a unit in place, durably. batch: rows of one of the teacher's; unreadable: position -> reason, of at least
    their batches. Raises OSError."""
    about = {
        "fingerprint": cache.fingerprint,
        "versions": library_versions(),
        "block": block,
        "view": view,
        "batch": batch,
        "places": [place for part in parts for place in part.places],
        "position": np.concatenate([part.position for part in parts]).tolist(),
        "errors": {name: list(error) for name, error in errors_of(parts).items()},
        "unreadable": {str(position): reason for position, reason in unreadable.items()},
    }
    fields: Arrays = {
        "about": np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8),
        "crc": np.concatenate([part.crc for part in parts]).astype(np.uint32),
    }
    targets = Arrays()
    dimensions: dict[str, tuple[str, ...]] = {"about": ("byte",), "crc": ("sample",)}
    for number, (name, codec) in enumerate(cache.codecs.items()):
        for key, array in codec.concat([part.targets[name] for part in parts]).items():
            targets[f"c{number}_{key}"] = array
            dimensions[f"c{number}_{key}"] = codec.dimensions[key]
    data = pack_unit(fields, targets, dimensions, {"draft": f"block {block}, view {view}"})
    put(cache.root / draft_file(block, view, hashlib.sha256(data).hexdigest()), data)


def errors_of(parts: Sequence[Rows]) -> dict[str, AnyMeasured]:
    """The error of each codec over all rows, where it was measured."""
    names = dict.fromkeys(name for part in parts for name in part.errors)
    found = {name: together(part.errors[name] for part in parts if name in part.errors) for name in names}
    return {name: error for name, error in found.items() if error is not None}


def read_drafts(
    cache: Cache, block: int, view: int, batch: int, order: NDArray[np.int64]
) -> tuple[list[Rows], dict[int, str]]:
    """What the drafts of a unit hold, each batch once, and why its other images can't be read: position -> reason."""
    found, unreadable, places = list[Rows](), dict[int, str](), set[int]()
    for path in _drafts(cache.root, block, view):
        with contextlib.suppress(
            CskdError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError
        ):
            rows, reasons = _read(cache, block, view, batch, order, path)
            if places.isdisjoint(rows.places):
                found.append(rows)
                places.update(rows.places)
                unreadable |= reasons
    return found, unreadable


def remove_drafts(root: Path, block: int, view: int) -> None:
    """Of a unit that is committed."""
    for path in _drafts(root, block, view):
        path.unlink(missing_ok=True)


def _drafts(root: Path, block: int, view: int) -> list[Path]:
    pattern = root / draft_file(block, view, "*")
    return sorted(pattern.parent.glob(pattern.name))


def _read(
    cache: Cache, block: int, view: int, batch: int, order: NDArray[np.int64], path: Path
) -> tuple[Rows, dict[int, str]]:
    """One draft. CskdError, ValueError, KeyError, TypeError or OSError for one that is damaged, or not of this unit."""
    fields, arrays = read_unit(path)
    about: dict[str, Any] = parse_json(fields["about"].tobytes())
    expected = {"fingerprint": cache.fingerprint, "versions": library_versions(), "block": block, "view": view}
    if any(about[name] != value for name, value in {**expected, "batch": batch}.items()):
        raise ValueError("of another unit")
    places = tuple(int(place) for place in about["places"])
    if len(set(places)) < len(places) or any(place not in range(0, len(order), batch) for place in places):
        raise ValueError("other batches")
    rows = np.concatenate([order[place : place + batch] for place in places])
    position = np.array(about["position"], np.int64)
    unreadable = {int(name): str(reason) for name, reason in about["unreadable"].items()}
    bad = {p: unreadable[p] for p in np.setdiff1d(rows, position).tolist()}
    if not np.array_equal(position, rows[~np.isin(rows, list(bad))]) or fields["crc"].shape != position.shape:
        raise ValueError("other rows")
    targets = {
        name: {key.removeprefix(f"c{number}_"): a for key, a in arrays.items() if key.startswith(f"c{number}_")}
        for number, name in enumerate(cache.codecs)
    }
    for name, codec in cache.codecs.items():
        codec.check(targets[name], len(position), len(cache.classes))
    errors = {name: from_numbers(error) for name, error in about["errors"].items() if name in cache.codecs}
    return Rows(places, position, fields["crc"].astype(np.int64), targets, errors), bad
