"""Does the teacher number the classes as the data set does? Told from what it says of images whose labels are known. No torch here.

A wrong order shows in two ways. Where many classes are seen a few times each, the same predictions are right far more often
under another known order. Where each class is seen several times, most classes go to one other class each, and no two to the
same one. A teacher that is merely weak, or takes one class for another but not that one for the first, does neither.
"""

# Shapes: N images, K classes

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cskd.dataset.inventory import evenly
from cskd.errors import TeacherError
from cskd.teacher.class_map import ORDERS, class_map

Ints = NDArray[np.int64]

SURE = 5e-3  # chance that a coin falls so: for orders that disagree, of the images that one of them gets right
CLEAR = 4  # times as many images right as under the stated order, among classes that the two number differently
OFTEN = 0.5  # share of a class's images that must go to one other class
SEEN = 4  # images of a class that say where it goes, unless it is part of a cycle
MANY = 4  # classes that go elsewhere, and a third of all, need not form a cycle: some are not seen, or seen too seldom
SHOWN = 16  # characters of a class name in a message


@dataclass(frozen=True)
class OtherOrder:
    """Another order of the teacher's outputs, which explains its predictions better than the stated one."""

    cure: str | None  # a value of `teacher.classes`; None: none of the known ones
    column: Ints  # [K], the logit that label k has in this order; -1: one that is not among the K
    better: int  # images that only this order gets right, and
    worse: int  # that only the stated one does
    sure: bool  # whether that can be no weakness of the teacher

    def moved(self) -> Ints:
        """The labels that are numbered differently."""
        return np.flatnonzero(self.column != np.arange(len(self.column)))


