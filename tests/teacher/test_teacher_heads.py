"""Dense logits are the classifier's on each cell, average to the global ones, or are refused with the reason.

Weights are random, biases and running statistics of norms too: fresh networks have zero biases, which hide mistakes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cskd.errors import TeacherError
from cskd.machine.arithmetic import full_precision
from cskd.teacher.fingerprint import probe_images
from cskd.teacher.heads import Head, find_head, keep_classes

CPU = torch.device("cpu")
K = 10


Network = TypeVar("Network", bound=nn.Module)


def stir(model: Network) -> Network:
    """Move everything that initialisation leaves at 0 or 1."""
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn(p.shape, generator=g)
        elif any(name.startswith(n) for n in ("fc", "head", "classifier", "last_linear", "linear")):
            p.data = torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b += 0.1 * torch.randn(b.shape, generator=g)
        elif name.endswith("running_var"):
            b *= 0.8 + 0.4 * torch.rand(b.shape, generator=g)
    return model.eval().requires_grad_(False)


def images(size: int, n: int = 2) -> Tensor:
    return (torch.from_numpy(probe_images(size)[2 : 2 + n]).permute(0, 3, 1, 2).float() - 127.0) / 60.0


def build(name: str, **kwargs: Any) -> Any:  # what its parts are is timm's
    torch.manual_seed(0)  # weights that explode for one seed in a hundred would hide a difference, or make one
    return stir(timm.create_model(name, num_classes=K, **kwargs))


LINEAR = {  # name -> pixels, chosen for a grid of at least 2x2
    "resnet18": 64,
    "resnext26ts": 64,
    "regnety_002": 64,
    "efficientnet_b0": 64,
    "tf_efficientnetv2_b0": 64,
    "mobilenetv2_035": 64,
    "densenet121": 64,
    "resnest14d": 64,
    "inception_v3": 128,
    "inception_v4": 128,
    "dla46_c": 64,
    "legacy_xception": 64,
    "repvgg_a0": 64,
    "hrnet_w18_small": 64,
    "res2net50_14w_8s": 64,
    "repvit_m0_9": 64,  # batch norm after the pooling, two classifiers: affine all the same
    "rexnet_100": 64,
}
NOT_LINEAR = {  # name -> pixels, a layer that the reason must name
    "mobilenetv3_small_050": (64, "conv_head Conv2d > act2 Hardswish"),
    "ghostnet_050": (64, "conv_head Conv2d > act2 ReLU"),
    "mobilenetv4_conv_small_035": (64, "conv_head Conv2d"),
    "convnext_atto": (64, "head.norm LayerNorm2d"),
    "edgenext_xx_small": (64, "head.norm LayerNorm2d"),
    "vgg11": (64, "pre_logits.fc1 Conv2d"),
}
KWARGS: dict[str, dict[str, Any]] = {"vgg11": {"mlp_ratio": 1 / 64}}


@pytest.mark.parametrize("name", LINEAR)
def test_cells_average_to_the_model_s_own_output(name: str) -> None:
    model, x = build(name), images(LINEAR[name])
    with torch.no_grad():
        head = find_head(model, x, "exact")
        features = model.forward_features(x)
        dense_BKhw, global_BK = head.dense(features)
        own = model(x)
        cell = features[:, :, 1:2, 0:1].expand_as(features)  # a map that is one cell everywhere
        of_cell = model.forward_head(cell.contiguous())
    assert head.kind == "linear" and head.gap < 1e-5
    assert dense_BKhw.shape == (2, K, *features.shape[2:]) and min(dense_BKhw.shape[2:]) >= 2
    torch.testing.assert_close(global_BK, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense_BKhw.mean((2, 3)), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense_BKhw[:, :, 1, 0], of_cell, rtol=1e-4, atol=1e-4)
    assert (
        dense_BKhw.std((2, 3)).mean() > 1e-2 * dense_BKhw.abs().mean()
    )  # cells that differ: the identity says something


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_heads_that_are_not_linear_in_the_mean_are_refused_and_taken_on_request(name: str) -> None:
    size, layer = NOT_LINEAR[name]
    model, x = build(name, **KWARGS.get(name, {})), images(size)
    with torch.no_grad():
        with pytest.raises(TeacherError) as e:
            find_head(model, x, "exact")
        head = find_head(model, x, "per_cell")
        features = model.forward_features(x)
        dense_BKhw, global_BK = head.dense(features)
        own = model(x)
        of_cell = model.forward_head(features[:, :, 1:2, 0:1].expand_as(features).contiguous())
    text = str(e.value)
    assert layer in text and "gap" in text and "per_cell" in text and "\n" not in text
    assert head.kind == "per_cell" and head.gap > 0.1
    torch.testing.assert_close(global_BK, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense_BKhw[:, :, 1, 0], of_cell, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", ["max", "catavgmax", "avgmax"])
def test_other_poolings_are_refused_by_name(pool: str) -> None:
    model = build("resnet18", channels=[8, 8, 8, 8], global_pool=pool)
    with torch.no_grad(), pytest.raises(TeacherError, match=f"pools with '{pool}'"):
        find_head(model, images(64), "exact")


def test_channels_last_maps_are_taken_as_such() -> None:
    model = build("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1))
    x = images(64)
    with torch.no_grad():
        head = find_head(model, x, "exact")
        features_BhwC = model.forward_features(x)
        dense_BKhw, _ = head.dense(features_BhwC)
        expected = model.head.fc(features_BhwC[:, 0, 1])
    assert head.nhwc and dense_BKhw.shape == (2, K, 2, 2)
    torch.testing.assert_close(dense_BKhw[:, :, 0, 1], expected)


def test_networks_without_a_map_of_cells_are_refused() -> None:
    model = build("deit_tiny_patch16_224", img_size=32, depth=1)
    with torch.no_grad(), pytest.raises(TeacherError, match=r"\[2, 5, 192\], expected one feature map of 4 dimensions"):
        find_head(model, images(32), "exact")


def test_an_input_size_the_network_can_t_take_is_refused_with_its_shape() -> None:
    model = build("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1))
    with torch.no_grad(), pytest.raises(TeacherError, match=r"shape \[2, 3, 40, 40\].*teacher.input_size"):
        find_head(model, images(40), "exact")


class Own(nn.Module):
    """A user's network without forward_head; `after` is what stands between the mean and the classifier."""

    def __init__(self, after: nn.Module | None = None, conv: bool = False, hidden: int = 8) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, 4, 1)
        self.after = after or nn.Identity()
        self.score = nn.Conv2d(hidden, K, 1) if conv else nn.Linear(hidden, K)
        if conv:
            self.classifier = self.score
        self.conv = conv

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        z = self.after(self.forward_features(x).mean((2, 3)))
        y: Tensor = self.score(z[:, :, None, None]).flatten(1) if self.conv else self.score(z)
        return y


