"""Who computes what of a step: a global batch is cut into micro-batches, and each rank has a run of them.

The micro-batch is the grain: its rows, its random draws and its weight in the step don't depend on the number of ranks. Ranks may
have different numbers of micro-batches, and the last micro-batch may be smaller.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The micro-batches of one rank in every global batch. batch: rows of all ranks together; micro: rows of a micro-batch.

    Both are even, so that the two views of a mixed pair are in one micro-batch.
    """

    batch: int
    micro: int
    rank: int = 0
    ranks: int = 1

    @property
    def numbers(self) -> range:
        """Which of the global batch's micro-batches are this rank's: in order, and as many as the other ranks have, or one
        less or more."""
        count = micro_batches(self.batch, self.micro)
        return range(self.rank * count // self.ranks, (self.rank + 1) * count // self.ranks)

    @property
    def start(self) -> int:
        """First of its rows in the global batch."""
        return self.numbers.start * self.micro

    @property
    def rows(self) -> int:
        return min(self.batch, self.numbers.stop * self.micro) - self.start

    @property
    def weight(self) -> float:
        """Rows of this rank over those of an even share: the mean over ranks of means weighted so is the mean over rows."""
        return self.rows * self.ranks / self.batch

    def divisor(self, rows: int) -> float:
        """What divides the loss of a micro-batch of so many rows, a mean over rows: then the sum over this rank's micro-batches,
        averaged over ranks, is the mean over the global batch. Their number, where the shares are even."""
        return self.batch / (rows * self.ranks)


def micro_batches(batch: int, micro: int) -> int:
    """How many a global batch has."""
    return -(-batch // micro)


def largest(batch: int, micro: int, ranks: int) -> int:
    """Rows of the rank that has most."""
    return max(Share(batch, micro, rank, ranks).rows for rank in range(ranks))


def even_grain(batch: int, ranks: int) -> int:
    """Rows of a micro-batch with which each rank has one: batch / ranks; where that is not even the next even number with which
    none goes without. Both `batch` and the result are even; batch >= 2 * ranks."""
    above = -(-batch // (2 * ranks)) * 2
    return above if micro_batches(batch, above) >= ranks else above - 2
