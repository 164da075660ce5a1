"""Decoded logits that are made to agree with the exact class: the projection, and that it never goes away from the truth."""

from __future__ import annotations

import torch

from cskd.method.agree import agreed


def test_the_class_becomes_the_largest_by_the_least_change_and_comes_nearer_to_the_truth() -> None:
    rng = torch.Generator().manual_seed(0)
    true = torch.randn(2000, 7, generator=rng) * 2
    decoded = true + torch.randn(2000, 7, generator=rng) * 1.5
    cls = true.argmax(1)
    found = agreed(decoded, cls)
    assert torch.equal(found.argmax(1), cls)
    right = decoded.argmax(1) == cls
    assert 0 < int(right.sum()) < 2000 and torch.equal(found[right], decoded[right])
    before, after = ((x - true).square().sum(1) for x in (decoded, found))
    assert bool((after <= before + 1e-4).all()) and float(after.sum()) < 0.95 * float(before.sum())
    # Against the conditions of a least-squares projection: what was lowered and the class share one mean, all else is as it was.
    for x, y, c in zip(decoded[~right][:200], found[~right][:200], cls[~right][:200], strict=True):
        changed = (x - y).abs() > 1e-4
        pooled = changed | (torch.arange(7) == c)
        assert torch.allclose(x[pooled].mean(), y[pooled].mean(), atol=1e-4)
        assert torch.allclose(y[pooled], y[pooled].mean(), atol=1e-4) and bool((y[~pooled] <= y[c]).all())


def test_ties_and_a_class_below_all_others() -> None:
    x = torch.tensor([[1.0, 1.0, 0.0], [3.0, 3.0, -6.0], [2.0, 1.0, 0.0]])
    found = agreed(x, torch.tensor([1, 2, 0]))
    assert found.argmax(1).tolist() == [1, 2, 0]
    assert torch.allclose(found, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 1.0, 0.0]]), atol=1e-5)


def test_two_classes_share_their_mean() -> None:
    found = agreed(torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([0, 0]))
    assert found.argmax(1).tolist() == [0, 0]
    assert torch.allclose(found, torch.tensor([[1.5, 1.5], [3.0, 1.0]]), atol=1e-5)
