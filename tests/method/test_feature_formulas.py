"""Terms of features against their formulas in float64, and what is refused of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cskd.config import LossConfig
from cskd.config.schema import LossTerm
from cskd.errors import ConfigError, StudentError
from cskd.method.losses import DistillationLoss, FeatureTargets, HardTargets, MixedLabels, StudentOutput
from cskd.method.terms import needs

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
