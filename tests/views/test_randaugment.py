"""RandAugment and colour jitter: the same operations as timm's, as often, as strong, pixel for pixel."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as torchvision_ops

from cskd.config import RecipeConfig
from cskd.config.rand_string import RandSettings, parse_rand_string
from cskd.errors import ConfigError
from cskd.views import geometry
from cskd.views.ops import apply_op
from cskd.views.randaugment import TIMM_OPERATIONS, Op, argument_of, draw_jitter, draw_randaugment
from cskd.views.recipe import sample_params
from tests.distributions import assert_same_counts, assert_same_distribution

DEIT = "rand-m9-mstd0.5-inc1"
DRAWS = 20_000
FILL = (124, 116, 104)  # of ImageNet's mean
SLIDES = ("ShearX", "ShearY", "TranslateX", "TranslateY")
SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}
TIMM_FUNCTION: dict[str, Callable[..., Image.Image]] = {
    "AutoContrast": timm_ops.auto_contrast,
    "Equalize": timm_ops.equalize,
    "Invert": timm_ops.invert,
    "Rotate": timm_ops.rotate,
    "Posterize": timm_ops.posterize,
    "Solarize": timm_ops.solarize,
    "SolarizeAdd": timm_ops.solarize_add,
    "Color": timm_ops.color,
    "Contrast": timm_ops.contrast,
    "Brightness": timm_ops.brightness,
    "Sharpness": timm_ops.sharpness,
    "ShearX": timm_ops.shear_x,
    "ShearY": timm_ops.shear_y,
    "TranslateX": timm_ops.translate_x_rel,
    "TranslateY": timm_ops.translate_y_rel,
}


def ours_of(timm_name: str) -> str:
    return timm_name.removesuffix("Increasing").removesuffix("Rel")


# --- the string


def test_parts_may_come_in_any_order_and_be_left_out() -> None:
    assert parse_rand_string(DEIT) == RandSettings(9.0, 0.5, 2, 0.5, True)
    assert parse_rand_string("rand-inc1-mstd0.5-m9") == parse_rand_string(DEIT)
    assert parse_rand_string("rand") == RandSettings(10.0, 0.0, 2, 0.5, False)
    assert parse_rand_string("rand-m5-n3-p0.8-mstdinf") == RandSettings(5.0, float("inf"), 3, 0.8, False)
    assert parse_rand_string("rand-mstd101").magnitude_std == float("inf")


@pytest.mark.parametrize("text", [DEIT, "rand-m9", "rand-m7-n3-p0.8-mstd1-inc1", "rand-mstd200", "rand-inc0-n1"])
def test_a_string_means_what_timm_reads_in_it(text: str) -> None:
    ours, timms = parse_rand_string(text), timm_ops.rand_augment_transform(text, {"img_mean": FILL})
    assert ours.layers == timms.num_layers
    for op in timms.ops:
        assert (ours.prob, ours.magnitude, ours.magnitude_std) == (op.prob, op.magnitude, op.magnitude_std)
    assert [ours_of(op.name) for op in timms.ops] == list(TIMM_OPERATIONS)
    assert ours.increasing == any(op.name.endswith("Increasing") for op in timms.ops)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("augmix-m3", "augmix"),
        ("rand-m9-w0", "w0"),
        ("rand-tweights", "tweights"),
        ("rand-m11", "m11"),
        ("rand-m9-m8", "m8"),
        ("rand-n0", "n0"),
        ("rand-n1.5", "n1.5"),
        ("rand-p2", "p2"),
        ("rand-inc2", "inc2"),
        ("rand-minf", "minf"),
        ("rand--m9", ""),
        ("rand-m9-", ""),
        ("rand-mmax15", "mmax15"),
    ],
)
def test_a_part_that_is_not_usable_is_refused_by_its_name(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"its part '{part}' is not usable") as error:
        RecipeConfig(randaugment=text)
    assert f"'{text}'" in str(error.value)
    assert "\n" not in str(error.value)


# --- what is drawn


@pytest.fixture(scope="module")
def our_draws() -> list[tuple[Op, ...]]:
    recipe = RecipeConfig(randaugment=DEIT)
    return [sample_params(seed, 375, 500, recipe).ops for seed in range(DRAWS)]


@pytest.fixture(scope="module")
def timm_draws() -> list[tuple[Op, ...]]:
    """What the transform that DeiT trains with does, its pixel functions replaced by a pencil."""
    transform = create_transform(224, is_training=True, auto_augment=DEIT, interpolation="bicubic", color_jitter=0.3)
    (randaugment,) = (t for t in transform.transforms if isinstance(t, timm_ops.RandAugment))
    for op in randaugment.ops:
        assert op.kwargs == {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
        op.aug_fn = partial(note, ours_of(op.name))
    random.seed(0)
    np.random.seed(0)
    return [tuple(randaugment(())) for _ in range(DRAWS)]


def note(name: str, before: tuple[Op, ...], *arguments: float, **_: object) -> tuple[Op, ...]:
    return (*before, Op(name, arguments[0] if arguments else None))


def strength(op: Op) -> float:
    assert op.argument is not None
    return op.argument


def test_operations_are_as_frequent_as_timms(our_draws: list[tuple[Op, ...]], timm_draws: list[tuple[Op, ...]]) -> None:
    assert_same_counts([len(ops) for ops in our_draws], [len(ops) for ops in timm_draws], "operations a view")
    ours, timms = ([op.name for ops in draws for op in ops] for draws in (our_draws, timm_draws))
    assert set(ours) == set(TIMM_OPERATIONS)
    assert_same_counts(ours, timms, "operation")
    pairs = [Counter(tuple(op.name for op in ops) for ops in our_draws if len(ops) == 2)]
    assert len(pairs[0]) == 15 * 15  # with replacement, and in both orders


@pytest.mark.parametrize("name", [n for n in TIMM_OPERATIONS if argument_of(n, 9.0, False, True) is not None])
def test_operations_are_as_strong_as_timms(
    name: str, our_draws: list[tuple[Op, ...]], timm_draws: list[tuple[Op, ...]]
) -> None:
    ours, timms = (
        [strength(op) for ops in draws for op in ops if op.name == name] for draws in (our_draws, timm_draws)
    )
    assert_same_distribution(ours, timms, name)


def test_magnitudes_and_signs_are_timms(our_draws: list[tuple[Op, ...]], timm_draws: list[tuple[Op, ...]]) -> None:
    """The five operations with a sign together: five times the sample, so a finer look."""
    ours, timms = (
        np.array([op.argument / SIGNED[op.name] for ops in draws for op in ops if op.name in SIGNED and op.argument])
        for draws in (our_draws, timm_draws)
    )
    assert_same_distribution(ours, timms, "signed magnitude")
    assert_same_distribution(abs(ours), abs(timms), "magnitude")
    assert np.mean(abs(ours) == 1.0) == pytest.approx(0.0228, abs=0.006)  # beyond two standard deviations: clipped


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("timm_name", sorted({*timm_ops._RAND_TRANSFORMS, *timm_ops._RAND_INCREASING_TRANSFORMS}))
def test_an_argument_is_timms_at_every_magnitude(
    timm_name: str, negative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm_ops, "_randomly_negate", lambda v: -v if negative else v)
    level = timm_ops.LEVEL_TO_ARG[timm_name]
    for magnitude in np.linspace(0.0, 10.0, 401).tolist():
        expected = level(magnitude, {})[0] if level else None
        increasing = timm_name.endswith("Increasing")
        found = argument_of(ours_of(timm_name), magnitude, negative, increasing)
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-12, abs=0.0)), magnitude


def test_a_uniform_magnitude_reaches_from_none_to_m() -> None:
    settings = parse_rand_string("rand-m6-mstdinf-p1-inc1")
    degrees = [abs(o.argument or 0.0) for s in range(9000) for o in draw_randaugment(s, settings) if o.name == "Rotate"]
    assert_same_distribution(degrees, np.linspace(0.0, 18.0, 5000), "uniform")


def test_one_layer_more_changes_no_other() -> None:
    two, three = parse_rand_string(DEIT), parse_rand_string(DEIT + "-n3")
    for seed in range(200):
        ops = draw_randaugment(seed, two)
        assert draw_randaugment(seed, three)[: len(ops)] == ops


# --- pixels


def generated() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(60), np.arange(90))[..., None] * np.array([1, 2, 3]) % 256
    return {
        "noise": rng.integers(0, 256, (64, 48, 3), np.uint8),
        "ramp": ramp.astype(np.uint8),
        "flat": np.full((40, 40, 3), (3, 77, 250), np.uint8),
        "dark": rng.integers(10, 40, (33, 65, 3), np.uint8),
        "two levels": rng.integers(0, 2, (64, 64, 3), np.uint8) * np.uint8(200),
        "thin": rng.integers(0, 256, (2, 9, 3), np.uint8),
        "pixel": rng.integers(0, 256, (1, 1, 3), np.uint8),
    }


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    """Generated images, and scikit-learn's two photographs where it is installed."""
    found = generated()
    try:
        from sklearn.datasets import load_sample_images

        for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
            small = Image.fromarray(photo).resize((224, 224), Image.Resampling.BICUBIC, box=(100, 30, 480, 410))
            found[name] = np.array(small)
    except ImportError:
        pass
    return found


