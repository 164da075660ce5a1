"""Inputs that are read wrongly by guessing: numbers that are no class numbers, columns that look alike, masks next to images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cskd.dataset.inventory import Inventory, open_inventory
from cskd.errors import DataError
from cskd.packing.index import index
from cskd.packing.pack import pack
from tests.data_sources import folder, tar

IMAGES = {f"x/{i}.png": b"%d" % i for i in range(4)}


def packed(tmp_path: Path, labels: list[str], classes: Path | None = None) -> Inventory:
    """Four images of one folder, with these labels in a CSV, and what follows the fourth in rows of images that are not there."""
    paths = [*IMAGES, *(f"z/{i}.png" for i in range(len(labels)))]
    src = folder(tmp_path / "src", IMAGES)
    rows = [f"{path},{label}\n" for path, label in zip(paths, labels, strict=False)]
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(rows))
    pack(src, tmp_path / "out", labels=tmp_path / "l.csv", classes=classes)
    return open_inventory(tmp_path / "out")


@pytest.mark.parametrize("odd", ["-1", "1.0", "nan", "3000000000", "1e3", "inf"])
def test_a_number_that_is_no_class_number_makes_no_names_of_the_others(tmp_path: Path, odd: str) -> None:
    with pytest.raises(DataError, match=rf"l\.csv has the label {odd}, expected whole numbers"):
        packed(tmp_path, ["0", "1", "2", odd])


def test_a_row_of_an_image_that_is_not_there_changes_no_label(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("zebra\nape\n")
    made = packed(tmp_path, ["1", "0", "1", "0", "unknown"], classes=tmp_path / "classes.txt")
    assert list(made.classes) == ["zebra", "ape"] and sorted(made.label.tolist()) == [0, 0, 1, 1]
    assert [int(made.label[i]) for i in sorted(range(4), key=made.key)] == [1, 0, 1, 0]


def test_names_that_are_digits_stay_names(tmp_path: Path) -> None:
    assert list(packed(tmp_path, ["007", "008", "007", "008"]).classes) == ["007", "008"]


@pytest.mark.parametrize("label", ["a\x7fb", "a\x1bb"])
def test_a_label_that_is_no_line_of_text_is_refused(tmp_path: Path, label: str) -> None:
    with pytest.raises(DataError, match="expected a line of text"):
        packed(tmp_path, ["cat", "dog", "cat", label])


def test_the_column_of_the_very_name_is_taken(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", IMAGES)
    rows = [f"{path},{i % 2},x{i}" for i, path in enumerate(sorted(IMAGES))]
    (tmp_path / "l.csv").write_text("\n".join(["path,label,label_2", *rows]))
    pack(src, tmp_path / "out", labels=tmp_path / "l.csv")
    assert len(open_inventory(tmp_path / "out").classes) == 2


def test_a_first_row_with_a_digit_is_a_row(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", {f"img_{i:04d}.png": data for i, data in enumerate(IMAGES.values())})
    rows = [f"img_{i:04d},{'dog' if i % 2 else 'cat'}" for i in range(len(IMAGES))]
    (tmp_path / "l.csv").write_text("\n".join(rows))
    pack(src, tmp_path / "out", labels=tmp_path / "l.csv")
    assert list(open_inventory(tmp_path / "out").classes) == ["cat", "dog"]


def test_a_mask_with_facts_of_its_own_is_no_sample(tmp_path: Path) -> None:
    image = next(iter(IMAGES.values()))
    files: dict[str, bytes] = {}
    for i in range(3):
        own = {
            f"{i}.jpg": image,
            f"{i}.cls": b"%d" % (i % 2),
            f"{i}.mask.png": image,
            f"{i}.mask.json": b'{"label": 5}',
        }
        files |= own
    tar(tmp_path / "data" / "t-000.tar", files)
    made = index(tmp_path / "data")
    assert (len(open_inventory(tmp_path / "data")), len(open_inventory(tmp_path / "data").classes)) == (3, 2), made


def test_a_copy_of_other_compressed_shards_is_not_taken_for_these(tmp_path: Path) -> None:
    image = next(iter(IMAGES.values()))
    for name in "ab":
        files = {f"{name}{i}.{kind}": data for i in range(2) for kind, data in (("png", image), ("cls", b"%d" % i))}
        tar(tmp_path / name / "t-0.tar.gz", files, "w:gz")
    shutil.copystat(tmp_path / "a" / "t-0.tar.gz", tmp_path / "b" / "t-0.tar.gz")
    for name in "ab":
        index(tmp_path / name, out=tmp_path / "out" / name)
    shutil.rmtree(tmp_path / "out" / "b" / "inventory", ignore_errors=True)
    shutil.copytree(tmp_path / "out" / "a" / "unpacked", tmp_path / "out" / "b" / "unpacked", dirs_exist_ok=True)
    index(tmp_path / "b", out=tmp_path / "out" / "b")
    made = open_inventory(tmp_path / "out" / "b")
    assert sorted(made.key(i) for i in range(2)) == ["b0", "b1"]


def test_imagenet_s_validation_images_alone_are_told_of_the_devkit(tmp_path: Path) -> None:
    image = next(iter(IMAGES.values()))
    tar(tmp_path / "val.tar", {f"ILSVRC2012_val_{i:08d}.JPEG": image for i in range(1, 4)})
    with pytest.raises(DataError, match=r"ILSVRC2012_devkit_t12\.tar\.gz next to it"):
        pack(tmp_path / "val.tar", tmp_path / "out")


def test_an_empty_first_shard_is_passed_over(tmp_path: Path) -> None:
    image = next(iter(IMAGES.values()))
    tar(tmp_path / "data" / "t-0.tar", {})
    tar(
        tmp_path / "data" / "t-1.tar",
        {f"{i}.{k}": d for i in range(4) for k, d in (("png", image), ("cls", b"%d" % (i % 2)))},
    )
    pack(tmp_path / "data", tmp_path / "out")
    assert len(open_inventory(tmp_path / "out")) == 4
