"""Is the teacher any good? Its accuracy on clean images, prepared as it wants them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cskd.errors import TeacherError
from cskd.teacher.model import Preprocess, Teacher


def clean_predictions(teacher: Teacher, images: Iterable[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """The class that the teacher says of each clean image, resized and centre cropped as it wants it: int64 [N].

    Args:    images uint8 [H, W, 3] RGB of any size.
    """
    return predictions(teacher, (clean_image(image, teacher.preprocess) for image in images))


def predictions(teacher: Teacher, pixels: Iterable[Tensor]) -> NDArray[np.int64]:
    """The class that the teacher says of each image, uint8 [3, size, size] RGB of one size: int64 [N]."""
    said: list[Tensor] = []
    waiting: list[Tensor] = []

    def flush() -> None:
        said.append(teacher.forward_global(torch.stack(waiting).float()).argmax(1).cpu())
        waiting.clear()

    for image in pixels:
        waiting.append(image)
        if len(waiting) == teacher.batch:
            flush()
    if waiting:
        flush()
    return torch.cat(said).numpy() if said else np.zeros(0, np.int64)


def clean_limit(classes: int, count: int, min_top1: float | None = None) -> float:
    """The accuracy on `count` clean images below which a teacher is near chance.

    It is `min_top1`, or else twice chance, but no less than four standard deviations of luck above chance and no more than
    half-way from chance to 1 (two classes).
    """
    chance = 1.0 / classes
    luck = chance + 4.0 * math.sqrt(chance * (1.0 - chance) / count)
    return min(max(2.0 * chance, luck), (1.0 + chance) / 2.0) if min_top1 is None else min_top1


def check_clean(top1: float, classes: int, count: int, min_top1: float | None = None, cure: str | None = None) -> None:
    """Refuse a teacher whose accuracy on `count` clean images is below `clean_limit`. cure: what is known to mend it.

    Raises:  TeacherError with accuracy, chance, and what to look at.
    """
    limit = clean_limit(classes, count, min_top1)
    if not top1 >= limit:
        usual = (
            "check teacher.mean and std, the order of the classes (teacher.classes), teacher.weights and kwargs; "
            "teacher.min_top1 sets the limit"
        )
        raise TeacherError(
            f"the teacher gets {100 * top1:.2f} % of {count} clean images right, expected {100 * limit:.2f} % or more "
            f"(chance is {100 / classes:.2f} %); {cure or usual}"
        )


def clean_image(image: NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    """uint8 [H, W, 3] of any size -> uint8 [3, size, size]."""
    x_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: decoders give arrays that are read-only
    size = preprocess.size
    short = max(size, math.floor(size / preprocess.crop_pct))
    H, W = x_CHW.shape[1:]
    h, w = (short, max(short, short * W // H)) if H <= W else (max(short, short * H // W), short)
    if (h, w) != (H, W):
        # uint8 in and out on the CPU: the arithmetic of PIL's resize, within one grey level
        x_CHW = F.interpolate(x_CHW[None], (h, w), mode=preprocess.interpolation, antialias=True)[0]
    top, left = round((h - size) / 2), round((w - size) / 2)
    return x_CHW[:, top : top + size, left : left + size]
