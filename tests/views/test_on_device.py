"""Views made of batches by torch operations: byte for byte those of the CPU's path, by all operations and recipes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device_views import Work
from cskd.config import RecipeConfig
from cskd.views.digest import pixel_crc
from cskd.views.mix_pixels import _mix_batch, mix_pixels
from cskd.views.mixing import pair_params
from cskd.views.on_device import make_views, pixel_crcs, plan_views, resizing
from cskd.views.ops import apply
from cskd.views.randaugment import TIMM_OPERATIONS, Op, argument_of
from cskd.views.recipe import Box, ViewParams, describe, sample_params

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
RAND = "rand-m9-mstd0.5-inc1"
RECIPES = {
    "resized": RecipeConfig(size=32),
    "padded": RecipeConfig(size=32, crop="padded", padding=4),
    "center": RecipeConfig(size=31, crop="center"),
    "deit": RecipeConfig(size=64, randaugment=RAND, erase=0.25),
    "strong": RecipeConfig(size=33, randaugment=f"{RAND}-n4-p1", erase=1.0, erase_count=3),
    "falling": RecipeConfig(size=32, randaugment="rand-m5-mstd2-n3", erase=0.5, mean=[0.5] * 3, std=[0.3, 0.2, 0.1]),
    "jittered": RecipeConfig(size=32, crop="padded", color_jitter=0.4, erase=0.5),
    "tiny": RecipeConfig(size=3, randaugment=f"{RAND}-n3-p1", erase=1.0),
}
SHAPES = [(1, 1), (2, 3), (3, 200), (200, 3), (32, 32), (64, 64), (80, 70), (150, 90), (333, 250)]
ALLOWED = """index_select gather index_copy_ copy_ cat stack where arange zeros new_zeros full_like ones_like
repeat_interleave _to_copy add add_ sub sub_ rsub mul mul_ div floor_divide remainder __lshift__ __rshift__ bitwise_and
bitwise_xor bitwise_xor_ bitwise_or sum cumsum scatter_add_ amin amax minimum all bmm floor floor_ ceil clamp clamp_ eq ge gt
le lt"""


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Flat areas of strong colours and a little noise: clips, repeats values, and has edges."""
    draws = np.random.default_rng(seed)
    areas = draws.integers(-40, 296, (height // 9 + 1, width // 7 + 1, 3)).repeat(9, 0).repeat(7, 1)[:height, :width]
    return (areas + draws.integers(-6, 7, (height, width, 3))).clip(0, 255).astype(np.uint8)


def assert_same(images: Sequence[np.ndarray], params: Sequence[ViewParams], device: str = "cpu") -> torch.Tensor:
    plan = plan_views(params, [i.shape[:2] for i in images]).to(device)
    views = make_views([torch.from_numpy(i).to(device) for i in images], plan)
    crcs = pixel_crcs(views).tolist()
    for found, crc, pixels, p in zip(views.cpu().numpy(), crcs, images, params, strict=True):
        expected = apply(pixels, p)
        assert np.array_equal(found, expected), describe(p)
        assert crc == pixel_crc(expected), describe(p)
    return views


def every_operation() -> Iterator[Op]:
    for name in TIMM_OPERATIONS:
        arguments = {
            argument_of(name, magnitude, negative, increasing)
            for magnitude in (0.0, 0.37, 5.0, 9.0, 10.0)
            for negative in (False, True)
            for increasing in (False, True)
        }
        yield from (Op(name, argument) for argument in arguments)
    yield from (Op("Rotate", degrees) for degrees in (-1e-20, 1e-9, 90.0, 180.0, 270.0, 359.9))
    yield from (Op(name, share) for name in ("TranslateX", "TranslateY") for share in (0.5 / 32, 1.0, -1.2, 1e-17))
    yield from (Op(name, share) for name in ("ShearX", "ShearY") for share in (1.0, -2.5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 2, 3, 31, 32])
def test_every_operation_at_every_strength(size: int, device: str) -> None:
    pictures = [image(size, size), np.full((size, size, 3), 77, np.uint8), image(size, size, 1) // 2 + 40]
    ops = [(picture, op) for picture in pictures for op in every_operation()]
    crop = Box(0, 0, size, size)
    assert_same([picture for picture, _ in ops], [ViewParams(size, crop, 0, False, (op,)) for _, op in ops], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_on_images_of_all_shapes(recipe: RecipeConfig, device: str) -> None:
    images = [image(*shape, seed) for seed in range(8) for shape in SHAPES]
    params = [sample_params(seed, pixels.shape[0], pixels.shape[1], recipe) for seed, pixels in enumerate(images)]
    assert_same(images, params, device)


def test_full_size_views() -> None:
    recipe = RecipeConfig(size=224, randaugment=f"{RAND}-p1", erase=1.0)
    images = [image(375 - 9 * i, 500 - 31 * i, i) for i in range(12)]
    assert_same(images, [sample_params(i, pixels.shape[0], pixels.shape[1], recipe) for i, pixels in enumerate(images)])


@pytest.mark.parametrize("size", [32, 224])
def test_weights_are_torchs(size: int) -> None:
    """On lines of noise a weight that is wrong by one unit changes one pixel in a hundred or more."""
    draws = np.random.default_rng(size)
    for length in [*range(1, 20), *draws.integers(20, 900, 8).tolist()]:
        lines = torch.from_numpy(draws.integers(0, 256, (1, 300, length, 3), np.uint8)).permute(0, 3, 1, 2)
        torchs = F.interpolate(lines, size=(300, size), mode="bicubic", antialias=True)[0]
        first, weights, precision, *_ = resizing.resize_weights(length, size)
        dense = np.zeros((length, size))
        for k, column in enumerate(weights.T):
            np.add.at(dense, (np.minimum(first + k, length - 1), np.arange(size)), column)
        sums = (lines[0].double() @ torch.from_numpy(dense)).to(torch.int64)
        assert torch.equal(((sums + (1 << (precision - 1))) >> precision).clamp(0, 255).to(torch.uint8), torchs), length


@pytest.mark.parametrize("size", [32, 224])
def test_no_weight_is_near_to_being_rounded_otherwise(size: int) -> None:
    """So that a multiply-add that a compiler fuses inside of torch changes none. Lengths to 3,000 hold, in a minute."""
    for length in range(1, 200):
        exact = resizing.scaled_weights(length, size)[1]
        assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-9, length


def test_products_in_float64_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [image(90, 70), image(20, 300), image(3000, 5)]  # the last is too much smaller than it was for float32
    params = [
        ViewParams(32, Box(0, 0, pixels.shape[0], pixels.shape[1]), 0, flip)
        for pixels, flip in zip(images, (False, True, False), strict=True)
    ]
    assert [resizing.resize_weights(length, 32).small for length in (90, 70, 20, 300, 3000)] == [True] * 3 + [False] * 2
    views = assert_same(images, params)
    monkeypatch.setattr(resizing, "_exact_dtype", lambda *_: torch.float64)
    assert torch.equal(assert_same(images, params), views)


def test_products_that_may_be_tf32_are_done_in_float64() -> None:
    matmul: Any = vars(torch.backends)["mkldnn"].matmul
    assert resizing._exact_dtype(True, torch.device("cpu")) == torch.float32
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert resizing._exact_dtype(True, torch.device("cpu")) == torch.float64
    finally:
        matmul.fp32_precision = before


def test_buckets_hold_every_view_once_and_little_padding() -> None:
    draws = np.random.default_rng(0)
    shapes = [(int(h), int(w)) for h, w in np.exp(draws.uniform(2, 7.5, (300, 2)))]
    views = [ViewParams(32, Box(0, 0, *shape), 0, False) for shape in shapes]
    sources = [resizing.Source.of(p, 0, *shape) for p, shape in zip(views, shapes, strict=True)]
    groups = list(resizing.buckets(sources))
    assert sorted(row for rows in groups for row in rows) == list(range(300))
    for rows in groups:
        padded = len(rows) * max(shapes[i][0] for i in rows) * max(shapes[i][1] for i in rows)
        assert len(rows) == 1 or padded <= 2 * sum(math.prod(shapes[i]) for i in rows)
        assert len(rows) == 1 or padded <= 1 << 25


def test_views_of_one_image_share_it_and_a_plan_can_be_copied() -> None:
    images, which = [image(60, 50), image(40, 90)], [1, 0, 0, 1, 1]
    params = [
        sample_params(seed, images[i].shape[0], images[i].shape[1], RECIPES["strong"]) for seed, i in enumerate(which)
    ]
    plan = copy.deepcopy(plan_views(params, [i.shape[:2] for i in images], which))
    pixels = torch.cat([torch.from_numpy(i).view(-1, 3) for i in images])
    expected = [apply(images[i], p) for i, p in zip(which, params, strict=True)]
    assert np.array_equal(make_views(pixels, plan).numpy(), expected)
    assert np.array_equal(make_views([torch.from_numpy(i) for i in images], plan).numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_pixels_are_those_of_the_cpu(device: str) -> None:
    recipe = RecipeConfig(size=32, randaugment=RAND, mixup=0.8, cutmix=1.0)
    images = [image(50 + i, 70 - i, i) for i in range(24)]
    params = [sample_params(i, pixels.shape[0], pixels.shape[1], recipe) for i, pixels in enumerate(images)]
    views = assert_same(images, params, device)
    mode, lam, box = zip(*(pair_params(i // 2, i // 2 + 99, recipe) for i in range(24)), strict=True)
    fields = [torch.arange(24) ^ 1, torch.tensor(mode, dtype=torch.uint8), torch.tensor(lam), torch.tensor(box)]
    mixed = _mix_batch(views, *(field.to(device) for field in fields))
    cpu = mix_pixels(torch.from_numpy(np.stack([apply(i, p) for i, p in zip(images, params, strict=True)])), *fields)
    assert torch.equal(mixed.cpu(), cpu)


class Seen(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **kwargs or {})


def test_only_operations_that_are_the_same_on_cuda_are_used_and_few_of_them() -> None:
    """The allowed ones are those of the module's table."""
    recipe, seen = RECIPES["deit"], Seen()
    images = [image(70, 80, i) for i in range(64)]
    params = [sample_params(i, 70, 80, recipe) for i in range(64)]
    plan = plan_views(params, [(70, 80)] * 64)
    tensors = [torch.from_numpy(pixels) for pixels in images]
    with seen:
        pixel_crcs(make_views(tensors, plan))
    assert set(seen.names) <= {*Work.NAMING, *ALLOWED.split()}
    assert len([name for name in seen.names if name not in Work.NAMING]) < 700


def test_what_can_not_be_planned_is_refused() -> None:
    crop = Box(0, 0, 8, 8)
    for params, text in [
        ([ViewParams(8, crop, 0, False), ViewParams(9, crop, 0, False)], r"views have sizes \[8, 9\]"),
        ([ViewParams(8, crop, 0, False, (Op("Blur", 1.0),))] * 2, "operation 'Blur' is not known"),
        ([ViewParams(8, crop, 0, False, (Op("Rotate", None),))] * 2, "operation Rotate has no argument"),
        ([ViewParams(9, crop, 4, False)] * 2, "padded crop is 8 x 8 pixels"),
    ]:
        with pytest.raises(ValueError, match=text):
            plan_views(params, [(8, 8)] * 2)
