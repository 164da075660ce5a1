"""A teacher that was prepared for in a wrong way says so on images that it should know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd.config import TeacherConfig
from cskd.teacher.clean import clean_predictions
from cskd.teacher.variants import better_variant
from tests.teacher.test_teacher_checks import read_images
from tests.teachers import load

NORMAL = "set teacher.mean: [0.485, 0.456, 0.406], teacher.std: [0.229, 0.224, 0.225]"


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ({}, None),
        ({"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, NORMAL),
        ({"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}, NORMAL),
        ({"mean": [0.0, 0.0, 0.0], "std": [1 / 255, 1 / 255, 1 / 255]}, NORMAL),
        ({"input_size": 48}, "set teacher.input_size: 32"),
        ({"crop_pct": 0.7}, "set teacher.crop_pct: 1.0"),
        ("bgr", "reverse the channels in build(): x[:, [2, 1, 0]]"),
    ],
)
@pytest.mark.slow
def test_a_cifar_teacher_names_what_was_set_wrongly(
    sample_data: Path, wrong: dict[str, Any] | str, cure: str | None
) -> None:
    folder = sample_data / "teachers"
    images, labels, classes = read_images(sample_data / "data" / "cifar10-val.tar.gz", 160)
    config = TeacherConfig(
        model=f"{folder / 'cifar_resnet.py'}:build", weights=str(folder / "cifar10_resnet56.safetensors")
    )
    teacher = load(config, classes, 32, **(wrong if isinstance(wrong, dict) else {}))
    seen: Sequence[Any] = [image[..., ::-1] for image in images] if wrong == "bgr" else images
    found = better_variant(teacher, seen, np.array(labels), clean_predictions(teacher, seen))
    assert (found and found.variant.cure[: len(cure or "")]) == cure
    if found:
        assert found.top1 > 0.8 > found.stated and found.images == len(images)


def test_a_dozen_images_are_no_evidence(sample_data: Path) -> None:
    """A dozen images say nothing, whatever they look like."""
    folder = sample_data / "teachers"
    images, labels, classes = read_images(sample_data / "data" / "cifar10-val.tar.gz", 12)
    config = TeacherConfig(
        model=f"{folder / 'cifar_resnet.py'}:build", weights=str(folder / "cifar10_resnet56.safetensors")
    )
    teacher = load(config, classes, 32, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    assert better_variant(teacher, images, np.array(labels), clean_predictions(teacher, images)) is None
