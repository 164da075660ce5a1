"""Differences between runs are those that scipy computes."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from cskd.pipeline.intervals import paired_difference, spread, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30, 101])
@pytest.mark.parametrize("p", [0.5, 0.75, 0.95, 0.975, 0.999])
def test_quantiles_of_t_are_scipys(p: float, degrees: int) -> None:
    assert t_quantile(p, degrees) == pytest.approx(float(stats.t.ppf(p, degrees)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_interval_is_that_of_a_paired_t_test(n: int) -> None:
    a, b = [91.0 + math.sin(3 * i) for i in range(n)], [89.0 + math.cos(5 * i) for i in range(n)]
    found = paired_difference(a, b)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((float(interval.low), float(interval.high)))
    assert found.low < found.mean < found.high and found.pairs == n


def test_one_run_has_no_spread_and_unequal_lists_no_pairs() -> None:
    one = paired_difference([3.0], [1.0])
    assert (one.mean, one.pairs) == (2.0, 1)
    assert all(math.isnan(value) for value in (one.low, one.high, spread([3.0])))
    for others in ([], [1.0, 2.0]):
        with pytest.raises(ValueError, match="expected as many of both"):
            paired_difference([3.0], others)
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="expected"):
        t_quantile(1.0, 3)
