"""A teacher in the wrong order or with the wrong normalisation is not cached from in silence; a weak one is let through."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cskd.config import Config, from_dict
from cskd.dataset.inventory import open_inventory
from cskd.errors import DataError, TeacherError
from cskd.machine.ranks import Ranks
from cskd.packing.pack import pack
from cskd.pipeline import cache_teacher as stage1
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.clean_check import CleanCheck, clean_check, spread
from cskd.pipeline.look.inspect_cache import inspect, render
from cskd.pipeline.online import open_online
from cskd.pipeline.show.progress import Notes
from cskd.store.cache import open_cache
from cskd.store.manifest import Manifest
from cskd.teacher.model import Teacher, load_teacher, teacher_images
from cskd.views.maker import ViewMaker

# Nearest colour of K, in an order of its own, with a bias and a share of classes that it takes for the next one.
TEACHER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, colours, order, background, temper, mean, std):
        super().__init__()
        self.pool = nn.AvgPool2d(4)
        c = (torch.tensor(colours) / 255 - torch.tensor(mean)) / torch.tensor(std)
        c = c[torch.tensor(order)] if order else c
        self.fc = nn.Linear(3, len(c) + background)
        with torch.no_grad():
            self.fc.weight.fill_(0.0); self.fc.bias.fill_(-1e4)
            self.fc.weight[background:].copy_(2 * c); self.fc.bias[background:].copy_(-(c ** 2).sum(1))
            self.fc.weight.mul_(temper); self.fc.bias.mul_(temper)

    def forward_features(self, x):
        return self.pool(x)

    def forward_head(self, f):
        return self.fc(f.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

def build(colours, order=None, background=0, temper=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    return Net(colours, order, background, temper, mean, std)
"""
NAMES = sorted(["ant", "bee", "cat", "Ibis", "jay", "kea", "type1", "type2", "type10", "vole"])
COLOURS = np.random.default_rng(5).integers(20, 236, (len(NAMES), 3))
SIZE = 16
RAW = {"mean": [0.0] * 3, "std": [1.0] * 3}  # what the teacher wants


