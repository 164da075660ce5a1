"""Single terms of a loss against their formulas in float64, and what a loss asks of a teacher."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cskd.config import LossConfig, from_dict, load_config
from cskd.config.schema import LossTerm
from cskd.errors import ConfigError
from cskd.method.losses import BothTargets, DistillationLoss, HardTargets, MixedLabels, SoftTargets, StudentOutput
from cskd.method.terms import (
    cells_term,
    expanded,
    idle_terms,
    needs,
    own_terms,
    read_heads,
    refuse_gaps,
    trained_heads,
    unread_keys,
)

B, K, H, W = 5, 7, 2, 3
Array = NDArray[np.float64]


def softmax(v: Array) -> Array:
    e = np.exp(v - v.max(-1, keepdims=True))
    p: Array = e / e.sum(-1, keepdims=True)
    return p


def kl(p: Array, q: Array) -> float:
    return float((p * np.log(p / q)).sum(-1).mean())


@pytest.fixture
def batch() -> tuple[StudentOutput, MixedLabels, BothTargets]:
    generator = torch.Generator().manual_seed(3)

    def logits(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    output = StudentOutput(logits(B, K), logits(B, K), logits(B, K, H, W))
    label, partner = torch.randint(K, (2, B), generator=generator)
    labels = MixedLabels(label, partner, torch.rand(B, generator=generator))
    glob, dense = logits(B, K), logits(B, K, H, W)
    mixture = 0.25 * dense + 0.75 * glob[:, :, None, None]
    hard = HardTargets(glob.argmax(1), mixture.argmax(1), {"local": dense.argmax(1)})
    return output, labels, BothTargets(hard, SoftTargets(glob, dense, 1 << 14, {"local": 1 << 16}))


def value(term: LossTerm, batch: tuple[StudentOutput, MixedLabels, BothTargets]) -> float:
    total, terms = DistillationLoss(LossConfig("terms", terms=[term]))(*batch)
    assert total == pytest.approx(term.weight * terms[term.title])
    return float(total)


def term(*args: Any, **kwargs: Any) -> LossTerm:
    return LossTerm(*args, **kwargs)


def test_a_kl_of_standardised_logits(batch: tuple[StudentOutput, MixedLabels, BothTargets]) -> None:
    output, _, targets = batch
    z = [
        (v - v.mean(1, keepdims=True)) / v.std(1, keepdims=True)
        for v in (targets.soft.global_logits.numpy(), output.cls_logits.numpy())
    ]
    stated = 9 * kl(softmax(z[0] / 3), softmax(z[1] / 3))
    assert value(term("class", "global", "kl", tau=3.0, standardise=True), batch) == pytest.approx(stated, rel=1e-5)
    moved = output._replace(cls_logits=output.cls_logits * 5 + 2)
    assert value(term("class", "global", "kl", tau=3.0, standardise=True), (moved, *batch[1:])) == pytest.approx(
        stated, rel=1e-5
    )


def test_decoupled_kd(batch: tuple[StudentOutput, MixedLabels, BothTargets]) -> None:
    output, labels, targets = batch
    tau, alpha, beta = 4.0, 0.7, 2.5
    assert output.dist_logits is not None
    logits = [v.numpy() / tau for v in (targets.soft.global_logits, output.dist_logits)]
    target = other = 0.0
    for b, t in enumerate(labels.label.tolist()):
        p, q = (softmax(v[b]) for v in logits)
        target += kl(np.array([p[t], 1 - p[t]]), np.array([q[t], 1 - q[t]])) / B
        other += kl(softmax(np.delete(logits[0][b], t)), softmax(np.delete(logits[1][b], t))) / B
    stated = tau**2 * (alpha * target + beta * other)
    one = term("distillation", "global", "dkd", tau=tau, dkd_alpha=alpha, dkd_beta=beta)
    assert value(one, batch) == pytest.approx(stated, rel=1e-9)
    # KL(p || q) = KL of the pair + (1 - p_t) * KL among the others: with that weight in place of beta it is plain KD.
    plain = value(term("distillation", "global", "kl", tau=tau), batch) / tau**2
    assert plain == pytest.approx(kl(softmax(logits[0]), softmax(logits[1])), rel=1e-9)


EVERY_KIND = [
    term("class", "label"),
    term("distillation", "global", "ce"),
    term("distillation", "global", "kl", standardise=True),
    term("class", "global", "dkd"),
    term("patches", "cells", "ce"),
    term("patches", "cells", "kl", decay="local"),
]


@pytest.mark.parametrize("one", EVERY_KIND, ids=lambda one: one.title)
def test_no_term_waits_for_the_numbers_of_a_device(
    batch: tuple[StudentOutput, MixedLabels, BothTargets], one: LossTerm
) -> None:
    # Fake tensors have none: what asks for one, or selects by a mask, raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        total, _ = DistillationLoss(LossConfig("terms", terms=[one]), cells_term(LossConfig("terms", terms=[one])))(
            *batch
        )
    assert total.shape == ()


@pytest.mark.parametrize("decay", [None, "local"])
def test_cells_at_a_decay_of_their_own(batch: tuple[StudentOutput, MixedLabels, BothTargets], decay: Any) -> None:
    output, _, targets = batch
    assert output.patch_logits is not None and targets.soft.dense_logits is not None
    share = 1.0 if decay else 0.25
    mixture = share * targets.soft.dense_logits + (1 - share) * targets.soft.global_logits[:, :, None, None]
    p, q = (softmax(v.numpy().transpose(0, 2, 3, 1)) for v in (mixture, output.patch_logits))
    assert value(term("patches", "cells", "kl", decay=decay), batch) == pytest.approx(kl(p, q), rel=1e-9)
    chosen = np.take_along_axis(q, mixture.argmax(1).numpy()[..., None], -1)
    assert value(term("patches", "cells", "ce", decay=decay), batch) == pytest.approx(-np.log(chosen).mean(), rel=1e-9)


def test_hard_and_soft_terms_in_one_loss_and_stages(batch: tuple[StudentOutput, MixedLabels, BothTargets]) -> None:
    """The authors' two switches: hard for the token, soft for the cells, or the other way round."""
    both = [
        term("distillation", "global", "ce", weight=0.5),
        term("patches", "cells", "kl", weight=2.0, tau=2.0, epochs=[0, 3]),
        term("class", "label", weight=0.5, smoothing=0.1, epochs=[3, 9]),
    ]
    config = LossConfig("terms", terms=both)
    loss = DistillationLoss(config)
    alone = [value(one, batch) for one in both]
    for epoch, counted in ((0, [0, 1]), (2, [0, 1]), (3, [0, 2]), (9, [0])):
        total, terms = loss(*batch, epoch=epoch)
        assert total == pytest.approx(sum(alone[i] for i in counted)) and len(terms) == len(counted)
    assert needs(config) == type(needs(config))("global", True, (), ())
    assert trained_heads(config, True) == ("class", "distillation", "patches")


