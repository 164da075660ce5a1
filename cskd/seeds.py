"""Every random decision of a view, from its seed alone: a counter-based generator in 64-bit integers.

A draw is a pure function of (seed, purpose, counter), so it does not depend on batch, worker, rank, order, or any
library's global generator. The mixing function is SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), applied to
a Weyl sequence; it is stated here in full so that no library update can change a view.
"""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
from numpy.typing import NDArray

MASK = 0xFFFF_FFFF_FFFF_FFFF
GAMMA = 0x9E37_79B9_7F4A_7C15  # 2^64 / golden ratio, odd
MULTIPLIERS = 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB
_M1, _M2 = MULTIPLIERS

U64 = NDArray[np.uint64]


def mix64(x: int) -> int:
    """SplitMix64's finaliser, a bijection of 64-bit integers."""
    x &= MASK
    x = ((x ^ (x >> 30)) * _M1) & MASK
    x = ((x ^ (x >> 27)) * _M2) & MASK
    return x ^ (x >> 31)


def mix64_array(x: U64) -> U64:
    """`mix64` of every element; uint64 in, uint64 out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_M1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_M2)
    return x ^ (x >> np.uint64(31))


def hash64(*parts: str | int) -> int:
    """64-bit BLAKE2b of the parts, each preceded by its length, so that no two lists of parts collide by joining."""
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = str(part).encode()
        h.update(len(raw).to_bytes(4, "little"))
        h.update(raw)
    return int.from_bytes(h.digest(), "little")


def key_hash(key: str) -> int:
    """64-bit hash of a sample's key: what a unit stores to name its samples."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def view_seeds(recipe_seed: int, inventory_id: str, key_hashes: U64, view: int) -> U64:
    """Seeds of view `view` of many samples.

    Args:    key_hashes uint64 [N] (see `key_hash`); view >= 0.
    Returns: uint64 [N], a hash of (recipe seed, inventory id, sample key, view).
    """
    base = np.uint64(hash64("view", recipe_seed, inventory_id))
    step = np.uint64((view * GAMMA + GAMMA) & MASK)
    return mix64_array(mix64_array(key_hashes ^ base) + step)


def uniform_array(seeds: U64, purpose: str, counter: int = 0) -> NDArray[np.float64]:
    """The draw `Draws(seed, purpose)` makes at `counter`, for many seeds at once: float64 [N] in [0, 1)."""
    states = mix64_array(seeds ^ np.uint64(hash64(purpose)))
    bits = mix64_array(states + np.uint64((counter + 1) * GAMMA & MASK))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that depends on (n, seed) only: ranks of counter-based draws, int64 [n]."""
    draws = mix64_array(np.uint64(mix64(seed)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GAMMA))
    return np.argsort(draws, kind="stable")


# Purposes are words of the code: a few dozen, used for every view.
_purpose_hash = functools.lru_cache(maxsize=1024)(hash64)


class Draws:
    """The stream of draws for one (seed, purpose); each call takes the next counter value."""

    __slots__ = ("_counter", "_state")

    def __init__(self, seed: int, purpose: str) -> None:
        self._state = mix64(seed ^ _purpose_hash(purpose))
        self._counter = 0

    def bits(self) -> int:
        """The next 64 random bits."""
        self._counter += 1
        return mix64(self._state + self._counter * GAMMA)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform in [low, high), 53 bits."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def integer(self, n: int) -> int:
        """Uniform in 0..n-1 (bias below n / 2^64)."""
        return (self.bits() * n) >> 64

    def normal(self) -> float:
        """Standard normal, by Box and Muller's transform (one of the two values; two draws)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        return radius * math.cos(2.0 * math.pi * self.uniform())

    def beta(self, a: float) -> float:
        """Symmetric Beta(a, a): Johnk's rejection for a <= 1, two gamma draws (Marsaglia and Tsang, 2000) above."""
        if a == 1.0:
            return self.uniform()
        if a < 1.0:
            while True:
                x, y = self.uniform() ** (1.0 / a), self.uniform() ** (1.0 / a)
                if 0.0 < x + y <= 1.0:
                    return float(x / (x + y))
        x, y = self._gamma(a), self._gamma(a)
        return x / (x + y)

    def _gamma(self, a: float) -> float:
        d = a - 1.0 / 3.0
        while True:
            x = self.normal()
            v = (1.0 + x / math.sqrt(9.0 * d)) ** 3
            if v > 0.0 and math.log(1.0 - self.uniform()) < 0.5 * x * x + d - d * v + d * math.log(v):
                return d * v
