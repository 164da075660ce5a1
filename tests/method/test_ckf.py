"""The blend of an epoch, and the targets it makes."""

from typing import cast

import numpy as np
import pytest
import torch

from cskd.config.schema import Decay
from cskd.method.ckf import blend_at, ckf_blend, hard_targets

ONE = 65536


@pytest.mark.parametrize(
    ("decay", "last"),
    [
        ("linear", 1 / 300),
        ("quadratic", 1 / 300**2),
        ("cosine", np.cos(np.pi / 2 * 299 / 300)),
        ("local", 1),
        ("global", 0),
    ],
)
def test_blend_starts_local_and_ends_above_global(decay: Decay, last: float) -> None:
    blends = [blend_at(e, 300, decay) for e in range(300)]
    assert blends[0] == (0 if decay == "global" else ONE)
    assert blends[-1] == round(last * ONE)
    assert all(isinstance(q, int) and a >= q for a, q in zip([ONE, *blends], blends, strict=False))


def test_blend_follows_the_papers_formulas() -> None:
    for epoch in (0, 37, 75, 150, 299):
        p = epoch / 300
        assert blend_at(epoch, 300, "linear") == round((1 - p) * ONE)
        assert blend_at(epoch, 300, "quadratic") == round((1 - p) ** 2 * ONE)
        assert blend_at(epoch, 300, "cosine") == round(np.cos(np.pi * p / 2) * ONE)
    assert blend_at(0, 1, "linear") == ONE  # a single epoch is local


@pytest.mark.parametrize(("epoch", "epochs", "decay"), [(3, 3, "linear"), (-1, 3, "linear"), (0, 3, "exponential")])
def test_blend_refuses_what_is_no_epoch_or_decay(epoch: int, epochs: int, decay: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        blend_at(epoch, epochs, cast(Decay, decay))


def test_blend_mixes_cell_and_image() -> None:
    dense = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # 1 image, 2 classes, 1 x 2 cells
    image = torch.tensor([[10.0, 20.0]])
    assert ckf_blend(dense, image, 0.25).tolist() == [[[[7.75, 8.0]], [[15.75, 16.0]]]]
    assert torch.equal(ckf_blend(dense, image, 1.0), dense)
    assert torch.equal(ckf_blend(dense, image, 0.0), image[:, :, None, None].expand_as(dense))
    for blend in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected a share"):
            ckf_blend(dense, image, blend)


def test_hard_targets_are_the_float64_argmax_with_the_lowest_class_on_ties() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(3, 50, 4, 5)).astype(np.float32).round(1)  # rounding makes ties
    image = dense.mean((2, 3)).round(1)
    tied = 0
    for q in (0, 1, 12345, 32768, 65535, 65536):
        a = q / ONE
        blended = a * dense.astype(np.float64) + (1 - a) * image.astype(np.float64)[:, :, None, None]
        got = hard_targets(torch.from_numpy(dense), torch.from_numpy(image), q)
        assert got.dtype == torch.int64
        np.testing.assert_array_equal(got.numpy(), blended.argmax(1))  # numpy's argmax: the first
        tied += ((blended == blended.max(1, keepdims=True)).sum(1) > 1).sum()
    assert tied > 20  # the tie rule was exercised
