"""The teacher on clean images, before it teaches anything: a wrong normalisation or class order costs days."""

from __future__ import annotations

import contextlib

import numpy as np

from cskd.config import Config
from cskd.errors import DataError, ImageError
from cskd.loading.views import ViewMaker
from cskd.teacher import Teacher, check_clean, clean_top1


def clean_check(teacher: Teacher, maker: ViewMaker, config: Config) -> tuple[float, int]:
    """Top-1 of the teacher on clean images spread over the data set, and how many; near chance is refused."""
    images, labels = [], []
    wanted = min(config.teacher.check_images, len(maker.inventory))
    for i in np.linspace(0, len(maker.inventory) - 1, wanted).astype(int).tolist():
        with contextlib.suppress(ImageError):  # it will be quarantined, and counted, in its turn
            images.append(maker.image(i))
            labels.append(int(maker.inventory.label[i]))
    if not images:
        raise DataError(
            f"none of {wanted} images of {config.data.train} can be decoded; run `cskd pack` on a whole data set"
        )
    top1 = clean_top1(teacher, images, labels)
    check_clean(top1, teacher.classes, len(images), config.teacher.min_top1)
    return top1, len(images)
