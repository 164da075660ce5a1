"""The codecs of the image alone: what they keep exactly, how far the rest may be off, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cskd.codecs import Codec, Outputs, get_codec, known_own
from cskd.codecs.base import BLEND_ONE, Arrays
from cskd.codecs.winners import winners
from cskd.errors import CodecError

GRID = (2, 3)


def encoded(codec: Codec, image: Tensor, labels: Tensor) -> Arrays:
    arrays = codec.encode_outputs(Outputs(torch.zeros(*image.shape, *GRID), image, labels))
    codec.check(arrays, len(image), codec.classes)
    return arrays


def kind(what: str, n: int, k: int, seed: int) -> Tensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 4
    return {"random": x, "ties": x.round(), "constant": x[:, :1].expand(n, k).clone(), "far": x * 1e-3 + 5000}[what]


@pytest.mark.parametrize("k", [2, 12, 1000, 21_843])
@pytest.mark.parametrize("name", ["global:2", "global:5", "global:8", "global:16", "global:top1", "global:top11"])
@given(what=st.sampled_from(["random", "ties", "constant", "far"]), seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_labels_class_mean_and_std_are_exact_and_the_other_logits_as_near_as_declared(
    name: str, k: int, what: str, seed: int
) -> None:
    if name == "global:top11" and k == 2:
        name = "global:top1"
    codec, image = get_codec(name, k, GRID), kind(what, 3, k, seed)
    labels = torch.randint(0, k, (3, 2), generator=torch.Generator().manual_seed(seed))
    arrays = encoded(codec, image, labels)
    decoded = torch.from_numpy(codec.logits(arrays)[1])
    assert torch.equal(decoded.gather(1, labels), image.gather(1, labels))
    np.testing.assert_array_equal(codec.global_class(arrays), image.numpy().argmax(1))
    np.testing.assert_allclose(arrays["mean"], image.double().mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(arrays["std"], image.double().numpy().std(1), rtol=1e-6, atol=1e-12)
    if "top" not in name:
        step = (image.double().amax(1) - image.double().amin(1)) / (2 ** int(name[7:]) - 1)
        bound = step / 2 + 4 * 2.0**-24 * image.abs().amax(1)
        assert bool(((decoded.double() - image).abs() <= bound[:, None]).all())
        return
    kept = torch.zeros_like(image, dtype=torch.bool)
    kept.scatter_(1, image.topk(int(name[10:]), dim=1).indices, True).scatter_(1, labels, True)
    assert bool(((decoded - image).abs() <= 2.0**-10 * image.abs())[kept].all())
    if not kept.all():
        mass = (x.masked_fill(kept, -torch.inf).double().logsumexp(1) for x in (image, decoded))
        torch.testing.assert_close(*mass, rtol=2.0**-10, atol=2.0**-10)


@pytest.mark.parametrize(
    "name, classes, said",
    [
        ("global:1", 5, r"1 bits per logit, expected 2\.\.16"),
        ("global:17", 5, r"17 bits per logit, expected 2\.\.16"),
        ("global:top5", 5, r"keeps 5 of 5 classes, expected 1\.\.4; or use global:8"),
        ("global", 5, "did you mean 'global:8'"),
        ("global:top", 5, "unknown codec 'global:top'"),
        ("global:top0", 5, "unknown codec 'global:top0'"),
        ("global:-8", 5, "unknown codec 'global:-8'"),
        ("global:8.5", 5, "unknown codec 'global:8.5'"),
    ],
)
def test_names_that_mean_nothing_are_refused_in_one_line(name: str, classes: int, said: str) -> None:
    with pytest.raises(CodecError, match=said) as refused:
        get_codec(name, classes, GRID)
    assert "\n" not in str(refused.value) and len(str(refused.value)) <= 300


def test_a_name_of_a_cache_is_that_of_a_config_without_its_colons() -> None:
    for name in ("global:8", "global:top10", "global:top:10"):
        codec = get_codec(name, 1000, GRID)
        assert known_own(name) == name
        assert codec.name == name.replace(":", "") == get_codec(codec.name, 1000, GRID).name


def test_logits_beyond_float16_are_refused_by_top_k_and_held_by_bits() -> None:
    image = torch.tensor([[3e38, -3e38, 0.0]])
    labels = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(CodecError, match="beyond float16's 65504; cache 'global:16'"):
        encoded(get_codec("global:top1", 3, GRID), image, labels)
    codec = get_codec("global:16", 3, GRID)
    np.testing.assert_allclose(codec.logits(encoded(codec, image, labels))[1], image, rtol=1e-4, atol=1e34)


@pytest.mark.parametrize("name", ["global:8", "global:top2"])
def test_every_cell_shows_the_image_at_every_blend(name: str) -> None:
    codec, image = get_codec(name, 12, GRID), kind("ties", 40, 12, 1)
    arrays = encoded(codec, image, torch.full((40, 2), 3))
    expected = np.broadcast_to(image.numpy().argmax(1)[:, None, None], (40, *GRID))
    for blend in (0, 1, BLEND_ONE):
        np.testing.assert_array_equal(codec.hard(arrays, blend), expected)
        np.testing.assert_array_equal(winners(codec, arrays).at(blend), expected)
    dense, whole = codec.logits(arrays)
    np.testing.assert_array_equal(dense, np.broadcast_to(whole[:, :, None, None], dense.shape))