def known_orders(names: Sequence[str], chosen: Sequence[int], outputs: int) -> dict[str, Ints]:
    """What `teacher.classes` could say instead -> the logit int64 [K] that label k would have, -1 where it is not among them.

    Args:    names of the data set's classes; chosen, the output of the network that each of the K logits is; outputs of it.
    """
    K = len(names)
    at, same = np.full(outputs, -1), np.arange(K)
    at[list(chosen)] = same
    words: list[str | None] = [None, *ORDERS]
    shift = (chosen[0] + outputs // 2) % outputs - outputs // 2  # as a small number of either sign
    base = shift if [(k + shift) % outputs for k in range(K)] == list(chosen) else 0
    words += [f"shift:{base + step}" for step in (1, -1)] + ["shift:0"]
    orders: dict[str, Ints] = {}
    for word in words:
        try:
            raw = class_map(word, names, outputs)
        except TeacherError:  # names that sort alike, or another number of outputs
            continue
        column = at[np.arange(K) if raw is None else raw]
        if not any(np.array_equal(column, other) for other in (same, *orders.values())):
            orders["null" if word is None else word] = column
    return orders


def other_order(predicted: Ints, labels: Ints, K: int, known: Mapping[str, Ints]) -> OtherOrder | None:
    """The order of the outputs that explains the predictions clearly better than the stated one, or None.

    Args:    predicted, labels int64 [N]; known as of `known_orders`. One that is known is preferred where it explains as much.
    """
    orders = [_weigh(cure, column, predicted, labels) for cure, column in known.items()]
    goes = goes_to(predicted, labels, K, SEEN)
    seen = int((np.bincount(labels, minlength=K) >= SEEN).sum())
    if len(goes) < max(MANY, seen / 3):
        goes = cycles(goes_to(predicted, labels, K, 2))
    column = np.arange(K)
    column[list(goes)] = list(goes.values())
    orders.append(_weigh(None, column, predicted, labels, fitted=len(goes)))
    found = [order for order in orders if order.better > order.worse and _coin(order.better, order.worse) < SURE]
    found = [order for order in found if order.better >= CLEAR / 2 * order.worse]
    if not found:
        return None
    most = max(order.better - order.worse for order in found)
    return next(order for order in found if order.better - order.worse >= 0.9 * most)  # the known ones come first


def goes_to(predicted: Ints, labels: Ints, K: int, least: int) -> dict[int, int]:
    """Label -> another class, which most of its images (`least` or more) are taken for, and those of no other label are.

    Where most images of that class are taken for what they are, it is the teacher that errs, and not the order.
    """
    most = _most(predicted, labels)
    count = np.bincount(labels, minlength=K)
    targets = [to for k, to in most.items() if count[k] >= least or to == k]
    return {k: to for k, to in most.items() if to != k and count[k] >= least and targets.count(to) == 1}


def _most(predicted: Ints, labels: Ints) -> dict[int, int]:
    """Label -> the class that more than OFTEN of its images are taken for, where there is one."""
    most = {}
    for k in np.unique(labels).tolist():
        values, counts = np.unique(predicted[labels == k], return_counts=True)
        if counts.max() > OFTEN * counts.sum():
            most[k] = int(values[counts.argmax()])
    return most


def cycles(goes: Mapping[int, int]) -> dict[int, int]:
    """Those of `goes_to` that lead back to where they begin: a, b, c and a again."""
    goes = dict(goes)
    while open_ends := [k for k, to in goes.items() if to not in goes]:
        for k in open_ends:
            del goes[k]
    return goes


def suspects(predicted: Ints, labels: Ints, K: int, known: Mapping[str, Ints], most: int = 32) -> Ints:
    """The labels, at most `most`, of which more images would tell whether they are numbered in another order."""
    count = np.bincount(labels, minlength=K)
    wanted: list[int] = []
    for column in known.values():
        order = _weigh(None, column, predicted, labels)
        if count[moved := order.moved()].sum() < most and order.better >= order.worse:
            wanted += moved.tolist()
    once = goes_to(predicted, labels, K, 1)
    wanted += cycles(once)
    if len(once) >= max(MANY, (count > 0).sum() / 3):
        present = np.flatnonzero(count)
        few = present[evenly(len(present), most // 4)].tolist()
        wanted += [k for label in few for k in (label, once.get(label, label))]
    return np.array(list(dict.fromkeys(wanted))[:most], np.int64)


def describe(order: OtherOrder, predicted: Ints, labels: Ints, names: Sequence[str], most: int = 2) -> str:
    """What shows that order, for people: class 'ibis': the teacher says 'ant' in 98 %, of at most so many classes."""
    moved = [k for k in order.moved().tolist() if (labels == k).any()]
    share = {k: float((predicted[labels == k] == order.column[k]).mean()) for k in moved}
    moved.sort(key=lambda k: -share[k])
    first = [
        f"class {shown(names[k])}: the teacher says {shown(names[order.column[k]])} in {100 * share[k]:.0f} %"
        for k in moved[:most]
    ]
    rest = sum(share[k] > OFTEN for k in moved[most:])
    return "; ".join(first) + (f"; so for {rest} more" if rest and most > 1 else "")


def one_way(predicted: Ints, labels: Ints, names: Sequence[str], least: int = 8, share: float = 0.8) -> str | None:
    """A note on classes that are mostly taken for one other, where no other order explains it."""
    found = []
    for k in np.flatnonzero(np.bincount(labels) >= least).tolist():
        said = np.bincount(predicted[labels == k])
        if (to := int(said.argmax())) != k and said[to] >= share * said.sum():
            found.append(f"{shown(names[k])} for {shown(names[to])} in {100 * said[to] / said.sum():.0f} %")
    if not found:
        return None
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"the teacher takes {', '.join(found[:3])}{more}: is that class in its training data, and its name the same?"


def clearly_more(better: int, worse: int, chance: float) -> bool:
    """Whether `better` of better + worse coins on one side have at most that chance."""
    return better > worse and _coin(better, worse) < chance


def shown(name: str) -> str:
    """A class name in a message."""
    return repr(name if len(name) <= SHOWN else name[: SHOWN - 3] + "...")


def _weigh(cure: str | None, column: Ints, predicted: Ints, labels: Ints, fitted: int = 0) -> OtherOrder:
    """An order against the stated one. fitted: classes that were put where their images go, so that one of each says nothing."""
    right, stated = predicted == column[labels], predicted == labels
    only = np.bincount(labels[right & ~stated], minlength=1)  # by label
    better, worse = int(only.sum()), int((stated & ~right).sum())
    # One class that all images are taken for speaks for any order that has it in another place.
    spread = only.max() <= 0.75 * better
    sure = better >= CLEAR * worse and bool(spread) and clearly_more(better - fitted, worse, SURE)
    return OtherOrder(cure, column, better, worse, sure)


def _coin(heads: int, tails: int) -> float:
    """Chance of as many heads or more in so many throws."""
    n = heads + tails
    if n > 1000:
        return 1.0 - NormalDist(n / 2, math.sqrt(n) / 2).cdf(heads - 0.5)
    return sum(math.comb(n, i) for i in range(heads, n + 1)) / 2.0**n
