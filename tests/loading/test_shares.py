"""Promises of the ranks' shares: every row of a global batch is one rank's, and the weighted mean is the mean over rows."""

from __future__ import annotations

import pytest

from cskd.loading.shares import Share, even_grain, largest, micro_batches


@pytest.mark.parametrize(("batch", "micro"), [(64, 16), (64, 10), (64, 64), (2, 2), (30, 4), (6, 2)])
def test_every_row_of_a_batch_is_one_ranks_and_weighs_the_same(batch: int, micro: int) -> None:
    for ranks in range(1, micro_batches(batch, micro) + 1):
        shares = [Share(batch, micro, rank, ranks) for rank in range(ranks)]
        assert [row for s in shares for row in range(s.start, s.start + s.rows)] == list(range(batch))
        assert [number for s in shares for number in s.numbers] == list(range(micro_batches(batch, micro)))
        assert largest(batch, micro, ranks) == max(s.rows for s in shares) and min(s.rows for s in shares) > 0
        assert max(len(s.numbers) for s in shares) - min(len(s.numbers) for s in shares) <= 1
        weights = []  # of a row of each micro-batch, in the mean over ranks of what each rank adds up
        for s in shares:
            rows = [min(micro, batch - number * micro) for number in s.numbers]
            weights += [1 / (s.divisor(n) * n * ranks) for n in rows]
            assert s.weight == pytest.approx(sum(1 / s.divisor(n) for n in rows))
        assert weights == pytest.approx([1 / batch] * micro_batches(batch, micro))


def test_even_shares_are_divided_by_the_number_of_micro_batches() -> None:
    """Exactly: a step of even shares is the same bits as before there were uneven ones."""
    for ranks in (1, 2, 4, 8):
        for count in (1, 2, 3, 5, 7):
            assert Share(6 * ranks * count, 6, 0, ranks).divisor(6) == count


@pytest.mark.parametrize(("batch", "ranks", "grain"), [(64, 1, 64), (64, 4, 16), (64, 3, 22), (8, 3, 2), (6, 3, 2)])
def test_without_a_micro_batch_every_rank_has_one(batch: int, ranks: int, grain: int) -> None:
    assert even_grain(batch, ranks) == grain and micro_batches(batch, grain) >= ranks