@pytest.mark.parametrize("name", TIMM_OPERATIONS)
def test_pixels_are_timms(name: str, images: dict[str, np.ndarray]) -> None:
    """Exactly, but for the four slides: one level at most, in fewer than 1 in 100 pixels."""
    for negative in (False, True):
        for magnitude in (0.0, 0.7, 5.0, 8.6, 9.3, 9.999):
            argument = argument_of(name, magnitude, negative, increasing=True)
            for title, image in images.items():
                arguments = () if argument is None else (argument,)
                options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
                timms = np.asarray(TIMM_FUNCTION[name](Image.fromarray(image), *arguments, **options)).astype(int)
                before = image.copy()
                ours = apply_op(image, Op(name, argument), FILL)
                assert np.array_equal(image, before), f"{name} wrote on its input"
                assert (ours.dtype, ours.shape) == (np.dtype(np.uint8), image.shape)
                assert ours.flags.c_contiguous and ours.flags.writeable
                wrong = abs(ours - timms)
                if name not in SLIDES:
                    assert wrong.max() == 0, f"{name} {argument} of {title}"
                elif title in ("china", "flower"):
                    assert wrong.max() <= 1 and np.mean(wrong > 0) < 0.01, f"{name} {argument} of {title}"
                else:
                    assert wrong.max() <= 1, f"{name} {argument} of {title}"


