"""What stage 1 has still to make, pass by pass, and which of it is next for each of several processes."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from cskd.machine.launch import Worker
from cskd.storage.posix import Posix
from cskd.store.cache import Cache

_APART = 3  # passes from the beginning of a stretch that another process walks: as many as it may make meanwhile
_BOLD = 0.5  # of the free processes that there are passes for, so many take one
LOOKS = 8  # parts of a pass after each of which a process looks whether another one has committed it
Pass = tuple[int, tuple[int, ...]]  # block, views
Passes = list[Pass]


def has_claims(cache: Cache) -> bool:
    """Whether its processes can tell each other what they are at: in a folder, not on an object store."""
    return isinstance(cache.storage, Posix)


def missing_passes(cache: Cache, number: int = 0) -> Passes:
    """(block, views) of each pass: the missing views of one mixing group of one block, made from one decoding.

    number: of this process among those that share the work; each begins one pass further on.
    """
    by_pass: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for block, view in cache.missing():
        by_pass[view // cache.recipe.mix_group, block].append(view)
    passes = [(block, tuple(views)) for (_, block), views in sorted(by_pass.items())]
    begin = number % max(1, len(passes))
    return passes[begin:] + passes[:begin]


class Walk:
    """The way of one process through the passes where there are no claims, on an object store.

    Its first stretch is its share, each `count`-th pass, where nobody else is. Where nobody says how many processes there are, it
    begins anywhere. Later on it is a guest in what is left: the others are at the
    beginnings of stretches of missing passes, and walk on, so it begins within a long one, at a place that no other would choose,
    and goes to its end. Where too little is left for all who are free, chance decides who waits; what is still missing when it
    looks again has most likely been left by a process that has died. How many there are is what it was told, or else what it
    sees: what all have made since it began, over what it has made itself.

    made: passes that this process has made, as its caller counts them.
    """

    def __init__(self, cache: Cache, worker: Worker) -> None:
        self.made = 0.0
        self._cache, self._worker, self._guest = cache, worker, False
        self._begun = 0  # passes that were missing then
        self._seen: set[Pass] = set()  # that were missing when it last waited, its own since taken out
        self._alone = 1.0  # doubled whenever nobody else has made anything while it waited
        self._rng = np.random.default_rng()

    def following(self) -> Passes | None:
        """What is next; none where nothing is missing. None: wait for the time of a pass or two, and ask again."""
        passes, count = missing_passes(self._cache), self._worker.count or 1
        if not self._guest:
            self._guest, self._begun = True, len(passes)
            if mine := self._share(passes):
                return mine
        if not passes:
            return []
        place = np.array([self._place(one) for one in passes], np.int64)
        place = place % count * (place.max() + 2) + place // count  # share after share
        line = np.argsort(place)
        first = np.flatnonzero(np.diff(place[line], prepend=-2) != 1)
        length = np.diff(first, append=len(passes))
        free = np.maximum(length - _APART, 0)
        idle = max(1, (self._worker.count or self._seen_at_work(len(passes))) - len(first))
        if self._rng.random() < _BOLD * free.sum() / idle:
            free[2 * length < length.max()] = 0
            i = int(self._rng.choice(len(free), p=free / free.sum()))
            within = max(_APART, int(length[i] * self._rng.uniform(0.3, 0.8)))
            return [passes[line[k]] for k in range(first[i] + within, first[i] + length[i])]
        left = [one for one in passes if one in self._seen]
        self._alone = 2 * self._alone if len(left) == len(self._seen) else 1.0
        if left and self._rng.random() < self._alone * len(left) / idle:
            taken = left[self._rng.integers(len(left))]
            self._seen = {*left} - {taken}
            return [taken]
        self._seen = set(passes)
        return None

    def _seen_at_work(self, missing: int) -> int:
        """How many processes there are, this one included, by what has been made since it began."""
        return round((self._begun - missing) / max(1.0, self.made))

    def _share(self, passes: Passes) -> Passes:
        number, count = self._worker.number, self._worker.count
        if count:
            return [one for one in passes if self._place(one) % count == number % count]
        begin = int(self._rng.random() * len(passes))
        return passes[begin:] + passes[:begin]

    def _place(self, one: Pass) -> int:
        """Of a pass among all of the cache."""
        return one[1][0] // self._cache.recipe.mix_group * self._cache.blocks + one[0]


def views_left(cache: Cache) -> int:
    """Views that have no unit yet."""
    sizes = np.diff(cache.inventory.blocks)
    return sum(int(sizes[block]) for block, _ in cache.missing())
