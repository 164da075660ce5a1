"""The agreement that training logs: the share of cells in which the student says what it is taught."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cskd.codecs.base import BLEND_ONE, direct_hard
from cskd.config import LossConfig
from cskd.config.schema import LossTerm
from cskd.errors import ConfigError
from cskd.method.losses import (
    AnyTargets,
    BothTargets,
    DistillationLoss,
    HardTargets,
    MixedLabels,
    SoftTargets,
    StudentOutput,
)
from cskd.method.terms import AGREEMENT, cells_term

HARD = LossTerm("patches", "cells", kind="ce")
SOFT = LossTerm("patches", "cells", kind="kl", decay="quadratic")


def agreement(patch: Tensor, targets: AnyTargets, term: LossTerm) -> Tensor:
    """As a loss that watches the term gives it, in an epoch in which the term does not count, too."""
    term = dataclasses.replace(term, epochs=[1, 2])
    label = torch.zeros(len(patch), dtype=torch.int64)
    loss = DistillationLoss(LossConfig("terms", terms=[term]), watched=term)
    values = [
        loss(StudentOutput(patch.mean((2, 3)), None, patch), MixedLabels(label, label, label.float()), targets, epoch)[
            1
        ]
        for epoch in (0, 1)
    ]
    assert torch.equal(values[0][AGREEMENT], values[1][AGREEMENT]) and len(values[1]) == 2
    return values[0][AGREEMENT]


@pytest.mark.parametrize("blend", [None, 0, 20_000, BLEND_ONE])
def test_it_is_counted_cell_by_cell_against_the_target_of_the_blend(
    blend: int | None,
) -> None:
    draw = torch.Generator().manual_seed(0)
    patch, dense = torch.randn(5, 6, 3, 2, generator=draw), torch.randn(5, 6, 3, 2, generator=draw)
    image = torch.randn(5, 6, generator=draw)
    taught = direct_hard(dense, image, BLEND_ONE if blend is None else blend)
    same = sum(
        int(patch[b, :, i, j].argmax()) == int(taught[b, i, j]) for b in range(5) for i in range(3) for j in range(2)
    )
    logits, classes = SoftTargets(image, dense, blend), HardTargets(image.argmax(1), taught.long())
    soft, hard = agreement(patch, logits, SOFT), agreement(patch, classes, HARD)
    assert agreement(patch, BothTargets(classes, SoftTargets(image, dense, 7, {"quadratic": blend or 0})), HARD) == hard
    if blend is not None:
        assert agreement(patch, BothTargets(classes, SoftTargets(image, dense, 7, {"quadratic": blend})), SOFT) == soft
    assert agreement(patch, {"": classes, "other": logits}, dataclasses.replace(SOFT, cache="other")) == soft
    assert soft.item() == hard.item() == pytest.approx(same / 30) and not hard.requires_grad


def test_it_asks_for_no_gradient_and_only_cskd_has_it() -> None:
    patch = torch.zeros(1, 3, 1, 1, requires_grad=True)
    assert not agreement(patch, HardTargets(torch.zeros(1).long(), torch.zeros(1, 1, 1).long()), HARD).requires_grad
    methods = ("none", "deit-hard", "deit-soft", "cskd-hard", "cskd-soft")
    taught = [cells_term(LossConfig(method)) is not None for method in methods]  # type: ignore[arg-type]
    assert taught == [False] * 3 + [True] * 2
    assert cells_term(LossConfig("deit-hard", terms=[SOFT])) == SOFT
    with pytest.raises(ConfigError, match="column of the metrics"):
        cells_term(LossConfig("cskd-hard", terms=[dataclasses.replace(SOFT, name="agreement")]))
