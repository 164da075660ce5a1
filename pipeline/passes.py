"""What stage 1 has still to make, pass by pass, and where each of several processes begins."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from cskd.storage.posix import Posix
from cskd.store.cache import Cache

_GOLDEN = (5**0.5 - 1) / 2
Passes = list[tuple[int, tuple[int, ...]]]  # block, views


def has_claims(cache: Cache) -> bool:
    """Whether its processes can tell each other what they are at: in a folder, not on an object store."""
    return isinstance(cache.storage, Posix)


def missing_passes(cache: Cache, number: int = 0) -> Passes:
    """(block, views) of each pass: the missing views of one mixing group of one block, made from one decoding.

    number: of this process among those that share the work. With claims, each begins one pass further on. Without, on an object
    store, they begin far from one another, however many there are: at multiples of the golden section.
    """
    by_pass: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for block, view in cache.missing():
        by_pass[view // cache.recipe.mix_group, block].append(view)
    passes = [(block, tuple(views)) for (_, block), views in sorted(by_pass.items())]
    begin = number % max(1, len(passes)) if has_claims(cache) else int(number * _GOLDEN % 1 * len(passes))
    return passes[begin:] + passes[:begin]


def elsewhere(cache: Cache, passes: Passes) -> tuple[Passes, bool]:
    """The same passes for a process that has come to what another one makes, and whether each may be under way already.

    The others are at the beginnings of stretches of missing passes, and walk on. So this one begins within a long stretch, at a
    place that no other would choose. A pass that is missing alone is most likely being made.
    """
    group = cache.recipe.mix_group
    place = np.array([views[0] // group * cache.blocks + block for block, views in passes], np.int64)
    first = np.flatnonzero(np.diff(place, prepend=-2) != 1)
    length = np.diff(first, append=len(passes))
    longest = int(length.max(initial=0))
    if longest == 0:
        return [], False
    rng = np.random.default_rng()
    i = int(rng.choice(np.flatnonzero(2 * length >= longest)))
    begin = int(first[i]) + int(length[i] * rng.uniform(0.35, 0.75))
    return passes[begin:] + passes[:begin], longest == 1


def views_left(cache: Cache) -> int:
    """Views that have no unit yet."""
    sizes = np.diff(cache.inventory.blocks)
    return sum(int(sizes[block]) for block, _ in cache.missing())
