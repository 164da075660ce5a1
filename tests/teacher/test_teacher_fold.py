"""Folded batch norms: the same teacher up to rounding, under another name, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest
import timm
import torch
from torch import Tensor, nn

from cskd.config import TeacherConfig
from cskd.errors import TeacherError
from cskd.teacher.fold import fold_norms
from tests.teachers import load, pixels, tiny_teacher


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return tiny_teacher(tmp_path_factory.mktemp("tiny"))


Network = TypeVar("Network", bound=nn.Module)


def uneven(model: Network) -> Network:
    """Eval mode, with batch statistics and affine parameters that are not those of a fresh network."""
    torch.manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for values, low, high in (
            (norm.running_mean, -1, 1),
            (norm.running_var, 0.5, 2),
            (norm.weight, 0.5, 2),
            (norm.bias, -1, 1),
        ):
            assert values is not None
            nn.init.uniform_(values, low, high)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "folded"),
    [("mobilenetv2_100", 52), ("tf_efficientnet_b0", 49), ("regnety_002", 44), ("resnet18", 20), ("densenet121", 59)],
)
def test_folding_changes_nothing_but_rounding(name: str, folded: int) -> None:
    model, x = uneven(timm.create_model(name, num_classes=10)), torch.randn(2, 3, 64, 64)
    before = model(x)
    assert fold_norms(model, x) == folded
    other = torch.randn(3, 3, 96, 96)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3 * float(before.std()))
    assert fold_norms(model, other) == 0


class Twice(nn.Module):
    """A convolution whose output is read by a norm and, past it, by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        z: Tensor = self.norm(y)
        return (z + y).mean((2, 3))


def test_a_convolution_that_is_read_elsewhere_too_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"logits .* of their size away.* set teacher\.fold: false"):
        fold_norms(uneven(Twice()), torch.randn(2, 3, 8, 8))


def test_a_convolution_or_norm_that_runs_twice_is_left_alone() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model = uneven(nn.Sequential(conv, norm, conv, nn.ReLU(), nn.Flatten()))
    assert fold_norms(model, torch.randn(2, 3, 8, 8)) == 0


def test_a_folded_teacher_is_another_teacher_with_nearly_the_same_logits(tiny: TeacherConfig) -> None:
    plain, folded, x = load(tiny), load(tiny, fold=True), pixels()
    assert "fold" not in plain.fingerprint.facts
    assert folded.fingerprint.facts == {**plain.fingerprint.facts, "fold": True}
    assert "21 batch norms are folded into convolutions" in folded.notes
    for a, b in zip(plain.forward_dense(x), folded.forward_dense(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_folding_works_on_a_users_own_network(tmp_path: Path) -> None:
    model = uneven(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=True), nn.ReLU(), nn.Flatten())
    )
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    assert fold_norms(model, x) == 1
    assert isinstance(model[1], nn.Sequential) and len(model[1]) == 0
    torch.testing.assert_close(model(x), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@torch.no_grad()
def test_a_convolution_whose_weight_is_computed_keeps_its_norm() -> None:
    model, x = (
        nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    expected = model(x)
    assert fold_norms(model, x) == 0
    assert torch.equal(model(x), expected)
