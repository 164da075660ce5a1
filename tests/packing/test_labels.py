"""Promises about `--labels`: any usual file of paths and labels, for a folder, tar or zip alike, and no image without its label."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cskd.cli import app
from cskd.dataset.inventory import open_inventory
from cskd.errors import DataError
from cskd.packing.labels import parse_labels
from tests.data_sources import folder, opened, tar, zipped

IMAGES = {"train/00/0.jpg": b"0", "train/00/1.png": b"1", "train/01/2.JPEG": b"2", "train/01/3.jpg": b"3"}
LABELS = ["cat", "ant", "cat", "bee"]
EXPECTED = {
    path[6:].rpartition(".")[0]: (label, data) for (path, data), label in zip(IMAGES.items(), LABELS, strict=True)
}


def lines(form: str, paths: list[str] | None = None, labels: list[str] | None = None) -> str:
    """One line per image."""
    pairs = zip(paths or list(IMAGES), labels or LABELS, strict=True)
    return "".join(form.replace("PATH", path).replace("LABEL", label) + "\n" for path, label in pairs)


FORMS = {
    "path,label": ("l.csv", "path,label\n" + lines("PATH,LABEL")),
    "no header": ("l.csv", lines("PATH,LABEL")),
    "file_name": ("l.csv", "file_name,label\n" + lines("PATH,LABEL")),
    "pandas' index": ("l.csv", ",Filename,x,Class Name\n" + lines("7,PATH,0.5,LABEL")),
    "label first": ("l.csv", "class,image\n" + lines("LABEL,PATH")),
    "an unknown label column": ("l.csv", "image_id,style\n" + lines("PATH,LABEL")),
    "a header of unknown names": ("l.csv", "x,y\n" + lines("PATH,LABEL")),
    "BOM and CRLF": ("l.csv", "\ufeff" + ("path,label\n" + lines("PATH,LABEL")).replace("\n", "\r\n")),
    "quotes": ("l.csv", lines('"PATH","LABEL"')),
    "semicolons": ("l.csv", "path;label\n" + lines("PATH;LABEL")),
    "tabs": ("l.tsv", "image\ttarget\n" + lines("PATH\tLABEL")),
    "Tiny ImageNet": ("val_annotations.txt", lines("PATH\tLABEL\t0\t32\t44\t62")),
    "Caffe": ("train.txt", lines("PATH LABEL")),
    "JSONL": ("l.jsonl", lines('{"file_name": "PATH", "label": "LABEL"}')),
    "JSON, a dict": ("l.json", "{" + lines('"PATH": "LABEL",').strip().strip(",") + "}"),
    "JSON, pairs": ("l.json", '{"labels": [' + lines('["PATH", "LABEL"],').strip().strip(",") + "]}"),
    "JSON, objects": ("l.json", "[" + lines('{"id": "PATH", "class": "LABEL"},').strip().strip(",") + "]"),
    "./ and backslashes": ("l.csv", lines("./PATH,LABEL").replace("00/0", "00\\0")),
    "without extensions": ("l.csv", lines("PATH,LABEL", [p.rpartition(".")[0] for p in IMAGES])),
    "names alone": ("l.csv", lines("PATH,LABEL", [p.rpartition("/")[2] for p in IMAGES])),
    "from the folder above": ("l.csv", lines("data/PATH,LABEL")),
}


@pytest.mark.parametrize("case", list(FORMS))
def test_every_usual_form_gives_the_same_data_set(tmp_path: Path, case: str) -> None:
    name, text = FORMS[case]
    (tmp_path / name).write_text(text, newline="")
    images, source = opened(folder(tmp_path / "data", IMAGES), tmp_path / "w", labels=tmp_path / name)
    assert images == EXPECTED and source.classes == ["ant", "bee", "cat"]
    assert f"labels from {name}" in source.notes and not any("no image that is there" in note for note in source.notes)


@pytest.mark.parametrize("form", ["tar", "tar.gz", "zip", "inside", "absolute"])
def test_it_goes_with_every_kind_of_source(tmp_path: Path, form: str) -> None:
    (tmp_path / "l.csv").write_text(lines("PATH,LABEL"))
    labels, src = tmp_path / "l.csv", tmp_path / f"x.{form}"
    if form == "zip":
        zipped(src, IMAGES)
    elif form.startswith("tar"):
        tar(src, {f"./{name}": data for name, data in IMAGES.items()}, "w:gz" if form == "tar.gz" else "w")
    else:
        folder(src, IMAGES)
        labels = src / "meta" / "l.csv"
        labels.parent.mkdir()
        paths = [f"../{p}" if form == "inside" else str((src / p).resolve()) for p in IMAGES]
        labels.write_text(lines("PATH,LABEL", paths))
    assert opened(src, tmp_path / "w", labels=labels)[0] == EXPECTED


def test_numbers_stay_what_they_are_and_names_may_be_given(tmp_path: Path) -> None:
    src = folder(tmp_path / "data", IMAGES)
    (tmp_path / "l.csv").write_text(lines("PATH,LABEL", labels=["3", "0", "3", "1"]))
    images, source = opened(src, tmp_path / "w", labels=tmp_path / "l.csv")
    assert source.classes == ["0", "1", "2", "3"] and images["00/0"] == ("3", b"0")
    (tmp_path / "c.txt").write_text("w\nx\ny\nz\n")
    images, source = opened(src, tmp_path / "w", labels=tmp_path / "l.csv", classes=tmp_path / "c.txt")
    assert source.classes == ["w", "x", "y", "z"] and images["00/0"] == ("z", b"0")
    (tmp_path / "l.csv").write_text(lines("PATH,LABEL", labels=["007", "003", "007", "010"]))
    assert opened(src, tmp_path / "w", labels=tmp_path / "l.csv")[1].classes == ["003", "007", "010"]


def test_a_file_of_all_splits_numbers_the_classes_of_each_alike(tmp_path: Path) -> None:
    src = folder(tmp_path / "data", {**IMAGES, "val/9.jpg": b"9", "val/8.jpg": b"8"})
    (tmp_path / "l.csv").write_text(lines("PATH,LABEL") + "val/9.jpg,cat\nval/8.jpg,bee\n")
    for split, count in (("train", 4), ("val", 2)):
        images, source = opened(src, tmp_path / "w", labels=tmp_path / "l.csv", split=split)
        assert len(images) == count and source.classes == ["ant", "bee", "cat"]
    assert "4 rows of l.csv name no image that is there: train/00/0.jpg" in source.notes


def test_an_imagefolder_has_its_labels_in_metadata(tmp_path: Path) -> None:
    """As Hugging Face's imagefolder has it: paths are relative to the file."""
    for name, text in (
        ("metadata.jsonl", lines('{"file_name": "PATH", "label": "LABEL"}')),
        ("metadata.csv", "file_name,label\n" + lines("PATH,LABEL")),
    ):
        src = folder(tmp_path / name / "data", {**IMAGES, name: text.encode()})
        images, source = opened(src, tmp_path / "w")
        assert images == EXPECTED and f"labels from {name}" in source.notes
    captions = folder(tmp_path / "c", {**IMAGES, "metadata.csv": b"file_name,text\n"})
    assert opened(captions, tmp_path / "w")[1].classes == ["00", "01"]


