"""Promises about zips: the same data set as the folder, and nothing read that is not what the directory says."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cskd.errors import DataError
from cskd.packing.pack import pack
from cskd.packing.places import Place, read_place
from cskd.packing.sources import open_source
from cskd.packing.zips import zip_members
from tests.data_sources import EXPECTED, FILES, SMALL, folder, opened, prefixed, zipped

MAC = {"__MACOSX/ant/._ant_00.JPEG": b"x", "ant/.DS_Store": b"x", "__MACOSX/._ant": b"x"}


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["", "data/", "data/train/"])
def test_a_zip_holds_what_its_folder_holds(tmp_path: Path, how: int, top: str) -> None:
    images, source = opened(zipped(tmp_path / "x.zip", {**prefixed(top), **MAC}, how), tmp_path / "w")
    assert images == EXPECTED and source.classes == ["ant", "bee", "cat"]
    assert [note for note in source.notes if "passed over" in note] == [
        "3 other files passed over (3 hidden): __MACOSX/._ant ..."
    ]


def test_a_zip_is_packed_to_the_inventory_of_its_folder(tmp_path: Path) -> None:
    ids = {
        pack(src, tmp_path / f"out{i}", **SMALL).id
        for i, src in enumerate([zipped(tmp_path / "x.zip", FILES), folder(tmp_path / "src", FILES)])
    }
    assert len(ids) == 1


def test_zips_of_splits_and_zips_of_classes_are_folders_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    zipped(tmp_path / "a" / "train.zip", prefixed("train/"))
    zipped(tmp_path / "a" / "val.zip", {"val/ant/v.jpg": b"v", "val/bee/v.jpg": b"v"})
    with pytest.raises(DataError, match=r"holds the splits train, val; pick one with --split train$"):
        opened(tmp_path / "a", tmp_path / "w")
    assert opened(tmp_path / "a", tmp_path / "w", split="train")[0] == EXPECTED
    (tmp_path / "b").mkdir()
    for name in ("ant", "bee", "cat"):
        zipped(tmp_path / "b" / f"{name}.zip", {k[4:]: v for k, v in FILES.items() if k.startswith(name)})
    images, source = opened(tmp_path / "b", tmp_path / "w")
    assert images == EXPECTED and "each archive is a class, as ant: 3 of them" in source.notes


def test_zip64_and_names_of_old_programs_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        for name, data in FILES.items():
            with out.open(name, "w", force_zip64=True) as member:
                member.write(data)
    assert opened(tmp_path / "x.zip", tmp_path / "w")[0] == EXPECTED
    data = (tmp_path / "x.zip").read_bytes()
    _, _, _, _, n, size, start, _ = struct.unpack("<4sHHHHLLH", data[-22:])
    end64 = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, n, n, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) - 22, 1)
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "y.zip").write_bytes(data[:-22] + end64 + locator + end)
    assert opened(tmp_path / "y.zip", tmp_path / "w")[0] == EXPECTED
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as out:
        for length in (7, 10):
            info = zipfile.ZipInfo("x" * length)
            info.create_system = 0  # DOS
            out.writestr(info, b"")
    raw = (tmp_path / "z.zip").read_bytes()
    raw = raw.replace(b"x" * 10, b"caf\x82/2.jpg").replace(b"x" * 7, b"b\\1.jpg")
    (tmp_path / "z.zip").write_bytes(raw)
    assert set(opened(tmp_path / "z.zip", tmp_path / "w")[0]) == {"b/1", "café/2"}


def changed(files: dict[str, bytes], *edits: tuple[bytes, int, bytes]) -> Callable[[Path], Path]:
    """A zip with bytes changed: each edit is what to find from the end, how far from it, and the new bytes."""

    def make(path: Path) -> Path:
        data = bytearray(zipped(path, files, zipfile.ZIP_STORED).read_bytes())
        for mark, at, new in edits:
            place = data.rindex(mark) + at
            data[place : place + len(new)] = new
        path.write_bytes(data)
        return path

    return make


def appended(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(data + zipped(path, TWO).read_bytes())
        return path

    return make


def cut(path: Path) -> Path:
    path.write_bytes(zipped(path, TWO).read_bytes()[:-30])
    return path


def link(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        info = zipfile.ZipInfo("a/0.jpg")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        out.writestr(info, "/etc/passwd")
    return path


TWO = {"a/0.jpg": b"0" * 40, "b/1.jpg": b"1" * 40}
CENTRAL, END = b"PK\1\2", b"PK\5\6"
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut": (cut, "has no end record of a zip: it was cut off"),
    "joined": (appended(b"x" * 100), "directory is not where its end record says"),
    "encrypted": (changed(TWO, (CENTRAL, 8, b"\1")), "'b/1.jpg' in .* is encrypted; unpack it"),
    "deflate64": (changed(TWO, (CENTRAL, 10, b"\x09")), "is compressed by deflate64, which is not read"),
    "an unknown method": (changed(TWO, (CENTRAL, 10, b"\x63\x01")), "compressed by method 355, which is not read"),
    "a part of several": (changed(TWO, (END, 4, b"\1")), "is one part of a zip of several; join them"),
    "another count": (changed(TWO, (END, 8, b"\3\0\3")), "has 2 members, and its end record says 3"),
    "a bad record": (changed(TWO, (CENTRAL, 0, b"PQ")), "has a damaged directory"),
    "members outside": (changed(TWO, (CENTRAL, 42, b"\xf0\xf0")), "share bytes or lie outside"),
    "sizes of gigabytes": (changed(TWO, (CENTRAL, 24, b"\xf0\xff\xff\xf0")), "expected at most 200 from one"),
    "bytes that are shared": (changed(TWO, (CENTRAL, 20, b"\xf0")), "share bytes or lie outside"),
    "a link": (link, "'a/0.jpg' in .* is a link"),
    "a name with ..": (lambda p: zipped(p, {"a/../../x.jpg": b""}), "expected a name below the zip's folder"),
    "an absolute name": (lambda p: zipped(p, {"/a/x.jpg": b""}), "expected a name below the zip's folder"),
    "a control character": (lambda p: zipped(p, {"a/x\ny.jpg": b""}), "has a control character"),
    "one name twice": (lambda p: zipped(p, {"a/x.jpg": b"", "./a/x.jpg": b"", "b/1.jpg": b""}), "the same key 'a/x'"),
    "loose images": (lambda p: zipped(p, {"x.jpg": b"", "y.jpg": b""}), r"holds 2 image\(s\) in no class folder"),
    "shards": (lambda p: zipped(p, {"0.tar": b""}), "0.tar is an archive in a zip"),
    "nothing": (lambda p: zipped(p, {}), "holds no images in class folders .it is empty"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_zip_that_is_not_sound_is_refused_by_name(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        open_source(make(tmp_path / "x.zip"), None, tmp_path, 0, None)
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bytes_that_are_not_those_of_the_checksum_are_never_an_image(tmp_path: Path, how: int) -> None:
    path = zipped(tmp_path / "x.zip", {"a/0.jpg": b"0123456789" * 30, "b/1.jpg": b"1" * 40}, how)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    source = open_source(path, None, tmp_path, 0, None)
    with pytest.raises(DataError, match=r"a/0.jpg in .*x.zip is damaged: .*checksum .*download it again"):
        read_place(source.listing.place(0))
    assert read_place(source.listing.place(1)) == b"1" * 40


def test_a_member_is_never_unpacked_further_than_the_directory_says(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a/0.jpg": bytes(30_000_000)})
    data = bytearray(path.read_bytes())
    data[data.rindex(CENTRAL) + 24 : data.rindex(CENTRAL) + 28] = struct.pack("<L", 100)
    path.write_bytes(data)
    [member] = zip_members(path)
    with pytest.raises(DataError, match="is damaged"):
        read_place(Place(str(path), member.offset, 100, zipped=True))
