"""Another order of the teacher's outputs is told from its predictions; a weak teacher is not taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cskd.teacher.class_order import OtherOrder, describe, known_orders, one_way, other_order, suspects

Ints = NDArray[np.int64]


def names_of(K: int) -> list[str]:
    """Sorted plainly; timm's reader numbers them otherwise."""
    return sorted(f"{'Type' if i % 3 == 0 else 'type'}{i}" for i in range(K))


def says(labels: Ints, K: int, accuracy: float, column: Ints | None = None, seed: int = 0) -> Ints:
    """Predictions of a teacher of that accuracy whose outputs lie in that order; its errors go to the next three classes."""
    rng = np.random.default_rng(seed)
    wrong = (labels + rng.integers(1, 4, len(labels))) % K
    said = np.where(rng.random(len(labels)) < accuracy, labels, wrong)
    return said if column is None else column[said]


def found(predicted: Ints, labels: Ints, K: int) -> OtherOrder | None:
    return other_order(predicted, labels, K, known_orders(names_of(K), range(K), K))


@pytest.mark.parametrize(("K", "per_class"), [(1000, 0.5), (100, 5), (22, 6), (5, 12)])
@pytest.mark.parametrize("word", ["timm", "shift:1", "shift:-1"])
@pytest.mark.parametrize("accuracy", [1.0, 0.7])
def test_a_known_order_is_named_however_few_images_a_class_has(
    K: int, per_class: float, word: str, accuracy: float
) -> None:
    labels = np.arange(K)[:: round(1 / per_class)] if per_class < 1 else np.arange(K).repeat(int(per_class))
    column = known_orders(names_of(K), range(K), K)[word]
    order = found(says(labels, K, accuracy, column), labels, K)
    assert order is not None and order.sure and order.cure == word
    assert np.array_equal(order.column, column)


def test_orders_that_sort_by_other_rules_are_known_and_told_apart() -> None:
    known = known_orders(sorted(["B2", "a", "b10", "C", "b9"]), range(5), 5)
    assert {"timm", "caseless", "shift:1", "shift:-1"} == known.keys()  # sorted is the stated one
    assert "sorted" in known_orders(["b", "B", "a"], range(3), 3)


def test_two_swapped_classes_of_a_hundred_are_found_and_shown() -> None:
    K, labels = 100, np.arange(100).repeat(10)
    column = np.arange(K)
    column[[7, 50]] = [50, 7]
    predicted = says(labels, K, 0.97, column)
    order = found(predicted, labels, K)
    assert order is not None and order.sure and order.cure is None
    assert order.moved().tolist() == [7, 50]
    names = names_of(K)
    text = describe(order, predicted, labels, names)
    assert f"class {names[7]!r}: the teacher says {names[50]!r} in" in text
    assert f"class {names[50]!r}: the teacher says {names[7]!r} in" in text


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("K", [5, 22, 100])
def test_an_order_that_nobody_knows_is_found_whole_or_in_part(K: int, part: float) -> None:
    rng = np.random.default_rng(K)
    column = np.arange(K)
    moved = rng.permutation(K)[: max(2, int(part * K))]
    column[moved] = np.roll(moved, 1)
    labels = np.arange(K).repeat(8)
    order = found(says(labels, K, 0.9, column), labels, K)
    assert order is not None and order.sure and order.cure is None
    assert (order.column == column).mean() > 0.95


def test_a_few_classes_seen_often_tell_an_unknown_order_of_a_thousand() -> None:
    K, column = 1000, np.random.default_rng(1).permutation(1000)
    labels = np.arange(0, K, 2)
    predicted = says(labels, K, 0.8, column)
    few = suspects(predicted, labels, K, known_orders(names_of(K), range(K), K))
    assert 8 <= len(few) <= 32
    more = few.repeat(8)
    labels, predicted = np.r_[labels, more], np.r_[predicted, says(more, K, 0.8, column, seed=1)]
    order = found(predicted, labels, K)
    assert order is not None and order.sure


