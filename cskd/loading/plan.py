"""The epoch plan: which (sample, view) pairs an epoch feeds, in which order. A pure function, so a resume is an integer.

Two neighbours in the plan are a mixing pair (or two unmixed samples); a batch starts at an even place, so no pair
straddles batches or ranks. Blocks are shuffled, then quads within a window of blocks: reads stay nearly sequential.
`repeats` R: epochs come in runs of R; run s uses views R*s .. R*s+R-1 (wrapped at V), and each of its epochs takes
another 1/R of the quads with all R views. So no view is used twice before all have been used. With `draw: random` every epoch is
a run of its own: it takes the next R views, and 1/R of the quads at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cskd.config import RecipeConfig, TrainConfig
from cskd.errors import PlanError
from cskd.loading.shares import Share
from cskd.loading.sources import ViewSource
from cskd.seeds import hash64, permutation
from cskd.views.mixing import quads

# Rows of a quad in the order that puts each matching's pairs side by side; see `mixing.MATCHINGS`.
PAIRED = np.array([[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2]])


@dataclass(frozen=True)
class PlanSpec:
    """What every epoch's plan depends on, in addition to the epoch.

    bounds: int64 [n_blocks + 1], first sample of each block. bad: bool [n], quarantined samples, never fed. micro: rows of a
    micro-batch; 0: all ranks have even shares of one each. An epoch's order depends on neither `ranks` nor `micro`.
    """

    bounds: NDArray[np.int64]
    bad: NDArray[np.bool_]
    inventory_id: str
    recipe: RecipeConfig
    views: int
    repeats: int
    seed: int
    global_batch: int
    window: int
    ranks: int = 1
    draw: Literal["cover", "random"] = "cover"
    micro: int = 0

    def __post_init__(self) -> None:
        group, views, repeats, batch = self.recipe.mix_group, self.views, self.repeats, self.global_batch
        if group % repeats:
            fits = [r for r in range(1, group + 1) if group % r == 0]
            near = min(fits, key=lambda r: abs(r - repeats))
            raise PlanError(f"train.repeats is {repeats}, which must divide recipe.mix_group {group}; use {near}")
        if views % repeats:
            raise PlanError(
                f"the cache has {views} views and train.repeats is {repeats}, which must divide them; "
                f"cache {-(-views // repeats) * repeats} views or use {max(views // repeats, 1) * repeats} of them"
            )
        step = 2 if self.micro else 2 * self.ranks  # shares of whole micro-batches need not be equal
        if batch % step or batch < 2 * self.ranks:
            near = max(2 * self.ranks, round(batch / step) * step)
            raise PlanError(f"train.global_batch is {batch} on {self.ranks} rank(s): shares must be even; use {near}")
        if self.steps < 1:
            raise PlanError(
                f"an epoch has {self._epoch_items} samples, fewer than train.global_batch {batch}; "
                f"use a batch of at most {self._epoch_items // (2 * self.ranks) * 2 * self.ranks}"
            )

    @classmethod
    def over(cls, source: ViewSource, train: TrainConfig, ranks: int = 1, micro: int = 0) -> PlanSpec:
        """The plan over a cache's images. PlanError where views, repeats, batch and samples do not fit together."""
        return cls(
            bounds=source.inventory.blocks,
            bad=source.quarantined(),
            inventory_id=source.inventory.id,
            recipe=source.recipe,
            views=train.views or source.views,
            repeats=train.repeats,
            seed=train.seed,
            global_batch=train.global_batch,
            window=train.window,
            ranks=ranks,
            draw=train.repeats_draw,
            micro=micro,
        )

    def share(self, rank: int) -> Share:
        """Which rows of every global batch are that rank's."""
        return Share(self.global_batch, self.micro or self.global_batch // self.ranks, rank, self.ranks)

    @property
    def _epoch_items(self) -> int:
        """Samples that every epoch has, whichever quads it takes."""
        sizes = np.diff(self.bounds)
        parts = [0] * self.repeats
        for block, n in enumerate(sizes.tolist()):
            for part in range(self.repeats):
                parts[part] += 4 * len(range((part - block) % self.repeats, n // 4, self.repeats))
            parts[block % self.repeats] += n % 4
        return max(0, (min(parts) - int(self.bad.sum())) * self.repeats)

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch, the same for every epoch; the last partial batch is dropped."""
        return self._epoch_items // self.global_batch


@dataclass(frozen=True)
class EpochPlan:
    """sample int64 [n], index in the inventory; view int32 [n]; ends int64: positions at which a window of blocks ends."""

    sample: NDArray[np.int64]
    view: NDArray[np.int32]
    ends: NDArray[np.int64]


def run_of(draw: str, repeats: int, epoch: int) -> int:
    """The run that an epoch belongs to: `repeats` epochs that share their views."""
    return epoch if draw == "random" else epoch // repeats


def views_needed(train: TrainConfig) -> int:
    """Views of an image that all epochs take, where none is taken twice."""
    return (run_of(train.repeats_draw, train.repeats, train.epochs - 1) + 1) * train.repeats


def epoch_views(spec: PlanSpec, epoch: int) -> list[int]:
    """The views that epoch feeds."""
    run = run_of(spec.draw, spec.repeats, epoch)
    return [(run * spec.repeats + r) % spec.views for r in range(spec.repeats)]


def epoch_plan(spec: PlanSpec, epoch: int) -> EpochPlan:
    """The ordered (sample, view) pairs of one epoch, cut to `spec.steps` whole batches."""
    views = epoch_views(spec, epoch)
    blocks = permutation(len(spec.bounds) - 1, hash64("blocks", spec.seed, epoch))
    samples, seen, ends = [], [], []
    carry = np.empty((0, 2), np.int64)  # at most one unpaired (sample, view), handed on to the next window
    for first in range(0, len(blocks), spec.window):
        pairs, singles = _window(spec, epoch, views, blocks[first : first + spec.window])
        singles = np.concatenate([carry, singles])
        even = len(singles) // 2 * 2
        carry = singles[even:]
        items = np.concatenate([pairs.reshape(-1, 2), singles[:even]])
        samples.append(items[:, 0])
        seen.append(items[:, 1].astype(np.int32))
        ends.append(len(items))
    if len(carry):  # the very last one; kept, so that every sample is counted before the cut to whole batches
        samples.append(carry[:, 0])
        seen.append(carry[:, 1].astype(np.int32))
        ends[-1] += 1
    n = spec.steps * spec.global_batch
    return EpochPlan(np.concatenate(samples)[:n], np.concatenate(seen)[:n], np.minimum(np.cumsum(ends), n))


def _window(
    spec: PlanSpec, epoch: int, views: list[int], blocks: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs int64 [P, 2, 2] of (sample, view), their quads shuffled over the window, and singles int64 [S, 2]."""
    group = views[0] // spec.recipe.mix_group
    part, run = epoch % spec.repeats, run_of(spec.draw, spec.repeats, epoch)
    quad_rows, singles = [], []
    for block in blocks.tolist():
        start, n = int(spec.bounds[block]), int(spec.bounds[block + 1] - spec.bounds[block])
        order = quads(n, spec.recipe, spec.inventory_id, block, group) + start
        rows = order[: n // 4 * 4].reshape(-1, 4)
        if spec.repeats > 1:  # which quads belong to this part of the run; the same split for all parts of it
            rows = rows[permutation(len(rows), hash64("parts", spec.seed, run, block))][
                (part - block) % spec.repeats :: spec.repeats
            ]
        quad_rows.append(rows)
        if block % spec.repeats == part:
            singles.append(order[n // 4 * 4 :])
    rows = np.concatenate(quad_rows)
    rows = rows[permutation(len(rows), hash64("quads in window", spec.seed, epoch, int(blocks[0])))]
    by_view = [np.stack([rows[:, PAIRED[v % spec.recipe.mix_group]], np.full(rows.shape, v)], axis=-1) for v in views]
    pairs = np.stack(by_view, axis=1).reshape(-1, 2, 2)  # [quads x views x 2, pair, (sample, view)]
    left = np.concatenate(singles) if singles else np.empty(0, np.int64)
    alone = np.stack([np.repeat(left, len(views)), np.tile(np.array(views, np.int64), len(left))], axis=-1)
    bad = spec.bad[pairs[:, :, 0]]
    widowed = pairs[bad.any(axis=1)].reshape(-1, 2)
    alone = np.concatenate([alone, widowed])
    return pairs[~bad.any(axis=1)], alone[~spec.bad[alone[:, 0]]]


def rank_share(plan: EpochPlan, share: Share) -> EpochPlan:
    """The rows of one rank: its contiguous share of every batch."""
    return batch_part(plan, share.batch, share.start, share.start + share.rows)


def batch_part(plan: EpochPlan, global_batch: int, first: int, stop: int) -> EpochPlan:
    """Rows first .. stop-1 of every batch."""
    sample = plan.sample.reshape(-1, global_batch)[:, first:stop].reshape(-1)
    view = plan.view.reshape(-1, global_batch)[:, first:stop].reshape(-1)
    return EpochPlan(sample, view, np.minimum(-(-plan.ends // global_batch) * (stop - first), len(sample)))
