"""Mixing as a field of the view has the marginal distributions of timm's batch mode."""

from __future__ import annotations

import numpy as np
import pytest
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from cskd.config import RecipeConfig
from cskd.seeds import mix64
from cskd.views.mixing import CUTMIX, MIXUP, NONE, ONE, mixing, pair_params, partners, quads
from tests.distributions import assert_same_counts, assert_same_distribution

DRAWS = 20_000
SIZE = 224
Drawn = list[tuple[int, float, tuple[int, ...]]]  # mode, share of the own image, box (top, bottom, left, right)


def ours(recipe: RecipeConfig) -> Drawn:
    drawn = [pair_params(mix64(2 * i), mix64(2 * i + 1), recipe) for i in range(DRAWS)]
    return [(mode, lam / ONE if mode else 1.0, box) for mode, lam, box in drawn]


def timms(recipe: RecipeConfig) -> Drawn:
    """As `Mixup._mix_batch` draws for one batch: parameters, then for CutMix the box and its corrected lambda. A lambda
    is rounded as ours is, and where it is 1 (as with a box without area) nothing is mixed."""
    mixer = Mixup(recipe.mixup, recipe.cutmix, prob=recipe.mix_prob, switch_prob=recipe.mix_switch)
    np.random.seed(0)
    drawn: Drawn = []
    for _ in range(DRAWS):
        lam, cut = mixer._params_per_batch()
        box: tuple[int, ...] = (0, 0, 0, 0)
        if cut and lam < 1.0:
            box, lam = cutmix_bbox_and_lam((2, 3, SIZE, SIZE), lam)
        mode = NONE if round(lam * ONE) == ONE else CUTMIX if cut else MIXUP
        drawn.append((mode, round(lam * ONE) / ONE, tuple(int(v) for v in box)))
    return drawn


@pytest.mark.parametrize(
    "recipe",
    [
        RecipeConfig(),
        RecipeConfig(mixup=0.2, cutmix=0.4, mix_prob=0.7, mix_switch=0.3),
        RecipeConfig(mixup=2.0, cutmix=0.0),
    ],
)
def test_modes_lambdas_and_boxes_are_timms(recipe: RecipeConfig) -> None:
    a, b = ours(recipe), timms(recipe)
    assert_same_counts([mode for mode, _, _ in a], [mode for mode, _, _ in b], "modes")
    for kind, name in ((MIXUP, "mixup"), (CUTMIX, "cutmix")):
        if getattr(recipe, name) == 0:
            assert not any(m == kind for m, _, _ in a)
            continue
        of_a, of_b = ([lam for m, lam, _ in drawn if m == kind] for drawn in (a, b))
        assert_same_distribution(of_a, of_b, f"lambda of {name}")
    if recipe.cutmix:
        boxes = [np.array([box for m, _, box in drawn if m == CUTMIX]) for drawn in (a, b)]
        for i, edge in enumerate(("top", "bottom", "left", "right")):
            assert_same_distribution(boxes[0][:, i], boxes[1][:, i], edge)
        areas = [(box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) for box in boxes]
        assert_same_distribution(areas[0], areas[1], "area")


@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 41])
def test_every_member_of_a_quad_meets_each_other_once_and_left_overs_stay_alone(n: int) -> None:
    recipe = RecipeConfig()
    order = quads(n, recipe, "id", 2, 5)
    met = np.stack([partners(order, recipe, view) for view in (15, 16, 17)])
    alone = order[n // 4 * 4 :]
    assert (met[:, alone] == -1).all()
    for quad in order[: n // 4 * 4].reshape(-1, 4):
        for member in quad:
            assert sorted([*met[:, member], member]) == sorted(quad)


def test_a_pair_shares_its_fields_and_a_bad_sample_leaves_its_partner_alone() -> None:
    recipe, n = RecipeConfig(), 40
    seeds = np.array([mix64(i) for i in range(n)], np.uint64)
    bad = np.isin(np.arange(n), [7, 21])
    order = quads(n, recipe, "id", 0, 0)
    m, whole = mixing(seeds, order, bad, recipe, 0), mixing(seeds, order, np.zeros(n, bool), recipe, 0)
    assert (m.partner[bad] == -1).all() and not np.isin(m.partner, [7, 21]).any()
    widowed = np.isin(whole.partner, [7, 21])
    assert widowed.sum() == 2 and (m.mode[widowed | bad] == NONE).all()
    rest = ~(widowed | bad)
    for name in ("partner", "mode", "lam", "box"):
        assert np.array_equal(getattr(m, name)[rest], getattr(whole, name)[rest])
    mixed = np.flatnonzero(m.mode)
    mates = m.partner[mixed]
    assert np.array_equal(m.partner[mates], mixed)
    assert all(np.array_equal(a[mixed], a[mates]) for a in (m.mode, m.lam, m.box))
