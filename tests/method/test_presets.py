"""The loss of each shipped preset against a statement of its own in float64: what its config's header says, in numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cskd.config import load_config
from cskd.method.losses import (
    BothTargets,
    DistillationLoss,
    FeatureTargets,
    HardTargets,
    MixedLabels,
    SoftTargets,
    StudentOutput,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
B, K, H, W, D = 6, 10, 3, 2, 5
Array = NDArray[np.float64]


class Values:
    """A batch, in numpy: logits of the student and of the teacher, mixed labels, and features."""

    def __init__(self) -> None:
        draw = np.random.default_rng(5)
        self.cls, self.dist, self.image = (2 * draw.normal(size=(B, K)) for _ in range(3))
        self.patch, self.dense = (2 * draw.normal(size=(B, K, H, W)) for _ in range(2))
        self.label, self.partner = draw.integers(K, size=(2, B))
        self.lam = draw.random(B).astype(np.float32).astype(np.float64)
        self.pooled, self.features = draw.normal(size=(B, D)), draw.normal(size=(B, D, H, W))
        self.stages = {name: draw.normal(size=(B, D, H, W)) for name in ("layer1", "layer2", "layer3")}
        self.blocks = {name: draw.normal(size=(B, D, H, W)) for name in self.stages}
        self.cells = (0.25 * self.dense + 0.75 * self.image[..., None, None]).argmax(1)

    def batch(self) -> tuple[StudentOutput, MixedLabels, FeatureTargets]:
        t = torch.from_numpy
        blocks = {"layer1": ("0",), "layer2": ("1", "2"), "layer3": ("last",)}  # of either preset
        projected = {f"block_{n}_stage_{stage}_mse": t(self.blocks[stage]) for stage, of in blocks.items() for n in of}
        projected["tokens_pooled_smooth_l1"] = t(self.pooled)
        labels = MixedLabels(t(self.label), t(self.partner), t(self.lam))
        hard = HardTargets(t(self.image).argmax(1), t(self.cells))
        targets = FeatureTargets(
            t(self.features),
            BothTargets(hard, SoftTargets(t(self.image), t(self.dense), 1 << 14)),
            {name: t(maps) for name, maps in self.stages.items()},
        )
        return StudentOutput(t(self.cls), t(self.dist), t(self.patch), projected=projected), labels, targets


def log_softmax(v: Array) -> Array:
    w: Array = v - v.max(1, keepdims=True)
    return np.asarray(w - np.log(np.exp(w).sum(1, keepdims=True)))


def ce(logits: Array, classes: NDArray[np.int64]) -> float:
    return float(-np.take_along_axis(log_softmax(logits), classes[:, None], 1).mean())


def kl(teacher: Array, student: Array, tau: float) -> float:
    p, q = log_softmax(teacher / tau), log_softmax(student / tau)
    return float(tau**2 * (np.exp(p) * (p - q)).sum(1).mean())


def label(x: Values) -> float:
    """Of the class token: cross entropy with lam of the label, 1 - lam of the partner, smoothed by 0.1."""
    one = np.eye(K)
    target = 0.9 * (x.lam[:, None] * one[x.label] + (1 - x.lam[:, None]) * one[x.partner]) + 0.1 / K
    return float(-(target * log_softmax(x.cls)).sum(1).mean())


def dkd(x: Values, tau: float, alpha: float, beta: float) -> float:
    total = 0.0
    for own, teacher, student in zip(x.label, x.image / tau, x.dist / tau, strict=True):
        p, q = (np.exp(log_softmax(v[None]))[0] for v in (teacher, student))
        pair = p[own] * np.log(p[own] / q[own]) + (1 - p[own]) * np.log((1 - p[own]) / (1 - q[own]))
        rest_p, rest_q = (np.delete(v, own) / (1 - v[own]) for v in (p, q))
        total += alpha * pair + beta * float((rest_p * np.log(rest_p / rest_q)).sum())
    return tau**2 * total / B


def standardised(v: Array) -> Array:
    return np.asarray((v - v.mean(1, keepdims=True)) / v.std(1, keepdims=True))


def vkd(x: Values) -> float:
    """Smooth L1 between the projected mean token and the teacher's mean feature, normed over its channels."""
    mean = x.features.mean((2, 3))
    off = np.abs(x.pooled - (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-5))
    return float(np.where(off < 1, off**2 / 2, off - 0.5).mean())


def stages(x: Values, *names: str) -> float:
    """Mean squared differences of the blocks that were projected, and the stages."""
    return sum(float(((x.blocks[name] - x.stages[name]) ** 2).mean()) for name in names)


STATED: dict[str, Callable[[Values], float]] = {
    "cifar10_deit_hard": lambda x: 0.5 * label(x) + 0.5 * ce(x.dist, x.image.argmax(1)),
    "cifar10_deit_soft": lambda x: 0.5 * label(x) + 0.5 * kl(x.image, x.dist, 1.0),
    "cifar10": lambda x: 0.5 * label(x) + 0.5 * ce(x.dist, x.image.argmax(1)) + ce(x.patch, x.cells),
    "cifar10_dkd": lambda x: label(x) + dkd(x, 4.0, 1.0, 2.0),
    "cifar10_standardised": lambda x: label(x) + 10 * kl(standardised(x.image), standardised(x.dist), 2.0),
    "cifar10_locality": lambda x: label(x) + 2.5 * stages(x, "layer1", "layer2", "layer3"),
    "cifar10_cskd_locality": lambda x: STATED["cifar10"](x) + 2.5 * stages(x, "layer1", "layer2", "layer3"),
    "cifar10_vkd": lambda x: label(x) + kl(x.image, x.dist, 1.0) + vkd(x),
}


@pytest.mark.parametrize("name", STATED)
def test_a_presets_loss_is_what_its_header_states(name: str) -> None:
    x = Values()
    total, _ = DistillationLoss(load_config(CONFIGS / f"{name}.yaml").loss)(*x.batch())
    assert isinstance(total, Tensor) and float(total) == pytest.approx(STATED[name](x), rel=1e-6)


def test_dearkd_ends_its_distillation_with_its_first_stage() -> None:
    x = Values()
    loss = DistillationLoss(load_config(CONFIGS / "cifar10_dearkd.yaml").loss)
    first, second = (float(loss(*x.batch(), epoch=epoch)[0]) for epoch in (3, 4))
    assert first == pytest.approx(0.5 * label(x) + 0.5 * ce(x.dist, x.image.argmax(1)) + stages(x, "layer1", "layer2"))
    x.cls = (x.cls + x.dist) / 2
    assert second == pytest.approx(label(x))
