"""The codecs of the feature map: round trips, declared errors, streams that are damaged, tables that are not theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cskd.codecs import Outputs, get_codec, known_own
from cskd.codecs.base import Arrays
from cskd.codecs.features import FeaturesCodec
from cskd.codecs.features_pca import cosines
from cskd.codecs.stages import StageCodec
from cskd.errors import CodecError

GRID, C = (2, 3), 16
NAMES = ["features:3", "features:8", "features:pca8", "features:pca8:8"]


def maps(n: int, seed: int = 0, what: str = "random") -> Tensor:
    x = (torch.randn(n, C, *GRID, generator=torch.Generator().manual_seed(seed)) * 2).relu()
    return {"random": x, "ties": x.round(), "constant": torch.full_like(x, 1.5), "zero": x * 0, "far": x + 500}[what]


def made(name: str, classes: int) -> tuple[FeaturesCodec, Arrays]:
    codec = get_codec(name, classes, GRID)
    assert isinstance(codec, FeaturesCodec)
    rng = torch.Generator().manual_seed(classes)
    tables = codec.fit((torch.randn(classes, C, generator=rng), torch.randn(classes, generator=rng)), [maps(40, 1)])
    codec.use_tables(lambda: tables)
    return codec, tables


def outputs(tables: Arrays, x: Tensor) -> Outputs:
    weight, bias = torch.from_numpy(tables["weight"]), torch.from_numpy(tables["bias"])
    dense = torch.nn.functional.conv2d(x, weight[:, :, None, None], bias)
    return Outputs(dense, x.mean((2, 3)) @ weight.T + bias, None, x)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "classes"),
    [*((name, k) for name in NAMES for k in (1, 2, 12)), ("features:8", 21_843), ("features:pca8", 21_843)],
)
def test_what_is_packed_comes_back_and_the_logits_are_near_the_teachers(name: str, classes: int) -> None:
    codec, tables = made(name, classes)
    for what in ("random", "ties", "constant", "zero", "far") if classes < 1000 else ("random",):
        true = outputs(tables, maps(3, 7, what))
        arrays = codec.encode_outputs(true)
        codec.check(arrays, 3, classes)
        packed = codec.pack(arrays)
        again = codec.unpack(packed, 3)
        assert {n: (a.dtype, a.tobytes()) for n, a in again.items()} == {
            n: (a.dtype, a.tobytes()) for n, a in arrays.items()
        }
        assert {n: a.ndim for n, a in packed.items()} == {n: len(d) for n, d in codec.packed_dimensions.items()}
        np.testing.assert_array_equal(codec.global_class(arrays), true.image.numpy().argmax(1))
        dense, image = (torch.from_numpy(a) for a in codec.logits(arrays))
        assert dense.shape == true.dense.shape and image.shape == true.image.shape
        worst = {"features:3": 9.0, "features:8": 0.4, "features:pca8": 40.0, "features:pca8:8": 40.0}[name]
        if what != "far" or "pca" not in name:
            assert float((centred(dense) - centred(true.dense)).abs().max()) < worst
        if "pca" not in name:
            step = torch.from_numpy(arrays["step"])[:, None]
            found = codec.features_torch({n: torch.from_numpy(a) for n, a in arrays.items()})
            assert bool(((found - maps(3, 7, what)).abs() <= step / 2 * 1.001 + 1e-4).all())


def test_more_bits_and_more_directions_diverge_less() -> None:
    x, kl = maps(60, 3), []
    for name in ("features:pca2:2", "features:pca4", "features:pca16", "features:pca16:6", "features:pca16:8"):
        codec, tables = made(name, 200)
        true = outputs(tables, x)
        dense = torch.from_numpy(codec.logits(codec.encode_outputs(true))[0])
        p, q = true.dense.log_softmax(1), dense.log_softmax(1)
        kl.append(float((p.exp() * (p - q)).sum(1).mean()))
    assert kl == sorted(kl, reverse=True) and kl[0] > 100 * kl[-1] and kl[-1] < 1e-4


@given(seed=st.integers(0, 99), index=st.lists(st.integers(0, 5), max_size=8))
@settings(max_examples=10, deadline=None)
def test_taking_and_joining_samples_of_pca_give_the_arrays_of_encoding_those(seed: int, index: list[int]) -> None:
    codec, tables = made("features:pca8:8", 12)
    x = maps(6, seed) * torch.tensor([1, 1, 90.0, 1, 1, 1])[:, None, None, None]  # one sample needs int16
    arrays, chosen = codec.encode_outputs(outputs(tables, x)), np.array(index, np.int64)
    expected = codec.encode_outputs(outputs(tables, x[index]))
    joined = codec.concat([codec.encode_outputs(outputs(tables, x[[i]])) for i in [0, *index]])
    for found in (codec.take(arrays, chosen), codec.take(joined, np.arange(1, 1 + len(index)))):
        assert {n: (a.dtype, a.tobytes()) for n, a in found.items()} == {
            n: (a.dtype, a.tobytes()) for n, a in expected.items()
        }
    assert arrays["coefficient"].dtype == np.int16


def test_the_cosine_transform_is_orthonormal_and_begins_with_the_mean() -> None:
    t = cosines((3, 5)).double()
    torch.testing.assert_close(t @ t.T, torch.eye(15, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(t[0], torch.full((15,), 15**-0.5, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", [0, 40, -1])
def test_a_damaged_stream_is_refused(where: int) -> None:
    codec, tables = made("features:pca8", 12)
    packed = codec.pack(codec.encode_outputs(outputs(tables, maps(9))))
    stream = packed["stream"].copy()
    stream[where] ^= 255
    for wrong in (
        packed | {"stream": packed["stream"][:-1]},
        packed | {"stream_bytes": packed["stream_bytes"][:-1]},
        packed | {"stream_bytes": packed["stream_bytes"][::-1].copy()},
        {name: a for name, a in packed.items() if name != "stream"},
    ):
        with pytest.raises(CodecError, match="codec 'featurespca8'"):
            codec.unpack(wrong, 9)
    with pytest.raises(CodecError, match="is not of"):
        codec.unpack(packed, 10)
    try:  # a bit of a number can't be told from another number: the checksums of the file can
        codec.check(codec.unpack(packed | {"stream": stream}, 9), 9, 12)
    except CodecError as e:
        assert "\n" not in str(e)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_or_of_another_shape_are_refused(bad: float) -> None:
    codec, tables = made("features:8", 12)
    true = outputs(tables, maps(3))
    assert true.features is not None
    wrong = true.features.clone()
    wrong[2, 1, 0, 0] = bad
    for features, said in (
        (wrong, "features of sample 2 of the batch"),
        (None, "features are none"),
        (wrong[:, :-1], "expected float32"),
        (wrong.double(), "expected float32"),
    ):
        with pytest.raises(CodecError, match=said):
            codec.encode_outputs(true._replace(features=features))
    with pytest.raises(CodecError, match="stores the teacher's features, not its logits"):
        codec.encode(true.dense, true.image)


def test_tables_that_are_absent_or_not_of_the_codec_are_refused() -> None:
    codec, tables = made("features:pca8", 12)
    fresh = get_codec("features:pca8", 12, GRID)
    assert isinstance(fresh, FeaturesCodec)
    with pytest.raises(CodecError, match="needs its tables"):
        fresh.tables()
    for wrong in (
        {n: a for n, a in tables.items() if n != "encode"},
        tables | {"weight": tables["weight"][:-1]},
        tables | {"order": tables["order"] * 0},
        tables | {"decode": tables["decode"] * np.float32("nan")},
    ):
        codec.use_tables(lambda wrong=wrong: wrong)  # type: ignore[misc]
        with pytest.raises(CodecError, match=r"its t|its order"):
            codec.tables()


@pytest.mark.parametrize(
    "name", ["features:1", "features:17", "features:pca8:1", "features:pca8:9", "features", "features:pca0"]
)
def test_names_that_mean_nothing_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(CodecError, match=r"bits|unknown codec") as refused:
        get_codec(name, 12, GRID)
    assert "\n" not in str(refused.value) and len(str(refused.value)) <= 300


def test_a_name_of_a_cache_is_known_again() -> None:
    names = {
        "features:8": "features8",
        "features:pca8": "featurespca8",
        "features:pca8:4": "featurespca8",
        "features:pca8:6": "featurespca8b6",
    }
    for name, stored in names.items():
        assert get_codec(name, 12, GRID).name == get_codec(stored, 12, GRID).name == stored
        assert known_own(name) == name, "and is not taken for a class of a user's module"


class Products(TorchDispatchMode):
    """The dtypes that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.convolution.default):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["features:pca8", "stage:layer2:pca4"])
def test_what_a_gpu_stores_does_not_depend_on_tf32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = get_codec(name, 5, GRID), maps(5, 3)
    if isinstance(codec, StageCodec):
        tables = codec.fit([maps(40, 1)])
        codec.use_tables(lambda: tables)
        of = Outputs(torch.zeros(5, 5, *GRID), torch.zeros(5, 5), None, None, {"layer2": x})
    else:
        codec, tables = made(name, 5)
        of = outputs(tables, x)
    here = codec.encode_outputs(of)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with Products() as products:
        there = codec.encode_outputs(of)
    assert products.dtypes == {torch.float64}
    for field, numbers in here.items():  # those that lie between two steps may be rounded to the other one
        assert there[field].dtype == numbers.dtype and np.mean(there[field] != numbers) < 0.02
