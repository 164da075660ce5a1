"""Fused convolutions: the same features up to rounding, and a model that is left as it was where it can't be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from cskd.config import TeacherConfig
from cskd.teacher.fold import fold_norms
from cskd.teacher.fuse import FusedConvolution, fuse_activations
from cskd.teacher.heads import Head
from tests.teachers import load, pixels, tiny_teacher

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def fuse(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    backbone: Any = getattr(model, "forward_features", model)
    head: Any = getattr(model, "forward_head", lambda features: features.mean((2, 3)))
    return fuse_activations(model, Head("linear", 0.0, "", backbone, head), x, dtype)


@pytest.mark.parametrize(
    ("name", "fused", "kwargs"),
    [
        ("mobilenetv2_100", 52, {"pad_type": "same"}),
        ("mobilenetv3_large_100", 62, {}),
        ("tf_efficientnet_b0", 81, {}),
        ("regnety_002", 70, {}),
        ("resnet18", 20, {}),
        ("densenet121", 120, {}),
    ],
)
@torch.no_grad()
def test_fusing_changes_nothing_but_rounding(name: str, fused: int, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=10, **kwargs).eval(), torch.randn(2, 3, 66, 95)
    fold_norms(model, x)
    before = model(x)
    assert fuse(model, x) == fused
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3 * float(before.std()))


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (8, 9), (13, 20)])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (2, 2, 1), (3, 1, 2)])
@torch.no_grad()
def test_a_same_convolution_reads_the_same_pixels(
    size: tuple[int, int], kernel: int, stride: int, dilation: int
) -> None:
    torch.manual_seed(0)
    same = Conv2dSame(6, 6, kernel, stride, dilation=dilation, groups=3).requires_grad_(False)
    model, x = nn.Sequential(same, nn.ReLU6()), torch.randn(2, 6, *size)
    expected = F.relu6(same(x))
    assert fuse(model, x) == 1
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_in_bf16_it_is_as_close_as_autocast() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("regnety_002", num_classes=10).eval()
    x = torch.randn(4, 3, 64, 64)
    fold_norms(model, x)
    exact = model.forward_features(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.forward_features(x).float()
    assert fuse(model, x, torch.bfloat16) == 70
    with torch.autocast("cpu", torch.bfloat16):
        fused = model.forward_features(x)
    assert fused.dtype == torch.bfloat16
    assert float((fused.float() - exact).square().mean()) < 2 * float((autocast - exact).square().mean())


class Awkward(nn.Module):
    """Convolutions that must stay as they are: watched, run twice, with a shared activation, padded by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.watched, self.twice, self.plain = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.mirrored = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.act, self.own = nn.ReLU(), nn.ReLU()
        self.seen: list[Tensor] = []
        self.watched.register_forward_hook(lambda module, inputs, out: self.seen.append(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.twice(self.twice(self.act(self.watched(x)))))
        z: Tensor = self.own(self.plain(self.mirrored(y)))
        return z


@torch.no_grad()
def test_what_may_not_be_replaced_is_not() -> None:
    torch.manual_seed(0)
    model, x = Awkward().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert fuse(model, x) == 1
    assert isinstance(model.plain, FusedConvolution)
    assert [type(m) for m in (model.watched, model.twice, model.mirrored, model.act)] == [*[nn.Conv2d] * 3, nn.ReLU]
    seen = len(model.seen)
    torch.testing.assert_close(model(x), expected)
    assert len(model.seen) == seen + 1


class Branching(nn.Module):
    """What a convolution wrote is read by an activation, and once more by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        z: Tensor = self.act(y)
        return z + y


@torch.no_grad()
def test_a_model_whose_features_would_change_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert fuse(model, x) == 0
    assert torch.equal(model(x), expected)
    assert type(model.conv) is nn.Conv2d


@pytest.mark.parametrize("refused", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_the_operator_for_the_dtype_the_model_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, refused: torch.dtype
) -> None:
    operator = torch.ops.mkldnn._convolution_pointwise

    def partly(x: Tensor, *arguments: Any) -> Any:
        if x.dtype == refused:
            raise RuntimeError("needs the cpu support avx512bw")
        return operator(x, *arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", partly)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert fuse(model, x, torch.bfloat16) == 0
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU]
    assert torch.equal(model(x), expected)


class Shared(nn.Module):
    """The head uses an activation and a convolution of the features once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.act, self.fc = nn.ReLU(), nn.Linear(8, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.mix(self.act(self.first(x))))
        return y

    def forward_head(self, features: Tensor) -> Tensor:
        y: Tensor = self.fc(self.act(self.mix(features)).mean((2, 3)))
        return y


@torch.no_grad()
def test_what_the_head_uses_too_is_not_replaced() -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(2, 3, 9, 9)
    expected = model.forward_head(model.forward_features(x))
    assert fuse(model, x) == 2
    assert [type(m) for m in (model.mix, model.act)] == [nn.Conv2d, nn.ReLU]
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected)


class OwnPrecision(nn.Module):
    """Leaves autocast for a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.autocast("cpu", enabled=False):
            z: Tensor = self.last(self.second(y.float()).permute(0, 2, 3, 1))
            return z.permute(0, 3, 1, 2)


@torch.no_grad()
def test_a_part_that_the_model_keeps_in_float32_stays_in_it() -> None:
    model, x = OwnPrecision(), torch.randn(2, 3, 8, 8)
    assert fuse(model, x, torch.bfloat16) == 2
    assert [m.weight.dtype for m in (model.first, model.second)] == [torch.bfloat16, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32


class Keywords(nn.Module):
    """Calls its layers by keyword, which a hook does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(input=self.conv(input=x))
        return y


@torch.no_grad()
def test_a_model_that_can_not_be_watched_stays_as_it_was() -> None:
    model, x = Keywords(), torch.randn(2, 3, 8, 8)
    assert fuse(model, x) == 0
    assert type(model.conv) is nn.Conv2d and not model.conv._forward_hooks


@torch.no_grad()
def test_an_input_of_another_size_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert fuse(model, torch.randn(2, 3, 8, 8)) == 1
    with pytest.raises(ValueError, match=r"input of \[8, 9\] pixels, expected \[8, 8\]"):
        model(torch.randn(2, 3, 8, 9))


def test_only_a_folded_teacher_on_the_cpu_is_fused(tmp_path: Path) -> None:
    tiny: TeacherConfig = tiny_teacher(tmp_path)
    plain, folded = load(tiny), load(tiny, fold=True)
    exact = load(tiny, fold=True, precision="float64")
    said = [any("convolutions run in oneDNN" in note for note in t.notes) for t in (plain, folded, exact)]
    assert said == [False, True, False]
    for a, b in zip(plain.forward_dense(pixels()), folded.forward_dense(pixels()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