@pytest.mark.parametrize("conv", [False, True])
def test_an_own_network_is_dense_through_its_last_linear_layer(conv: bool) -> None:
    model, x = stir(Own(conv=conv)), images(32)
    with torch.no_grad():
        head = find_head(model, x, "exact")
        features = model.forward_features(x)
        dense_BKhw, global_BK = head.dense(features)
        assert model.score.bias is not None
        weight, bias = model.score.weight.reshape(K, 8), model.score.bias
        expected = torch.einsum("bchw,kc->bkhw", features, weight) + bias[:, None, None]
    torch.testing.assert_close(dense_BKhw, expected)
    torch.testing.assert_close(global_BK, model(x))


@pytest.mark.parametrize("after", [nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
def test_layers_before_the_classifier_of_an_own_network_are_part_of_its_head(after: nn.Module) -> None:
    model, x = stir(Own(after)), images(32)
    with torch.no_grad():
        with pytest.raises(TeacherError, match=r"not linear in the mean.*after.* > score Linear"):
            find_head(model, x, "exact")
        head = find_head(model, x, "per_cell")
        features = model.forward_features(x)
        dense_BKhw, global_BK = head.dense(features)
        torch.testing.assert_close(global_BK, model(x))
        torch.testing.assert_close(dense_BKhw[:, :, 1, 0], model.score(after(features[:, :, 1, 0])))


class Elsewhere(Own):
    """What it calls its features is not what it classifies."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.score(F.relu(self.body(x)).square().mean((2, 3)))
        return y


def test_features_that_are_not_those_that_are_classified_are_refused() -> None:
    with torch.no_grad(), pytest.raises(TeacherError, match="add a method forward_head"):
        find_head(stir(Elsewhere()), images(32), "exact")


class TwoOutputs(Own):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_network_with_a_second_output_is_refused() -> None:
    with torch.no_grad(), pytest.raises(TeacherError, match="output is a tuple, expected logits"):
        find_head(stir(TwoOutputs()), images(32), "exact")


class Liar(Own):
    """Its forward_head is not what forward does."""

    def forward_head(self, features: Tensor) -> Tensor:
        y: Tensor = self.score(features.mean((2, 3)))
        return y + 0.01


def test_a_forward_head_that_is_not_the_model_s_is_refused() -> None:
    with torch.no_grad(), pytest.raises(TeacherError, match=r"0\.01 away from the model's own output"):
        find_head(stir(Liar()), images(32), "exact")


class OwnDense(Own):
    fault = ""

    def forward_dense(self, x: Tensor) -> Any:
        assert self.score.bias is not None
        features = self.forward_features(x)
        dense = torch.einsum("bchw,kc->bkhw", features, self.score.weight) + self.score.bias[:, None, None]
        if self.fault == "cells":
            dense[:, :, 0, 0] += 5.0
        if self.fault == "form":
            return dense
        if self.fault == "shape":
            return dense.flatten(2), self.forward(x)
        return dense, self.forward(x) + (0.01 if self.fault == "global" else 0.0)


def test_a_network_s_own_forward_dense_is_used() -> None:
    model, x = stir(OwnDense()), images(32)
    with torch.no_grad():
        head = find_head(model, x, "exact")
        dense_BKhw, global_BK = head.dense(head.backbone(x))
        expected = model.forward_dense(x)
    assert head.kind == "forward_dense"
    assert torch.equal(dense_BKhw, expected[0]) and torch.equal(global_BK, expected[1])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("cells", "do not average"), ("form", "expected \\(dense"), ("shape", "shapes"), ("global", "global logits are")],
)
def test_an_own_forward_dense_is_held_to_its_promise(fault: str, reason: str) -> None:
    model = stir(OwnDense())
    model.fault = fault
    with torch.no_grad():
        with pytest.raises(TeacherError, match=reason):
            find_head(model, images(32), "exact")
        if fault == "cells":
            assert find_head(model, images(32), "per_cell").kind == "forward_dense"


@pytest.mark.parametrize("name", ["resnet18", "dla46_c", "repvit_m0_9"])
def test_a_subset_of_the_classes_is_the_subset_of_the_logits(name: str) -> None:
    model, x, rows = build(name), images(64), torch.tensor([7, 0, 3])
    with torch.no_grad():
        head = find_head(model, x, "exact")
        features = model.forward_features(x)
        dense_BKhw, global_BK = head.dense(features)
        kept = keep_classes(model, head, features, rows)
        after = head.dense(features)
    assert kept == (name != "repvit_m0_9")  # two classifiers are summed there: left as they were, indexed afterwards
    wanted = (dense_BKhw[:, rows], global_BK[:, rows]) if kept else (dense_BKhw, global_BK)
    for a, b in zip(after, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_autocast_reaches_the_classifier() -> None:
    layer, z = nn.Linear(64, K), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(z).dtype == torch.bfloat16
            with full_precision(CPU):
                assert torch.equal(layer(z), expected)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = stir(Own())
    assert model.score.bias is not None
    model.score.bias.data[3] = float("nan")
    with torch.no_grad(), pytest.raises(TeacherError, match="not finite"):
        find_head(model, images(32), "exact")


def test_a_head_is_plain_data() -> None:
    head = Head("linear", 0.0, "fc Linear", nn.Identity(), lambda f: f.mean((2, 3)))
    dense, pooled = head.dense(torch.ones(1, 4, 2, 2))
    assert dense.shape == (1, 4, 2, 2) and pooled.shape == (1, 4)


class Clipped(nn.Module):
    """A head that clips what is larger than any feature of the images it is looked at with."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x).relu()
        return y

    def forward_head(self, features: Tensor) -> Tensor:
        y: Tensor = self.fc(features.clamp(max=6.0).mean((2, 3)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@torch.no_grad()
def test_a_head_that_does_more_to_a_cell_than_classify_is_run_as_it_is() -> None:
    model, x = Clipped(), torch.rand(2, 3, 32, 32)
    head = find_head(model, x, "exact")
    features = 20 * model.forward_features(x)
    dense, _ = head.dense(features)
    cells = features.permute(0, 2, 3, 1).reshape(-1, 4, 1, 1)
    torch.testing.assert_close(dense.permute(0, 2, 3, 1).reshape(-1, 5), model.forward_head(cells))


@torch.no_grad()
def test_a_classifier_whose_weight_is_computed_keeps_all_its_outputs() -> None:
    model, x = Clipped(), torch.rand(2, 3, 32, 32)
    torch.nn.utils.parametrizations.weight_norm(model.fc)
    head = find_head(model, x, "exact")
    assert not keep_classes(model, head, model.forward_features(x), torch.tensor([3, 0]))
