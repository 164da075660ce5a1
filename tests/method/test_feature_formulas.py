"""Terms of features against their formulas in float64, and what is refused of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from cskd.config import LossConfig
from cskd.config.schema import LossTerm
from cskd.errors import ConfigError, StudentError
from cskd.method.features import MapShape, bilinear
from cskd.method.losses import DistillationLoss, FeatureTargets, HardTargets, MixedLabels, StudentOutput
from cskd.method.terms import needs, refuse_gaps
from cskd.student.projections import Projections

B, C, H, W, K = 3, 6, 2, 4, 5
Array = NDArray[np.float64]
LABELS = MixedLabels(torch.tensor([0, 4, 2]), torch.tensor([1, 4, 2]), torch.tensor([0.3, 1.0, 1.0]))
LABEL = LossTerm("class", "label", name="label")


def normed(rows: Array) -> Array:
    """Rows of mean 0 and variance 1, as a layer norm without weights does it."""
    shifted = rows - rows.mean(-1, keepdims=True)
    scaled: Array = shifted / np.sqrt((shifted**2).mean(-1, keepdims=True) + 1e-5)
    return scaled


def stated(kind: str, student: Array, teacher: Array) -> float:
    """Of rows of channels [..., C]."""
    d = np.abs(student - teacher)
    if kind == "mse":
        return float((d * d).mean())
    if kind == "smooth_l1":
        return float(np.where(d < 1, d * d / 2, d - 0.5).mean())
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return float((1 - (student * teacher).sum(-1) / norms).mean())


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("target", ["features", "pooled"])
def test_a_term_of_features_is_its_formula(target: Any, kind: Any, standardise: bool) -> None:
    rng = np.random.default_rng(5)
    maps = 1.5 * rng.normal(size=(B, C, H, W)) + 0.4
    student = 1.5 * rng.normal(size=(B, C) if target == "pooled" else (B, C, H, W))
    rows, own = np.moveaxis(maps, 1, -1), np.moveaxis(student, 1, -1)
    rows = rows.mean((1, 2)) if target == "pooled" else rows
    expected = stated(kind, own, normed(rows) if standardise else rows)
    term = LossTerm("tokens", target, kind, weight=0.5, standardise=standardise)
    output = StudentOutput(torch.zeros(B, K).double(), projected={term.title: torch.from_numpy(student)})
    loss = DistillationLoss(LossConfig("terms", terms=[LABEL, term]))
    total, terms = loss(output, LABELS, FeatureTargets(torch.from_numpy(maps)))
    assert float(terms[term.title]) == pytest.approx(expected, rel=1e-12)
    assert float(total) == pytest.approx(np.log(K) + 0.5 * expected)


class Copies(TorchDispatchMode):
    """Counts copies to another device or dtype."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_the_weights_of_another_grid_are_copied_to_a_device_once() -> None:
    x = torch.arange(48.0).view(1, 2, 4, 6)
    first = bilinear(x, (7, 3))
    with Copies() as copies:  # each would wait for what the device is at
        assert torch.equal(bilinear(x, (7, 3)), first)
        assert not copies.count
        assert bilinear(x.double(), (7, 3)).dtype == torch.float64


def test_features_stand_next_to_classes_and_have_a_gradient_when_they_do_not_count() -> None:
    features = LossTerm("tokens", "features", "mse", epochs=[1, 2])
    config = LossConfig("deit-hard", smoothing=0.0, terms=[features])
    projected = torch.ones(B, C, H, W, requires_grad=True)
    output = StudentOutput(torch.zeros(B, K), torch.zeros(B, K), projected={features.title: projected})
    targets = FeatureTargets(torch.zeros(B, C, H, W), HardTargets(torch.zeros(B, dtype=torch.int64)))
    found = [DistillationLoss(config)(output, LABELS, targets, epoch)[0] for epoch in (0, 1)]
    assert float((found[1] - found[0]).detach()) == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(found[0], projected)
    assert not gradient.any()
    assert (needs(config).hard, needs(config).soft, needs(config).features) == ("global", False, True)


def test_maps_of_another_grid_and_targets_without_a_map_are_refused() -> None:
    term = LossTerm("tokens", "features", "mse")
    loss = DistillationLoss(LossConfig("none", terms=[term]))
    output = StudentOutput(torch.zeros(B, K), projected={term.title: torch.zeros(B, C, H, H)})
    with pytest.raises(StudentError, match=r"\[3, 6, 2, 2\], the teacher's features are \[3, 6, 2, 4\]"):
        loss(output, LABELS, FeatureTargets(torch.zeros(B, C, H, W)))
    with pytest.raises(TypeError, match="expected FeatureTargets"):
        loss(output, LABELS, HardTargets(torch.zeros(B, dtype=torch.int64)))
    with pytest.raises(ValueError, match="no projected tokens for tokens_features_mse"):
        loss(output._replace(projected=None), LABELS, FeatureTargets(torch.zeros(B, C, H, W)))


