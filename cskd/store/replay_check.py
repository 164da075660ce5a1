"""Golden samples: views of a cache made again here and now, to find out whether this machine still makes them so.

Training checks every view it feeds; this is for the moment before it, and for whoever wants to know without training.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cskd.dataset.inventory import evenly
from cskd.errors import CacheError, ImageError, ReplayError
from cskd.seeds import hash64, permutation
from cskd.store.cache import Cache
from cskd.store.format import Unit
from cskd.views.digest import changed_versions, check_view, pixel_crc
from cskd.views.maker import ViewMaker

GOLDEN = 256  # views replayed when versions have changed: each of DeiT's fifteen ops is in 17 of them on average


def golden_rows(cache: Cache, count: int) -> Iterator[tuple[int, int, Unit, NDArray[np.int64]]]:
    """About `count` of a cache's views, spread over its units: (block, view, unit, rows of it), the same every time."""
    missing = set(cache.missing())
    made = [(b, v) for b in range(cache.blocks) for v in range(cache.views) if (b, v) not in missing]
    chosen = [made[i] for i in evenly(len(made), count)]
    codec = next(iter(cache.codecs))
    for left, (block, view) in zip(range(len(chosen), 0, -1), chosen, strict=True):
        unit = cache.read(block, view, codec)
        share = min(-(-count // left), len(unit.position))
        yield block, view, unit, np.sort(permutation(len(unit.position), hash64("golden", block, view))[:share])
        count -= share


def replay_golden(cache: Cache, count: int) -> Iterator[str | None]:
    """Make about `count` views again; yields one item a view: None where it is equal, else the reason it is not.

    Raises:  ReadError and CacheError for shards and units that can't be read.
    """
    maker, recorded = ViewMaker(cache.inventory, cache.recipe), cache.recorded()
    for block, view, unit, rows in golden_rows(cache, count):
        first = cache.inventory.block_range(block)[0]
        for row in rows.tolist():
            sample = first + int(unit.position[row])
            fields = {name: array[row] for name, array in unit.fields.items()}
            partner = first + int(fields["partner"])
            try:
                crc = pixel_crc(maker.view(maker.image(sample), int(fields["seed"])))
                check_view(cache.inventory, cache.recipe, recorded, sample, view, fields, partner, crc)
            except (ReplayError, ImageError) as e:
                yield str(e)
            else:
                yield None


def check_versions(cache: Cache) -> list[str]:
    """Replay golden samples where libraries have changed since the cache was made; a note that says so.

    Raises:  CacheError for the first view that differs.
    """
    changed = changed_versions(dict(cache.manifest.versions or {}))
    if not changed:
        return []
    count = 0
    try:
        for reason in replay_golden(cache, GOLDEN):
            count += 1
            if reason:
                raise ReplayError(reason)
    except ReplayError as e:
        raise CacheError(f"{cache.location}: golden samples, replayed since {changed}: {e}") from None
    return [f"since the cache was made: {changed}; {count} golden views replay exactly"]
