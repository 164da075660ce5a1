"""`cskd pack` and `cskd index` take one split of one data set: what holds several, or could be read in two ways, is refused
by name, with what picks one; `--split` gives the data set that its folder alone gives."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cskd.dataset.inventory import Inventory
from cskd.errors import DataError
from cskd.packing.index import index
from cskd.packing.layout import Tree, check_tree
from cskd.packing.pack import pack
from cskd.packing.split_words import chosen, roots_of, split_names, split_of, words_in
from tests.data_sources import contents, folder, names, shard, tar


def files(*paths: str) -> dict[str, bytes]:
    return {path: path.encode() for path in paths}


def kaggle(prefix: str = "") -> dict[str, bytes]:
    train = [f"{prefix}train/n0{c}/n0{c}_{i}.JPEG" for c in range(3) for i in range(2)]
    flat = [f"{prefix}{split}/ILSVRC2012_{split}_{i}.JPEG" for split in ("val", "test") for i in range(3)]
    return files(*train, *flat)


def classes(n: int, prefix: str = "") -> dict[str, bytes]:
    return files(*(f"{prefix}c{i:03d}/{i}_{j}.jpg" for i in range(n) for j in range(2)))


# What is in the source; what is said. As a folder and as a tar.
REFUSED: dict[str, tuple[dict[str, bytes], str | dict[str, str]]] = {  # files; the message, or one per form
    "Kaggle's CLS-LOC": (kaggle(), r"src holds the splits train, val, test; pick one with --split train"),
    "Kaggle's ILSVRC": (
        {**kaggle("Data/CLS-LOC/"), "Annotations/CLS-LOC/train/n00/n00_0.xml": b"", "ImageSets/CLS-LOC/val.txt": b""},
        r"src holds the splits train, val, test in Data/CLS-LOC; pick one with --split train",
    ),
    "the same classes in each": (
        files("train/a/0.jpg", "train/b/1.jpg", "val/a/2.jpg", "val/b/3.jpg"),
        "src holds the splits train, val; pick one with --split train",
    ),
    "other classes in each": (
        files("Training/a/0.jpg", "Training/b/1.jpg", "Validation/c/2.jpg"),
        "src holds the splits Training, Validation; pick one with --split Training",
    ),
    "splits with words around them": (
        files("seg_train/seg_train/a/0.jpg", "seg_train/seg_train/b/1.jpg", "seg_test/seg_test/a/2.jpg"),
        "src holds the splits seg_train, seg_test; pick one with --split seg_train",
    ),
    "flat splits": (
        files("train/0.jpg", "test/1.jpg"),
        "src holds the splits train, test; pick one with --split train",
    ),
    "a split next to the classes": (
        files("val/a/0.jpg", "val/b/1.jpg", "a/2.jpg", "b/3.jpg"),
        "src holds the split val, next to a, b; pick one with --split val",
    ),
    "a flat split among the classes": (
        files("ant/0.jpg", "bee/1.jpg", "test/2.jpg", "test/3.jpg"),
        "test in .*src has the name of a split and lies among the class folders; move it out, or, .* with --classes",
    ),
    "a large flat split among many classes": (
        {**classes(30), **files(*(f"val/{i}.jpg" for i in range(60)))},
        "val in .*src has the name of a split and lies among the class folders",
    ),
    "splits inside classes": (
        files("ant/train/0.jpg", "ant/test/1.jpg", "bee/train/2.jpg"),
        "src holds the splits train, test inside its folders .*expected SPLIT/CLASS/NAME",
    ),
    "splits inside data sets": (
        files("nut/train/good/0.jpg", "nut/test/bad/1.jpg", "bolt/train/good/2.jpg", "bolt/test/bad/3.jpg"),
        "src holds the splits train, test inside its folders",
    ),
    "different depths": (
        files("a/0.jpg", "b/sub/1.jpg"),
        "images of .*src lie at different depths, a/0.jpg and b/sub/1.jpg; .*--split b, or .*--classes",
    ),
    "an image on top": (
        files("0.jpg", "a/1.jpg", "b/2.jpg"),
        r"0.jpg in .*src is in no class folder \(1 such image\(s\), next to the folders\); expected CLASS/0.jpg",
    ),
    "images in a class and below it": (files("a/0.jpg", "a/sub/1.jpg", "b/2.jpg"), "a holds images and so does a/sub"),
    "a folder in every class": (
        files("a/images/0.jpg", "b/images/1.jpg"),
        r"one folder too deep, in 'images' \(a/images, b/images\); expected CLASS/NAME; move them up",
    ),
    "a class in two places": (
        files("photo/a/0.jpg", "sketch/a/1.jpg", "sketch/b/2.jpg"),
        "class 'a' is in two places of .*src, photo/a and sketch/a; .*--split photo",
    ),
    "one class": (files("a/0.jpg", "a/1.jpg"), r"src holds one class, 'a' with 2 image\(s\), expected two or more"),
    "one flat split": (
        files("val/0.jpg", "val/1.jpg"),
        r"src holds 2 image\(s\) in no class folder, only in val, so that their labels are unknown",
    ),
    "an empty class": (
        {**files("a/0.jpg", "b/1.jpg"), "c/": b""},
        r"1 class folder\(s\) of .*src hold no images that can be read: c; fill or remove them, or .*--classes",
    ),
    "a class of images that are not read": (
        files("a/0.jpg", "b/1.jpg", "c/2.avif", "c/2.txt"),
        r"hold no images that can be read: c;",
    ),
    "parquet": (
        files("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        {"folder": r"00000-of-00002\.parquet can't be read as a table", "tar": "src holds 2 .*parquet"},
    ),
    "numpy": (files("x_train.npy", "README.md"), "src holds 1 .* x_train.npy: NumPy arrays, which are not read"),
    "zips": (
        files("train.zip"),
        {"folder": r"train\.zip has no end record of a zip", "tar": "a zip in a tar; unpack the outer one"},
    ),
    "images that are not read": (files("a/0.heic", "b/1.heic"), "src holds 2 .* a/0.heic, a kind of image that is not"),
}


def source(root: Path, what: dict[str, bytes], form: str) -> Path:
    if form == "tar":
        with tarfile.open(root / "src", "w") as out:
            for path in sorted({path.rpartition("/")[0] for path in what} - {""}):
                info = tarfile.TarInfo(path)
                info.type = tarfile.DIRTYPE
                out.addfile(info)
        return tar(root / "src", {path: data for path, data in what.items() if not path.endswith("/")}, "a")
    for path in what:
        if path.endswith("/"):
            (root / "src" / path).mkdir(parents=True)
    return folder(root / "src", {path: data for path, data in what.items() if not path.endswith("/")})


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_one_split_of_class_folders_is_refused_by_name(tmp_path: Path, case: str, form: str) -> None:
    what, message = REFUSED[case]
    expected = message if isinstance(message, str) else message[form]
    with pytest.raises(DataError, match=expected) as caught:
        pack(source(tmp_path, what, form), tmp_path / "out")
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300 and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_cure_is_the_option_and_the_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "ILSVRC", kaggle("Data/CLS-LOC/"))
    for path, give in (
        ("", "ILSVRC/Data/CLS-LOC/train"),
        ("Data", "Data/CLS-LOC/train"),
        ("Data/CLS-LOC", "CLS-LOC/train"),
    ):
        with pytest.raises(DataError, match=rf"pick one with --split train \(or give {give}\)$"):
            pack(root / path, tmp_path / "out")


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_split_that_is_picked_is_the_data_set_of_its_folder(tmp_path: Path, form: str) -> None:
    what = {
        **kaggle("Data/CLS-LOC/"),
        "Annotations/CLS-LOC/train/n00/n00_0.xml": b"",
        "classes.txt": b"n02\nn01\nn00\n",
    }
    src = source(tmp_path, what, form)
    (tmp_path / "list").write_bytes(what["classes.txt"])
    alone = pack(
        folder(tmp_path / "d", what) / "Data" / "CLS-LOC" / "train", tmp_path / "alone", classes=tmp_path / "list"
    )
    for asked in ("train", "training", "Data/CLS-LOC/train"):
        picked = pack(src, tmp_path / asked, split=asked)
        assert picked.id == alone.id and picked.classes == ["n02", "n01", "n00"]
        assert "taken from Data/CLS-LOC/train in src, as asked with --split" in picked.notes
        assert picked.made["split"] == asked
    with pytest.raises(
        DataError, match=r"3 image.* in no class folder, only in Data/CLS-LOC/val, so that their labels are"
    ):
        pack(src, tmp_path / "val", split="val")
    with pytest.raises(DataError, match="holds no folder of images for '--split dev'; it holds test, train, val"):
        pack(src, tmp_path / "dev", split="dev")


def test_a_split_right_below_the_source_is_the_only_folder_that_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "src", {**files("0.jpg"), **kaggle()})
    (root / "val" / "broken.jpg").symlink_to(root / "gone")
    assert pack(root, tmp_path / "a", split="train").id == pack(root / "train", tmp_path / "b").id


def test_a_split_in_two_places_is_refused_naming_both(tmp_path: Path) -> None:
    what = files("DET/train/a/0.jpg", "DET/train/b/1.jpg", "LOC/train/a/2.jpg", "LOC/train/b/3.jpg")
    root = folder(tmp_path / "src", what)
    with pytest.raises(
        DataError, match=r"2 folders that '--split train' may mean: DET/train, LOC/train; give the path"
    ):
        pack(root, tmp_path / "out", split="train")
    assert set(contents(pack(root, tmp_path / "out", split="LOC/train"))) == {"a/2", "b/3"}


def test_what_is_one_data_set_is_taken_and_said(tmp_path: Path) -> None:
    def notes(what: dict[str, bytes], **options: Any) -> list[str]:
        at = tmp_path / str(len(list(tmp_path.iterdir())))
        return pack(folder(at / "src", what), at / "out", **options).notes

    assert notes(classes(3, "train/")) == ["taken from train in src: no other folder of it holds images"]
    assert notes(files("animal/cat/0.jpg", "plant/oak/1.jpg")) == [
        "a class is the innermost folder: 'cat' in animal/cat, not 'animal'"
    ]
    # CIFAR-100 has a class 'train'; somebody's 100 classes may have a 'test' that is like the others
    said = "is taken for a class like the folders next to it, not for a split"
    assert notes({**classes(3), **files("train/0.jpg", "train/1.jpg")}) == [f"'train' {said}"]
    assert notes({**classes(30), **files("test/0.jpg", "test/1.jpg")}) == [f"'test' {said}"]
    assert notes(files("bullet train/0.jpg", "test tube/1.jpg", "cat/2.jpg")) == []
    assert notes({**classes(2), "masks/0.png.txt": b"", "masks/1.npy": b""})[0].startswith(
        "1 folder(s) without images passed over: masks ("
    )
    listed = tmp_path / "list"
    listed.write_text("test\nval\nempty")
    assert notes(files("test/0.jpg", "val/1.jpg"), classes=listed) == ["2 of 3 classes have images; none: empty"]
    listed.write_text("a\nb")
    assert notes(files("a/0.jpg"), classes=listed) == ["1 of 2 classes have images; none: b"]


def shards(root: Path, names: str) -> Path:
    for number, name in enumerate(names.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tar(root / name, shard(f"{number}a", f"{number}b"))
    return root


SHARDS: dict[str, tuple[str, str]] = {
    "HF": (
        "train-00000.tar train-00001.tar validation-00000.tar",
        r"src.* holds shards of the splits train \(2\), validation \(1\); pick one with --split train, or give '.*/train\*.tar'",
    ),
    "words before them": (
        "imagenet1k-train-0000.tar imagenet1k-validation-00.tar",
        r"splits train \(1\), validation \(1\); .*'.*/imagenet1k-train\*.tar'",
    ),
    "a split and others": (
        "train-0.tar rest-0.tar",
        r"split train \(1\) and others \(rest-0.tar\); pick one with --split",
    ),
    "folders": (
        "train/0.tar train/1.tar val/0.tar",
        r"splits train \(2\), val \(1\); .*--split train, or give '.*train/\*",
    ),
    "folders in folders": ("data/train/0.tar data/val/0.tar", r"splits train \(1\), val \(1\)"),
    "on top and in folders": ("0.tar extra/1.tar", "src holds shards and in folders of it: extra; give .*'src/extra/"),
    "only in folders": ("00/0.tar 01/1.tar", "src holds shards only in folders of it: 00, 01; give .*'src/00/"),
}


@pytest.mark.parametrize("make", [pack, index])
@pytest.mark.parametrize("case", list(SHARDS))
def test_shards_of_several_splits_are_refused_with_what_picks_one(
    tmp_path: Path, case: str, make: Callable[..., Inventory]
) -> None:
    what, message = SHARDS[case]
    root = shards(tmp_path / "src", what)
    before = names(tmp_path)
    with pytest.raises(DataError, match=message):
        make(root, tmp_path / "out") if make is pack else make(root)
    if "/" not in what:
        with pytest.raises(DataError, match=message):
            make(root / "*.tar", tmp_path / "out") if make is pack else make(root / "*.tar")
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "what", ["train-0.tar validation-0.tar", "train/0.tar validation/0.tar", "d/train/0.tar d/val/0.tar"]
)
def test_a_split_of_shards_is_picked_by_name_folder_or_alias(tmp_path: Path, what: str) -> None:
    root = shards(tmp_path / "src", what)
    for asked, keys in (("train", {"0a", "0b"}), ("val", {"1a", "1b"})):
        assert set(contents(pack(root, tmp_path / asked, split=asked))) == keys
    indexed = index(root, split="val")
    assert set(contents(indexed)) == {"1a", "1b"} and indexed.made["split"] == "val"
    with pytest.raises(DataError, match=r"holds no shards of a split 'test'; its splits are train, val"):
        index(root, split="test")


def test_a_glob_or_braces_that_name_each_are_taken_as_they_are(tmp_path: Path) -> None:
    root = shards(tmp_path / "src", "train-0.tar train-1.tar val-0.tar")
    assert set(contents(pack(root / "train-*.tar", tmp_path / "a"))) == {"0a", "0b", "1a", "1b"}
    assert pack(root / "{train,val}-0.tar", tmp_path / "b").n == 4


def test_keys_of_several_splits_in_one_shard_are_refused_or_picked(tmp_path: Path) -> None:
    tar(tmp_path / "all.tar", shard("train/a/0", "train/b/1", "val/a/2", "val/b/3"))
    for make in (index, lambda src, **options: pack(src, tmp_path / "out", **options)):
        with pytest.raises(
            DataError, match=r"keys in .*all.tar are of the splits train, val; pick one with --split train"
        ):
            make(tmp_path / "all.tar")
        with pytest.raises(DataError, match=r"neither names nor keys of .*all.tar speak of a split 'test'"):
            make(tmp_path / "all.tar", split="test")
        assert set(contents(make(tmp_path / "all.tar", split="validation"))) == {"val/a/2", "val/b/3"}


def test_shards_that_are_missing_or_empty_are_said(tmp_path: Path) -> None:
    root = shards(tmp_path / "src", "x-0.tar x-1.tar x-4.tar")
    tar(root / "x-2.tar", {})
    said = ["1 of the shards x-* are not there: number 3", "1 shards without samples passed over: x-2.tar"]
    assert set(said) <= set(index(root).notes) and set(said) <= set(pack(root, tmp_path / "out").notes)
    of = shards(tmp_path / "of", "a-00000-of-00003.tar a-00001-of-00003.tar")
    assert "1 of the shards a-* are not there: number 2" in index(of).notes


def test_labels_that_can_not_be_all_there_is_are_refused_or_said(tmp_path: Path) -> None:
    one = tar(tmp_path / "one.tar", {"0.jpg": b"", "0.cls": b"3"})
    from_one = tar(tmp_path / "from_one.tar", {f"{i}.{x}": b"%d" % i for i in (1, 2) for x in ("jpg", "cls")})
    for n, make in enumerate((index, lambda src: pack(src, tmp_path / "out"))):
        with pytest.raises(
            DataError, match=r"all 1 sample\(s\) have the label 3, expected two classes or more; .*--classes"
        ):
            make(one)
        notes = make(from_one).notes
        assert notes[0].startswith("no sample has the label 0: labels count from 0, are these 1 to"), n
        assert "2 of 3 classes have images; none: 0" in notes


def test_words_of_splits_are_told_from_words_of_classes() -> None:
    assert [split_of(name) for name in ("train", "Validation", "val2017", "test_images", "TrainSet", "test_A")] == [
        *("train", "val", "val", "test", "train", "test")
    ]
    assert [split_of(name) for name in ("bullet train", "ILSVRC2012_img_train", "trainer", "cat", "")] == [None] * 5
    assert words_in("imagenet1k-validation-00") == ["val"] and words_in("restrain") == []
    assert split_names({"seg_train", "seg_test", "x"}) == {"seg_train", "seg_test"}
    assert split_names({"bullet train", "steam train", "train"}) == {"train"}
    assert chosen({"validation", "train"}, "val") == {"validation"}
    assert chosen({"val", "validation"}, "val") == {"val"} and chosen({"cats"}, "cat") == set()
    assert roots_of(["train/train", "test/train", "train/cat"], "train") == ["train"]


def test_a_thousand_classes_with_any_names_are_one_data_set() -> None:
    names = [f"n{i:08d}" for i in range(996)] + ["bullet train", "test tube", "dev board", "eval"]
    tree = Tree("src", dict.fromkeys(names, 1300), example=lambda folder: f"{folder}/0.jpg")
    assert check_tree(tree) == ["'eval' is taken for a class like the folders next to it, not for a split"]
    assert not re.search("split", " ".join(check_tree(Tree("src", dict.fromkeys(names[:-1], 9), example=str))))
