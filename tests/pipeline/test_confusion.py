"""What classes are taken for: counted, kept as CSV, drawn for two classes and for a thousand."""

from __future__ import annotations

import numpy as np
import pytest

from cskd.pipeline.draw.confusion import Confusion, draw_confusion, from_csv, mistakes, to_csv


def made(classes: int, images: int = 200, step: int = 7, weights: str = "last") -> Confusion:
    draw = np.random.default_rng(classes)
    label = draw.integers(0, classes, images)
    return Confusion.of(
        weights, step, label, np.where(draw.random(images) < 0.6, label, draw.integers(0, classes, images))
    )


def test_pairs_are_counted_without_images_that_could_not_be_read() -> None:
    found = Confusion.of("last", 3, np.array([0, 0, 1, -1, 1]), np.array([0, 1, 1, 0, 0]))
    assert found.pairs == {(0, 0): 1, (0, 1): 1, (1, 0): 1, (1, 1): 1}
    assert (found.images, found.top1) == (4, 50.0)
    assert Confusion.of("last", 3, np.array([], np.int64), np.array([], np.int64)).top1 == 0.0


def test_mistakes_are_the_most_frequent_pairs_that_differ() -> None:
    assert mistakes({(0, 0): 9, (0, 1): 2, (1, 0): 5, (2, 1): 1}, 2) == [(1, 0, 5), (0, 1, 2)]


def test_a_table_is_read_back_with_names_that_hold_commas_quotes_and_lines() -> None:
    names = ["a, b", '"c"', "d\ne", "=1+1"]
    both = [made(4, weights="best", step=3), made(4)]
    assert from_csv(to_csv(both, names), names) == both
    for damaged in (b"\xff", b"weights,step\n1,2\n", to_csv(both, names).replace(b"last", b"last,x", 1)):
        with pytest.raises(ValueError, match="no confusion table"):
            from_csv(damaged, names)


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 31, 1000])
def test_a_picture_shows_each_of_the_confusions(classes: int) -> None:
    names = [f"class {c} with a name of some length" for c in range(classes)]
    one, two = made(classes), made(classes, step=9, weights="best")
    single, both = draw_confusion([one], names), draw_confusion([two, one], names)
    assert both.width * both.height > 1.5 * single.width * single.height
    same = Confusion("best", one.step, one.pairs)
    assert draw_confusion([same, one], names).size == single.size
    assert single.width < 1500


def test_no_mistakes_and_no_images_are_drawn_and_no_confusion_is_refused() -> None:
    names = [str(c) for c in range(40)]
    assert draw_confusion([Confusion("last", 1, {(c, c): 2 for c in range(40)})], names).width > 0
    assert draw_confusion([Confusion("last", 1, {})], names[:3]).width > 0
    with pytest.raises(ValueError, match="no confusions"):
        draw_confusion([], names)
