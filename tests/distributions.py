"""Do two samples come from one distribution? Limits so wide that a right implementation passes with any seed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import ArrayLike


def ks_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Kolmogorov and Smirnov's statistic of two samples: the largest distance of their distribution functions."""
    a, b = np.sort(np.asarray(a, np.float64)), np.sort(np.asarray(b, np.float64))
    at = np.concatenate([a, b])
    return float(np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max())


def assert_same_distribution(a: ArrayLike, b: ArrayLike, what: str = "") -> None:
    """KS at a level of 1e-4 (exceeded less often still where there are ties)."""
    n, m = np.size(a), np.size(b)
    limit = 2.23 * np.sqrt((n + m) / (n * m))
    assert ks_distance(a, b) < limit, f"{what}: KS distance {ks_distance(a, b):.4f}, limit {limit:.4f} for {n} and {m}"


def assert_same_counts(a: Iterable[Hashable], b: Iterable[Hashable], what: str = "") -> None:
    """Chi-square of two samples of the same size over their categories, at about four standard deviations."""
    a, b = list(a), list(b)
    names = sorted(set(a) | set(b), key=str)
    x, y = (np.array([sample.count(name) for name in names], np.float64) for sample in (a, b))
    scale = np.sqrt(y.sum() / x.sum())
    chi2 = float(((x * scale - y / scale) ** 2 / (x + y)).sum())
    limit = len(names) - 1 + 4.0 * np.sqrt(2.0 * max(len(names) - 1, 1)) + 4.0
    assert chi2 < limit, f"{what}: chi-square {chi2:.1f}, limit {limit:.1f}: {names}, {x}, {y}"
