"""The losses against the formulas written out again in float64 numpy, class by class and cell by cell."""

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.data.mixup import mixup_target
from torch import Tensor

from cskd.config import LossConfig
from cskd.config.schema import Method
from cskd.errors import ConfigError, StudentError
from cskd.method.losses import DistillationLoss, HardTargets, MixedLabels, SoftTargets, StudentOutput, label_loss
from cskd.method.terms import trained_heads

Array = NDArray[np.float64]
Values = dict[str, Any]  # arrays by name, and "a", a number

B, K, H, W = 4, 7, 2, 3
METHODS: list[Method] = ["none", "deit-hard", "deit-soft", "cskd-hard", "cskd-soft"]


def softmax(v: Array) -> Array:
    e = np.exp(v - v.max())
    p: Array = e / e.sum()
    return p


def cross_entropy(logits: Array, target: Array) -> float:
    return -sum(float(t * np.log(p)) for t, p in zip(target, softmax(logits), strict=True))


def kl(teacher: Array, student: Array, tau: float) -> float:
    p, q = softmax(teacher / tau), softmax(student / tau)
    return tau**2 * sum(float(a * np.log(a / b)) for a, b in zip(p, q, strict=True))


def one_hot(c: int) -> Array:
    row: Array = np.eye(K)[c]
    return row


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def stated(
    x: Values,
    method: Method,
    reduction: str,
    distilled: bool,
    alpha: float,
    weight: float,
    tau: float,
    smoothing: float,
    baseline: str = "class",
) -> dict[str, float]:
    """The loss as the design states it; x holds float64 arrays."""
    cls, dist = x["cls"], x["dist"] if distilled else x["cls"]

    def smooth(c: int) -> Array:
        return np.where(np.arange(K) == c, 1 - smoothing + smoothing / K, smoothing / K)

    mixed = [l * smooth(a) + (1 - l) * smooth(b) for l, a, b in zip(x["lam"], x["label"], x["partner"], strict=True)]  # noqa: E741
    if method == "none":
        head = cls if baseline == "class" else (cls + dist) / 2
        return {"total": mean([cross_entropy(v, t) for v, t in zip(head, mixed, strict=True)])}
    label = mean([cross_entropy(v, t) for v, t in zip(cls, mixed, strict=True)])
    cells = list(itertools.product(range(B), range(H), range(W)))
    blended = {(b, i, j): x["a"] * x["dense"][b, :, i, j] + (1 - x["a"]) * x["global"][b] for b, i, j in cells}
    if method.endswith("hard"):
        d = mean([cross_entropy(dist[b], one_hot(x["global"][b].argmax())) for b in range(B)])
        p = mean([cross_entropy(x["patch"][b, :, i, j], one_hot(blended[b, i, j].argmax())) for b, i, j in cells])
    else:
        d = sum(kl(x["global"][b], dist[b], tau) for b in range(B)) / (B * K if reduction == "paper" else B)
        p = sum(kl(blended[b, i, j], x["patch"][b, :, i, j], tau) for b, i, j in cells)
        p /= B if reduction == "paper" else B * H * W
    total = (1 - alpha) * label + alpha * d
    if method.startswith("cskd"):
        return {"total": total + weight * p, "label": label, "dist": d, "patch": p}
    return {"total": total, "label": label, "dist": d}


@pytest.fixture
def x() -> Values:
    rng = np.random.default_rng(0)
    x: Values = {n: rng.normal(scale=2, size=(B, K)) for n in ("cls", "dist", "global")}
    x |= {n: rng.normal(scale=2, size=(B, K, H, W)) for n in ("patch", "dense")}
    x |= {"label": rng.integers(K, size=B), "partner": rng.integers(K, size=B), "lam": rng.uniform(size=B), "a": 0.25}
    x["lam"][0], x["partner"][0] = 1.0, x["label"][0]  # one image is not mixed
    return x


def targets_of(x: Values, method: str, blended: bool) -> tuple[MixedLabels, HardTargets | SoftTargets]:
    t = {n: torch.from_numpy(v) for n, v in x.items() if isinstance(v, np.ndarray)}
    mixture = x["a"] * t["dense"] + (1 - x["a"]) * t["global"][:, :, None, None]
    labels = MixedLabels(t["label"], t["partner"], t["lam"])
    if method.endswith("hard"):
        return labels, HardTargets(t["global"].argmax(1), mixture.argmax(1))
    if blended:
        return labels, SoftTargets(t["global"], mixture)
    return labels, SoftTargets(t["global"], t["dense"], round(x["a"] * 65536))


