"""How many images that can't be decoded a cache or a run bears: `cache.max_quarantine`, of each block and in all."""

from __future__ import annotations

from cskd.dataset.inventory import Inventory
from cskd.errors import CacheError


def refuse_too_many(quarantine: dict[int, str], n: int, inventory: Inventory, first: int, limit: float) -> None:
    """CacheError when more than `limit` of a block's n samples can't be decoded. quarantine: position -> reason."""
    if len(quarantine) > max(1, limit * n):
        position, reason = next(iter(quarantine.items()))
        raise CacheError(
            f"{len(quarantine)} of {n} images of a block are unreadable, more than cache.max_quarantine {limit}; the first is "
            f"'{inventory.key(first + position)}': {reason}; mend the data set, or raise the limit"
        )


def refuse_too_many_in_all(unreadable: int, n: int, limit: float) -> None:
    """CacheError when more than `limit` of all n images can't be decoded; one is always borne. Stage 1 stops at such a block,
    but bears one in each: many small blocks would hide what a large one shows."""
    if unreadable > max(1, limit * n):
        raise CacheError(
            f"{unreadable} of {n} images are unreadable, more than cache.max_quarantine {limit}; mend the data set and cache it "
            "anew, or raise the limit and run the same command again"
        )
