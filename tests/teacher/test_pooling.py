"""Networks that do not say what their features are: the pooling is seen, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cskd.config import TeacherConfig
from cskd.errors import TeacherError
from cskd.teacher.heads import find_head
from tests.teacher.test_teacher_heads import K, images, stir
from tests.teachers import load, pixels

Forward = Callable[[Any, Tensor], Any]


class Plain(nn.Module):
    """A body of four convolutions' worth, and `end`, which does the rest with the map [B, 8, 8, 8]."""

    def __init__(self, end: Forward, mid: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.mid, self.last, self.drop = mid or nn.Identity(), last or nn.Linear(8, K), nn.Dropout(0.5)
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self, F.relu(self.body(x)))


def mean(s: Any, f: Tensor) -> Any:
    return s.last(s.mid(f.mean((2, 3))))


ENDS: dict[str, Forward] = {
    "mean": mean,
    "from the end": lambda s, f: s.last(s.drop(f.mean([-1, -2]))),
    "one after the other": lambda s, f: s.last(f.mean(3, keepdim=True).mean(2, keepdim=True).flatten(1)),
    "adaptive": lambda s, f: s.last(F.adaptive_avg_pool2d(f, 1).view(f.size(0), -1)),
    "average of all": lambda s, f: s.last(F.avg_pool2d(f, f.shape[2:]).squeeze(-1).squeeze(-1)),
    "of a list of cells": lambda s, f: s.last(f.flatten(2).mean(-1)),
    "sum by number": lambda s, f: s.last(f.sum((2, 3)) / 64),
    "after work in place": lambda s, f: s.last(F.hardswish(f, inplace=True).mean((2, 3))),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {name: lambda end=end: Plain(end) for name, end in ENDS.items()} | {
    "a norm over the batch after it": lambda: Plain(mean, nn.BatchNorm1d(8)),
    "two linear layers": lambda: Plain(mean, nn.Linear(8, 8)),
    "a convolution after it": lambda: Plain(
        lambda s, f: s.last(F.adaptive_avg_pool2d(f, 1)).flatten(1), None, nn.Conv2d(8, K, 1)
    ),
    "a convolution before it": lambda: Plain(lambda s, f: s.last(f).mean((2, 3)), None, nn.Conv2d(8, K, 1)),
    "weight norm": lambda: Plain(mean, None, nn.utils.parametrizations.weight_norm(nn.Linear(8, K))),
    "Sequential": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, K)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pooling_is_found_however_it_is_written(name: str) -> None:
    model, x = stir(NETWORKS[name]()), images(32, 3)
    with torch.no_grad():
        head = find_head(model, x[:2], "exact")
        dense_BKhw, global_BK = head.dense(head.backbone(x))
        own = model(x)
    assert head.kind == "linear" and head.gap < 1e-5 and dense_BKhw.shape == (3, K, 8, 8)
    torch.testing.assert_close(global_BK, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense_BKhw.mean((2, 3)), own, rtol=1e-4, atol=1e-4)
    assert dense_BKhw.std((2, 3)).mean() > 1e-3 * dense_BKhw.abs().mean()


def test_a_map_of_one_cell_is_one_where_a_convolution_made_it() -> None:
    wide = torch.ones(8, 8, 8, 8)
    model = stir(Plain(lambda s, f: s.last(F.conv2d(f, wide).flatten(1))))
    with torch.no_grad():
        assert find_head(model, images(32), "exact").backbone(images(32)).shape == (2, 8, 1, 1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm": (lambda: Plain(mean, nn.LayerNorm(8)), "not linear .*mid LayerNorm > last Linear"),
    "a hidden layer": (
        lambda: Plain(mean, nn.Sequential(nn.Linear(8, 8), nn.ReLU())), r"mid\.0 Linear > mid\.1 ReLU > last Linear",
    ),
    "a hidden layer and a function": (
        lambda: Plain(lambda s, f: s.last(F.relu(s.mid(f.mean((2, 3))))), nn.Linear(8, 8)), "after mid .* a hidden layer",
    ),
    "all cells": (
        lambda: Plain(lambda s, f: s.last(f.flatten(1)), None, nn.Linear(512, K)), "all 8x8 cells of a map side by side",
    ),
    "the maximum": (lambda: Plain(lambda s, f: s.last(f.amax((2, 3)))), "takes the maximum over the cells"),
    "a pooling to the maximum": (
        lambda: Plain(lambda s, f: s.last(F.adaptive_max_pool2d(f, 1).flatten(1))), "takes the maximum over the cells",
    ),
    "another pooling": (
        lambda: Plain(lambda s, f: s.last(F.avg_pool2d(f.clamp(1e-6).pow(3), 8).pow(1 / 3).flatten(1))),
        "8 numbers that are not the mean",
    ),
    "a sum": (lambda: Plain(lambda s, f: s.last(f.sum((2, 3)))), "8 numbers that are not the mean"),
    "softmax": (lambda: Plain(lambda s, f: mean(s, f).softmax(1)), "ends in a softmax; return the logits"),
    "log_softmax": (lambda: Plain(lambda s, f: F.log_softmax(mean(s, f), 1)), "log_softmax; return the logits"),
    "a factor": (lambda: Plain(lambda s, f: 2 * mean(s, f)), "not that of a layer"),
    "two outputs": (lambda: Plain(lambda s, f: (mean(s, f), f)), "let forward return them alone"),
    "one channel": (lambda: nn.Sequential(nn.Conv2d(1, 8, 3)), r"takes 1 channel and views have 3.*x\.mean\(1"),
    "four channels": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), "takes 4 channels and views have 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_heads_without_logits_of_cells_are_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with torch.no_grad(), pytest.raises(TeacherError, match=reason) as e:
        find_head(stir(make()), images(32), "exact")
    assert len(str(e.value)) <= 300 and "\n" not in str(e.value)


def torchvision_config(**changes: Any) -> TeacherConfig:
    kwargs: dict[str, Any] = {"num_classes": 5}
    return TeacherConfig(**{"model": "torchvision:squeezenet1_1", "kwargs": kwargs, "input_size": 64, **changes})


def test_a_name_of_torchvision_is_enough() -> None:
    pytest.importorskip("torchvision")
    teacher = load(torchvision_config())
    assert teacher.grid == (3, 3) and teacher.reentrant
    assert teacher.preprocess.mean == (0.485, 0.456, 0.406) and teacher.preprocess.interpolation == "bilinear"
    dense_BKhw, global_BK = teacher.forward_dense(pixels())
    torch.testing.assert_close(dense_BKhw.mean((2, 3)), global_BK, rtol=1e-4, atol=1e-5)
    for changes, reason in (
        ({"model": "torchvision:resnet5O"}, "did you mean 'resnet50'"),
        ({"kwargs": {"width": 3}}, "can't be built with teacher.kwargs .*width"),
        ({"compile": True}, "offer forward_features"),
    ):
        with pytest.raises(TeacherError, match=reason):
            load(torchvision_config(**changes))


@pytest.mark.parametrize("changes", [{"fold": True}, {"fold": True, "precision": "bf16"}, {"precision": "float64"}])
def test_a_network_that_is_watched_may_be_folded_and_rounded(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The functions that are counted are those after the pooling, which no replacement changes."""
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(s):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        s.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1),\n"
        "                               nn.BatchNorm2d(16), nn.ReLU())\n"
        "        s.fc = nn.Linear(16, 5)\n"
        "    def forward(s, x):\n"
        "        return s.fc(s.body(x).mean((2, 3)))\n"
        "build = Net\n"
    )
    config = TeacherConfig(model=f"{tmp_path / 'own.py'}:build", input_size=64)
    plain, other = load(config).forward_dense(pixels()), load(config, **changes).forward_dense(pixels())
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0.02 if "precision" in changes else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, None) for name in ("resnet18", "densenet121", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf")),
        *((name, None) for name in ("googlenet", "shufflenet_v2_x0_5", "mnasnet0_5", "swin_t", "efficientnet_v2_s")),
        ("convnext_tiny", "LayerNorm2d"),
        ("mobilenet_v3_small", "Hardswish"),
        ("vgg11", "all 7x7 cells"),
        ("alexnet", "all 6x6 cells"),
    ],
)
def test_families_of_torchvision(name: str, reason: str | None) -> None:
    models = pytest.importorskip("torchvision.models")
    model, x = (
        stir(models.get_model(name, num_classes=K, **({"init_weights": False} if name == "googlenet" else {}))),
        images(64),
    )
    with torch.no_grad():
        if reason:
            with pytest.raises(TeacherError, match=reason):
                find_head(model, x, "exact")
        else:
            head = find_head(model, x, "exact")
            dense_BKhw, _ = head.dense(head.backbone(x))
            torch.testing.assert_close(dense_BKhw.mean((2, 3)), model(x), rtol=1e-4, atol=1e-4)