@pytest.mark.parametrize("K", [3, 10, 100, 1000])
@pytest.mark.parametrize("accuracy", [0.9, 0.6, 0.3])
def test_a_weak_teacher_is_not_taken_for_one_in_another_order(K: int, accuracy: float) -> None:
    for seed in range(10):
        labels = np.random.default_rng(seed).integers(0, K, 512)
        order = found(says(labels, K, accuracy, seed=seed), labels, K)
        assert order is None or not order.sure


def test_one_class_taken_for_another_is_no_order_but_is_said() -> None:
    K, labels = 10, np.arange(10).repeat(20)
    predicted = np.where((labels == 3) & (np.arange(200) % 20 < 19), 4, labels)
    assert found(predicted, labels, K) is None
    note = one_way(predicted, labels, [f"name {k}" for k in range(K)])
    assert note is not None and "'name 3' for 'name 4' in 95 %" in note
    assert one_way(labels, labels, names_of(K)) is None


@pytest.mark.parametrize("twins", [0.5, 0.3])
def test_two_classes_that_look_alike_are_no_swap(twins: float) -> None:
    """All of one and a part of the other taken for the first, or each image by the toss of a coin."""
    K, labels = 20, np.arange(20).repeat(20)
    coin = np.random.default_rng(0).random(len(labels)) < twins
    predicted = np.where((labels < 2) & coin, 1 - labels, labels)
    for said in (predicted, np.where(labels == 0, 1, predicted)):
        order = found(said, labels, K)
        assert order is None or not order.sure


def test_a_handful_of_images_is_no_proof_of_a_swap() -> None:
    K, labels = 20, np.arange(20).repeat(4)  # eight images, and all speak for it: worth a note
    order = found(np.where(labels < 2, 1 - labels, labels), labels, K)
    assert order is not None and not order.sure
    labels = np.arange(20).repeat(8)
    order = found(np.where(labels < 2, 1 - labels, labels), labels, K)
    assert order is not None and order.sure


def test_a_class_that_is_known_is_not_where_another_one_belongs() -> None:
    """Many classes seen often are each taken for one that is seen once, and rightly: the teacher errs."""
    K = 40
    labels = np.r_[np.arange(10).repeat(10), np.arange(20, 30)]
    predicted = np.where(labels < 10, labels + 20, labels)
    assert found(predicted, labels, K) is None


@pytest.mark.parametrize("K", [2, 5, 22])
def test_a_teacher_that_always_says_the_same_is_no_order(K: int) -> None:
    for only in range(K):
        labels = np.arange(K - 1).repeat(20)  # and the last class is not seen
        order = found(np.full(len(labels), only), labels, K)
        assert order is None or not order.sure


def test_outputs_that_were_chosen_are_compared_as_what_they_are() -> None:
    """A list that takes the first K outputs of a teacher with a background class: each label is one off."""
    K = 10
    labels = np.arange(K).repeat(6)
    known = known_orders(names_of(K), range(K), K + 1)
    raw = labels + 1  # what the network says, of K + 1 outputs
    keeps = raw < K
    order = other_order(raw[keeps], labels[keeps], K, known)
    assert order is not None and order.sure and order.cure == "shift:1"
    # timm's order was asked for and is not the teacher's: the way back is no teacher.classes at all
    ranks = known_orders(names_of(K), range(K), K)["timm"]
    known = known_orders(names_of(K), ranks.tolist(), K)
    order = other_order(np.argsort(ranks)[labels], labels, K, known)
    assert order is not None and order.sure and order.cure == "null"


def test_two_images_that_speak_for_a_swap_ask_for_more_and_good_ones_for_none() -> None:
    K, labels = 100, np.arange(100)
    known = {"shift:1": np.roll(np.arange(K), -1)}
    assert suspects(labels, labels, K, known).tolist() == []
    predicted = labels.copy()
    predicted[[4, 9]] = [9, 4]
    assert sorted(suspects(predicted, labels, K, known).tolist()) == [4, 9]


def test_classes_that_a_known_order_moves_are_looked_at_even_when_seldom_seen() -> None:
    K, labels = 100, np.arange(90)
    column = np.arange(K)
    column[[95, 96]] = [96, 95]
    assert suspects(labels, labels, K, {"timm": column}).tolist() == [95, 96]
