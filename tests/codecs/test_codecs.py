"""What every codec promises: one interface, nothing lost by cutting and joining, damage refused, errors declared."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cskd.codecs import Codec, get_codec
from cskd.codecs.base import BLEND_ONE, Arrays, direct_hard, quantise_blend
from cskd.errors import CodecError

NAMES = ["envelope", "int8", "topk:3", "global:8", "global:top3"]
K, GRID = 12, (2, 3)


def logits(n: int, seed: int = 0, k: int = K) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, k, *GRID, generator=rng) * 4
    return dense, dense.mean((2, 3)) + torch.randn(n, k, generator=rng)


def assert_same(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(params=NAMES)
def codec(request: pytest.FixtureRequest) -> Codec:
    return get_codec(request.param, K, GRID)


@given(name=st.sampled_from(NAMES), seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 8), max_size=4))
@settings(max_examples=60, deadline=None)
def test_encoding_in_parts_and_joining_gives_the_arrays_of_encoding_at_once(
    name: str, seed: int, cuts: list[int]
) -> None:
    codec, (dense, image) = get_codec(name, K, GRID), logits(8, seed)
    edges = [0, *sorted(cuts), 8]
    parts = [codec.encode(dense[a:b], image[a:b]) for a, b in pairwise(edges)]
    assert_same(codec.concat(parts), codec.encode(dense, image))


@given(name=st.sampled_from(NAMES), seed=st.integers(0, 99), index=st.lists(st.integers(0, 7), max_size=12))
@settings(max_examples=60, deadline=None)
def test_taking_samples_gives_the_arrays_of_encoding_those_samples(name: str, seed: int, index: list[int]) -> None:
    codec, (dense, image) = get_codec(name, K, GRID), logits(8, seed)
    taken = codec.take(codec.encode(dense, image), np.array(index, np.int64))
    assert_same(taken, codec.encode(dense[index], image[index]))
    codec.check(taken, len(index), K)


def test_taking_part_of_a_unit_with_wide_counts_gives_the_narrow_dtype_again() -> None:
    codec = get_codec("envelope", 600, (1, 1))
    t = torch.linspace(0, 1, 600, dtype=torch.float64)
    dense = torch.stack([2 * t - t * t, t]).float()[:, :, None, None]
    image = torch.stack([-t * t, -t]).float()
    unit = codec.encode(dense, image)
    assert unit["n_extra"].dtype == np.uint16
    assert_same(codec.take(unit, np.array([1])), codec.encode(dense[1:], image[1:]))
    assert_same(codec.concat([codec.encode(dense[:1], image[:1]), codec.encode(dense[1:], image[1:])]), unit)


def test_every_array_has_a_name_for_each_of_its_dimensions(codec: Codec) -> None:
    arrays = codec.encode(*logits(5))
    assert {name: a.ndim for name, a in arrays.items()} == {name: len(d) for name, d in codec.dimensions.items()}
    lengths = {"sample": 5, "row": 2, "col": 3, "class": K, "whose": 2}
    for name, dims in codec.dimensions.items():
        assert all(lengths.get(d, s) == s for d, s in zip(dims, arrays[name].shape, strict=True)), name


def test_the_global_class_is_exact_and_the_lowest_on_ties(codec: Codec) -> None:
    dense, image = logits(50)
    image = image.round()
    assert (image == image.amax(1, keepdim=True)).sum() > 50, "the case is meant to have ties"
    arrays = codec.encode(dense, image)
    assert codec.global_class(arrays).dtype == np.uint16
    np.testing.assert_array_equal(codec.global_class(arrays), image.numpy().argmax(1))
    np.testing.assert_array_equal(codec.hard(arrays, 0)[:, 1, 2], image.numpy().argmax(1))


def test_hard_targets_have_the_shape_of_the_grid_and_are_exact_where_declared(codec: Codec) -> None:
    dense, image = logits(400)
    arrays = codec.encode(dense, image)
    wrong = 0
    for q in (0, 1, 20000, 40000, BLEND_ONE):
        got = codec.hard(arrays, q)
        assert got.shape == (400, *GRID) and got.dtype == np.uint16
        wrong += (got != direct_hard(dense, image, q).numpy()).sum()
    assert (wrong == 0) == codec.exact_hard


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_that_are_not_float32_are_refused(codec: Codec, dtype: torch.dtype) -> None:
    dense, image = logits(2)
    with pytest.raises(CodecError, match="expected float32"):
        codec.encode(dense.to(dtype), image)
    with pytest.raises(CodecError, match="expected float32"):
        codec.encode(dense, image.to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_naming_the_sample(codec: Codec, bad: float) -> None:
    dense, image = logits(6)
    dense[4, 2, 1, 0] = bad
    with pytest.raises(CodecError, match=f"dense logits of sample 4 of the batch hold {bad}"):
        codec.encode(dense, image)
    dense, image = logits(6)
    image[3, 2] = bad
    with pytest.raises(CodecError, match=f"global logits of sample 3 of the batch hold {bad}"):
        codec.encode(dense, image)


def test_finite_logits_whose_sum_is_not_are_accepted() -> None:
    dense, image = logits(2)
    dense[0, :2] = 3e38
    for name in ("envelope", "int8"):
        get_codec(name, K, GRID).encode(dense, image)


def test_logits_of_another_shape_are_refused(codec: Codec) -> None:
    dense, image = logits(3)
    for d, g in ((dense[:, :-1], image), (dense, image[:2]), (dense.transpose(2, 3), image)):
        with pytest.raises(CodecError, match="shape"):
            codec.encode(d, g)


def test_arrays_of_another_codec_count_or_class_list_are_refused(codec: Codec) -> None:
    arrays = codec.encode(*logits(3))
    codec.check(arrays, 3, K)
    with pytest.raises(CodecError, match="shape"):
        codec.check(arrays, 4, K)
    with pytest.raises(CodecError, match="classes"):
        codec.check(arrays, 3, K + 1)
    with pytest.raises(CodecError, match="has the arrays"):
        codec.check({"other": arrays["global_class"]}, 3, K)
    with pytest.raises(CodecError, match=f"names class {K} of {K}"):
        codec.check(arrays | {"global_class": np.full(3, K, np.uint16)}, 3, K)


def test_read_only_arrays_are_read_without_warning_or_change(codec: Codec) -> None:
    arrays = codec.encode(*logits(3))
    for a in arrays.values():
        a.flags.writeable = False
    codec.hard(arrays, 30000)
    if codec.soft:
        dense, _ = codec.logits(arrays)
        dense += 1  # must be the caller's own


@pytest.mark.parametrize("name", ["int8", "topk:3"])
def test_soft_codecs_decode_the_same_logits_as_arrays_and_as_tensors(name: str) -> None:
    codec = get_codec(name, K, GRID)
    arrays = codec.encode(*logits(5))
    tensors = codec.logits_torch({k: torch.from_numpy(a) for k, a in arrays.items()})
    for a, t, shape in zip(codec.logits(arrays), tensors, ((5, K, *GRID), (5, K)), strict=True):
        assert a.dtype == np.float32 and a.shape == shape
        np.testing.assert_array_equal(a, t.numpy())


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1.0, 1e6]), offset=st.sampled_from([0.0, 100.0]))
@settings(max_examples=40, deadline=None)
def test_int8_errs_by_at_most_half_a_step_of_each_cell(seed: int, scale: float, offset: float) -> None:
    dense, image = (x * scale + offset for x in logits(4, seed, k=300))
    codec = get_codec("int8", 300, GRID)
    got = codec.logits(codec.encode(dense, image))
    for x, decoded, steps in ((dense, got[0], 255), (image, got[1], 65535)):
        rounding = 4 * 2.0**-24 * x.abs().amax(1, keepdim=True)
        bound = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / (2 * steps) + rounding
        assert ((torch.from_numpy(decoded) - x).abs() <= bound).all()


def test_int8_is_exact_in_a_cell_of_equal_logits() -> None:
    codec = get_codec("int8", K, GRID)
    dense, image = codec.logits(codec.encode(torch.full((1, K, *GRID), 7.5), torch.full((1, K), -3.0)))
    assert (dense == 7.5).all() and (image == -3.0).all()


def test_topk_keeps_the_largest_logits_and_the_probability_of_the_rest() -> None:
    codec = get_codec("topk:3", K, GRID)
    truth = logits(20)
    for x, array in zip(truth, codec.logits(codec.encode(*truth)), strict=True):
        decoded = torch.from_numpy(array)
        kept = x >= x.topk(3, dim=1).values[:, 2:]
        assert ((decoded - x).abs() <= 2.0**-10 * x.abs())[kept].all()
        others = decoded.masked_fill(kept, -torch.inf)
        assert (others.amax(1, keepdim=True) == others).sum() == (~kept).sum(), "absent classes share equally"
        expected = x.softmax(1).masked_fill(kept, 0).sum(1)
        torch.testing.assert_close(decoded.softmax(1).masked_fill(kept, 0).sum(1), expected, atol=2e-3, rtol=0)


def test_topk_refuses_logits_beyond_float16_and_k_beyond_the_classes() -> None:
    dense, image = logits(2)
    with pytest.raises(CodecError, match="float16"):
        get_codec("topk:3", K, GRID).encode(dense * 1e5, image)
    with pytest.raises(CodecError, match=r"expected 1\.\.11"):
        get_codec("topk:12", K, GRID)


def test_codec_names_are_normalised_and_unknown_ones_refused_with_the_known() -> None:
    assert get_codec("topk:10", 1000, (7, 7)).name == get_codec("topk10", 1000, (7, 7)).name == "topk10"
    for name in ("topk", "topk:0", "zip", "Envelope"):
        with pytest.raises(CodecError, match="envelope, int8 and topk:10"):
            get_codec(name, 1000, (7, 7))


@pytest.mark.parametrize("classes, grid", [(0, (7, 7)), (65536, (7, 7)), (10, (0, 7))])
def test_impossible_class_counts_and_grids_are_refused(classes: int, grid: tuple[int, int]) -> None:
    with pytest.raises(CodecError, match="expected"):
        get_codec("int8", classes, grid)


def test_blends_are_rounded_to_whole_numbers_of_65536ths_and_refused_outside_zero_to_one() -> None:
    assert [quantise_blend(a) for a in (0.0, 0.5, 1.0, 1 / 300, 2 / 300)] == [0, 32768, 65536, 218, 437]
    for a in (-1e-9, 1.0001, float("nan")):
        with pytest.raises(CodecError, match="outside"):
            quantise_blend(a)


@pytest.mark.parametrize("blend", [-1, 65537, 0.5])
def test_a_blend_that_is_not_quantised_is_refused(codec: Codec, blend: float) -> None:
    arrays = codec.encode(*logits(1))
    with pytest.raises(CodecError, match="whole number"):
        codec.hard(arrays, cast(int, blend))
    with pytest.raises(CodecError, match="whole number"):
        direct_hard(*logits(1), cast(int, blend))


def test_measured_errors_tell_an_exact_codec_from_one_that_is_not() -> None:
    dense, image = logits(60)
    found = {name: measure(get_codec(name, K, GRID), dense, image) for name in NAMES}
    assert set(found["envelope"]["hard_agreement"].values()) == {1.0} and "kl" not in found["envelope"]
    assert min(found["topk:3"]["hard_agreement"].values()) < 1.0
    assert 0 < found["int8"]["kl"][32768] < found["topk:3"]["kl"][32768]
    step = float((dense.amax(1) - dense.amin(1)).max()) / 510
    assert step / 2 < found["int8"]["largest_logit_error"] <= step * 1.001
    assert all(found[name]["global_agreement"] == 1.0 for name in NAMES)


def test_the_interface_imports_without_torch() -> None:
    code = "import sys, cskd.codecs, cskd.codecs.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MEASURED_BLENDS = (0, 1 << 14, 1 << 15, 3 << 14, BLEND_ONE)


def measure(codec: Codec, dense_BKhw: Tensor, global_BK: Tensor) -> dict[str, Any]:
    """The error a codec makes on these float32 logits.

    Returns: `hard_agreement` {blend: share of cells whose hard target is `direct_hard`'s}, `global_agreement`; for soft
             codecs `largest_logit_error` (dense), `largest_global_error`, and `kl` {blend: mean over cells, in nats, of
             KL(softmax T || softmax of the decoded T)} at temperature 1. All are plain numbers.
    """
    arrays = codec.encode(dense_BKhw, global_BK)
    dense_BKhw, global_BK = dense_BKhw.detach().cpu(), global_BK.detach().cpu()
    truth = {q: direct_hard(dense_BKhw, global_BK, q).numpy() for q in MEASURED_BLENDS}
    result: dict[str, Any] = {
        "hard_agreement": {q: float((codec.hard(arrays, q) == truth[q]).mean()) for q in MEASURED_BLENDS},
        "global_agreement": float((codec.global_class(arrays) == global_BK.argmax(1).numpy()).mean()),
    }
    if codec.soft:
        dense, whole = (torch.from_numpy(x) for x in codec.logits(arrays))
        result["largest_logit_error"] = float((dense - dense_BKhw).abs().max())
        result["largest_global_error"] = float((whole - global_BK).abs().max())
        result["kl"] = {q: _kl(_blend(dense_BKhw, global_BK, q), _blend(dense, whole, q)) for q in MEASURED_BLENDS}
    return result


def _blend(dense_BKhw: Tensor, global_BK: Tensor, blend: int) -> Tensor:
    a = blend / BLEND_ONE
    return a * dense_BKhw.double() + (1 - a) * global_BK.double()[:, :, None, None]


def _kl(true_BKhw: Tensor, decoded_BKhw: Tensor) -> float:
    p = true_BKhw.log_softmax(1)
    return float((p.exp() * (p - decoded_BKhw.log_softmax(1))).sum(1).mean())
