"""`cskd pack` refuses what would change the data set if it were passed over, and says which file it is."""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cskd.dataset.classes import classes_text, parse_classes
from cskd.errors import DataError
from cskd.packing.index import index
from cskd.packing.pack import pack
from tests.data_sources import FILES, folder, shard, tar


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def link_member(path: Path) -> Path:
    with tarfile.open(path, "w") as out:
        info = tarfile.TarInfo("a/x.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(info)
    return path


def own_link(root: Path) -> Path:
    folder(root, {"a/x.jpg": b""})
    (root / "a" / "loop").symlink_to(root)
    return root


def broken_link(root: Path) -> Path:
    folder(root, {"a/x.jpg": b""})
    (root / "a" / "y.jpg").symlink_to(root / "gone")
    return root


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (
        lambda p: folder(p, {"a/readme": b""}),
        r"holds no images in class folders \(1 other file\(s\): 1 without extension\)",
    ),
    "no class folder": (lambda p: folder(p, {"x.jpg": b"", "a/y.jpg": b""}), r"x.jpg in .* is in no class folder"),
    "one key, two files": (
        lambda p: folder(p, {"a/x.jpg": b"", "a/x.PNG": b"", "b/y.jpg": b""}),
        r"a/x.PNG in .* and a/x.jpg in .*'a/x'",
    ),
    "dots collide": (
        lambda p: folder(p, {"a/x.1.jpg": b"", "a/x_1.jpg": b"", "b/y.jpg": b""}),
        r"a/x.1.jpg in .* and a/x_1.jpg in .*'a/x_1'",
    ),
    "twice in a tar": (
        lambda p: tar(p, {"a/x.jpg": b"", "./a/x.jpg": b"", "b/y.jpg": b""}),
        r"a/x.jpg in .* and a/x.jpg in .*same key",
    ),
    "train and val": (
        lambda p: tar(p, {"train/a/x.jpg": b"", "val/a/y.jpg": b""}),
        "holds the splits train, val; pick one with --split train$",
    ),
    "nested": (lambda p: folder(p, {"a/x.jpg": b"", "a/b/y.jpg": b""}), "a holds images and so does a/b inside it"),
    "link in a tar": (link_member, "'a/x.jpg' in .* is a link"),
    "absolute": (lambda p: tar(p, {"/a/x.jpg": b""}), "member '/a/x.jpg', expected a name below"),
    "dot dot": (lambda p: tar(p, {"a/../../x.jpg": b""}), "member 'a/../../x.jpg', expected a name below"),
    "control": (lambda p: tar(p, {"a/x\ny.jpg": b""}), r"'a/x\\ny.jpg' in .* has a control character"),
    "not utf-8": (lambda p: folder(p, {"a/\udcff.jpg": b""}), "is not UTF-8"),
    "metadata": (lambda p: folder(p, {"__a__/x.jpg": b"", "b/x.jpg": b""}), "webdataset skips folders named"),
    "outer spaces": (
        lambda p: folder(p, {"a/x.jpg": b"", "b /x.jpg": b""}),
        "class 'b ' of .*src would be another one in",
    ),
    "two lines": (
        lambda p: folder(p, {"a/x.jpg": b"", "b\u2028c/x.jpg": b""}),
        r"class 'b\\u2028c' of .*src would be another one in",
    ),
    "loop": (own_link, "is a link to a folder that it is in"),
    "broken link": (broken_link, "y.jpg is no regular file, or a link to none"),
    "no tar": (lambda p: written(p, b"x" * 5000), "is not a whole tar"),
    "missing": (lambda p: p, "nothing at .*; expected a folder of class folders"),
    "no such shards": (lambda p: p / "{0..2}.tar", "no shard at .*0.tar"),
    "no match": (lambda p: p / "*.tar", "no .tar files at"),
    "empty file": (lambda p: written(p, b""), "is not a whole tar"),
    "cut tar.gz": (lambda p: written(p, gzip.compress(os.urandom(5000))[:-50]), "can't be decompressed"),
    "zstd": (lambda p: written(p, b"\x28\xb5\x2f\xfd...."), "compressed with zstd; decompress it"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_would_change_the_data_set_is_refused_naming_it(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        pack(make(tmp_path / "src"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_class_folder_that_the_file_lacks_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("ant\nbe\ncat")
    with pytest.raises(DataError, match=r"class folder 'bee' is not in .*list \(3 names, the nearest is 'be'\)"):
        pack(folder(tmp_path / "source", FILES), tmp_path / "out", classes=tmp_path / "list")


def test_a_class_file_is_read_back_as_it_was_written() -> None:
    names = ["ant", "a b", "\u00e9t\u00e9", '"x"', "# y"]
    assert parse_classes(classes_text(names, "SRC"), "FILE") == names


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"", "is empty"), (b"a\n\nb", "line 2 is empty"), (b"a\nb\na", "'a' in lines 1 and 3"), (b"\xff", "not UTF-8")],
)
def test_a_malformed_class_file_is_refused_naming_the_line(text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_classes(text, "FILE")


def test_a_class_file_that_is_none_is_refused_with_the_option_that_names_it(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", FILES)
    for path, found in ((tmp_path / "absent", "no file"), (source, "a folder")):
        with pytest.raises(DataError, match=f"{path.name} is {found}; expected a file of class names.*--classes"):
            pack(source, tmp_path / "out", classes=path)


@pytest.mark.parametrize("option", ["shard_size", "block", "short_side", "workers", "limit"])
def test_options_below_one_are_refused(tmp_path: Path, option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(DataError, match=f"{option} is 0, expected at least 1"):
        pack(folder(tmp_path / "source", FILES), tmp_path / "out", **options)


def test_a_decompressed_copy_is_bounded(tmp_path: Path) -> None:
    bomb = tar(tmp_path / "bomb.tar.gz", {"a/x.jpg": bytes(4 << 20)}, "w:gz")
    with pytest.raises(DataError, match="decompresses to more than the limit of 2097152 bytes"):
        pack(bomb, tmp_path / "out", max_spool=2 << 20)
    assert not (tmp_path / "out").exists()


def test_no_cut_of_a_tar_goes_unnoticed(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", dict(list(FILES.items())[7:10])).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512  # the end-of-archive mark begins here
    for length in range(0, end + 1, 256):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            pack(tmp_path / "cut.tar", tmp_path / "out")
    (tmp_path / "cut.tar").write_bytes(whole[:515])
    with pytest.raises(DataError, match=r"was cut off inside 'ant/ant_07.JPEG'"):
        pack(tmp_path / "cut.tar", tmp_path / "out")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])
    assert pack(tmp_path / "cut.tar", tmp_path / "out").n == 3


@pytest.mark.parametrize("at", [512 * 2, 512 * 2 + 130, 512 * 4 + 150])
def test_a_damaged_or_joined_tar_is_refused(tmp_path: Path, at: int) -> None:
    path = tar(tmp_path / "x.tar", dict(list(FILES.items())[:3]))
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(DataError, match="damaged at byte"):
        pack(path, tmp_path / "out")
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="goes on after its end-of-archive mark"):
        pack(path, tmp_path / "out")


WRONG: dict[str, tuple[dict[str, dict[str, bytes]], str]] = {
    "compressed": ({"0.tar.gz": {}, "1.tar.gz": {}}, r"2 compressed .*0.tar.gz for one; .*gunzip"),
    "compressed in part": ({"0.tar": shard("a", "b"), "1.tar.gz": {}}, r"1 compressed .*1.tar.gz for one; .*gunzip"),
    "label as text": (
        {"0.tar": {"0.jpg": b"", "0.json": b'{"label": "3.5"}'}},
        "sample '0' in .*0.tar has the label '3.5' as text in its .json label, expected a number from 0 or the name of a class",
    ),
    "no label": (
        {"0.tar": {"0.jpg": b"", "0.json": b'{"caption": "c", "url": "u"}'}},
        """sample '0' in .*0.tar has no class label .its .json has caption, url, no "label".; add 0.cls""",
    ),
    "captions": (
        {"0.tar": {"0.jpg": b"", "0.txt": b"a cat"}},
        r"all 1 sample\(s\) are of the class 'a cat' \(.txt\), expected two",
    ),
    "tars of parts": (
        {"part1.tar": {"1.jpg": b""}, "part2.tar": {"2.jpg": b""}},
        r"numbered archives of images \(part1, part2\), which look like parts .*--labels",
    ),
    "tars of splits": (
        {"x_train.tar": {"a/0.jpg": b"", "b/1.jpg": b""}, "x_val.tar": {"a/0.jpg": b""}},
        "holds the splits x_train, x_val; pick one with --split x_train$",
    ),
    "shards among tars": (
        {"0.tar": {"a/0.jpg": b""}, "1.tar": {"0.cls": b"1", "0.jpg": b""}},
        "1.tar holds samples of several files .* lies inside of the source",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_tars_that_are_no_shards_are_named_for_what_they_are(tmp_path: Path, case: str) -> None:
    what, message = WRONG[case]
    for name, members in what.items():
        (tmp_path / "src").mkdir(exist_ok=True)
        tar(tmp_path / "src" / name, members, "w:gz" if name.endswith("gz") else "w")
    with pytest.raises(DataError, match=message) as caught:
        pack(tmp_path / "src", tmp_path / "out")
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300
    if case.startswith("compressed"):
        with pytest.raises(DataError, match=message):
            index(tmp_path / "src")


def test_single_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    for name, data, message in (
        (
            "both.tar",
            tar(tmp_path / "z.tar", {"train.tar": b"", "val.tar": b""}).read_bytes(),
            "train.tar .* not a whole",
        ),
        ("x.zip", b"PK\3\4" + bytes(600), "x.zip has no end record of a zip: it was cut off"),
        ("x.parquet", b"PAR1" + bytes(600), "x.parquet can't be read as a table: .*copy or download it again"),
        ("flat.tar", tar(tmp_path / "f.tar", {"0.jpg": b"", "0.json": b"{}"}).read_bytes(), "'0' in .* no class label"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            pack(tmp_path / name, tmp_path / "out")
    (tmp_path / "gz").mkdir()
    tar(tmp_path / "gz" / "0.tar", shard("a", "b"), "w:gz")
    with pytest.raises(DataError, match=r"0.tar is compressed with gzip, not a tar; decompress it first \(gunzip\)"):
        index(tmp_path / "gz")
