"""How large a difference between two lists of runs is, and how sure one can be of it. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    pairs: int


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation (divisor n - 1); NaN of a single value, which has none."""
    return stdev(values) if len(values) > 1 else math.nan


def paired_difference(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Difference:
    """The mean of `values[i] - others[i]`, and its interval from Student's t distribution with n - 1 degrees of freedom.

    Args:    values, others: results of the same seeds in the same order; confidence in (0, 1).
    Returns: low and high are NaN of a single pair.
    Raises:  ValueError for lists of different lengths, or empty ones.
    """
    if len(values) != len(others) or not values:
        raise ValueError(f"{len(values)} and {len(others)} values, expected as many of both, at least one")
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean, n = fmean(differences), len(differences)
    if n == 1:
        return Difference(mean, math.nan, math.nan, n)
    half = t_quantile(0.5 + confidence / 2, n - 1) * spread(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def t_quantile(p: float, degrees: int) -> float:
    """The value that Student's t with so many degrees of freedom stays below with probability p, in [0.5, 1).

    Source: the finite sums for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4, inverted by bisection.
    """
    if not 0.5 <= p < 1 or degrees < 1:
        raise ValueError(f"p is {p} and degrees {degrees}, expected 0.5 <= p < 1 and at least 1")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 2 * p - 1 else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """Probability that |t| < sqrt(degrees) * tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = 0.0 if degrees == 1 else cosine if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