def images(root: Path, per_class: int, start: int = 0, noise: float = 6.0) -> Path:
    for k, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for j in range(per_class):
            rng = np.random.default_rng([k, start + j])
            pixels = np.clip(COLOURS[k] + rng.normal(0, noise, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{start + j:03d}.png")
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    (folder / "net.py").write_text(TEACHER)
    pack(images(folder / "src" / "train", 8), folder / "train")
    pack(images(folder / "src" / "val", 4, start=100), folder / "val")
    return folder


def config(base: Path, val: str = "", kwargs: dict[str, Any] | None = None, **teacher: Any) -> Config:
    own = {"model": f"{base / 'net.py'}:build", "kwargs": {"colours": COLOURS.tolist(), **(kwargs or {})}, "batch": 16}
    return from_dict(
        {
            "data": {"train": str(base / "train"), "val": val and str(base / val)},
            "teacher": {**own, **RAW, **teacher},
            "recipe": {"size": SIZE},
            "cache": {"path": str(base / "cache"), "views": 1, "workers": 0},
            "train": {"workers": 0},
        }
    )


def check(settings: Config) -> tuple[CleanCheck, Teacher]:
    inventory = open_inventory(Path(settings.data.train))
    teacher = load_teacher(settings.teacher, inventory.classes, torch.device("cpu"), SIZE)
    return clean_check(teacher, ViewMaker(inventory, settings.recipe), settings), teacher


def refusal(settings: Config) -> str:
    with pytest.raises(TeacherError) as e:
        check(settings)
    text = str(e.value)
    assert "\n" not in text and len(text) <= 300, text
    return text


def timm_order() -> list[int]:
    return [NAMES.index(n) for n in ("ant", "bee", "cat", "Ibis", "jay", "kea", "type1", "type2", "type10", "vole")]


def test_timms_order_of_the_folders_is_refused_and_teacher_classes_timm_mends_it(base: Path) -> None:
    wrong = {"order": timm_order()}
    text = refusal(config(base, kwargs=wrong))
    assert "class '" in text and "the teacher says '" in text and "100 %" in text
    assert "set teacher.classes: timm;" in text
    found, _ = check(config(base, kwargs=wrong, classes="timm"))
    assert found.top1 == 1.0 and not found.notes


def test_a_right_order_asked_for_in_another_is_refused_too(base: Path) -> None:
    assert "set teacher.classes: null;" in refusal(config(base, classes="timm"))


@pytest.mark.parametrize("step", [1, -1])
def test_labels_that_are_one_off_are_refused_with_the_shift_that_mends_them(base: Path, step: int) -> None:
    order = np.roll(np.arange(len(NAMES)), step).tolist()
    assert f"set teacher.classes: shift:{step};" in refusal(config(base, kwargs={"order": order}))
    assert check(config(base, kwargs={"order": order}, classes=f"shift:{step}"))[0].top1 == 1.0


def test_a_background_class_that_the_list_forgets_is_a_shift(base: Path) -> None:
    wrong = config(base, kwargs={"background": 1}, classes=list(range(len(NAMES))))
    assert "set teacher.classes: shift:1;" in refusal(wrong)
    assert "shift:1" in refusal(config(base, kwargs={"background": 1}))  # the sizes disagree, before any image is read
    assert check(config(base, kwargs={"background": 1}, classes="shift:1"))[0].top1 == 1.0


def test_two_swapped_classes_are_refused_with_both_names_and_the_list_that_mends_them(base: Path) -> None:
    order = list(range(len(NAMES)))
    order[2], order[5] = order[5], order[2]
    text = refusal(config(base, kwargs={"order": order}))
    for k, other in ((2, 5), (5, 2)):
        assert f"class {NAMES[k]!r}: the teacher says {NAMES[other]!r} in 100 %" in text
    assert f"teacher.classes: {order}" in text
    assert check(config(base, kwargs={"order": order}, classes=order))[0].top1 == 1.0


def test_few_validation_images_are_joined_by_training_images_to_make_sure(base: Path) -> None:
    order = list(range(len(NAMES)))
    order[2], order[5] = order[5], order[2]
    assert "says" in refusal(config(base, val="val", kwargs={"order": order}))
    # four images a class are too few to refuse by: they are noted
    small = config(base, val="val", kwargs={"order": order})
    small = dataclasses.replace(small, data=dataclasses.replace(small.data, train=str(base / "val"), val=""))
    found, _ = check(small)
    assert any("are its outputs in that order" in note for note in found.notes)


def test_min_top1_is_no_way_round_an_order_but_check_note_is(base: Path) -> None:
    wrong = {"order": timm_order()}
    assert "timm" in refusal(config(base, kwargs=wrong, min_top1=0.0))
    found, _ = check(config(base, kwargs=wrong, check="note"))
    assert (
        found.top1 is not None and found.top1 < 0.6 and any("set teacher.classes: timm" in note for note in found.notes)
    )
    shift = config(base, kwargs={"order": np.roll(np.arange(10), 1).tolist()}, check="note")
    assert any("shift:1" in note for note in check(shift)[0].notes)  # near chance, too


def test_a_teacher_that_takes_one_class_for_another_is_noted_and_goes_on(base: Path) -> None:
    colours = COLOURS.tolist()
    colours[4] = [c - 60 for c in colours[3]]  # class 4 is taken for whichever lies nearest
    found, _ = check(config(base, kwargs={"colours": colours}))
    assert found.top1 == 0.9
    assert any(f"the teacher takes {NAMES[4]!r} for" in note for note in found.notes), found.notes


def test_a_teacher_that_knows_nothing_is_refused_as_before(base: Path) -> None:
    text = refusal(config(base, kwargs={"colours": [[30, 30, 30]] * 9 + [[31, 31, 31]]}))
    assert "chance is 10.00 %" in text and "teacher.min_top1" in text


def test_messages_hold_long_names(base: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(TEACHER)
    src = images(tmp_path / "src", 8)
    for name in NAMES:
        (src / name).rename(src / (name + "x" * 200))
    pack(src, tmp_path / "train")
    for order in (timm_order(), np.random.default_rng(0).permutation(10).tolist()):
        assert "the teacher says" in refusal(config(tmp_path, kwargs={"order": order}))


WRONG = {
    "ImageNet's": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "Inception's": ([0.5] * 3, [0.5] * 3),
    "0..255": ([0.0] * 3, [1 / 255] * 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_normalisation_that_is_clearly_better_is_named_with_its_keys(base: Path, name: str) -> None:
    """The teacher wants this one and is given none."""
    mean, std = WRONG[name]
    wrong = config(base, kwargs={"mean": mean, "std": std}, check="note")
    found, _ = check(wrong)
    assert found.top1 is not None and found.top1 < 0.95
    numbers = [f"{v:.4g}" for v in mean], [f"{v:.4g}" for v in std]
    cure = f"set teacher.mean: [{', '.join(numbers[0])}], teacher.std: [{', '.join(numbers[1])}]"
    assert any(name in note and cure in note for note in found.notes), found.notes
    right = config(base, kwargs={"mean": mean, "std": std}, mean=mean, std=std)
    assert check(right)[0].notes == [] and check(right)[0].top1 == 1.0


def test_near_chance_the_normalisation_that_mends_it_is_named(base: Path) -> None:
    mean, std = WRONG["0..255"]
    text = refusal(config(base, kwargs={"mean": mean, "std": std}))
    assert "chance is" in text and "teacher.std: [0.003922, 0.003922, 0.003922]" in text


def test_channels_the_other_way_round_are_told(base: Path) -> None:
    colours = COLOURS[:, ::-1].tolist()
    found, _ = check(config(base, kwargs={"colours": colours}, check="note"))
    assert any("BGR" in note and "x[:, [2, 1, 0]]" in note for note in found.notes), found.notes


def test_the_check_leaves_the_teacher_as_it_is_and_counts_what_it_shows_it(base: Path) -> None:
    settings = config(base, kwargs={"mean": WRONG["Inception's"][0], "std": WRONG["Inception's"][1]}, check="note")
    inventory = open_inventory(Path(settings.data.train))
    teacher = load_teacher(settings.teacher, inventory.classes, torch.device("cpu"), SIZE)
    fingerprint, preprocess, probe = teacher.fingerprint, teacher.preprocess, teacher.probe()
    before = teacher_images()
    assert clean_check(teacher, ViewMaker(inventory, settings.recipe), settings).notes
    assert teacher.fingerprint == fingerprint and teacher.preprocess == preprocess
    assert teacher.probe() == probe
    shown = teacher_images() - before
    assert 80 + 8 * 64 <= shown <= 80 + 15 * 64 + 2 * 80  # all images, each variant on 64, the best two on all


def test_a_good_teacher_is_shown_the_check_images_and_no_more(base: Path) -> None:
    before = teacher_images()
    check(config(base))
    assert teacher_images() - before == 80 + 2 + 0  # and two to find the head


def test_validation_images_are_taken_where_there_are_any_and_all_say_so(base: Path, tmp_path: Path) -> None:
    for val, name, count in (("val", "val", 40), ("", "train", 80)):
        settings = config(base, val=val)
        settings = dataclasses.replace(
            settings, cache=dataclasses.replace(settings.cache, path=str(tmp_path / f"cache-{name}"))
        )
        report = cache_teacher(settings, quiet=True)
        manifest = open_cache(report.cache).manifest
        assert (manifest.clean_data, manifest.clean_images, report.clean_data) == (name, count, name)
        facts = inspect(Path(report.cache))
        assert facts.teacher.clean_data == name
        with (console := Console(width=200, no_color=True)).capture() as shown:
            render(facts, console)
            stage1.render(report, console)
        assert f"top-1 100.0 % on {count} clean images of data.{name}" in shown.get()
        assert f"top-1 on clean images of data.{name} 100.0 %" in shown.get()
        with pytest.raises(ValueError, match="clean_data"):
            Manifest.read({**manifest.sealed, "clean_data": "[bold]"})
        Manifest.read(dataclasses.replace(manifest, clean_data=None).sealed)  # as older caches are


def test_the_checks_notes_stand_in_the_manifest_and_a_resume_does_not_check_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(base, kwargs={"order": timm_order()}, check="note")
    settings = dataclasses.replace(settings, cache=dataclasses.replace(settings.cache, path=str(tmp_path / "cache")))
    report = cache_teacher(settings, quiet=True)
    assert any("teacher.classes: timm" in note for note in report.notes)
    assert open_cache(report.cache).manifest.notes == report.notes[:-1]  # the last is of its threads
    monkeypatch.setattr(stage1, "clean_check", lambda *_: pytest.fail("checked again"))
    again = cache_teacher(settings, quiet=True)
    assert (again.notes, again.clean_top1, again.clean_data) == (report.notes, report.clean_top1, report.clean_data)


def test_validation_images_in_another_order_of_classes_are_compared_by_name(base: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(reversed(NAMES)))
    pack(base / "src" / "val", tmp_path / "val", classes=tmp_path / "classes.txt")
    settings = config(base)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, val=str(tmp_path / "val")))
    found, _ = check(settings)
    assert (found.top1, found.data, found.images) == (1.0, "val", 40)


@pytest.mark.parametrize("fault", ["absent", "other classes", "no shard", "no image"])
def test_validation_images_that_do_not_serve_are_named_and_training_images_taken(
    base: Path, tmp_path: Path, fault: str
) -> None:
    val = tmp_path / "val"
    if fault == "other classes":
        (base / "src" / "val" / "vole").rename(tmp_path / "vole")
        pack(base / "src" / "val", val)
        (tmp_path / "vole").rename(base / "src" / "val" / "vole")
    elif fault == "no image":
        for name in NAMES:
            (tmp_path / "src" / name).mkdir(parents=True)
            (tmp_path / "src" / name / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
        pack(tmp_path / "src", val)
    elif fault == "no shard":
        pack(base / "src" / "val", val)
        next(val.glob("*.tar")).unlink()
    settings = config(base)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, val=str(val)))
    found, _ = check(settings)
    assert (found.top1, found.data, found.images) == (1.0, "train", 80)
    assert len(found.notes) == 1 and "the clean check ran on data.train" in found.notes[0]


def test_no_image_at_all_is_refused(base: Path, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
    pack(tmp_path / "src", tmp_path / "train")
    settings = config(base)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, train=str(tmp_path / "train")))
    with pytest.raises(DataError, match="none of 10 images"):
        check(settings)


def test_training_with_the_teacher_beside_it_is_checked_the_same_way(base: Path, tmp_path: Path) -> None:
    settings = config(base, val="val", kwargs={"order": timm_order()})
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, output=str(tmp_path / "run")))
    with pytest.raises(TeacherError, match=r"teacher\.classes: timm"):
        open_online(settings, torch.device("cpu"), Ranks(), True, Notes(quiet=True))
    teacher = dataclasses.replace(settings.teacher, classes="timm")
    settings, notes = dataclasses.replace(settings, teacher=teacher), Notes(quiet=True)
    open_online(settings, torch.device("cpu"), Ranks(), True, notes)
    assert any("100.0 % on 40 clean images of data.val" in note for note in notes.all)


