"""A teacher knows itself again, is told apart from others, and is refused when it knows nothing."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cskd.config import TeacherConfig
from cskd.errors import TeacherError
from cskd.teacher.clean import check_clean, clean_image, clean_predictions
from cskd.teacher.fingerprint import compare_probe, probe_images
from cskd.teacher.model import Teacher
from tests.teachers import SIZE, load, tiny_teacher


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return tiny_teacher(tmp_path_factory.mktemp("tiny"))


def test_probe_images_are_the_same_anywhere() -> None:
    assert probe_images(32).dtype == np.uint8 and probe_images(32).shape == (8, 32, 32, 3)
    assert probe_images(32)[0, ::16, ::16].tolist() == [
        [[45, 224, 63], [29, 112, 254]],
        [[18, 196, 172], [97, 197, 18]],
    ]


def test_a_probe_takes_threads_and_bf16_for_noise(tiny: TeacherConfig) -> None:
    teacher = load(tiny)
    probe = json.loads(json.dumps(teacher.probe()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert compare_probe(probe, teacher.probe()) is None
    finally:
        torch.set_num_threads(threads)
    assert compare_probe(probe, load(tiny, channels_last=False).probe()) is None
    assert compare_probe(probe, load(tiny, precision="bf16").probe()) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        {"input_size": 80},
        {"grid": [2, 2]},
        {"classes": [1, 0, 2, 3, 4]},
        {"weights": None},
    ],
)
def test_a_probe_tells_other_teachers_apart(tiny: TeacherConfig, changes: dict[str, Any]) -> None:
    difference = compare_probe(load(tiny).probe(), load(tiny, **changes).probe())
    assert difference is not None and "\n" not in difference


def test_a_probe_with_another_padding_is_found_with_the_same_weights(sample_data: Path) -> None:
    config = TeacherConfig(
        model="mobilenetv2_100",
        weights=str(sample_data / "teachers" / "imagenet_mobilenetv2_100.safetensors"),
        kwargs={"pad_type": "same"},
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
    )
    names = [str(i) for i in range(1000)]
    right, wrong, half = (
        load(config, names, 96, input_size=96, **changes)
        for changes in ({}, {"kwargs": {"pad_type": ""}}, {"precision": "bf16"})
    )
    assert right.fingerprint.weights_sha256 == wrong.fingerprint.weights_sha256
    difference = compare_probe(right.probe(), wrong.probe())
    assert difference is not None and "differ by" in difference
    assert compare_probe(right.probe(), half.probe()) is None


def test_a_probe_of_another_shape_is_no_noise() -> None:
    probe = {"autocast": "none", "global": [[1.0, 2.0], [3.0, 5.0]], "dense": [[1.0], [2.0]]}
    assert compare_probe(probe, probe) is None
    assert "shape" in str(compare_probe(probe, {**probe, "global": [[1.0, 2.0]]}))
    assert compare_probe(probe, {**probe, "dense": [[1.0], [float("nan")]]}) is not None


def test_clean_images_are_cropped_and_resized_as_pillow_does(tiny: TeacherConfig) -> None:
    preprocess = load(tiny, crop_pct=0.875, interpolation="bicubic").preprocess
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((200, 150))
    for image in (coarse, coarse.transpose(Image.Transpose.ROTATE_90), coarse.resize((40, 30))):
        W, H = image.size
        short = 73  # floor(64 / 0.875)
        w, h = (short, short * H // W) if W <= H else (short * W // H, short)
        left, top = round((w - 64) / 2), round((h - 64) / 2)
        expected = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64)))
        got = clean_image(np.asarray(image), preprocess).permute(1, 2, 0).numpy()
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def clean_top1(teacher: Teacher, images: Iterable[NDArray[np.uint8]], labels: Sequence[int]) -> float:
    return float((clean_predictions(teacher, images) == np.asarray(labels)).mean())


def test_clean_top1_counts_over_ragged_batches(tiny: TeacherConfig) -> None:
    teacher = load(tiny, batch=4)
    images = list(probe_images(SIZE)) + list(probe_images(SIZE)[:3])
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    predicted = teacher.forward_global(tensor).argmax(1).tolist()
    labels = [p if i % 2 else (p + 1) % 5 for i, p in enumerate(predicted)]
    assert clean_top1(teacher, iter(images), labels) == 5 / 11
    assert len(clean_predictions(teacher, [])) == 0


@pytest.mark.parametrize(
    ("top1", "classes", "count", "limit", "refused"),
    [
        (0.19, 10, 500, None, True),
        (0.21, 10, 500, None, False),
        (0.004, 1000, 512, None, True),  # two of 512: twice chance, and still luck
        (0.60, 1000, 512, None, False),
        (0.70, 2, 500, None, True),
        (0.80, 2, 500, None, False),
        (0.60, 1000, 512, 0.7, True),
        (0.001, 1000, 512, 0.0, False),
        (float("nan"), 10, 500, None, True),
    ],
)
def test_near_chance_is_refused(top1: float, classes: int, count: int, limit: float | None, refused: bool) -> None:
    if not refused:
        return check_clean(top1, classes, count, limit)
    with pytest.raises(TeacherError) as e:
        check_clean(top1, classes, count, limit)
    for hint in (f"{100 * top1:.2f} %", "chance is", "mean and std", "order of the classes", "weights"):
        assert hint in str(e.value)
    assert "\n" not in str(e.value)


def read_images(path: Path, count: int) -> tuple[list[NDArray[np.uint8]], list[int], list[str]]:
    with tarfile.open(path) as tar:
        names = [n for n in tar.getnames() if n.endswith(".jpg")]
        classes = sorted({n.split("/")[1] for n in names})
        chosen = names[:: len(names) // count][:count]
        files = [tar.extractfile(n) for n in chosen]
        images = [np.asarray(Image.open(io.BytesIO(f.read())).convert("RGB")) for f in files if f is not None]
    return images, [classes.index(n.split("/")[1]) for n in chosen], classes


def test_an_own_network_knows_cifar_and_a_wrong_class_order_is_refused(sample_data: Path) -> None:
    folder = sample_data / "teachers"
    config = TeacherConfig(
        model=f"{folder / 'cifar_resnet.py'}:build", weights=str(folder / "cifar10_resnet56.safetensors")
    )
    images, labels, classes = read_images(sample_data / "data" / "cifar10-val.tar.gz", 500)
    teacher = load(config, classes, 32)
    assert teacher.grid == (8, 8) and teacher.head.kind == "linear"
    top1 = clean_top1(teacher, images, labels)
    assert 0.80 < top1 < 0.88  # 83 % of all 5,000
    check_clean(top1, 10, 500)
    shuffled = load(config, classes, 32, classes=[3, 7, 1, 9, 5, 0, 8, 2, 6, 4])
    with pytest.raises(TeacherError, match="order of the classes"):
        check_clean(clean_top1(shuffled, images[::5], labels[::5]), 10, 100)
