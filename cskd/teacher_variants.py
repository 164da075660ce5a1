"""Would the teacher do better on images prepared in another way? The usual ways, tried on clean images.

The weights decide how an image must be normalised, and nothing in them says it. Wrong numbers cost accuracy, seldom all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cskd.class_order import clearly_more
from cskd.teacher import IMAGENET_MEAN, IMAGENET_STD, Prepare, Preprocess, Teacher
from cskd.teacher_checks import clean_predictions

Image = NDArray[np.uint8]
Ints = NDArray[np.int64]

_HALF, _ZERO, _ONE, _BYTES = (0.5,) * 3, (0.0,) * 3, (1.0,) * 3, (1 / 255,) * 3
_CAFFE = (0.485, 0.458, 0.408)  # means in 0..255 of the networks that have no std
_NORMALISATIONS = (
    ("ImageNet's", IMAGENET_MEAN, IMAGENET_STD),
    ("Inception's", _HALF, _HALF),
    ("none, 0..1,", _ZERO, _ONE),
    ("none, 0..255,", _ZERO, _BYTES),
    ("Caffe's", _CAFFE, _BYTES),
    ("CLIP's", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ("CIFAR-10's", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ("CIFAR-100's", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
)
FEW = 64  # images that every variant is tried on, the best two on ENOUGH
ENOUGH = 256
CHANCE = 2e-3  # that a variant is better by luck
MARGIN = 0.02  # of the images: less is not worth a word


@dataclasses.dataclass(frozen=True)
class Variant:
    """Another way to prepare an image."""

    name: str
    cure: str  # what to set
    preprocess: Preprocess
    bgr: bool = False

    def predictions(self, teacher: Teacher, images: Sequence[Image]) -> Ints:
        """As `clean_predictions`, of the same network. Its fingerprint and count of images stay what they are."""
        prepare = Prepare(self.preprocess, teacher.device, teacher.fingerprint["channels_last"])
        other = dataclasses.replace(teacher, preprocess=self.preprocess, prepare=prepare)
        return clean_predictions(other, (image[..., ::-1] if self.bgr else image for image in images))


@dataclasses.dataclass(frozen=True)
class Better:
    """A variant with which the teacher is clearly better, and its share of `images` right, against that of the stated one."""

    variant: Variant
    top1: float
    stated: float
    images: int
    gain: int  # images more

    @property
    def text(self) -> str:
        """What it is and what to do, for people."""
        return (
            f"with {self.variant.name} {100 * self.top1:.1f} % of {self.images} images are right, not "
            f"{100 * self.stated:.1f} %: {self.variant.cure}"
        )


def better_variant(teacher: Teacher, images: Sequence[Image], labels: Ints, predicted: Ints) -> Better | None:
    """The variant with which the teacher is clearly better on the same images, or None.

    Args:    images uint8 [H, W, 3], at most ENOUGH; labels and predicted int64 [N], theirs and what the teacher says of them.
    """
    right = predicted == labels
    few = np.unique(np.linspace(0, len(images) - 1, FEW).astype(int))
    gains: list[tuple[int, Variant]] = []
    for variant in _variants(teacher, images):
        try:
            said = variant.predictions(teacher, [images[i] for i in few])
        except Exception:  # a network may refuse another input size, in whatever way it likes
            continue
        gains.append((int((said == labels[few]).sum() - right[few].sum()), variant))
    gains.sort(key=lambda gain: -gain[0])
    found: list[Better] = []
    for gain, variant in gains[:2]:
        if gain < 1:
            continue
        now = variant.predictions(teacher, images) == labels
        better, worse = int((now & ~right).sum()), int((right & ~now).sum())
        if clearly_more(better, worse, CHANCE) and better - worse >= MARGIN * len(images):
            found.append(Better(variant, float(now.mean()), float(right.mean()), len(images), better - worse))
    return max(found, key=lambda better: better.gain, default=None)


def _variants(teacher: Teacher, images: Sequence[Image]) -> Iterator[Variant]:
    stated = teacher.preprocess
    pixels = np.concatenate([image[::4, ::4].reshape(-1, 3) for image in images]) / 255.0
    own = ("this data's own", tuple(pixels.mean(0).tolist()), tuple((pixels.std(0) + 1e-3).tolist()))
    for name, mean, std in (*_NORMALISATIONS, own):
        here = dataclasses.replace(stated, mean=mean, std=std)
        cure = f"set teacher.mean: {_numbers(mean)}, teacher.std: {_numbers(std)}"
        if not np.allclose((mean, std), (stated.mean, stated.std), atol=2e-3):
            yield Variant(f"{name} mean and std", cure, here)
        if name == "Caffe's":
            yield Variant("Caffe's means and BGR channels", f"{cure}, {_REVERSE}", here, bgr=True)
    yield Variant("channels as BGR", _REVERSE, stated, bgr=True)
    if stated.crop_pct < 1.0:
        cure = "set teacher.crop_pct: 1.0 (of this check alone)"
        yield Variant("whole images", cure, dataclasses.replace(stated, crop_pct=1.0))
    sides = {min(image.shape[:2]) for image in images}
    for size in sorted({teacher.image_size, *(sides if len(sides) == 1 else ())} - {stated.size}):
        if 8 <= size <= 2 * stated.size:
            here = dataclasses.replace(stated, size=size)
            yield Variant(f"images of {size} pixels", f"set teacher.input_size: {size}", here)


_REVERSE = "reverse the channels in build(): x[:, [2, 1, 0]]"


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