@pytest.mark.parametrize(
    ("counts", "wanted", "expected"),
    [
        ([10, 10, 10], 6, [2, 2, 2]),
        ([1, 100, 3], 20, [1, 16, 3]),
        ([5, 5, 5, 5], 2, [1, 0, 0, 1]),  # fewer images than classes: classes spread over all
        ([2, 2], 9, [2, 2]),
        ([0, 7, 0, 7], 5, [0, 3, 0, 2]),
    ],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_images_are_spread_over_the_classes_sorted_or_not(
    counts: Sequence[int], wanted: int, expected: Sequence[int], shuffled: bool
) -> None:
    labels = np.arange(len(counts)).repeat(counts)
    if shuffled:
        labels = np.random.default_rng(0).permutation(labels)
    chosen = spread(labels, wanted)
    assert np.bincount(labels[chosen], minlength=len(counts)).tolist() == list(expected)
    assert (np.diff(chosen) > 0).all()


def test_images_of_a_class_are_spread_over_the_data_set() -> None:
    assert spread(np.zeros(100, np.int64), 4).tolist() == [12, 37, 62, 87]


@pytest.mark.parametrize(("per_class", "moved"), [(4, "val"), (20, "val"), (8, "train")])
def test_validation_images_that_are_numbered_otherwise_are_named_and_no_order_is_advised(
    base: Path, tmp_path: Path, per_class: int, moved: str
) -> None:
    """The cure of a wrong order of the teacher would seal a cache whose labels contradict its targets."""
    rotated = [*NAMES[1:], NAMES[0]]
    for split, start in (("train", 0), ("val", 100)):
        made = images(tmp_path / "src" / split, per_class, start)
        if split == moved:
            for name in NAMES:
                (made / name).rename(made / f"was {name}")
            for name, other in zip(NAMES, rotated, strict=True):
                (made / f"was {name}").rename(made / other)
        pack(made, tmp_path / split)
    (tmp_path / "net.py").write_text(TEACHER)
    said = refusal(config(tmp_path, val="val"))
    assert "data.val numbers its classes otherwise than data.train" in said and "teacher.classes" not in said
    if moved == "val":  # as the old advice had it: right for data.val alone
        assert "numbers its classes otherwise" in refusal(config(tmp_path, val="val", classes="shift:-1"))
    found, _ = check(config(tmp_path, val="val", check="note", min_top1=0.0))
    assert any("numbers its classes otherwise" in note for note in found.notes)