@pytest.mark.parametrize("method", ["none", "deit-hard", "deit-soft", "cskd-hard", "cskd-soft"])
def test_a_method_written_out_as_terms_is_the_method_to_the_last_bit(
    batch: tuple[StudentOutput, MixedLabels, BothTargets], method: Any
) -> None:
    output, labels, targets = batch
    config = LossConfig(method, alpha=0.3, patch_weight=1.7, tau=2.0, soft_reduction="paper")
    of = targets.soft if method.endswith("soft") else targets.hard
    stated = DistillationLoss(config)(output, labels, of)
    written = DistillationLoss(LossConfig("terms", terms=expanded(config)))(output, labels, targets)
    assert torch.equal(stated[0], written[0]) and stated[1].keys() == written[1].keys()


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"target": "cells"}, "cells are for patches"),
        ({"head": "patches", "target": "global"}, "target: cells, decay: global"),
        ({"kind": "kl"}, "expected ce"),
        ({"head": "patches", "target": "cells", "kind": "dkd"}, "expected ce, kl"),
        ({"tau": 0}, "loss.terms[0].tau is 0"),
        ({"own": "a.py:b", "tau": 2}, "does not read tau"),
        ({"heads": "class"}, "unknown key 'loss.terms[0].heads'; did you mean 'loss.terms[0].head'?"),
        ({"epochs": [3]}, "loss.terms[0].epochs is [3.0], expected 2 values, [first, end] with 0 <= first <= end"),
        ({"epochs": [None, 3]}, "loss.terms[0].epochs is [null, 3.0], expected 2 values"),
        ({"epochs": [1, "none"]}, "loss.terms[0].epochs[1] is 'none', expected a number or null; write null for none"),
        ({"epochs": "1-3"}, "loss.terms[0].epochs is '1-3', expected a list, each a number or null, or null"),
        ({"name": "label"}, "is the name of another term"),
        ("kl", "loss.terms[0] is 'kl', expected a section of keys"),
    ],
)
def test_terms_that_can_not_be_are_refused_by_name(item: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expanded(from_dict({"loss": {"terms": [item]}}).loss)
    assert says in str(caught.value) and len(str(caught.value)) <= 300


def test_a_loss_of_no_terms_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.terms is empty"):
        LossConfig("terms")


@pytest.mark.parametrize(
    ("windows", "gap", "mend"),
    [
        ([[1, None]], 0, "epochs: [0, 1]"),
        ([[0, 3], [4, 9]], 3, "epochs: [3, 4], or set train.epochs=3"),
        ([[0, 2.5], [2.5, 9]], None, ""),
        ([[0, 5]], 5, "epochs: [5, null], or set train.epochs=5"),
        ([[0, 9]], None, ""),
    ],
)
def test_an_epoch_in_which_no_term_counts_is_refused(
    windows: list[list[float | None]], gap: int | None, mend: str
) -> None:
    config = LossConfig("terms", terms=[term(epochs=w, name=f"t{i}") for i, w in enumerate(windows)])
    if gap is None:
        refuse_gaps(config, 9)
    else:
        with pytest.raises(ConfigError, match=re.escape(f"no term counts in epoch {gap} of 0 to 8; ")) as caught:
            refuse_gaps(config, 9)
        assert str(caught.value).endswith(mend)


@pytest.mark.parametrize("epochs", [[9, 12], [50, None], [8.5, 20], [0, 0], [2, 2], [0.2, 0.8]])
def test_a_term_that_counts_in_no_epoch_of_the_run_is_said(epochs: list[float | None]) -> None:
    """Not refused: a run of an older version goes on with its terms, and a loss with stages is tried with fewer epochs."""
    config = LossConfig(terms=[term(name="a"), term(epochs=epochs, name="b")])
    refuse_gaps(config, 9)
    (note,) = idle_terms(config, 9)
    assert note.startswith("loss.terms[1].epochs is [")
    assert note.endswith("and train.epochs 9: the term counts in no epoch of 0 to 8")
    assert idle_terms(LossConfig(terms=[term(epochs=[8, 9], name="a"), term(epochs=[8, None], name="b")]), 9) == []


def test_keys_that_terms_read_are_not_called_unread() -> None:
    given = ["loss.method", "loss.terms", "loss.decay"]
    cells = [term("patches", "cells")]
    assert unread_keys(LossConfig("deit-hard", terms=cells), given) == []
    assert unread_keys(LossConfig("deit-hard"), given) == ["loss.decay"]


def test_heads_of_an_idle_term_of_ones_own_have_a_gradient_of_zero(
    batch: tuple[StudentOutput, MixedLabels, BothTargets], tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text("def t(output, labels, targets):\n    return output.patch_logits.mean()\nt.heads = ('patches',)\n")
    output, labels, targets = batch
    assert output.patch_logits is not None
    patches = output.patch_logits.clone().requires_grad_()
    loss = DistillationLoss(LossConfig("terms", terms=[term(), term(own=f"{file}:t", epochs=[3, 9])]))
    total, terms = loss(output._replace(patch_logits=patches), labels, targets, epoch=0)
    total.backward()
    assert patches.grad is not None and not patches.grad.any() and list(terms) == ["class_label_ce"]


def test_the_preset_of_co_advise_is_its_formula() -> None:
    """CE of the class token with the mixed, smoothed label, and KL of each token with its own teacher, each times 1."""
    loss = load_config(Path(__file__).parents[2] / "configs" / "cifar10_civt.yaml").loss
    draw = np.random.default_rng(5)
    cls, conv, inv, by_conv, by_inv = (2 * draw.standard_normal((B, K)) for _ in range(5))
    label, partner, lam = draw.integers(K, size=B), draw.integers(K, size=B), draw.random(B)
    y = 0.9 * (lam[:, None] * np.eye(K)[label] + (1 - lam[:, None]) * np.eye(K)[partner]) + 0.1 / K
    ce = -(y * np.log(softmax(cls))).sum(1).mean()
    stated = [ce, kl(softmax(by_conv), softmax(conv)), kl(softmax(by_inv), softmax(inv))]
    tokens = {"conv": torch.from_numpy(conv), "involution": torch.from_numpy(inv)}
    output = StudentOutput(torch.from_numpy(cls), token_logits=tokens)
    labels = MixedLabels(*map(torch.from_numpy, (label, partner, lam)))
    targets = {"": SoftTargets(torch.from_numpy(by_conv)), "involution": SoftTargets(torch.from_numpy(by_inv))}
    total, terms = DistillationLoss(loss)(output, labels, targets)
    assert [float(value) for value in terms.values()] == pytest.approx(stated, rel=1e-9)
    assert float(total) == pytest.approx(sum(stated), rel=1e-9)


def test_tokens_by_name_take_every_kind_and_are_part_of_the_mean(
    batch: tuple[StudentOutput, MixedLabels, BothTargets],
) -> None:
    output, labels, targets = batch
    a, b = torch.randn(2, B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = output._replace(dist_logits=None, token_logits={"a": a, "b": b})
    as_class = output._replace(cls_logits=b)
    for kwargs in ({"kind": "kl", "tau": 2.0}, {"kind": "dkd"}, {"kind": "ce"}):
        made = value(term("token:b", "global", **kwargs), (plain, labels, targets))
        assert made == pytest.approx(value(term("class", "global", **kwargs), (as_class, labels, targets)))
    mean = output._replace(cls_logits=(output.cls_logits + a + b) / 3)
    of_mean = value(term("mean", "label"), (plain, labels, targets))
    assert of_mean == pytest.approx(value(term("class", "label"), (mean, labels, targets)))
    idle = term("token:a", "global", epochs=[1, 2])
    total, _ = DistillationLoss(LossConfig("terms", terms=[term("class", "label"), idle]))(
        plain._replace(token_logits={"a": a.requires_grad_(), "b": b}), labels, targets, epoch=0
    )
    total.backward()
    assert a.grad is not None and not a.grad.any()
    with pytest.raises(ValueError, match="no logits of token:c: the student has the tokens a, b"):
        value(term("token:c", "label"), (plain, labels, targets))


def test_which_heads_a_loss_with_tokens_trains() -> None:
    loss = LossConfig("terms", terms=[term("class", "label"), term("token:b", "global", weight=0.0)])
    assert trained_heads(loss, False, ["a", "b"]) == ("class",)
    assert read_heads(loss, False, ["a", "b"]) == ("class", "token:b")
    of_mean = LossConfig("terms", terms=[term("mean", "label")])
    assert trained_heads(of_mean, False, ["a", "b"]) == ("class", "token:a", "token:b")
    assert trained_heads(of_mean, False) == ("class",)


@pytest.mark.parametrize(
    "arguments", ["output, labels", "output, labels, targets, epoch", "*, output, labels, targets"]
)
def test_a_term_of_ones_own_that_can_not_be_called_is_refused(tmp_path: Path, arguments: str) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"def t({arguments}):\n    return 0\n")
    with pytest.raises(ConfigError, match=r"own.py:t' can't be called with \(output, labels, targets\)"):
        own_terms(LossConfig("terms", terms=[term(own=f"{file}:t")]))