def test_posterizing_to_no_bits_is_black() -> None:
    """As in timm before Pillow 13, which refuses 0 bits; drawn at magnitude 10, one in 44 of the posterizations."""
    assert argument_of("Posterize", 10.0, False, increasing=True) == 0
    assert not apply_op(generated()["noise"], Op("Posterize", 0), FILL).any()


def test_an_operation_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="'Blur' is not known"):
        apply_op(generated()["noise"], Op("Blur", 1.0), FILL)
    with pytest.raises(ValueError, match="Rotate has no argument"):
        apply_op(generated()["noise"], Op("Rotate", None), FILL)


# --- colour jitter


def test_jitter_is_torchvisions_in_strength_and_order() -> None:
    drawn = [draw_jitter(seed, 0.3) for seed in range(6000)]
    orders = Counter(tuple(op.name for op in ops) for ops in drawn)
    assert len(orders) == 6
    assert min(orders.values()) > 880 and max(orders.values()) < 1120
    for name in ("Brightness", "Contrast", "Color"):
        factors = [strength(op) for ops in drawn for op in ops if op.name == name]
        assert_same_distribution(factors, np.linspace(0.7, 1.3, 6000), name)
    assert draw_jitter(7, 0.0) == ()


def test_jittered_pixels_are_torchvisions(images: dict[str, np.ndarray]) -> None:
    adjust = {
        "Brightness": torchvision_ops.adjust_brightness,
        "Contrast": torchvision_ops.adjust_contrast,
        "Color": torchvision_ops.adjust_saturation,
    }
    for seed in range(20):
        for image in images.values():
            ours, timms = image, Image.fromarray(image)
            for op in draw_jitter(seed, 0.4):
                ours, timms = apply_op(ours, op, FILL), adjust[op.name](timms, op.argument)
            assert np.array_equal(ours, np.asarray(timms))


def test_jitter_is_used_only_where_randaugment_is_off() -> None:
    on, off = RecipeConfig(color_jitter=0.3, randaugment=DEIT), RecipeConfig(color_jitter=0.3)
    for seed in range(100):
        assert sample_params(seed, 300, 300, on).ops == draw_randaugment(seed, parse_rand_string(DEIT))
        assert len(sample_params(seed, 300, 300, off).ops) == 3


