"""Promises of cskd.seeds: the same draws for ever, whichever way they are made, and distributed as they say.

The pinned numbers are part of the cache format: a change of any of them makes other views from the same seeds. The tests
of distributions are deterministic; their bounds are those that 1 in 1,000 true samples would exceed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from cskd.seeds import (
    GAMMA,
    MASK,
    Draws,
    hash64,
    key_hash,
    mix64,
    mix64_array,
    permutation,
    uniform_array,
    view_seeds,
)

KS_BOUND = 1.95  # of sqrt(n) * D, at 1 in 1,000
u64 = st.integers(0, MASK)


def assert_distributed(sample: Sequence[float] | NDArray[np.float64], cdf: Callable[..., Any]) -> None:
    distance = stats.kstest(sample, cdf).statistic
    assert math.sqrt(len(sample)) * distance < KS_BOUND


def test_mix64_gives_the_published_outputs_of_splitmix64_from_seed_0() -> None:
    outputs = [mix64(i * GAMMA) for i in range(1, 6)]
    assert outputs == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
        0xF88BB8A8724C81EC,
        0x1B39896A51A8749B,
    ]


def test_pinned_hashes_seeds_and_permutations() -> None:
    assert hash64() == 0xB4B2797457A0A6E4
    assert hash64("view", 0, "abc") == 0xCA4779CD89DF5ED8
    assert key_hash("n01440764/10026.JPEG") == 0x9B2029A76018A320
    hashes = np.array([0, 1, key_hash("k")], np.uint64)
    assert view_seeds(7, "abc", hashes, 3).tolist() == [0x100A1AD3D53D801F, 0xC7A762659CA2E707, 0x87B9D350CCCE0A00]
    assert permutation(8, 0).tolist() == [2, 4, 6, 5, 1, 7, 0, 3]
    assert permutation(5, MASK).tolist() == [3, 2, 0, 1, 4]


def test_pinned_draws() -> None:
    draws = Draws(12345, "crop")
    assert draws.bits() == 0x3A365FC995C7BCA9
    assert draws.uniform() == 0.812149265562976
    assert draws.integer(1000) == 445
    # These go through the C library's log, cos and pow, which may differ in the last place between machines.
    assert draws.normal() == pytest.approx(0.7959036548055333, rel=1e-14)
    assert draws.beta(0.8) == pytest.approx(0.7450635012508744, rel=1e-14)
    assert draws.beta(1.0) == 0.3487154908054031
    assert draws.beta(2.5) == pytest.approx(0.5144072159555599, rel=1e-14)
    ends = np.array([0, 1, MASK], np.uint64)
    assert uniform_array(ends, "flip", 2).tolist() == [0.4448840106865174, 0.5117731375826327, 0.8183125142374879]


@given(st.lists(u64, min_size=1, max_size=20))
def test_the_array_form_of_mix64_is_the_scalar_one(values: list[int]) -> None:
    assert mix64_array(np.array(values, np.uint64)).tolist() == [mix64(v) for v in values]


@given(st.lists(u64, min_size=1, max_size=5), st.text(max_size=8), st.integers(0, 50))
def test_uniform_array_is_the_nth_draw_of_each_seeds_stream(seeds: list[int], purpose: str, counter: int) -> None:
    expected = []
    for seed in seeds:
        draws = Draws(seed, purpose)
        for _ in range(counter):
            draws.bits()
        expected.append(draws.uniform())
    assert uniform_array(np.array(seeds, np.uint64), purpose, counter).tolist() == expected


def unxorshift(x: int, shift: int) -> int:
    y = x
    for _ in range(64 // shift + 1):
        y = x ^ (y >> shift)
    return y


@given(u64)
def test_mix64_can_be_undone_so_that_no_two_inputs_share_an_output(x: int) -> None:
    y = unxorshift(mix64(x), 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    y = unxorshift(y, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    assert unxorshift(y, 30) == x


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_lists_of_parts_that_join_to_the_same_text_hash_apart(a: list[str], b: list[str]) -> None:
    assert (hash64(*a) == hash64(*b)) == (a == b)


def test_a_views_seed_depends_on_recipe_seed_inventory_key_and_view_and_on_nothing_else() -> None:
    keys = np.array([key_hash(f"sample-{i}") for i in range(1000)], np.uint64)
    base = view_seeds(0, "inventory", keys, 5)
    np.testing.assert_array_equal(view_seeds(0, "inventory", keys[::-1], 5)[::-1], base)
    np.testing.assert_array_equal(view_seeds(0, "inventory", keys[123:124], 5), base[123:124])
    others = [view_seeds(1, "inventory", keys, 5), view_seeds(0, "other", keys, 5), view_seeds(0, "inventory", keys, 6)]
    assert all((other != base).all() for other in others)


def test_seeds_of_many_views_and_samples_do_not_collide() -> None:
    keys = np.array([key_hash(str(i)) for i in range(2000)], np.uint64)
    seeds = np.concatenate([view_seeds(0, "inventory", keys, view) for view in range(300)])
    assert len(np.unique(seeds)) == len(seeds) == 600_000  # by chance one pair in 10^8 tries


def test_streams_of_other_purposes_and_neighbouring_seeds_are_unrelated() -> None:
    seeds = np.arange(20_000, dtype=np.uint64)
    a, b = uniform_array(seeds, "crop"), uniform_array(seeds, "flip")
    c, d = uniform_array(seeds, "crop", 1), uniform_array(seeds + np.uint64(1), "crop")
    for other in (b, c, d):
        assert abs(np.corrcoef(a, other)[0, 1]) < 3.3 / math.sqrt(len(seeds))


def test_draws_of_one_stream_and_first_draws_of_many_are_uniform() -> None:
    draws = Draws(1, "crop")
    assert_distributed([draws.uniform() for _ in range(20_000)], stats.uniform.cdf)
    first = uniform_array(view_seeds(0, "inventory", np.arange(20_000, dtype=np.uint64), 0), "crop")
    assert_distributed(first, stats.uniform.cdf)
    assert first.min() >= 0.0
    assert first.max() < 1.0


def test_every_bit_is_set_half_of_the_time() -> None:
    draws = Draws(2, "bits")
    values = np.array([draws.bits() for _ in range(20_000)], np.uint64)
    share = [(values >> np.uint64(b) & np.uint64(1)).mean() for b in range(64)]
    assert np.abs(np.array(share) - 0.5).max() < 4.5 * 0.5 / math.sqrt(len(values))


def test_integers_are_uniform_and_in_range() -> None:
    draws = Draws(3, "integer")
    counts = np.bincount([draws.integer(7) for _ in range(21_000)], minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts).pvalue > 0.001
    assert {draws.integer(1) for _ in range(10)} == {0}


def test_uniform_stays_in_the_range_it_is_given() -> None:
    draws = Draws(4, "range")
    sample = np.array([draws.uniform(-2.0, 3.0) for _ in range(5_000)])
    assert_distributed(sample, stats.uniform(-2.0, 5.0).cdf)


def test_normal_draws_are_standard_normal() -> None:
    draws = Draws(5, "normal")
    assert_distributed([draws.normal() for _ in range(20_000)], stats.norm.cdf)


@pytest.mark.parametrize("a", [0.1, 0.2, 0.8, 1.0, 2.5, 8.0])
def test_beta_draws_follow_beta(a: float) -> None:
    draws = Draws(6, f"beta {a}")
    assert_distributed([draws.beta(a) for _ in range(10_000)], stats.beta(a, a).cdf)


@given(st.integers(0, 200), u64)
def test_a_permutation_holds_each_index_once(n: int, seed: int) -> None:
    assert sorted(permutation(n, seed).tolist()) == list(range(n))


def test_permutations_of_small_sets_are_all_equally_likely() -> None:
    ranks = [tuple(permutation(4, hash64("p", i)).tolist()) for i in range(12_000)]
    counts = list({r: ranks.count(r) for r in set(ranks)}.values())
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001
