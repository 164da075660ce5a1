"""The winners of all blends are the codec's hard targets at each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cskd.codecs import Arrays, Codec, get_codec
from cskd.codecs.base import BLEND_ONE
from cskd.codecs.winners import Winners, winners
from cskd.errors import CodecError
from cskd.pipeline.look.inspect_sample import margin
from tests.caches import random_logits

BLENDS = [0, 1, 2, 100, 20_000, 32_768, 60_000, BLEND_ONE - 1, BLEND_ONE]


def found(name: str, step: float = 0.0) -> tuple[Winners, Codec, Arrays]:
    dense, whole = random_logits(40, 7, (2, 3))
    if step:  # many exact ties
        dense, whole = (dense / step).round() * step, (whole / step).round() * step
    codec = get_codec(name, 7, (2, 3))
    arrays = codec.encode(dense, whole)
    return winners(codec, arrays), codec, arrays


@pytest.mark.parametrize("name", ["envelope", "int8", "topk:2"])
@pytest.mark.parametrize("step", [0.0, 2.0])
def test_winners_are_the_hard_targets_at_every_blend(name: str, step: float) -> None:
    won, codec, arrays = found(name, step)
    blends = np.unique([*BLENDS, *won.start.tolist(), *(won.start.astype(int) + 1).tolist()]).tolist()
    for blend in blends:
        assert np.array_equal(won.at(blend), codec.hard(arrays, blend)), blend
    for i in range(5):
        one = codec.take(arrays, np.array([i]))
        assert np.array_equal(won.margin[i], margin(codec, one))


def test_a_stored_class_that_the_decoded_logits_do_not_have_largest_counts_at_blend_0_alone() -> None:
    codec = get_codec("int8", 7, (2, 3))
    dense, whole = random_logits(6, 7, (2, 3))
    dense[:2] = whole[:2, :, None, None]  # cells that never differ from the image
    arrays = codec.encode(dense, whole)
    arrays["global_class"] = (arrays["global_class"] + 1).astype(np.uint16) % np.uint16(7)
    for i in range(3, 6):  # a cell that has the stored class from the next blend on, too
        arrays["dense"][i, arrays["global_class"][i], 0, 0] = 127
    won = winners(codec, arrays)
    for blend in BLENDS:
        assert np.array_equal(won.at(blend), codec.hard(arrays, blend)), blend
    one = codec.take(arrays, np.array([0]))
    assert np.array_equal(won.margin[0], margin(codec, one)) and (won.margin[0] == 0).any()


def test_a_blend_outside_is_refused() -> None:
    with pytest.raises(CodecError, match="65537"):
        found("envelope")[0].at(65537)


def test_no_samples_have_no_winners() -> None:
    codec = get_codec("envelope", 7, (2, 3))
    none = winners(codec, codec.encode(torch.zeros(0, 7, 2, 3), torch.zeros(0, 7)))
    assert none.at(5).shape == none.margin.shape == (0, 2, 3)
