"""Views: parameters from a seed, pixels from parameters, mixing from pairs."""

from __future__ import annotations

import json
import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from cskd.config import RecipeConfig, to_dict
from cskd.errors import ConfigError
from cskd.views.mix_pixels import InputMaker, _mix_batch, mix_pixels, normalise
from cskd.views.mixing import CUTMIX, MIXUP, NONE, ONE, own_share, pair_params
from cskd.views.ops import apply, apply_op
from cskd.views.randaugment import TIMM_OPERATIONS, Op, argument_of
from cskd.views.recipe import Box, ViewParams, describe, sample_params
from tests.distributions import assert_same_distribution

RESIZED = RecipeConfig(size=32)
PADDED = RecipeConfig(size=32, crop="padded", padding=4)
DEIT = RecipeConfig(size=224, randaugment="rand-m9-mstd0.5-inc1", erase=0.25)
STRONG = RecipeConfig(size=32, randaugment="rand-m9-mstd0.5-inc1-n4-p1", erase=1.0, erase_count=3)
JITTERED = RecipeConfig(size=32, crop="padded", color_jitter=0.4, erase=0.5)


def numpy_state() -> np.ndarray:
    """Of numpy's global generator."""
    state = np.random.get_state(legacy=False)["state"]["key"]
    assert isinstance(state, np.ndarray)
    return state


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (32, 32), (500, 375)])
@pytest.mark.parametrize("recipe", [RESIZED, PADDED, RecipeConfig(size=32, crop="center"), STRONG, JITTERED])
def test_every_image_shape_gives_a_view_of_the_recipe_size(shape: tuple[int, int], recipe: RecipeConfig) -> None:
    for seed in range(50):
        params = sample_params(seed, *shape, recipe)
        view = apply(image(*shape), params)
        assert view.shape == (32, 32, 3)
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous


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


@pytest.mark.parametrize(("height", "width"), [(375, 500), (400, 100)])  # the second needs the centre crop at times
def test_resized_crops_are_timms_in_area_ratio_and_place(height: int, width: int) -> None:
    blank = Image.new("L", (width, height))
    random.seed(0)
    timms = [RandomResizedCropAndInterpolation.get_params(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(20_000)]
    boxes = [sample_params(seed, height, width, RESIZED).crop for seed in range(20_000)]
    ours = np.array([(b.top, b.left, b.height, b.width) for b in boxes], np.float64)
    for title, of in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: np.log(b[:, 3] / b[:, 2]),
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "place": lambda b: b[:, 0] / (height + 1 - b[:, 2]),
    }.items():
        assert_same_distribution(of(ours), of(np.array(timms, np.float64)), title)


def test_half_of_the_views_are_flipped() -> None:
    flips = [sample_params(seed, 32, 32, PADDED).flip for seed in range(4000)]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.03)


