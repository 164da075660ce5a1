"""Would the teacher do better on images prepared in another way? The usual ways, tried on clean images.

The weights decide how an image must be normalised, and nothing in them says it. Wrong numbers cost accuracy, seldom all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cskd.dataset.inventory import evenly
from cskd.teacher.class_order import Ints, clearly_more
from cskd.teacher.clean import clean_image, predictions
from cskd.teacher.model import IMAGENET_MEAN, IMAGENET_STD, Prepare, Preprocess, Teacher
from cskd.views import Image

_HALF, _ZERO, _ONE, _BYTES = (0.5,) * 3, (0.0,) * 3, (1.0,) * 3, (1 / 255,) * 3
_CAFFE = (0.485, 0.458, 0.408)  # means in 0..255 of the networks that have no std
_NORMALISATIONS = (
    ("ImageNet's mean and std", IMAGENET_MEAN, IMAGENET_STD),
    ("Inception's mean and std", _HALF, _HALF),
    ("no normalisation (0..1)", _ZERO, _ONE),
    ("no normalisation (0..255)", _ZERO, _BYTES),
    ("Caffe's mean and std", _CAFFE, _BYTES),
    ("CLIP's mean and std", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ("CIFAR-10's mean and std", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ("CIFAR-100's mean and std", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
)
FEW = 64  # images that every variant is tried on, the best two on MORE, the better one of them on ENOUGH
MORE = 256
ENOUGH = 512
CHANCE = 2e-3  # that a variant is better by luck
MARGIN = 0.02  # of the images: less is not worth a word


@dataclasses.dataclass(frozen=True)
class Variant:
    """Another way to prepare an image."""

    name: str
    cure: str  # what to set
    preprocess: Preprocess
    bgr: bool = False


@dataclasses.dataclass(frozen=True)
class Better:
    """A variant with which the teacher is clearly better, and its share of `images` right, against that of the stated one."""

    variant: Variant
    top1: float
    stated: float
    images: int

    @property
    def text(self) -> str:
        """What it is and what to do, for people."""
        return (
            f"with {self.variant.name} {100 * self.top1:.1f} % of {self.images} images are right, not "
            f"{100 * self.stated:.1f} %: {self.variant.cure}"
        )


class _Trial:
    """Variants on the same images; what they all have in common is read and resized once."""

    def __init__(self, teacher: Teacher, images: Sequence[Image], labels: Ints) -> None:
        self.teacher, self.images, self.labels = teacher, images, labels
        self.sides: dict[int, int] = {}  # image -> its short side
        self._clean: dict[int, Tensor] = {}

    def right(self, variant: Variant, rows: Ints) -> NDArray[np.bool_]:
        """Which of the images `rows` the same network gets right. Its fingerprint stays what it is."""
        prepare = Prepare(variant.preprocess, self.teacher.device, self.teacher.fingerprint.channels_last)
        other = dataclasses.replace(self.teacher, preprocess=variant.preprocess, prepare=prepare)
        pixels = (self.clean(i, variant.preprocess) for i in rows.tolist())
        said = predictions(other, (x.flip(0) if variant.bgr else x for x in pixels))
        return np.asarray(said == self.labels[rows])

    def clean(self, i: int, preprocess: Preprocess) -> Tensor:
        """Image i as of `clean_image`."""
        stated = self.teacher.preprocess
        if (preprocess.size, preprocess.crop_pct) != (stated.size, stated.crop_pct):
            return clean_image(self.images[i], preprocess)
        if i not in self._clean:
            image = self.images[i]
            self.sides[i], self._clean[i] = min(image.shape[:2]), clean_image(image, stated)
        return self._clean[i]


def better_variant(teacher: Teacher, images: Sequence[Image], labels: Ints, predicted: Ints) -> Better | None:
    """The variant with which the teacher is clearly better on the same images, or None.

    Args:    images uint8 [H, W, 3], at most ENOUGH, decoded when they are asked for; labels and predicted int64 [N], theirs and
             what the teacher says of them.
    """
    trial, stated = _Trial(teacher, images, labels), predicted == labels
    few, more = (evenly(len(images), most) for most in (FEW, MORE))
    every = np.arange(len(images))

    def best(variants: list[Variant], rows: Ints, most: int) -> list[Variant]:
        gains = []
        for variant in variants:
            with contextlib.suppress(Exception):  # a network may refuse another input size, in whatever way it likes
                gains.append((int(trial.right(variant, rows).sum() - stated[rows].sum()), variant))
        gains.sort(key=lambda gain: -gain[0])
        return [variant for gain, variant in gains[:most] if gain > 0]

    for variant in best(best(list(_variants(trial, few)), few, 2), more, 1):
        now = trial.right(variant, every)
        gained, lost = int((now & ~stated).sum()), int((stated & ~now).sum())
        if clearly_more(gained, lost, CHANCE) and gained - lost >= MARGIN * len(images):
            return Better(variant, float(now.mean()), float(stated.mean()), len(images))
    return None


def _variants(trial: _Trial, rows: Ints) -> Iterator[Variant]:
    stated = trial.teacher.preprocess
    pixels = (
        np.concatenate([trial.clean(i, stated)[:, ::2, ::2].flatten(1).numpy() for i in rows.tolist()], axis=1) / 255.0
    )
    own = ("this data's own mean and std", tuple(pixels.mean(1).tolist()), tuple((pixels.std(1) + 1e-3).tolist()))
    for name, mean, std in (*_NORMALISATIONS, own):
        here = dataclasses.replace(stated, mean=mean, std=std)
        cure = f"set teacher.mean: {_numbers(mean)}, teacher.std: {_numbers(std)}"
        if not np.allclose((mean, std), (stated.mean, stated.std), atol=2e-3):
            yield Variant(name, cure, here)
        if mean is _CAFFE:
            yield Variant("Caffe's means and BGR channels", f"{cure}, {_REVERSE}", here, bgr=True)
    yield Variant("channels as BGR", _REVERSE, stated, bgr=True)
    if stated.crop_pct < 1.0:
        cure = "set teacher.crop_pct: 1.0 (of this check alone)"
        yield Variant("whole images", cure, dataclasses.replace(stated, crop_pct=1.0))
    sides = set(trial.sides.values())
    for size in sorted({trial.teacher.image_size, *(sides if len(sides) == 1 else ())} - {stated.size}):
        if 8 <= size <= 2 * stated.size:
            here = dataclasses.replace(stated, size=size)
            yield Variant(f"images of {size} pixels", f"set teacher.input_size: {size}", here)


_REVERSE = "reverse the channels in build(): x[:, [2, 1, 0]]"


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
