"""The codecs of stages: round trips, their errors, what is measured of them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cskd.codecs import Outputs, get_codec, known_own
from cskd.codecs.base import Arrays
from cskd.codecs.measured import MeasuredMap, from_facts, measure, together
from cskd.codecs.stages import StageCodec, StagePcaCodec
from cskd.errors import CodecError
from cskd.store.commit import _CODEC

C, GRID = 12, (4, 6)
NAMES = ["stage:layer2.0:3", "stage:layer2.0:8", "stage:layer2.0:pca4", "stage:layer2.0:pca12:8"]


def maps(n: int, seed: int = 0, what: str = "random") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, C, *GRID, generator=generator) * torch.linspace(3, 0.1, C)[:, None, None]
    x = x + 2 * torch.randn(n, C, 1, 1, generator=generator)
    return {"random": x, "constant": torch.full_like(x, 1.5), "zero": x * 0, "far": x + 500}[what]


def made(name: str, what: str = "random") -> tuple[StageCodec, Arrays]:
    codec = get_codec(name, 5, (2, 3))
    assert isinstance(codec, StageCodec)
    tables = codec.fit([maps(20, 1, what), maps(20, 2, what)])
    codec.use_tables(lambda: tables)
    return codec, tables


def outputs(x: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(x), 5, 2, 3), torch.zeros(len(x), 5), None, None, {"layer2.0": x})


def decoded(codec: StageCodec, arrays: Arrays) -> Tensor:
    return codec.map_torch({name: torch.from_numpy(a) for name, a in arrays.items()})


@pytest.mark.parametrize("what", ["random", "constant", "zero", "far"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_packed_comes_back_on_the_stages_own_grid_within_the_error(name: str, what: str) -> None:
    codec, tables = made(name, what)
    x = maps(7, 3, what)
    arrays = codec.encode_outputs(outputs(x))
    codec.check(arrays, 7, 5)
    again = codec.unpack(codec.pack(arrays), 7)
    assert {n: (a.dtype, a.tobytes()) for n, a in again.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in arrays.items()
    }
    joined = codec.take(codec.concat([codec.encode_outputs(outputs(x[[i]])) for i in (2, 0)]), np.array([1, 0]))
    assert all(np.array_equal(joined[n], codec.take(arrays, np.array([0, 2]))[n]) for n in arrays)
    found = decoded(codec, arrays)
    assert found.shape == x.shape and codec.map_grid == GRID and codec.channels == C
    if isinstance(codec, StagePcaCodec) and what == "random":
        # The stated quantiser: what R directions leave out, and a dead zone of at most 0.6 steps per coefficient.
        basis, mean, step = (torch.from_numpy(tables[n]).double() for n in ("basis", "mean", "step"))
        assert torch.allclose(basis.T @ basis, torch.eye(codec.rank).double(), atol=1e-5)
        flat = x.double().permute(0, 2, 3, 1) - mean
        kept = flat @ basis @ basis.T
        best = (flat - kept).square().mean()
        off = (found.double() - x.double()).square().mean()
        noise = 0.36 * step.square() * codec.rank / C
        assert float(best) <= float(off) + 1e-9 and float(off) <= float(best + noise) + 1e-9
    elif not isinstance(codec, StagePcaCodec):
        step = torch.from_numpy(arrays["step"])[:, None]
        assert bool(((found - x).abs() <= step / 2 * 1.001 + 1e-4).all())


def test_more_bits_and_directions_lose_less_and_that_is_what_is_measured() -> None:
    x, lost = maps(30, 5), []
    for name in (
        "stage:layer2.0:pca2",
        "stage:layer2.0:pca6",
        "stage:layer2.0:pca12",
        "stage:layer2.0:pca12:7",
        "stage:layer2.0:8",
    ):
        codec, _ = made(name)
        arrays = codec.encode_outputs(outputs(x))
        found = measure(codec, arrays, outputs(x), 30)
        assert isinstance(found, MeasuredMap) and found.views == 30
        off = decoded(codec, arrays) - x
        spread = (x - x.mean((0, 2, 3), keepdim=True)).square().sum()
        assert found.lost == pytest.approx(float(off.square().sum() / spread), rel=1e-5)
        assert found.largest == pytest.approx(float(off.abs().max()))
        assert from_facts(found.facts) == pytest.approx(found, rel=1e-5)
        lost.append(found.lost)
    assert lost == sorted(lost, reverse=True) and lost[0] > 100 * lost[-1]
    assert together([MeasuredMap(1, 0.5, 2.0), MeasuredMap(3, 0.1, 1.0)]) == pytest.approx(MeasuredMap(4, 0.2, 2.0))


def test_maps_of_another_shape_or_not_finite_are_refused() -> None:
    codec, tables = made("stage:layer2.0:8")
    wrong = maps(3)
    wrong[2, 1, 0, 0] = float("nan")
    for x, said in (
        (wrong, "maps of sample 2"),
        (maps(3)[:, :-1], r"maps of stage layer2.0 are torch.float32 \(3, 11"),
    ):
        with pytest.raises(CodecError, match=said):
            codec.encode_outputs(outputs(x))
    with pytest.raises(CodecError, match="not logits"):
        codec.encode(torch.zeros(1, 5, 2, 3), torch.zeros(1, 5))
    for name, tables_ in (("stage:layer2.0:8", {}), ("stage:layer2.0:pca4", tables)):
        fresh, _ = made(name)
        fresh.use_tables(lambda tables_=tables_: tables_)  # type: ignore[misc]
        with pytest.raises(CodecError, match="its tables"):
            fresh.tables()


def test_names_are_known_again_and_may_be_part_of_a_files_name() -> None:
    for name, stored in {
        "stage:layer2.0:8": "stage-layer2.0-8",
        "stage:s3:pca64": "stage-s3-pca64",
        "stage:1:pca64:4": "stage-1-pca64",
        "stage:1:pca64:6": "stage-1-pca64b6",
    }.items():
        assert get_codec(name, 5, GRID).name == get_codec(stored, 5, GRID).name == stored
        assert _CODEC.fullmatch(stored) and known_own(name) == name


@pytest.mark.parametrize(
    "name",
    ["stage:a:1", "stage:a:17", "stage:a:pca4:9", "stage:a:pca0", "stage:a", "stage:a/b:8", "stage:..:8", "stage::8"],
)
def test_names_that_mean_nothing_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(CodecError, match=r"bits|expected stage:NAME") as refused:
        get_codec(name, 5, GRID)
    assert "\n" not in str(refused.value) and len(str(refused.value)) <= 300
