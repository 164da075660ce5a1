"""ImageNet exactly as it is downloaded, and as Kaggle has it, with few classes: the class numbers of val are those of train."""

from __future__ import annotations

import gzip
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from benchmarks.hostile.base import tar as tar_bytes
from cskd.errors import DataError
from cskd.packing.imagenet import mat_synsets, read_kit
from tests.data_sources import folder, opened, tar

# ILSVRC numbers do not follow the sorted names; n00 is no class, it has children
SYNSETS = {1: "n02119789", 2: "n01440764", 3: "n03000684", 4: "n00001740"}
TRUTH = [3, 2, 2, 1]
TRAIN = {f"{wnid}/{wnid}_{i}.JPEG": f"{wnid}{i}".encode() for wnid in list(SYNSETS.values())[:3] for i in range(2)}
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": b"v%d" % i for i in range(1, 5)}
LABELLED = {name[:-5]: (SYNSETS[TRUTH[i]], data) for i, (name, data) in enumerate(VAL.items())}
NAMES = sorted(SYNSETS[i] for i in (1, 2, 3))
KIT = "ILSVRC2012_devkit_t12"


def meta(path: Path, compressed: bool = True) -> bytes:
    """meta.mat as MATLAB saves it: a struct array of N x 1."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((len(SYNSETS), 1), [(name, object) for name in fields])
    for row, (number, wnid) in zip(synsets[:, 0], SYNSETS.items(), strict=True):
        children = 2.0 if number == 4 else 0.0
        values = (float(number), wnid, "tench, Tinca", children, np.arange(int(children)), 1.0)
        for name, value in zip(fields, values, strict=True):
            row[name] = value
    savemat(path, {"other": np.eye(3), "synsets": synsets}, do_compression=compressed)
    return path.read_bytes()


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files of the download, and the same unpacked as people do."""
    root = tmp_path_factory.mktemp("download")
    classes = {
        f"{wnid}.tar": tar_bytes({name[10:]: data for name, data in TRAIN.items() if name.startswith(wnid)})
        for wnid in list(SYNSETS.values())[:3]
    }
    tar(root / "ILSVRC2012_img_train.tar", classes)
    tar(root / "ILSVRC2012_img_val.tar", VAL)
    tar(root / "ILSVRC2012_img_test_v10102019.tar", {"test/ILSVRC2012_test_00000001.JPEG": b"t"})
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    kit = {
        f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt": truth,
        f"{KIT}/data/meta.mat": meta(root / "meta.mat"),
        f"{KIT}/readme.txt": b"",
    }
    (root / "meta.mat").unlink()
    tar(root / f"{KIT}.tar.gz", kit, "w:gz")
    other = folder(root.parent / "unpacked", kit)
    folder(other / "val", VAL)
    folder(other / "class_tars", classes)
    return root


def test_the_tars_are_packed_as_they_are(download: Path, tmp_path: Path) -> None:
    images, source = opened(download / "ILSVRC2012_img_train.tar", tmp_path / "a")
    assert images == {name[:-5]: (name[:9], data) for name, data in TRAIN.items()}
    assert source.classes == NAMES
    images, source = opened(download / "ILSVRC2012_img_val.tar", tmp_path / "b")
    assert images == LABELLED and source.classes == NAMES
    assert source.notes == [f"labels from {KIT}.tar.gz"]
    same, _ = opened(download, tmp_path / "c", split="train")
    assert same == {name[:-5]: (name[:9], data) for name, data in TRAIN.items()}
    same, source = opened(download, tmp_path / "d", split="val")
    assert same == LABELLED and source.classes == NAMES
    with pytest.raises(DataError, match=r"train.*val.*; pick one with --split"):
        opened(download, tmp_path / "e")


