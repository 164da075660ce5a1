"""The error measured at encoding is that of the decoded logits, is summed rightly, and is read from strangers with care."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cskd.codecs import Outputs, get_codec
from cskd.codecs.measured import BLENDS, Measured, from_facts, measure, together
from tests.caches import random_logits

GRID = (2, 3)


def test_it_is_the_divergence_of_the_decoded_softmax_at_five_blends() -> None:
    dense, image = random_logits(4, 12, GRID)
    codec = get_codec("topk:3", 12, GRID)
    arrays = codec.encode(dense, image)
    found = measure(codec, arrays, Outputs(dense, image))
    again, whole = (torch.from_numpy(a) for a in codec.logits(arrays))
    kl = wrong = 0.0
    for a in BLENDS:
        p, q = (
            (a * d + (1 - a) * g[:, :, None, None]).double().softmax(1) for d, g in ((dense, image), (again, whole))
        )
        kl += float((p * (p / q).log()).sum(1).mean()) / len(BLENDS)
        wrong += float((p.argmax(1) != q.argmax(1)).double().mean()) / len(BLENDS) if a else 0.0
    assert isinstance(found, Measured) and found.views == 4
    assert found.kl == pytest.approx(kl, rel=1e-4) and found.wrong == pytest.approx(wrong) and wrong > 0
    e, g = again - dense, whole - image
    largest = max(float((x - x.mean(1, keepdim=True)).abs().max()) for x in (e, g))
    assert found.largest == pytest.approx(largest)


def test_a_codec_without_cells_is_measured_on_the_image_and_an_exact_one_not_at_all() -> None:
    dense, image = random_logits(9, 12, GRID)
    codec = get_codec("global:2", 12, GRID)
    arrays = codec.encode(dense, image)
    found = measure(codec, arrays, Outputs(dense, image), 9)
    p, q = image.log_softmax(1), torch.from_numpy(codec.logits(arrays)[1]).log_softmax(1)
    assert isinstance(found, Measured) and found.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert found.wrong == 0 and found.views == 9
    envelope = get_codec("envelope", 12, GRID)
    assert measure(envelope, envelope.encode(dense, image), Outputs(dense, image)) is None
    empty = Outputs(dense[:0], image[:0])
    assert measure(codec, codec.encode(*empty[:2]), empty) is None


def test_several_are_weighted_by_their_views() -> None:
    both = together([Measured(1, 1.0, 0.5, 3.0), Measured(3, 2.0, 0.1, 1.0)])
    assert both is not None and list(both.facts.values()) == pytest.approx([4, 1.75, 0.2, 3.0])
    assert together([]) is None
    error = Measured(4, 1 / 3, 0.1, 2.0)
    assert from_facts(error.facts) == Measured(4, 0.333333, 0.1, 2.0)


@pytest.mark.parametrize(
    "change",
    [{"kl": math.nan}, {"kl": -1.0}, {"wrong": 1.5}, {"views": 1.5}, {"views": True}, {"largest": "1"}, {"more": 1}],
)
def test_what_is_no_measured_error_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a measured error is"):
        from_facts(Measured(1, 0.1, 0.1, 0.1).facts | change)
    with pytest.raises(ValueError, match="a measured error is"):
        from_facts([1, 0.1, 0.1, 0.1])
