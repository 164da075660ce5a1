"""Views: parameters from a seed, pixels from parameters, mixing from pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cskd.augment.device import mix_pixels, normalise
from cskd.augment.mixing import CUTMIX, MIXUP, NONE, ONE, own_share, pair_params
from cskd.augment.ops import apply
from cskd.augment.recipe import Box, ViewParams, sample_params
from cskd.config import RecipeConfig

RESIZED = RecipeConfig(size=32)
PADDED = RecipeConfig(size=32, crop="padded", padding=4)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (32, 32), (500, 375)])
@pytest.mark.parametrize("recipe", [RESIZED, PADDED, RecipeConfig(size=32, crop="center")])
def test_every_image_shape_gives_a_view_of_the_recipe_size(shape: tuple[int, int], recipe: RecipeConfig) -> None:
    for seed in range(50):
        params = sample_params(seed, *shape, recipe)
        view = apply(image(*shape), params)
        assert view.shape == (32, 32, 3)
        assert view.dtype == np.uint8


def test_a_padded_crop_is_a_shifted_window_with_zeros_outside() -> None:
    source = image(32, 32)
    view = apply(source, ViewParams(32, Box(1, 6, 32, 32), 4, False))
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = source
    assert np.array_equal(view, padded[1:33, 6:38])
    flipped = apply(source, ViewParams(32, Box(1, 6, 32, 32), 4, True))
    assert np.array_equal(flipped, view[:, ::-1])


def test_a_crop_of_the_view_size_keeps_its_pixels() -> None:
    source = image(50, 60)
    assert np.array_equal(apply(source, ViewParams(32, Box(3, 5, 32, 32), 0, False)), source[3:35, 5:37])


def test_resized_crops_have_torchvisions_area_and_ratio() -> None:
    boxes = [sample_params(seed, 400, 400, RESIZED).crop for seed in range(4000)]
    area = np.array([b.height * b.width / (400 * 400) for b in boxes])
    ratio = np.log([b.width / b.height for b in boxes])
    assert 0.07 < area.min() < 0.09
    assert area.max() <= 1.0
    assert abs(ratio).max() < np.log(4 / 3) + 0.05
    assert abs(np.mean(ratio)) < 0.01


def test_a_pair_draws_the_same_mixing_from_either_side() -> None:
    for a in range(100):
        assert pair_params(a, a + 7, RESIZED) == pair_params(a + 7, a, RESIZED)


def test_modes_and_lambdas_follow_the_recipe() -> None:
    drawn = [pair_params(a, a + 10**6, RecipeConfig(size=32, mix_prob=0.8)) for a in range(6000)]
    mode = np.array([d[0] for d in drawn])
    assert np.mean(mode == NONE) == pytest.approx(0.2, abs=0.025)
    assert np.mean(mode == CUTMIX) == pytest.approx(0.4, abs=0.025)
    lam = np.array([d[1] for d in drawn])[mode == MIXUP] / ONE
    assert lam.mean() == pytest.approx(0.5, abs=0.02)
    assert lam.var() == pytest.approx(0.25 / (2 * 0.8 + 1), abs=0.01)  # of Beta(0.8, 0.8)


def test_a_cutmix_lambda_is_what_its_box_leaves() -> None:
    for a in range(500):
        mode, lam, (top, bottom, left, right) = pair_params(a, a + 1, RecipeConfig(size=32, mixup=0.0))
        if mode == CUTMIX:
            assert lam == round((1 - (bottom - top) * (right - left) / 1024) * ONE)


def test_mixing_on_the_device_is_the_formula() -> None:
    views = torch.from_numpy(np.stack([image(8, 8, s) for s in range(6)]))
    partner = torch.tensor([1, 0, 3, 2, 4, 5])
    mode = torch.tensor([MIXUP, MIXUP, CUTMIX, CUTMIX, NONE, NONE], dtype=torch.uint8)
    lam = torch.tensor([16384, 16384, 49152, 49152, 0, 0])
    box = torch.tensor([[0, 0, 0, 0]] * 2 + [[2, 6, 1, 5]] * 2 + [[0, 0, 0, 0]] * 2)
    mixed = mix_pixels(views, partner, mode, lam, box).permute(0, 2, 3, 1)
    x = views.double()
    assert torch.equal(mixed[0].double(), (0.25 * x[0] + 0.75 * x[1]))
    cut = x[2].clone()
    cut[2:6, 1:5] = x[3][2:6, 1:5]
    assert torch.equal(mixed[2].double(), cut)
    assert torch.equal(mixed[4].double(), x[4])


def test_own_share_is_one_where_unmixed() -> None:
    share = own_share(np.array([NONE, MIXUP], np.uint8), np.array([0, 16384], np.uint16))
    assert share.tolist() == [1.0, 0.25]


def test_normalise_is_timms_formula() -> None:
    x = torch.arange(0, 256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    expected = (x / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(normalise(x, mean, std), expected, atol=1e-6)