def neighbours(image_HWC: np.ndarray, whole_L: np.ndarray, axis: int, fill: tuple[int, int, int]) -> np.ndarray:
    """Each line moved by its whole number of pixels, with one neighbour before it and two behind.

    Returns: uint8 [H, (W + 3) * 3] for rows, [H + 3, W * 3] for columns. What lies outside the image is two copies of
             the line's last pixel, as in Pillow, then the fill colour, which the kernel leaves as it is.
    """
    height, width = image_HWC.shape[:2]
    n = image_HWC.shape[axis]
    pad = int(max(2, 1 - whole_L.min(), whole_L.max() + 2))
    padded = np.empty((height + 2 * pad * (1 - axis), width + 2 * pad * axis, 3), np.uint8)
    padded.reshape(len(padded), -1)[:] = np.tile(np.array(fill, np.uint8), padded.shape[1])
    source = padded if axis == 1 else padded.swapaxes(0, 1)  # [L, n + 2 pad, 3]
    image = image_HWC if axis == 1 else image_HWC.swapaxes(0, 1)
    source[:, pad : pad + n] = image
    source[:, pad - 2 : pad] = image[:, :1]
    source[:, pad + n : pad + n + 2] = image[:, -1:]
    moved = np.empty((height + 3 * (1 - axis), width + 3 * axis, 3), np.uint8)
    target = moved if axis == 1 else moved.swapaxes(0, 1)
    steps = [0, *(np.flatnonzero(np.diff(whole_L)) + 1).tolist(), len(whole_L)]
    for first, last in itertools.pairwise(steps):  # lines with the same whole shift
        start = pad - 1 + int(whole_L[first])
        target[first:last] = source[first:last, start : start + n + 3]
    return moved.reshape(len(moved), -1)


def fill_rims(lines_LN3: np.ndarray, shift_L: np.ndarray, fill: tuple[int, int, int]) -> None:
    """Set the pixels from outside that the two copied pixels have reached: at most four at each end of a line."""
    n = lines_LN3.shape[1]
    first = np.ceil(-0.5 - shift_L).astype(np.int64)[:, None]  # the first position that comes from inside
    behind = np.ceil(n - 0.5 - shift_L).astype(np.int64)[:, None]  # the first one after the last of those
    at = np.concatenate([first + np.arange(-4, 0), behind + np.arange(4)], axis=1)
    line, k = np.nonzero((at >= 0) & (at < n))
    lines_LN3[line, at[line, k]] = fill


def numpy_slide(image: np.ndarray, shift: np.ndarray, axis: int, fill: tuple[int, int, int]) -> np.ndarray:
    """`geometry._slide` as it was when numpy did the arithmetic, caches of that time hold its pixels: int16 differences,
    a float32 polynomial, truncated, then clipped; each line moved first, between borders as wide as its shift."""
    height, width = image.shape[:2]
    whole = np.floor(shift)
    fraction = (shift - whole).astype(np.float32)
    lines = neighbours(image, whole.astype(np.int64), axis, fill).astype(np.int16)
    if axis == 1:
        p0, p1, p2, p3 = (lines[:, 3 * k : 3 * (k + width)] for k in range(4))
        t = fraction[:, None]
    else:
        p0, p1, p2, p3 = (lines[k : k + height] for k in range(4))
        t = np.repeat(fraction, 3)[None]
    left = p0 - p1
    third = p3 - p2 - left
    out = third * t
    out += left - third
    out *= t
    out += p2 - p0
    out *= t
    out += p1
    result: np.ndarray = np.clip(out.astype(np.int16), 0, 255).astype(np.uint8).reshape(image.shape)
    fill_rims(result if axis == 1 else result.swapaxes(0, 1), shift, fill)
    return result


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (64, 64), (113, 40), (224, 224), (300, 260)])
def test_slides_have_the_bits_they_had_in_numpy(shape: tuple[int, int], axis: int) -> None:
    rng = np.random.default_rng(shape[0])
    steps = rng.integers(0, 2, (*shape, 3), np.uint8) * 255  # overshoots at every edge
    for image in (rng.integers(0, 256, (*shape, 3), np.uint8), steps):
        lines = image.shape[1 - axis]
        for factor in (0.3, -0.3, 0.07, 0.0, 0.5, -1.0, 2.5, -1e-20, rng.uniform(-1.0, 1.0)):
            for shift in (factor * geometry._centres(lines), np.full(lines, factor * image.shape[axis])):
                expected = numpy_slide(image, shift, axis, FILL)
                assert np.array_equal(geometry._slide(image, shift, axis, FILL), expected)