REFUSED = {
    "an image without a row": (
        "l.csv",
        lines("PATH,LABEL").partition("\n")[2],
        "1 of 4 images of .*data are not in l.csv, train/00/0.jpg for one; add their labels",
    ),
    "no image in it": (
        "l.csv",
        "x/a.jpg,1\nx/b.jpg,2\n",
        "no image of .* is in l.csv: images are like train/00/0.jpg, its",
    ),
    "two labels": (
        "l.csv",
        lines("PATH,LABEL") + "train/00/0.jpg,ant\n",
        "gives 'train/00/0.jpg' two labels, 'cat' and",
    ),
    "an empty label": ("l.csv", "path,label\n" + lines("PATH,"), "has 'train/00/0.jpg' without a label .after 0 rows."),
    "an empty path": ("l.csv", "path,label\n,a\n", "has a row without a path"),
    "one row, two images": ("l.csv", "jpg.jpg,1\n", "no image of"),
    "one column": ("class_map.txt", "ant\nbee\ncat\n", "has one column .'ant'.* list of class names is for --classes"),
    "columns of unknown names": (
        "l.csv",
        "a,b,c\n1,2,3\n",
        "has the columns a, b, c; expected 'path' and 'label' among",
    ),
    "a short row": ("l.csv", "path,x,label\ntrain/00/0.jpg,1\n", "row 1 has 2 columns"),
    "nothing": ("l.csv", "", "has one column|has no rows"),
    "a header alone": ("l.csv", "path,label\n", "l.csv has no rows; expected the columns"),
    "no text": ("l.csv", "\udcff", "is not UTF-8 text"),
    "no JSON": ("l.jsonl", "{", "is no JSON"),
    "JSON of lists": ("l.jsonl", '{"path": "a.jpg", "label": [1, 2]}', "row 1 is .* expected a path and one label"),
    "deep JSON": ("l.json", "[" * 100_000, "is no JSON: nested deeper"),
    "a negative number": ("l.csv", lines("PATH,LABEL", labels=["-1", "-1", "-1", "-1"]), "all 4 sample|-1"),
    "a number too large": (
        "l.csv",
        lines("PATH,LABEL", labels=["1", "2", "3", "70000"]),
        "has the label 70000, expected",
    ),
    "one class": ("l.csv", lines("PATH,LABEL", labels=["1"] * 4), "all 4 sample.s. have the label 1|the label"),
    "a control character": (
        "l.csv",
        lines("PATH,LABEL", labels=["a\x1b", "b", "c", "d"]),
        "expected a line of text",
    ),
    "a broken quote": ("l.csv", 'path,label\n"train/00/0.jpg"x,1\n', "is no table"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_label_file_of_the_source_is_refused_by_name(tmp_path: Path, case: str) -> None:
    name, text, message = REFUSED[case]
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        opened(folder(tmp_path / "data", IMAGES), tmp_path / "w", labels=tmp_path / name)
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300 and "\n" not in str(caught.value)


def test_a_name_that_two_images_have_is_refused(tmp_path: Path) -> None:
    src = folder(tmp_path / "data", {"a/0.jpg": b"", "b/0.jpg": b""})
    (tmp_path / "l.csv").write_text("0.jpg,1\n")
    with pytest.raises(DataError, match=r"'0.jpg' in l.csv may be a/0.jpg or b/0.jpg of data"):
        opened(src, tmp_path / "w", labels=tmp_path / "l.csv")
    with pytest.raises(DataError, match=r"--labels .*gone.csv can't be read: No such file"):
        opened(src, tmp_path / "w", labels=tmp_path / "gone.csv")
    (tmp_path / "l.csv").write_text("a/0.jpg,x\nb/0.jpg,y\n")
    (tmp_path / "c.txt").write_text("x\nz\n")
    with pytest.raises(DataError, match=r"1 label of l.csv is not in .*c.txt \(2 names\): y; add it there"):
        opened(src, tmp_path / "w", labels=tmp_path / "l.csv", classes=tmp_path / "c.txt")


def test_rows_that_repeat_are_counted_and_paths_never_leave_the_source(tmp_path: Path) -> None:
    labels = parse_labels(b"a.jpg,1\na.jpg,1\n../../etc/passwd,2\n", "l.csv")
    assert labels.rows == {"a.jpg": "1", "../../etc/passwd": "2"}
    assert labels.notes == ["1 row of l.csv repeat an image with the same label"]


def test_the_command_line_takes_a_label_file(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(lines("PATH,LABEL"))
    args = [str(folder(tmp_path / "data", IMAGES)), str(tmp_path / "out"), "--labels", str(tmp_path / "l.csv")]
    assert CliRunner().invoke(app, ["pack", *args, "--json"]).exit_code == 0
    inventory = open_inventory(tmp_path / "out")
    assert inventory.classes == ["ant", "bee", "cat"] and inventory.made["labels"] == "l.csv"
