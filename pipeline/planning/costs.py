"""From what was measured to hours, and to the number of students after which a cache pays. Arithmetic alone.

A view of training costs the loader `loader`, the student `student`, and live the teacher `teacher` seconds. On a device of its
own they run side by side, and the slowest decides; on a CPU all of them share the cores, so that what the loader adds stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_STUDENTS = 1000  # beyond so many nobody trains students of one cache
SHARED = (2, 4, 8)  # students at the same time that a table shows
NOISE = 0.02  # of the time online: less than that saved is nothing saved
HOUR = 3600.0


@dataclass(frozen=True)
class Measured:
    """Seconds on this machine. Of a view where nothing else is said; each student's own is that of one rank on one device."""

    stage1: float  # all of stage 1
    cached: float  # a step from the cache, divided by its views
    student: float  # the same without a loader at work
    teacher: float  # a live teacher, padding of its batches included
    loader: float  # decoding and augmenting, by all workers together
    own_device: bool  # the student's device is not where views are made
    evaluate: float  # per image of data.val
    epoch_end: float  # per epoch: states and weights to disk
    stage1_start: float  # once: loading, checks
    student_start: float  # once
    online_start: float  # once: loading the teacher, checks, and whether each image can be decoded


@dataclass(frozen=True)
class Work:
    """How much there is to do: images, views of each in the cache; epochs of a student, their views, images of evaluations."""

    images: int
    views: int
    epochs: int
    epoch_views: int  # steps of an epoch times train.global_batch
    eval_images: int  # over the whole run


@dataclass(frozen=True)
class Costs:
    """Hours."""

    stage1: float
    cached: float  # a student from the cache
    online: float  # a student with the teacher at every step
    shared: dict[int, float]  # students at the same time -> each one's, with one forward of the teacher for all
    students: int | None  # from so many on the cache costs less than online; None: never
    epochs: float | None  # of any students together, after which it has cost less; None: never
    students_shared: int | None  # from so many on, all trained at the same time, it costs less than one forward for all


def live_view(measured: Measured, students: int) -> float:
    """Seconds of a view for so many students at once, with one forward of the teacher for all of them."""
    main = measured.teacher + students * measured.student
    if measured.own_device:
        return max(measured.loader, main)
    return main + max(0.0, measured.cached - measured.student)


def costs_of(measured: Measured, work: Work) -> Costs:
    """Hours of both ways, and where they cross."""
    stage1 = measured.stage1_start + work.images * work.views * measured.stage1

    def student(view: float, start: float, count: int = 1) -> float:
        """Seconds of a run of `count` students whose views take so long."""
        once = work.eval_images * measured.evaluate + work.epochs * measured.epoch_end
        return start + work.epochs * work.epoch_views * view + count * once

    def shared(count: int) -> float:
        return student(live_view(measured, count), measured.online_start, count)

    cached, online = student(measured.cached, measured.student_start), shared(1)
    saved = online - cached
    if saved <= NOISE * online:
        students, epochs = None, None
    else:
        students, epochs = math.floor(stage1 / saved) + 1, stage1 / saved * work.epochs
    together = (k for k in range(1, MOST_STUDENTS + 1) if stage1 + k * cached < (1 - NOISE) * shared(k))
    return Costs(
        stage1=stage1 / HOUR,
        cached=cached / HOUR,
        online=online / HOUR,
        shared={k: shared(k) / k / HOUR for k in SHARED},
        students=students,
        epochs=epochs,
        students_shared=next(together, None),
    )


def verdict(costs: Costs, work: Work, students: int) -> list[str]:
    """Whether the cache pays for so many students, in plain words."""
    own, live = costs.stage1 + students * costs.cached, students * costs.online
    of = "one student" if students == 1 else f"{students} students"
    if costs.students is None:
        return [
            f"it does not pay: a student takes {hours(costs.cached)} from the cache and {hours(costs.online)} online, however many "
            "there are; train with --online"
        ]
    lines = []
    if students >= costs.students:
        lines.append(f"it pays: {of} in {hours(own)} with stage 1, in {hours(live)} online")
    else:
        more = f"it pays {_from(costs.students)}"
        lines.append(f"it does not pay for {of}: {hours(own)} with stage 1, {hours(live)} online; {more}")
    lines.append(
        f"stage 1 is paid for after {costs.epochs:,.1f} epochs of training, {work.epochs} of which make a student"
    )
    one = "against one forward of the teacher for all students, trained at the same time,"
    lines.append(
        f"{one} it does not pay" if costs.students_shared is None else f"{one} it pays {_from(costs.students_shared)}"
    )
    return lines


def _from(students: int) -> str:
    return "from the first student on" if students == 1 else f"from {students:,} students on"


def hours(value: float) -> str:
    """Hours as people say them: '3.2 h', '12 min', '40 s'."""
    if value * 60 < 1.5:
        return f"{value * HOUR:.0f} s"
    return f"{value * 60:.0f} min" if value < 1.5 else f"{value:,.1f} h"
