"""From measured seconds to hours, and from how many students on a cache pays: figures that can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cskd.pipeline.planning.costs import Measured, Work, costs_of, live_view, verdict

WORK = Work(images=1000, views=4, epochs=10, epoch_views=1000, eval_images=0)
FREE = {"evaluate": 0.0, "epoch_end": 0.0, "stage1_start": 0.0, "student_start": 0.0, "online_start": 0.0}
CPU = Measured(stage1=3.0, cached=1.5, student=1.0, teacher=2.0, loader=0.5, own_device=False, **FREE)


@pytest.mark.parametrize(
    ("measured", "students", "expected"),
    [
        (CPU, 1, 3.5),  # on a CPU what the loader adds to a step stays
        (CPU, 4, 6.5),
        (replace(CPU, own_device=True), 1, 3.0),  # on a device of its own the slowest decides
        (replace(CPU, own_device=True, loader=9.0), 4, 9.0),
    ],
)
def test_a_live_view_is_the_sum_on_a_cpu_and_the_slowest_on_a_device(
    measured: Measured, students: int, expected: float
) -> None:
    assert live_view(measured, students) == expected


def test_hours_and_the_students_from_which_a_cache_pays_are_those_worked_out_by_hand() -> None:
    costs = costs_of(CPU, WORK)
    assert [3600 * hours for hours in (costs.stage1, costs.cached, costs.online)] == pytest.approx([12e3, 15e3, 35e3])
    assert costs.students == 1 and costs.epochs == pytest.approx(6.0)  # 12,000 s of stage 1, 2,000 s saved an epoch
    assert 3600 * costs.shared[4] == pytest.approx(65e3 / 4)
    more_views = costs_of(CPU, replace(WORK, views=20))
    assert more_views.students == 4 and verdict(more_views, WORK, 3)[0].startswith("it does not pay for 3 students")
    assert verdict(more_views, WORK, 4)[0].startswith("it pays: 4 students")


def test_where_nothing_is_saved_it_is_said_plainly() -> None:
    costs = costs_of(replace(CPU, own_device=True, teacher=0.01, cached=9.0, loader=9.0), WORK)
    assert (costs.students, costs.epochs) == (None, None)
    assert verdict(costs, WORK, 1000)[0].startswith("it does not pay: ")
