"""Teachers without logits of cells: where a ViT, an MLP, a CNN keep their cells, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from cskd.config import TeacherConfig
from cskd.errors import TeacherError
from cskd.teacher.map_alone import find_map
from cskd.teacher.model import load_teacher

SMALL = {"img_size": 32, "depth": 1, "num_classes": 5}
VIT = SMALL | {"patch_size": 8, "embed_dim": 16, "num_heads": 2}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def built(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize(
    ("name", "kwargs", "kind", "prefix"),
    [
        ("vit_tiny_patch16_224", VIT, "image", 1),
        ("deit_tiny_distilled_patch16_224", VIT, "image", 2),
        ("vit_small_patch14_dinov2", VIT | {"num_classes": 0}, "no_classes", 1),
        ("vit_small_patch14_reg4_dinov2", VIT | {"num_classes": 0}, "no_classes", 5),
        ("vit_base_patch16_siglip_224", VIT, "image", 0),
    ],
)
def test_the_map_is_the_patch_tokens_after_the_last_norm(name: str, kwargs: Any, kind: str, prefix: int) -> None:
    model = built(name, **kwargs)
    head = find_map(model, X, classes=5)
    tokens = model.forward_features(X)
    dense, image, maps = head.outputs(head.backbone(X))
    assert head.kind == kind and maps.shape == (2, 16, 4, 4)
    assert torch.equal(maps, tokens[:, prefix:].transpose(1, 2).reshape(2, 16, 4, 4))
    assert torch.allclose(image, model(X) if kind == "image" else torch.zeros(2, 5))
    assert torch.equal(dense, image[:, :, None, None].expand(2, 5, 4, 4))


def test_a_norm_after_the_pooling_is_applied_to_each_token() -> None:
    model = built("vit_tiny_patch16_224", **VIT, global_pool="avg", fc_norm=True)
    head = find_map(model, X, classes=5)
    with torch.no_grad():
        expected = model.fc_norm(model.forward_features(X)[:, 1:])
        assert torch.equal(head.outputs(head.backbone(X))[2].flatten(2).transpose(1, 2), expected)


class Tokens(nn.Module):
    """Patch tokens of 8 x 8 pixels, their order and number as `change` leaves them."""

    def __init__(self, change: Callable[[Tensor], Any], outputs: int = 5) -> None:
        super().__init__()
        self.conv, self.fc, self.change, self.num_prefix_tokens = (
            nn.Conv2d(3, 16, 8, 8),
            nn.Linear(16, outputs),
            change,
            0,
        )

    def forward_features(self, x: Tensor) -> Any:
        return self.change(self.conv(x).flatten(2).transpose(1, 2))

    def forward_head(self, tokens: Tensor) -> Any:
        return self.fc(tokens.mean(1) if tokens.ndim == 3 else tokens)

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))


class PlainTokens(Tokens):
    """They do not say how many of them are of no cell."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__(change)
        del self.num_prefix_tokens


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Tokens(lambda t: t.flip(1)), "keeps its 4 x 4 cells in another order: what changes in row 0, column 0"),
        (Tokens(lambda t: t[:, :13]), "13 tokens for 32 x 32 pixels: no grid"),
        (Tokens(lambda t: t[:, :1]), "1 token for 32 x 32 pixels: no grid"),
        (PlainTokens(lambda t: t[:, :2]), "2 tokens for 32 x 32 pixels: no grid"),
        (Tokens(lambda t: t.mean(1)), r"gives \[2, 16\], expected a map"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)), "add a method forward_features"),
    ],
)
def test_what_has_no_cells_in_rows_and_columns_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(TeacherError, match=says) as refused:
        find_map(model.eval(), X, classes=5)
    assert len(str(refused.value)) <= 300


def test_a_cnn_without_a_classifier_or_with_any_head_keeps_its_map() -> None:
    for name, kwargs in (
        ("resnet10t", {"num_classes": 0}),
        ("convnext_atto", {"num_classes": 5, "depths": (1, 1, 1, 1)}),
    ):
        model = built(name, **kwargs)
        head = find_map(model, X, classes=5)
        assert torch.equal(head.outputs(head.backbone(X))[2], model.forward_features(X))


def test_a_coarser_grid_pools_the_features_and_a_vit_is_refused_with_what_takes_it() -> None:
    def loaded(**more: Any) -> Any:
        torch.manual_seed(0)
        config = TeacherConfig(model="vit_tiny_patch16_224", kwargs=VIT, batch=4, input_size=32, **more)
        return load_teacher(config, list("abcde"), torch.device("cpu"), 32)

    with pytest.raises(TeacherError, match=r"teacher\.dense: none"):
        loaded()
    own, coarse = loaded(dense="none"), loaded(dense="none", grid=[2, 2])
    pixels = torch.rand(2, 3, 32, 32) * 255
    fine, pooled = (teacher.with_features(pixels) for teacher in (own, coarse))
    assert torch.allclose(nn.functional.avg_pool2d(fine[2], 2), pooled[2], atol=1e-5)
    assert pooled[0].shape == (2, 5, 2, 2) and torch.equal(fine[1], pooled[1])
