"""The envelope codec's promise: at every blend a lookup is the class that direct computation gives, for every cell."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cskd.codecs import Codec, get_codec
from cskd.codecs import envelope as module
from cskd.codecs.base import BLEND_ONE, Arrays, direct_hard
from cskd.errors import CodecError

ENDS = (0, 1, 2, 32767, 32768, 32769, 65534, 65535, 65536)


def by_fractions(dense: Sequence[float], image: Sequence[float], blend: int) -> int:
    """One cell in exact rational arithmetic, written without regard to the code under test; lists of K floats."""
    a = Fraction(blend, BLEND_ONE)
    values = [a * Fraction(d) + (1 - a) * Fraction(g) for d, g in zip(dense, image, strict=True)]
    return values.index(max(values))


def encode(dense: Tensor, image: Tensor) -> tuple[Codec, Arrays]:
    codec = get_codec("envelope", dense.shape[1], (dense.shape[2], dense.shape[3]))
    arrays = codec.encode(dense, image)
    codec.check(arrays, len(dense), dense.shape[1])
    return codec, arrays


def critical_blends(arrays: Arrays, most: int = 20) -> list[int]:
    """Both ends and middle, and the blends on either side of stored starts: where a lookup would go wrong first."""
    starts = np.unique(arrays["start"].astype(int))
    starts = starts[:: max(1, len(starts) // most)]
    return sorted({*ENDS, *starts.tolist(), *(starts + 1).tolist()})


def assert_exact(dense: Tensor, image: Tensor, blends: Iterable[int] = ()) -> Arrays:
    codec, arrays = encode(dense, image)
    for q in blends or critical_blends(arrays):
        wrong = codec.hard(arrays, q) != direct_hard(dense, image, q).numpy()
        assert not wrong.any(), f"{wrong.sum()} of {wrong.size} cells wrong at blend {q}, first {np.argwhere(wrong)[0]}"
    return arrays


def tangents(k: int, lowest: float = 0.0, highest: float = 1.0) -> tuple[Tensor, Tensor]:
    """K lines that touch a parabola, so that all of them are on the envelope, class t at blend t: one cell."""
    t = torch.linspace(lowest, highest, k, dtype=torch.float64)
    return (2 * t - t * t).float().reshape(1, k, 1, 1), (-t * t).float().reshape(1, k)


@pytest.mark.parametrize("k, n", [(1, 50), (2, 2000), (10, 1000), (100, 100), (1000, 10), (21843, 1), (65535, 1)])
def test_lookups_are_exact_on_random_logits_of_any_number_of_classes(k: int, n: int) -> None:
    rng = torch.Generator().manual_seed(k)
    dense = torch.randn(n, k, 2, 3, generator=rng) * 3
    assert_exact(dense, dense.mean((2, 3)) + torch.randn(n, k, generator=rng))


@pytest.mark.parametrize("digits", [torch.bfloat16, torch.float16])
def test_lookups_are_exact_where_half_precision_logits_tie(digits: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    dense = (torch.randn(40, 300, 7, 7, generator=rng)).to(digits).float()
    image = torch.randn(40, 300, generator=rng).to(digits).float()
    tied = (dense == dense.amax(1, keepdim=True)).sum(1) > 1
    assert tied.any(), "the case is meant to have ties"
    assert_exact(dense, image)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_lookups_are_exact_in_rational_arithmetic_on_ties_and_crossings_at_grid_blends(data: st.DataObject) -> None:
    """Small whole numbers: duplicate lines, many lines through a point, crossings exactly at a grid blend."""
    k = data.draw(st.integers(1, 6))
    scale = data.draw(st.sampled_from([1, 4, 2**14]))
    unit = data.draw(st.sampled_from([1.0, 2.0**-149, 2.0**100]))  # 2^-149 is the least float32
    draw = st.lists(st.integers(-scale, scale), min_size=k, max_size=k)
    image = data.draw(draw)
    cells = data.draw(st.lists(draw, min_size=1, max_size=4))
    dense = torch.tensor(cells, dtype=torch.float64).T.reshape(1, k, 1, -1) * unit
    codec, arrays = encode(dense.float(), (torch.tensor([image], dtype=torch.float64) * unit).float())
    crossings = {
        round(BLEND_ONE * (image[i] - image[j]) / d) + e
        for cell in cells
        for i in range(k)
        for j in range(i)
        if (d := (image[i] - image[j]) + (cell[j] - cell[i]))
        for e in (-1, 0, 1)
    }
    for q in {*ENDS, *(q for q in crossings if 0 <= q <= BLEND_ONE)}:
        expected = [by_fractions(cell, image, q) for cell in cells]
        assert codec.hard(arrays, q).ravel().tolist() == expected, q


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_lookups_and_direct_targets_are_exact_for_any_finite_float32(data: st.DataObject) -> None:
    """Denormals beside 1e38, values one ulp apart: a plain float64 sum rounds there, and float32 would overflow."""
    k = data.draw(st.integers(1, 5))
    base = data.draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
    near = base + [float(np.nextafter(np.float32(x), np.float32(0))) for x in base]
    draw = st.lists(st.sampled_from(near), min_size=k, max_size=k)
    image, cell = data.draw(draw), data.draw(draw)
    dense = torch.tensor(cell).reshape(1, k, 1, 1)
    codec, arrays = encode(dense, torch.tensor([image]))
    for q in {*critical_blends(arrays), data.draw(st.integers(0, BLEND_ONE))}:
        expected = by_fractions(cell, image, q)
        assert codec.hard(arrays, q).item() == expected, q
        assert direct_hard(dense, torch.tensor([image]), q).item() == expected, q


def test_blends_that_agree_to_53_bits_without_being_equal_are_told_apart() -> None:
    """At blend 1 / 65536 classes 0 and 1 have the same float64 sum; exactly, class 1 leads up to 1, where they tie."""
    dense = torch.tensor([2.0**40, 2.0**40, 0.0]).reshape(1, 3, 1, 1)
    image = torch.tensor([[2.0**-30, 2.0**-29, 1.0]])
    codec, arrays = encode(dense, image)
    for q, expected in ((0, 2), (1, 1), (40000, 1), (65535, 1), (65536, 0)):
        assert codec.hard(arrays, q).item() == direct_hard(dense, image, q).item() == expected


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
@pytest.mark.parametrize("q", [1, 2, 3, 100, 32768, 65535, 65536])
def test_the_lowest_class_wins_at_a_crossing_that_falls_on_a_grid_blend(q: int, order: str) -> None:
    """Lines that all pass through one point at blend q / 65536; the class taking over may be the lower or higher."""
    slopes = {"rising": [0, 1, 2, 3], "falling": [3, 2, 1, 0], "mixed": [2, 0, 3, 1]}[order]
    image = torch.tensor([[float(-m * q) for m in slopes]])
    dense = torch.tensor([float(m * (BLEND_ONE - q)) for m in slopes]).reshape(1, 4, 1, 1)
    codec, arrays = encode(dense, image)
    got = [codec.hard(arrays, b).item() for b in (q - 1, q, min(q + 1, BLEND_ONE))]
    tie = 0
    steepest, flattest = slopes.index(3), slopes.index(0)
    assert got == [flattest, tie, steepest if q < BLEND_ONE else tie]
    assert_exact(dense, image)


def test_a_cell_with_more_than_255_classes_on_its_envelope_is_stored_in_a_wider_dtype_and_exact() -> None:
    dense, image = tangents(2000)
    arrays = assert_exact(dense, image, blends=range(0, BLEND_ONE + 1, 997))
    assert arrays["n_extra"].dtype == np.uint16 and arrays["n_extra"].item() > 1000
    assert_exact(dense.flip(1), image.flip(1), blends=range(0, BLEND_ONE + 1, 997))


def test_classes_that_win_only_between_two_grid_blends_are_not_stored() -> None:
    middle = (1000 + 0.5) / BLEND_ONE
    dense, image = tangents(50, middle - 2e-6, middle + 2e-6)
    arrays = assert_exact(dense, image, blends=range(995, 1006))
    assert arrays["n_extra"].item() <= 2


def test_cells_without_a_rival_store_no_segment() -> None:
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(5, 20, generator=rng)
    arrays = assert_exact(image[:, :, None, None].repeat(1, 1, 7, 7), image)
    assert arrays["n_extra"].sum() == 0
    flat = assert_exact(torch.ones(2, 20, 7, 7), torch.zeros(2, 20))
    assert flat["n_extra"].sum() == 0 and (flat["global_class"] == 0).all()


def test_an_empty_batch_encodes_to_empty_arrays() -> None:
    _, arrays = encode(torch.zeros(0, 9, 7, 7), torch.zeros(0, 9))
    assert {name: len(a) for name, a in arrays.items()} == dict.fromkeys(arrays, 0)


def test_the_memory_layout_of_the_logits_and_the_chunk_screened_at_a_time_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = torch.Generator().manual_seed(3)
    dense, image = torch.randn(9, 50, 7, 7, generator=rng), torch.randn(9, 50, generator=rng)
    codec, expected = encode(dense, image)
    results = [
        codec.encode(dense.to(memory_format=torch.channels_last), image),
        codec.encode(dense.requires_grad_(), image.t().contiguous().t()),
    ]
    monkeypatch.setattr(module, "CACHE_FLOATS", 4 * 50 * 49)
    results.append(codec.encode(dense, image))
    monkeypatch.setattr(module, "_on_cpu", lambda x: False)  # the operations another device would run
    results.append(codec.encode(dense, image))
    for arrays in results:
        for name in expected:
            assert arrays[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(arrays[name], expected[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_encodes_to_the_same_arrays() -> None:
    rng = torch.Generator().manual_seed(4)
    dense, image = torch.randn(9, 1000, 7, 7, generator=rng), torch.randn(9, 1000, generator=rng)
    codec, expected = encode(dense, image)
    arrays = codec.encode(dense.cuda(), image.cuda())
    for name in expected:
        np.testing.assert_array_equal(arrays[name], expected[name])
    for q in ENDS:
        assert torch.equal(direct_hard(dense.cuda(), image.cuda(), q).cpu(), direct_hard(dense, image, q))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("n_extra", lambda a: a["n_extra"] + np.uint8(1), "n_extra counts"),
        ("start", lambda a: a["start"][::-1].copy(), "start that does not rise"),
        ("start", lambda a: a["start"][:-1], "envelope/start has"),
        ("extra", lambda a: a["extra"] + np.uint8(200), "beyond its list"),
        ("extra", lambda a: np.zeros_like(a["extra"]), "class before it"),
        ("class_step", lambda a: a["class_step"] * 0, "list that does not rise"),
        ("class_step", lambda a: a["class_step"] + np.uint16(60), "class beyond 59"),
        ("n_classes", lambda a: a["n_classes"] + np.uint8(1), "n_classes counts"),
        ("global_class", lambda a: a["global_class"] + np.uint16(60), "names class"),
        ("global_class", lambda a: a["global_class"].astype(np.int64), "expected uint16"),
        ("n_extra", lambda a: a["n_extra"][:, :6], "shape"),
    ],
)
def test_damaged_arrays_are_refused(name: str, value: Callable[[Arrays], NDArray[Any]], message: str) -> None:
    rng = torch.Generator().manual_seed(5)
    codec, arrays = encode(torch.randn(4, 60, 7, 7, generator=rng), torch.randn(4, 60, generator=rng))
    with pytest.raises(CodecError, match=message):
        codec.check(arrays | {name: value(arrays)}, 4, 60)


def test_more_classes_than_uint16_can_name_are_refused() -> None:
    with pytest.raises(CodecError, match="uint16"):
        get_codec("envelope", 65536, (7, 7))


def test_soft_targets_are_refused_with_the_codecs_that_have_them() -> None:
    codec, arrays = encode(torch.zeros(1, 3, 1, 1), torch.zeros(1, 3))
    with pytest.raises(CodecError, match="int8"):
        codec.logits(arrays)


def test_lookups_of_a_real_teacher_are_exact_and_take_at_most_215_bytes_a_view(sample_data: Path) -> None:
    from numcodecs import Zstd
    from PIL import Image

    cells, whole = [], []
    teacher = _imagenet_teacher(sample_data)
    with tarfile.open(sample_data / "data/imagenet-sample.tar") as tar:
        names = sorted(n for n in tar.getnames() if n.endswith(".JPEG"))[::12]
        for first, second in pairwise(names):  # two images overlaid, as mixup does: twice the rivals of a clean one
            files = [file for n in (first, second) if (file := tar.extractfile(n))]
            opened = [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files]
            x = np.mean([np.asarray(i.resize((224, 224), Image.Resampling.BILINEAR), np.float32) for i in opened], 0)
            d, g = teacher(torch.from_numpy(x / 127.5 - 1).permute(2, 0, 1)[None])
            cells.append(d)
            whole.append(g)
    dense, image = torch.cat(cells), torch.cat(whole)
    arrays = assert_exact(dense, image, blends=[0, 1, 6553, 20000, 32768, 48000, 65535, 65536])
    assert sum(len(Zstd(level=9).encode(a)) for a in arrays.values()) / len(dense) <= 215


def _imagenet_teacher(sample_data: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    import timm
    from safetensors.torch import load_file

    model: Any = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    weights = load_file(sample_data / "teachers/imagenet_mobilenetv2_100.safetensors")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})

    @torch.inference_mode()
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        f = model.forward_features(x)
        dense = torch.nn.functional.linear(f.permute(0, 2, 3, 1), model.classifier.weight, model.classifier.bias)
        return dense.permute(0, 3, 1, 2), model.forward_head(f)

    return run


@pytest.mark.parametrize("piece", [1, 4, 100])
def test_lookups_and_checks_do_not_depend_on_how_many_samples_go_at_a_time(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    dense = torch.randn(11, 20, 3, 2, generator=torch.Generator().manual_seed(2))
    arrays = assert_exact(dense, dense.mean((2, 3)))
    codec, index = get_codec("envelope", 20, (3, 2)), np.array([7, 0, 7])
    for q in critical_blends(arrays):
        np.testing.assert_array_equal(codec.hard_at(arrays, index, q), codec.hard(codec.take(arrays, index), q))
    per_sample = arrays["n_extra"].sum((1, 2))
    last = int(per_sample[:9].sum()) - 1  # the last segment of sample 8
    arrays["extra"][last] = arrays["n_classes"][8]
    with pytest.raises(CodecError, match="sample 8 of the unit has a segment beyond its list of classes"):
        codec.check(arrays, 11, 20)