def output_of(x: Values, distilled: bool) -> tuple[dict[str, Tensor], StudentOutput]:
    t = {n: torch.from_numpy(x[n]).requires_grad_() for n in ("cls", "dist", "patch")}
    return t, StudentOutput(t["cls"], t["dist"] if distilled else None, t["patch"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduction", ["consistent", "paper"])
@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("blended", [True, False])
def test_every_method_is_the_stated_formula(
    x: Values, method: Method, reduction: Literal["consistent", "paper"], distilled: bool, blended: bool
) -> None:
    config = LossConfig(method, alpha=0.3, patch_weight=1.7, tau=2.5, smoothing=0.1, soft_reduction=reduction)
    want = stated(x, method, reduction, distilled, 0.3, 1.7, 2.5, 0.1)
    total, terms = DistillationLoss(config)(output_of(x, distilled)[1], *targets_of(x, method, blended))
    assert total.item() == pytest.approx(want.pop("total"), rel=1e-12)
    assert {n: v.item() for n, v in terms.items() if want} == pytest.approx(want, rel=1e-12)
    assert not any(v.requires_grad for v in terms.values())


@pytest.mark.parametrize(("method", "distilled"), [("none", True), ("cskd-hard", True), ("cskd-soft", False)])
def test_gradients_are_those_of_the_stated_formula(x: Values, method: Method, distilled: bool) -> None:
    config = LossConfig(method, alpha=0.3, patch_weight=1.7, tau=2.5, soft_reduction="paper")
    leaves, output = output_of(x, distilled)
    DistillationLoss(config)(output, *targets_of(x, method, True))[0].backward()
    rng = np.random.default_rng(1)
    for name, leaf in leaves.items():
        grad = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        for _ in range(4):
            at = tuple(rng.integers(n) for n in leaf.shape)
            total = []
            for step in (1e-5, -1e-5):
                moved = x | {name: x[name].copy()}
                moved[name][at] += step
                total.append(stated(moved, method, "paper", distilled, 0.3, 1.7, 2.5, 0.1)["total"])
            assert grad[at] == pytest.approx((total[0] - total[1]) / 2e-5, abs=1e-7), (name, at)


def test_the_label_term_is_timms_mixup_target() -> None:
    logits, label = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    target = mixup_target(label, 10, lam=0.3, smoothing=0.1)  # timm's partner is the flipped batch
    want = -(target * logits.log_softmax(1)).sum(1).mean()
    got = label_loss(logits, MixedLabels(label, label.flip(0), torch.full((6,), 0.3)), 0.1)
    assert torch.allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("baseline", ["class", "mean"])
def test_a_baseline_trains_the_class_head_alone_and_both_heads_by_name(
    x: Values, distilled: bool, baseline: Literal["class", "mean"]
) -> None:
    """The authors' CSKDLoss and DeiT's DistillationLoss return the label term of the first output for 'none'."""
    leaves, output = output_of(x, distilled)
    config = LossConfig("none", baseline_head=baseline)
    total, _ = DistillationLoss(config)(output, targets_of(x, "none", True)[0])
    want = stated(x, "none", "paper", distilled, 0.5, 1.0, 1.0, 0.1, baseline)
    assert total.item() == pytest.approx(want["total"], rel=1e-12)
    total.backward()
    learn = {name for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()}
    assert learn == ({"cls", "dist"} if distilled and baseline == "mean" else {"cls"})
    if "dist" in learn:
        cls, dist = leaves["cls"].grad, leaves["dist"].grad
        assert cls is not None and dist is not None and torch.equal(cls, dist)


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_heads_a_loss_trains_are_those_that_get_a_gradient(
    x: Values, distilled: bool, method: Method, alpha: float, weight: float
) -> None:
    config = LossConfig(method, alpha=alpha, patch_weight=weight)
    leaves, output = output_of(x, distilled)
    DistillationLoss(config)(output, *targets_of(x, method, True))[0].backward()
    name = {"class": "cls", "distillation": "dist", "patches": "patch"}
    learn = {n for n, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()}
    assert {name[head] for head in trained_heads(config, distilled)} == learn


def test_a_key_of_the_baseline_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(
        ConfigError, match=r"loss\.baseline_head is 'mean' and loss\.method cskd-hard, which does not read"
    ):
        LossConfig("cskd-hard", baseline_head="mean")


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_logits_give_a_float32_loss(x: Values, method: Method) -> None:
    cls, dist, patch = (torch.from_numpy(x[n]).bfloat16() for n in ("cls", "dist", "patch"))
    half, full = StudentOutput(cls, dist, patch), StudentOutput(cls.float(), dist.float(), patch.float())
    labels, targets = targets_of(
        {n: np.float32(v) if np.asarray(v).dtype == float else v for n, v in x.items()}, method, True
    )
    loss = DistillationLoss(LossConfig(method))
    assert torch.equal(loss(half, labels, targets)[0], loss(full, labels, targets)[0])
    assert loss(half, labels, targets)[0].dtype == torch.float32


def test_targets_that_do_not_fit_are_refused(x: Values) -> None:
    output, (labels, hard), (_, soft) = output_of(x, True)[1], targets_of(x, "hard", True), targets_of(x, "soft", True)
    assert isinstance(hard, HardTargets) and isinstance(soft, SoftTargets)
    hard_loss, soft_loss = DistillationLoss(LossConfig("cskd-hard")), DistillationLoss(LossConfig("cskd-soft"))
    with pytest.raises(TypeError, match="SoftTargets, expected HardTargets"):
        hard_loss(output, labels, soft)
    with pytest.raises(TypeError, match="HardTargets, expected SoftTargets"):
        soft_loss(output, labels, hard)
    with pytest.raises(ValueError, match="without a teacher grid"):
        hard_loss(output._replace(patch_logits=None), labels, hard)
    with pytest.raises(ValueError, match="no targets for the cells"):
        soft_loss(output, labels, SoftTargets(soft.global_logits))
    assert hard.cell_class is not None
    with pytest.raises(StudentError, match=r"grid is \[2, 2\], the student's patch logits have \[2, 3\]"):
        hard_loss(output, labels, HardTargets(hard.global_class, hard.cell_class[..., :2]))
