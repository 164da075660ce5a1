"""The agreement that training logs: the share of cells in which the student says what it is taught."""

from __future__ import annotations

import pytest
import torch

from cskd.codecs.base import BLEND_ONE, direct_hard
from cskd.config import LossConfig
from cskd.method import agreement as module
from cskd.method.agreement import agreement, has_agreement
from cskd.method.losses import HardTargets, SoftTargets


@pytest.mark.parametrize("blend", [None, 0, 20_000, BLEND_ONE])
def test_it_is_counted_cell_by_cell_against_the_target_of_the_blend(
    blend: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    draw = torch.Generator().manual_seed(0)
    patch, dense = torch.randn(5, 6, 3, 2, generator=draw), torch.randn(5, 6, 3, 2, generator=draw)
    image = torch.randn(5, 6, generator=draw)
    taught = direct_hard(dense, image, BLEND_ONE if blend is None else blend)
    same = sum(
        int(patch[b, :, i, j].argmax()) == int(taught[b, i, j]) for b in range(5) for i in range(3) for j in range(2)
    )
    soft = agreement(patch, SoftTargets(image, dense, blend))
    hard = agreement(patch, HardTargets(image.argmax(1), taught.long()))
    assert soft.item() == hard.item() == pytest.approx(same / 30) and not hard.requires_grad


def test_it_asks_for_no_gradient_and_only_cskd_has_it() -> None:
    patch = torch.zeros(1, 3, 1, 1, requires_grad=True)
    assert not agreement(patch, HardTargets(torch.zeros(1).long(), torch.zeros(1, 1, 1).long())).requires_grad
    methods = ("none", "deit-hard", "deit-soft", "cskd-hard", "cskd-soft")
    assert [has_agreement(LossConfig(method)) for method in methods] == [False] * 3 + [True] * 2  # type: ignore[arg-type]