def test_class_tars_in_a_folder_and_a_flat_folder_of_val_are_the_same(download: Path, tmp_path: Path) -> None:
    root = download.parent / "unpacked"
    assert opened(root / "class_tars", tmp_path / "a")[0].keys() == {name[:-5] for name in TRAIN}
    images, source = opened(root / "val", tmp_path / "b")
    assert images == LABELLED and source.classes == NAMES and source.notes == [f"labels from {KIT}"]
    for given in (KIT, f"{KIT}/data", f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt"):
        assert opened(root / "val", tmp_path / "c", labels=root / given)[0] == LABELLED


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = "ILSVRC/Data/CLS-LOC"
    solution = "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{i:08d},{SYNSETS[n]} 85 1 499 272 {SYNSETS[n]} 1 2 3 4\n" for i, n in enumerate(TRUTH, 1)
    )
    mapping = "".join(f"{wnid} tench, Tinca tinca\n" for wnid in NAMES)
    return folder(
        tmp_path_factory.mktemp("kaggle"),
        {
            **{f"{top}/train/{name}": data for name, data in TRAIN.items()},
            **{f"{top}/val/{name}": data for name, data in VAL.items()},
            f"{top}/test/ILSVRC2012_test_00000001.JPEG": b"t",
            "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": b"<annotation/>",
            "LOC_val_solution.csv": solution.encode(),
            "LOC_synset_mapping.txt": mapping.encode(),
        },
    )


def test_kaggles_layout_is_read_by_split(kaggle: Path, tmp_path: Path) -> None:
    images, source = opened(kaggle, tmp_path / "a", split="train")
    assert images == {name[:-5]: (name[:9], data) for name, data in TRAIN.items()}
    images, source = opened(kaggle, tmp_path / "b", split="val")
    assert images == LABELLED and source.classes == NAMES
    assert opened(kaggle / "ILSVRC/Data/CLS-LOC/val", tmp_path / "c")[0] == LABELLED
    with pytest.raises(DataError, match=r"ImageNet's test images .* whose labels are not public"):
        opened(kaggle, tmp_path / "d", split="test")


def test_a_class_that_val_lacks_moves_no_other(kaggle: Path, download: Path, tmp_path: Path) -> None:
    """Of the three classes only n02119789, label 1, has images here."""
    part = folder(tmp_path / "val", {"ILSVRC2012_val_00000004.JPEG": b"v4"})
    for labels in (kaggle / "LOC_val_solution.csv", download / f"{KIT}.tar.gz"):
        _, source = opened(part, tmp_path / "a", labels=labels)
        assert (source.classes, source.label(0)) == (NAMES, 1)
    only = folder(tmp_path / "only", {"n03000684/x.JPEG": b"", "n02119789/y.JPEG": b""})
    _, source = opened(only, tmp_path / "b", classes=kaggle / "LOC_synset_mapping.txt")
    assert source.classes == NAMES and source.folder_labels is not None and sorted(source.folder_labels) == [1, 2]


def test_meta_mat_is_read_as_scipy_writes_it_and_nothing_else(tmp_path: Path) -> None:
    expected = {number: wnid for number, wnid in SYNSETS.items() if number != 4}
    for compressed in (False, True):
        data = meta(tmp_path / "m.mat", compressed)
        assert mat_synsets(data) == expected
        for end in range(0, len(data) - 8, 7):
            with pytest.raises((ValueError, struct.error)):
                mat_synsets(data[:end])
    savemat(tmp_path / "n.mat", {"x": np.eye(2)})
    with pytest.raises(ValueError, match="no struct array with ILSVRC2012_ID"):
        mat_synsets((tmp_path / "n.mat").read_bytes())
    packed = zlib.compress(bytes(40_000_000))
    with pytest.raises(ValueError, match="cut off, or over 16777216 bytes"):
        mat_synsets(data[:128] + struct.pack("<II", 15, len(packed)) + packed)


def test_a_kit_that_is_none_is_refused_by_name(download: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with tarfile.open(download / f"{KIT}.tar.gz") as kit:
        kit.extractall(tmp_path, filter="data")
    data = tmp_path / KIT / "data"
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    for path, file, content, message in (
        (tmp_path / "empty", None, b"", "is no development kit of ImageNet: expected ILSVRC2012_validation_ground"),
        (data, truth, b"1\n9\n", "number 9 in line 2"),
        (data, truth, b"1\nx\n", "is damaged: invalid literal"),
        (data, data / "meta.mat", b"MATLAB", "is damaged: meta.mat is no MATLAB file"),
    ):
        if file:
            file.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            read_kit(path, tmp_path / "w")
        assert len(str(caught.value).replace(str(tmp_path), "")) <= 300
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bytes(300_000_000), 9))
    with pytest.raises(DataError, match="expected at most 200 from one"):
        read_kit(tmp_path / "x.tar.gz", tmp_path / "w2")