def test_a_view_neither_reads_nor_moves_any_global_generator() -> None:
    source, views = image(60, 50), []
    for state in (1, 2):
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        before = random.getstate(), numpy_state().copy(), torch.get_rng_state().clone()
        views.append([apply(source, sample_params(seed, 60, 50, r)) for seed in range(60) for r in (STRONG, JITTERED)])
        assert random.getstate() == before[0]
        assert np.array_equal(numpy_state(), before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
    assert all(np.array_equal(a, b) for a, b in zip(*views, strict=True))


def test_a_view_leaves_the_image_as_it_is_and_needs_no_right_to_write_it() -> None:
    source = image(32, 32)
    before = source.copy()
    source.flags.writeable = False
    for seed in range(100):
        for recipe in (STRONG, JITTERED, RecipeConfig(size=32, crop="center"), RecipeConfig(size=32, erase=1.0)):
            view = apply(source, sample_params(seed, 32, 32, recipe))
            view[0, 0, 0] ^= 1  # a view is its caller's to write on
    assert np.array_equal(source, before)


def test_one_decision_moves_no_other() -> None:
    plain, all_on = RecipeConfig(size=32), STRONG
    for seed in range(200):
        a, b = sample_params(seed, 80, 70, plain), sample_params(seed, 80, 70, all_on)
        assert (a.crop, a.flip) == (b.crop, b.flip)
        c = sample_params(seed, 80, 70, RecipeConfig(size=32, erase=1.0, erase_count=3))
        assert c.erasures == b.erasures


def test_a_seed_keeps_its_meaning() -> None:
    """Golden: when one of these changes, RECIPE_CODE_VERSION must, and no cache made before can be replayed."""
    lines = [describe(sample_params(seed, 375, 500, DEIT)) for seed in range(7)]
    assert lines == GOLDEN_LINES


def test_operations_reckoned_here_keep_their_pixels() -> None:
    """Golden, for every version of numpy and Pillow: all operations but Rotate, which is Pillow's, and the resizing."""
    skewed = ((np.arange(64 * 64 * 3) * 40503 >> 4) % 256) ** 2 // 400 + 20
    view, sums = skewed.astype(np.uint8).reshape(64, 64, 3), {}
    for name in TIMM_OPERATIONS:
        if name != "Rotate":
            sums[name] = zlib.crc32(
                apply_op(view, Op(name, argument_of(name, 9.0, True, True)), (124, 116, 104)).tobytes()
            )
    erasures = sample_params(4, 64, 64, RecipeConfig(size=64, erase=1.0)).erasures
    sums["erase"] = zlib.crc32(apply(view, ViewParams(64, Box(0, 0, 64, 64), 0, False, erasures=erasures)).tobytes())
    assert sums == GOLDEN_SUMS


def test_a_description_names_all_that_was_done() -> None:
    params = ViewParams(
        224,
        Box(1, 2, 100, 200),
        0,
        True,
        ops=(Op("Rotate", -27.3), Op("Invert", None)),
        erasures=sample_params(0, 9, 9, RecipeConfig(size=32, erase=1.0)).erasures,
    )
    text = describe(params)
    e = params.erasures[0]
    assert text == (
        f"crop 100x200 at (1, 2) to 224, flip, Rotate -27.3, Invert, erase {e.height}x{e.width} at ({e.top}, {e.left})"
    )


def test_a_recipe_is_plain_data() -> None:
    for recipe in (DEIT, STRONG, JITTERED):
        assert RecipeConfig(**json.loads(json.dumps(to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("erase", 1.5),
        ("erase_count", 0),
        ("color_jitter", -0.1),
        ("mean", [0.5, 0.5]),
        ("mean", [124, 116, 104]),
        ("std", [0.0, 0.2, 0.2]),
        ("randaugment", "rand-m9-w0"),
    ],
)
def test_a_value_that_is_not_usable_is_refused_by_its_key(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"recipe.{field} is ") as error:
        RecipeConfig(**{field: value})
    assert "expected" in str(error.value)


def test_a_pair_draws_the_same_mixing_from_either_side() -> None:
    for a in range(100):
        assert pair_params(a, a + 7, RESIZED) == pair_params(a + 7, a, RESIZED)


def test_modes_and_lambdas_follow_the_recipe() -> None:
    recipe = RecipeConfig(size=32, mix_prob=0.8)
    drawn = [pair_params(a, a + 10**6, recipe) for a in range(6000)]
    mode = np.array([d[0] for d in drawn])
    assert np.mean(mode == NONE) == pytest.approx(0.2, abs=0.025)
    assert np.mean(mode == CUTMIX) == pytest.approx(0.4, abs=0.025)
    lam = np.array([d[1] for d in drawn])[mode == MIXUP] / ONE
    assert lam.mean() == pytest.approx(0.5, abs=0.02)
    assert lam.var() == pytest.approx(0.25 / (2 * 0.8 + 1), abs=0.01)  # of Beta(0.8, 0.8)


def test_a_cutmix_lambda_is_what_its_box_leaves() -> None:
    recipe = RecipeConfig(size=32, mixup=0.0)
    for a in range(500):
        mode, lam, (top, bottom, left, right) = pair_params(a, a + 1, recipe)
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


def mixing_batch(n: int = 24, size: int = 40) -> dict[str, torch.Tensor]:
    """Pairs of all modes, with boxes that touch borders or are empty, as `cskd.loading.stage2` delivers them."""
    drawn = [pair_params(a, a + 1, RecipeConfig(size=size, mix_prob=0.8)) for a in range(n // 2)]
    drawn[0], drawn[1] = (CUTMIX, 65000, (0, size, 0, 1)), (CUTMIX, 65535, (3, 3, 5, 5))
    mode, lam, box = (torch.tensor([field for field in fields for _ in (0, 1)]) for fields in zip(*drawn, strict=True))
    mate = torch.arange(n) ^ 1
    return {
        "pixels": torch.from_numpy(np.stack([image(size, size, s) for s in range(n)])),
        "partner": torch.where(mode == NONE, torch.arange(n), mate),
        "mode": mode.to(torch.uint8),
        "lam": lam,
        "box": box,
    }


def test_a_batch_mixed_row_by_row_has_the_bits_of_one_mixed_at_once() -> None:
    batch = mixing_batch()
    assert set(batch["mode"].tolist()) == {NONE, MIXUP, CUTMIX}
    at_once = _mix_batch(*batch.values())
    by_rows = mix_pixels(*batch.values())
    assert torch.equal(by_rows.view(torch.int32), at_once.view(torch.int32))
    assert by_rows.is_contiguous(memory_format=torch.channels_last)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    fed = InputMaker(mean, std, torch.device("cpu")).mixed(batch)
    assert torch.equal(fed.view(torch.int32), normalise(at_once, mean, std).view(torch.int32))
    assert fed.is_contiguous(memory_format=torch.channels_last)


def test_every_lambda_mixes_row_by_row_to_the_bits_of_mixing_at_once() -> None:
    """With steps that round, the two would differ where a CPU multiplies and adds at once."""
    n = 2048
    views = torch.from_numpy(np.stack([image(3, 3, s) for s in range(n)]))
    fields = (torch.arange(n) ^ 1, torch.full((n,), MIXUP, dtype=torch.uint8))
    for lam in torch.arange(ONE).split(n):
        at_once = _mix_batch(views, *fields, lam, torch.zeros((n, 4), dtype=torch.int64))
        by_rows = mix_pixels(views, *fields, lam, torch.zeros((n, 4), dtype=torch.int64))
        assert torch.equal(by_rows.view(torch.int32), at_once.view(torch.int32))


def test_own_share_is_one_where_unmixed() -> None:
    share = own_share(np.array([NONE, MIXUP], np.uint8), np.array([0, 16384], np.uint16))
    assert share.tolist() == [1.0, 0.25]


def test_normalise_is_timms_formula() -> None:
    x = torch.arange(0, 256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    expected = (x / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(normalise(x, mean, std), expected, atol=1e-6)


GOLDEN_LINES = [
    "crop 167x195 at (12, 71) to 224, Color 0.166, erase 60x51 at (147, 140)",
    "crop 284x281 at (15, 64) to 224, flip, AutoContrast",
    "crop 217x250 at (17, 155) to 224, AutoContrast, erase 54x127 at (104, 37)",
    "crop 372x413 at (0, 58) to 224, flip, Contrast 1.85, Color 0.167",
    "crop 223x174 at (115, 299) to 224",
    "crop 245x219 at (63, 74) to 224, flip, SolarizeAdd 99",
    "crop 145x121 at (11, 38) to 224, flip, ShearY -0.259, erase 88x179 at (17, 13)",
]
GOLDEN_SUMS = {
    "AutoContrast": 0x86E4F48C,
    "Equalize": 0x25E59280,
    "Invert": 0x77E1A48E,
    "Posterize": 0x3C7D0068,
    "Solarize": 0x396A2262,
    "SolarizeAdd": 0x02062EC7,
    "Color": 0x5FE45E48,
    "Contrast": 0x7014F17B,
    "Brightness": 0x0D03646E,
    "Sharpness": 0xA964CA45,
    "ShearX": 0x8969CB37,
    "ShearY": 0x67EFBE0C,
    "TranslateX": 0xFFD20C39,
    "TranslateY": 0x5F91BDE6,
    "erase": 0x6887890C,
}
