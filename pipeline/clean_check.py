"""The teacher on clean images, before it teaches anything: a wrong normalisation or class order costs days.

choose    validation images where there are any of the same classes, else training images, evenly over the classes
top-1     near chance is refused
apart     data.val and data.train must number their classes alike
order     predictions against labels, class by class: an order of the outputs that explains much more is refused
variants  other usual normalisations, on the same images: one that is clearly better is noted
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cskd.config import Config
from cskd.dataset.inventory import Inventory, evenly, open_inventory
from cskd.errors import DataError, ImageError, TeacherError
from cskd.teacher.class_order import Ints, OtherOrder, describe, known_orders, one_way, other_order, suspects
from cskd.teacher.clean import check_clean, clean_limit, clean_predictions
from cskd.teacher.model import Teacher
from cskd.teacher.variants import ENOUGH, Better, better_variant
from cskd.views import Image
from cskd.views.maker import ViewMaker

ASIDE = 64  # images of data.train that are looked at where data.val is checked
MOST_MORE = 128  # images at most that are read to make sure of an order, or of a variant
PER_CLASS = 16  # images of a class that are enough to be sure
PERFECT = 0.995  # top-1 from which on no other normalisation is looked for
UNCHECKED = "the teacher has no classifier: neither its accuracy nor its mean and std can be checked on clean images"
LONGEST_LIST = 60  # characters of a list of outputs that a message holds


@dataclass(frozen=True)
class CleanCheck:
    """What the check found of a teacher that may go on."""

    top1: float | None  # share of `images` right; None: there was nothing to check
    images: int
    data: str | None  # where they are from: val or train
    notes: list[str]  # what a user should know, one line each

    @property
    def text(self) -> str:
        """The accuracy, for people."""
        if self.top1 is None:
            return "unknown: it has no classifier"
        return f"{100 * self.top1:.1f} % on {self.images} clean images of data.{self.data}"


def clean_check(teacher: Teacher, maker: ViewMaker, config: Config) -> CleanCheck:
    """Top-1 of the teacher on clean images spread over the classes, and whether order and normalisation are the right ones; of a
    teacher without a classifier a note that nothing could be checked.

    Raises:  TeacherError near chance, or for another order of the classes, with what mends it, unless `teacher.check: note`;
             DataError where no image can be decoded.
    """
    if not teacher.has_classes:
        return CleanCheck(None, 0, None, [UNCHECKED])
    wanted, names = config.teacher.check_images, maker.inventory.classes
    sources, notes = _sources(maker, config)
    seen = _Answers(teacher, sources)
    for source in list(sources):
        try:
            seen.add(source, spread(source.label, wanted))
        except DataError as e:
            if source.name == "train":
                raise
            notes.append(f"the clean check ran on data.train: {e}")
        else:
            if not len(seen) and source.name == "val":
                notes.append(f"the clean check ran on data.train: no image of {config.data.val} can be decoded")
        if len(seen):
            break
        sources.remove(source)
    else:
        raise DataError(
            f"none of {min(wanted, len(maker.inventory))} images of {config.data.train} can be decoded; run `cskd pack` on a "
            "whole data set"
        )
    count = len(seen)
    top1 = seen.top1(count)

    known = known_orders(names, teacher.chosen, teacher.outputs)
    if sources[0].name == "val" and (fault := _numbered_apart(seen, sources[-1], known, min(wanted, ASIDE))):
        if config.teacher.check == "refuse":
            raise TeacherError(f"{fault}; teacher.check: note goes on")
        notes.append(fault)
    if len(unsure := suspects(seen.predicted, seen.labels, len(names), known)):
        goal = max(1, min(PER_CLASS, MOST_MORE // len(unsure)))
        seen.more(goal * len(unsure) - int(np.isin(seen.labels, unsure).sum()), min(MOST_MORE, wanted), unsure)
    order = other_order(seen.predicted, seen.labels, len(names), known)
    better = None
    if top1 < PERFECT and not (order and order.sure and order.cure):
        seen.more(MOST_MORE - len(seen), min(MOST_MORE, wanted))
        better = better_variant(teacher, *seen.again(ENOUGH))
    faults, more_notes = _judge(order, better, seen, count, teacher, names)
    if better and better.top1 < clean_limit(teacher.classes, better.images, config.teacher.min_top1):
        better = None
    try:
        for fault in faults:
            raise TeacherError(f"{fault}; teacher.check: note goes on")
        check_clean(top1, teacher.classes, count, config.teacher.min_top1, better.text if better else None)
    except TeacherError as e:
        if config.teacher.check == "refuse":
            raise
        more_notes = [*(faults or [str(e)]), *more_notes]
    return CleanCheck(top1, count, sources[0].name, notes + more_notes)


def _judge(
    order: OtherOrder | None, better: Better | None, seen: _Answers, count: int, teacher: Teacher, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """What speaks against the teacher: faults, and notes."""
    if order is None:
        note = better.text if better else one_way(seen.predicted, seen.labels, names)
        return [], [note] if note else []
    shows = describe(order, seen.predicted, seen.labels, names)
    if better and order.cure is None:  # colours that change places look like classes that do
        one = describe(order, seen.predicted, seen.labels, names, most=1)
        return ([f"{one}; {better.text}"], []) if order.sure else ([], [better.text])
    cured = f"top-1 {100 * seen.top1(count):.1f} %, in another order {100 * seen.top1(count, order.column):.1f} %"
    if not order.sure:
        return [], [f"{shows} ({cured}): are its outputs in that order? teacher.classes says it"]
    return [f"{shows} ({cured}); set teacher.classes: {order.cure or _outputs(order, teacher)}"], []


def _numbered_apart(val: _Answers, source: _Source, known: Mapping[str, Ints], count: int) -> str | None:
    """Why data.val can't number its classes as data.train does, by some images of that; None where it may.

    Either another order fits data.val and not data.train, or the teacher is right for data.val alone: nobody's teacher is much
    better on images that it was not trained on.
    """
    train = _Answers(val.teacher, [source])
    with contextlib.suppress(DataError):  # it is said where the data set is read in its turn
        train.add(source, spread(source.label, count))
    n, m = len(train), len(val)
    if not n:
        return None
    on_train, on_val = train.top1(n), val.top1(m)
    order = other_order(val.predicted, val.labels, len(source.maker.inventory.classes), known)
    moved = (
        order is not None and train.top1(n, order.column) < on_train - 0.2 and val.top1(m, order.column) > on_val + 0.2
    )
    mean = (n * on_train + m * on_val) / (n + m)
    clear = abs(on_train - on_val) > 4 * math.sqrt(mean * (1 - mean) * (1 / n + 1 / m))
    if not clear or not (moved or on_train < on_val / 2):
        return None
    return (
        f"data.val numbers its classes otherwise than data.train: the teacher gets {100 * on_train:.1f} % of {n} images of "
        f"data.train right, {100 * on_val:.1f} % of {m} of data.val; pack both with one class list (--classes)"
    )


def _outputs(order: OtherOrder, teacher: Teacher) -> str:
    """The order as a list where that is short and no class is left out of it."""
    if order.column.min() >= 0 and len(set(order.column.tolist())) == len(order.column):
        text = "[" + ", ".join(str(teacher.chosen[column]) for column in order.column) + "]"
        if len(text) <= LONGEST_LIST:
            return text
    return "a file of its names in output order"


@dataclass(frozen=True)
class _Source:
    """A data set that clean images are taken from; label int64 [N] in the order of the classes that are trained on."""

    name: str
    maker: ViewMaker
    label: Ints
    used: set[int] = field(default_factory=set)


def _sources(maker: ViewMaker, config: Config) -> tuple[list[_Source], list[str]]:
    """Where images may come from, best first, and why not from data.val."""
    train = _Source("train", maker, np.asarray(maker.inventory.label, np.int64))
    if not config.data.val:
        return [train], []
    try:
        val: Inventory = open_inventory(Path(config.data.val))
    except DataError as e:
        return [train], [f"the clean check ran on data.train: {e}"]
    place = {name: k for k, name in enumerate(maker.inventory.classes)}
    if set(val.classes) != set(place):
        return [train], [f"the clean check ran on data.train: {config.data.val} has other classes"]
    label = np.array([place[name] for name in val.classes])[val.label]
    return [_Source("val", ViewMaker(val, maker.recipe), label), train], []


class _Images(Sequence[Image]):
    """Images that are decoded when they are asked for."""

    def __init__(self, at: list[tuple[_Source, int]]) -> None:
        self.at = at

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, row: Any) -> Any:
        source, i = self.at[row]
        return source.maker.image(i)


class _Answers:
    """Images that the teacher has seen: where they are, their labels, and what it said."""

    def __init__(self, teacher: Teacher, sources: list[_Source]) -> None:
        self.teacher, self.sources = teacher, sources
        self.at: list[tuple[_Source, int]] = []
        self.labels, self.predicted = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.at)

    def top1(self, count: int, column: Ints | None = None) -> float:
        """Of the first `count`, in another order of the outputs where `column` says so."""
        labels = self.labels[:count]
        return float((self.predicted[:count] == (labels if column is None else column[labels])).mean())

    def add(self, source: _Source, samples: Ints) -> None:
        """Let the teacher see samples of a source; those that can't be decoded will be quarantined, and counted, in their turn."""
        good: list[int] = []
        said = clean_predictions(self.teacher, self._decoded(source, samples, good))
        self.at += [(source, i) for i in good]
        source.used.update(samples.tolist())
        self.labels = np.concatenate([self.labels, source.label[good]])
        self.predicted = np.concatenate([self.predicted, said])

    def more(self, count: int, most: int, classes: Ints | None = None) -> None:
        """Up to `count` and `most` images more, of these classes or of all."""
        count = min(count, most)
        for source in self.sources:
            if count <= 0:
                return
            unused = np.ones(len(source.label), bool)
            unused[list(source.used)] = False
            if classes is not None:
                unused &= np.isin(source.label, classes)
            free = np.flatnonzero(unused)
            before = len(self)
            with contextlib.suppress(DataError):  # it is said where that data set is read in its turn
                self.add(source, free[spread(source.label[free], count)])
            count -= len(self) - before

    def again(self, most: int) -> tuple[_Images, Ints, Ints]:
        """At most so many of the images, spread evenly, with labels and predictions."""
        rows = evenly(len(self), most)
        return _Images([self.at[row] for row in rows]), self.labels[rows], self.predicted[rows]

    @staticmethod
    def _decoded(source: _Source, samples: Ints, good: list[int]) -> Iterator[Image]:
        for i in samples.tolist():
            with contextlib.suppress(ImageError):
                image = source.maker.image(i)
                good.append(i)
                yield image


def spread(labels: Ints, wanted: int) -> Ints:
    """At most `wanted` samples of those labels [N], evenly over the classes, and within a class over the data set; sorted."""
    if len(labels) <= wanted:
        return np.arange(len(labels))
    order = np.argsort(labels, kind="stable")
    present, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    each = np.zeros(len(present), np.int64)
    while (left := wanted - int(each.sum())) > 0:
        open_ = np.flatnonzero(each < count)
        if left < len(open_):
            each[open_[evenly(len(open_), left)]] += 1
        else:
            each[open_] += np.minimum(left // len(open_), (count - each)[open_])
    places = [f + ((np.arange(q) + 0.5) * n / q).astype(int) for f, n, q in zip(first, count, each, strict=True) if q]
    return np.sort(order[np.concatenate(places)])
