"""Mixing is a field of the view: who is mixed with whom, how, and how much, as pure functions of the seeds.

Views come in groups of G (`recipe.mix_group`). For each group a seeded permutation of a block puts its samples into
quads, and the three perfect matchings of a quad give the partners in the group's views: four decoded images serve all
views of a group, each with another partner every time. A pair shares mode, lambda and box and is trained on in both
directions, so that lambda and box have timm's marginal distribution (one draw and a flip of the batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory
from cskd.seeds import Draws, hash64, permutation, view_seeds

NONE, MIXUP, CUTMIX = 0, 1, 2
MODES = {NONE: "unmixed", MIXUP: "mixup", CUTMIX: "cutmix"}  # in words
ONE = 65536  # lambda is stored in units of 1 / ONE
UNMIXED = (NONE, 0, (0, 0, 0, 0))
MATCHINGS = np.array([[1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])  # [matching, place in the quad] -> partner's place


@dataclass(frozen=True)
class Mixing:
    """Mixing fields of N samples of one block in one view, in block order.

    partner: int32 [N], position in the block, -1 where unmixed. mode: uint8 [N]. lam: uint16 [N], share of the sample's
    own pixels and label in 1/65536, 0 where unmixed (see `own_share`); of a CutMix it is 1 minus the box's share of the
    area. box: uint16 [N, 4], top, bottom, left, right of the pasted part; zeros unless CutMix.
    """

    partner: NDArray[np.int32]
    mode: NDArray[np.uint8]
    lam: NDArray[np.uint16]
    box: NDArray[np.uint16]


def quads(n: int, recipe: RecipeConfig, inventory_id: str, block: int, group: int) -> NDArray[np.int64]:
    """Positions of a block's samples in the order of its quads: int64 [n]; the last n % 4 are left over.

    Row q of `order[: n // 4 * 4].reshape(-1, 4)` is quad q. The same for every view of a group.
    """
    return permutation(n, hash64("quads", recipe.seed, inventory_id, block, group))


def partners(order: NDArray[np.int64], recipe: RecipeConfig, view: int) -> NDArray[np.int32]:
    """Each sample's partner in one view, whether or not the pair is mixed: int32 [n], -1 for left-overs.

    Args:    order int64 [n] from `quads` of the view's group.
    """
    partner = np.full(len(order), -1, np.int32)
    quad = order[: len(order) // 4 * 4].reshape(-1, 4)
    partner[quad] = quad[:, MATCHINGS[view % recipe.mix_group]]
    return partner


def mixing(
    seeds: NDArray[np.uint64], order: NDArray[np.int64], bad: NDArray[np.bool_], recipe: RecipeConfig, view: int
) -> Mixing:
    """Partners, modes, lambdas and boxes of one block in one view.

    Args:    seeds uint64 [N] of this view; order from `quads` of the view's group; bad [N], quarantined samples, whose
             partners stay unmixed; view >= 0.
    Returns: Mixing, in block order.
    """
    n = len(seeds)
    partner = partners(order, recipe, view) if recipe.mixes else np.full(n, -1, np.int32)
    mode, lam, box = np.zeros(n, np.uint8), np.zeros(n, np.uint16), np.zeros((n, 4), np.uint16)
    if recipe.mixes:
        alone = bad | (bad[partner] & (partner >= 0))
        partner[alone] = -1
        for i in np.flatnonzero((partner >= 0) & (np.arange(n) < partner)):
            j = partner[i]
            mode[i], lam[i], box[i] = pair_params(int(seeds[i]), int(seeds[j]), recipe)
            mode[j], lam[j], box[j] = mode[i], lam[i], box[i]
        partner[mode == NONE] = -1
    return Mixing(partner, mode, lam, box)


def pair_params(seed_a: int, seed_b: int, recipe: RecipeConfig) -> tuple[int, int, tuple[int, int, int, int]]:
    """Mode, lambda (1/65536) and box of one pair; symmetric in the two seeds. Distributions as in timm's Mixup."""
    draws = Draws(hash64(min(seed_a, seed_b), max(seed_a, seed_b)), "mix")
    if draws.uniform() >= recipe.mix_prob:
        return UNMIXED
    both = recipe.mixup > 0 and recipe.cutmix > 0
    cut = draws.uniform() < recipe.mix_switch if both else recipe.cutmix > 0
    lam = draws.beta(recipe.cutmix if cut else recipe.mixup)
    if not cut:
        fixed = round(lam * ONE)
        return (MIXUP, fixed, (0, 0, 0, 0)) if fixed < ONE else UNMIXED
    size = recipe.size
    side = int(size * (1.0 - lam) ** 0.5)
    row, column = draws.integer(size), draws.integer(size)
    top, bottom = max(0, row - side // 2), min(size, row + side // 2)
    left, right = max(0, column - side // 2), min(size, column + side // 2)
    area = (bottom - top) * (right - left)
    fixed = round((1.0 - area / (size * size)) * ONE)
    return (CUTMIX, fixed, (top, bottom, left, right)) if fixed < ONE else UNMIXED


def own_share(mode: NDArray[np.uint8], lam: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The sample's own share of pixels and label: float32 [N] in [0, 1], 1 where unmixed."""
    return np.where(mode == NONE, 1.0, lam / ONE).astype(np.float32)


def drawn_fields(
    inventory: Inventory, recipe: RecipeConfig, block: int, view: int, bad: NDArray[np.bool_]
) -> dict[str, NDArray[Any]]:
    """What the recipe says of one view of one block: 'seed', 'partner', 'mode', 'lam', 'box' (see `Mixing`).

    Args:    bad bool [n], the quarantined samples of the block, which has n samples.
    Returns: arrays of n rows, in block order.
    """
    first, stop = inventory.block_range(block)
    seeds = view_seeds(recipe.seed, inventory.id, inventory.key_hash[first:stop], view)
    order = quads(stop - first, recipe, inventory.id, block, view // recipe.mix_group)
    m = mixing(seeds, order, bad, recipe, view)
    return {"seed": seeds, "partner": m.partner, "mode": m.mode, "lam": m.lam, "box": m.box}