@pytest.mark.parametrize(
    ("term", "said"),
    [
        *[
            ({"head": head, "target": target, "kind": "mse"}, "set head: tokens")
            for head in ("class", "distillation", "mean", "patches")
            for target in ("features", "pooled")
        ],
        *[({"head": "tokens", "target": t, "kind": "ce"}, "set head: tokens") for t in ("label", "global", "cells")],
        *[
            (
                {"head": "tokens", "target": "features", "kind": kind},
                f"has kind {kind}, expected mse, smooth_l1, cosine",
            )
            for kind in ("ce", "kl", "dkd")
        ],
        *[
            ({"head": head, "target": target, "kind": kind}, "set head: tokens or block:N")
            for head, target, kind in (
                ("class", "stage:s3", "mse"),
                ("block:0", "label", "ce"),
                ("block:last", "global", "kl"),
            )
        ],
        *[
            ({"target": target, "kind": kind, key: value}, f"and kind {kind} does not read {key}")
            for target, kind, key, value in (
                ("label", "ce", "tau", 2.0),
                ("label", "ce", "standardise", True),
                ("label", "ce", "divisor", "paper"),
                ("global", "ce", "tau", 2.0),
                ("global", "ce", "smoothing", 0.1),
                ("global", "kl", "smoothing", 0.1),
                ("global", "kl", "dkd_alpha", 2.0),
                ("global", "dkd", "divisor", "paper"),
                ("global", "ce", "resize", "finer"),
                ("global", "kl", "decay", "local"),
            )
        ],
        ({"head": "tokens", "target": "pooled", "kind": "mse", "resize": "finer"}, "does not read resize"),
        ({"head": "block:x", "target": "stage:s3", "kind": "mse"}, "head is 'block:x', expected one of class"),
        ({"head": "block:1", "target": "stage:", "kind": "mse"}, "target is 'stage:', expected one of label"),
        ({"epochs": [None, 2]}, "0 <= first <= end, end null = to the last"),
        ({"epochs": [3, 2]}, "0 <= first <= end, end null = to the last"),
        *[({"target": "global", "kind": kind}, "expected ce, kl, dkd") for kind in ("mse", "smooth_l1", "cosine")],
        ({"target": "global", "projection": "orthogonal"}, "does not read projection; leave it out"),
        *[
            ({"head": "tokens", "target": "pooled", "kind": "mse", key: value}, f"does not read {key}")
            for key, value in {
                "tau": 2.0,
                "smoothing": 0.1,
                "divisor": "paper",
                "decay": "local",
                "dkd_beta": 1.0,
            }.items()
        ],
    ],
)
def test_terms_whose_keys_do_not_fit_are_refused_in_one_line(term: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        LossConfig("none", terms=[LossTerm(**term)])
    assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)


def test_a_loss_of_features_alone_is_refused_for_it_trains_no_head() -> None:
    with pytest.raises(ConfigError, match="teaches no head"):
        LossConfig("terms", terms=[LossTerm("tokens", "pooled", "mse")])


def interpolated(x: Array, rows: int, cols: int) -> Array:
    """[B, C, h, w] on a finer grid: each new cell's centre between the two old centres next to it, the outer ones repeated."""
    for axis, size in ((2, rows), (3, cols)):
        n = x.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        x = x.take(low, axis) * (1 - part) + x.take(np.minimum(low + 1, n - 1), axis) * part
    return x


@pytest.mark.parametrize("resize", ["teacher", "finer"])
@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("grid", [(2, 2), (4, 8), (2, 8)], ids=["coarser", "finer", "both"])
def test_a_term_of_a_stage_is_its_formula_from_a_blocks_tokens(grid: tuple[int, int], kind: Any, resize: Any) -> None:
    """tokens of any grid, a linear layer, the map's grid or the finer one, then the kind; the stage's map is 4 x 4."""
    rng = np.random.default_rng(7)
    tokens, maps = rng.normal(size=(B, *grid, 3)), 1.5 * rng.normal(size=(B, C, 4, 4))
    term = LossTerm("block:1", "stage:s2", kind, weight=2.5, resize=resize)
    config = LossConfig("terms", terms=[LABEL, term])
    aligner = Projections(config, 3, {":s2": MapShape(C, (4, 4))}, seed=0).double()
    output = aligner(StudentOutput(torch.zeros(B, K).double(), blocks={1: torch.from_numpy(tokens)}))
    total, terms = DistillationLoss(config)(output, LABELS, FeatureTargets(None, None, {"s2": torch.from_numpy(maps)}))
    weight, bias = (aligner.get_parameter(name).detach().numpy() for name in ("0.weight", "0.bias"))
    student = np.moveaxis(tokens @ weight.T + bias, -1, 1)
    both = (max(grid[0], 4), max(grid[1], 4)) if resize == "finer" else (4, 4)
    for axis in (2, 3) if resize == "teacher" else ():
        if student.shape[axis] > 4:
            student = np.stack([part.mean(axis) for part in np.split(student, 4, axis)], axis)
    student, teacher = interpolated(student, *both), interpolated(maps, *both)
    expected = stated(kind, np.moveaxis(student, 1, -1), np.moveaxis(teacher, 1, -1))
    assert float(terms[term.title]) == pytest.approx(expected, rel=1e-12)
    assert float(total.detach()) == pytest.approx(np.log(K) + 2.5 * expected)
    assert term.title == f"block_1_stage_s2_{kind}" and needs(config).stages == ("s2",) and not needs(config).features


def test_epochs_may_be_open_at_the_end() -> None:
    terms = [LossTerm(epochs=[0, 2], name="a"), LossTerm(epochs=[2, None], name="b")]
    loss = DistillationLoss(LossConfig("terms", terms=terms))
    output = StudentOutput(torch.zeros(B, K))
    assert [list(loss(output, LABELS, None, epoch)[1]) for epoch in (0, 1, 2, 900)] == [["a"], ["a"], ["b"], ["b"]]
    refuse_gaps(LossConfig("terms", terms=terms), 900)
    with pytest.raises(ConfigError, match="no term counts in epoch 0"):
        refuse_gaps(LossConfig("terms", terms=terms[1:]), 900)
