"""Random erasing: timm's rectangles, as often, and timm's noise as the uint8 that normalising turns back into it."""

from __future__ import annotations

import random
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import timm.data.random_erasing as timm_erasing
import torch
from timm.data import create_transform

from cskd.views.erasing import Erasure, _draws16, draw_erasures, erase, noise_tables
from cskd.views.ops import apply
from cskd.views.recipe import Box, ViewParams
from tests.distributions import assert_same_counts, assert_same_distribution

DRAWS = 20_000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_rectangles(prob: float, count: int, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int, int, int]]]:
    """(top, left, height, width) of what timm's transform erases, image by image."""
    transform = create_transform(224, is_training=True, re_prob=prob, re_mode="pixel", re_count=count)
    eraser = transform.transforms[-1]
    assert isinstance(eraser, timm_erasing.RandomErasing) and eraser.per_pixel
    erased: list[tuple[int, int, int, int]] = []

    class Recorder:
        """Stands for the image tensor; keeps the slices that are written."""

        dtype = torch.float32

        def size(self) -> tuple[int, int, int]:
            return 3, 224, 224

        def __setitem__(self, at: Any, _: object) -> None:
            rows, columns = at[1:]
            erased.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))

    monkeypatch.setattr(timm_erasing, "_get_pixels", lambda *_, **__: None)
    random.seed(0)
    images = []
    for _ in range(DRAWS):
        erased.clear()
        eraser(Recorder())
        images.append(list(erased))
    return images


def our_rectangles(prob: float, count: int) -> list[list[tuple[int, int, int, int]]]:
    return [
        [(e.top, e.left, e.height, e.width) for e in draw_erasures(seed, 224, prob, count)] for seed in range(DRAWS)
    ]


def test_rectangles_are_timms_in_area_aspect_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for images in (our_rectangles(1.0, 1), timm_rectangles(1.0, 1, monkeypatch)):
        found.append(np.array([box for boxes in images for box in boxes], np.float64).T)
    (top, left, height, width), (timm_top, timm_left, timm_height, timm_width) = found
    assert_same_distribution(height * width, timm_height * timm_width, "area")
    assert_same_distribution(np.log(height / width), np.log(timm_height / timm_width), "aspect")
    assert_same_distribution(top, timm_top, "top")
    assert_same_distribution(left, timm_left, "left")
    assert_same_distribution(top / (224 - height), timm_top / (224 - timm_height), "place, top to bottom")
    assert (top + height).max() == 224 and (left + width).max() == 224 and top.min() == left.min() == 0


@pytest.mark.parametrize(("prob", "count"), [(0.25, 1), (0.6, 3)])
def test_as_many_rectangles_as_timm_and_as_large(prob: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, timms = our_rectangles(prob, count), timm_rectangles(prob, count, monkeypatch)
    assert_same_counts([len(boxes) for boxes in ours], [len(boxes) for boxes in timms], "rectangles an image")
    our_areas, timm_areas = ([h * w for boxes in images for _, _, h, w in boxes] for images in (ours, timms))
    assert_same_distribution(our_areas, timm_areas, "area")


def test_without_probability_nothing_is_erased() -> None:
    assert all(draw_erasures(seed, 224, 0.0, 1) == () for seed in range(1000))


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_rectangles_lie_inside_small_views_too(size: int) -> None:
    for seed in range(300):
        for e in draw_erasures(seed, size, 1.0, 2):
            assert 0 <= e.top <= e.top + e.height <= size and 0 <= e.left <= e.left + e.width <= size
            erase(np.zeros((size, size, 3), np.uint8), e, MEAN, STD)


def test_noise_tables_are_the_quantiles_of_the_rounded_and_clipped_normal() -> None:
    at = (np.arange(65536) + 0.5) / 65536
    normal = np.array([NormalDist().inv_cdf(p) for p in at.tolist()])
    for table, mean, std in zip(noise_tables(MEAN, STD), MEAN, STD, strict=True):
        expected = np.clip(np.floor(255.0 * (mean + std * normal) + 0.5), 0, 255)
        assert table.shape == (65536,) and table.dtype == np.uint8
        assert np.count_nonzero(table != expected) <= 3
        below, above = NormalDist(255 * mean, 255 * std).cdf(-0.5), 1 - NormalDist(255 * mean, 255 * std).cdf(255.5)
        assert 0.02 < below + above < 0.05


def test_noise_is_standard_normal_where_normalised() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    erase(image, Erasure(0, 0, 300, 300, 12345), MEAN, STD)
    rng = np.random.default_rng(1)
    for channel in range(3):
        timms = rng.standard_normal(90_000)  # what timm puts there, as the uint8 it would come from
        timms = np.clip(np.floor(255 * (MEAN[channel] + STD[channel] * timms) + 0.5), 0, 255)
        assert_same_distribution(image[..., channel].ravel(), timms, f"channel {channel}")
    flat = image.astype(np.float64) - image.mean((0, 1))
    for other in (flat[1:], flat[:, 1:], flat[..., 1:]):  # neighbours below, to the right, of the next channel
        same = flat[: other.shape[0], : other.shape[1], : other.shape[2]]
        assert abs(np.corrcoef(same.ravel(), other.ravel())[0, 1]) < 0.01


def test_sixteen_bit_draws_are_uniform_and_continue_each_other() -> None:
    draws = _draws16(99, 400_000)
    assert draws.dtype == np.uint16
    counts = np.bincount(draws >> 8, minlength=256)
    expected = 400_000 / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 4 * np.sqrt(2 * 255)
    for n in (0, 1, 5, 1000):
        assert np.array_equal(_draws16(99, n), draws[:n])
    assert not np.array_equal(_draws16(100, 1000), draws[:1000])


def test_noise_is_in_the_rectangle_only_and_the_source_is_left_alone() -> None:
    source = np.full((32, 32, 3), 9, np.uint8)
    erasure = Erasure(3, 5, 10, 20, 7)
    params = ViewParams(32, Box(0, 0, 32, 32), 0, False, erasures=(erasure,))
    view = apply(source, params)
    assert (source == 9).all()
    changed = (view != 9).any(axis=-1)
    assert changed[3:13, 5:25].mean() > 0.98
    changed[3:13, 5:25] = False
    assert not changed.any()
    assert np.array_equal(view, apply(source, params))


def test_each_rectangle_has_its_own_noise() -> None:
    states = [e.noise for seed in range(2000) for e in draw_erasures(seed, 224, 1.0, 3)]
    assert len(set(states)) == len(states)
