"""`cskd index`, and shards as a source of `cskd pack`: the same id, no shard changed, no sample dropped in silence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cskd.errors import DataError
from cskd.packing.index import index
from cskd.packing.pack import pack
from tests.data_sources import FILES, SMALL, contents, folder, names, tar


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folder(tmp_path / "source", FILES)


def shard_files(n: int = 3) -> dict[str, bytes]:
    return {f"a/{i}.{part}": data for i in range(n) for part, data in (("jpg", b"%d" % i), ("cls", b" %d\n" % (i % 2)))}


def test_index_gives_the_id_of_pack_and_changes_no_shard(tmp_path: Path, source: Path) -> None:
    made = pack(source, tmp_path / "out", **SMALL)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    shutil.rmtree(tmp_path / "out" / "inventory")
    calls: list[tuple[int, int, int]] = []
    again = index(tmp_path / "out", block=8, progress=lambda *done: calls.append(done))
    assert (again.id, again.classes) == (made.id, made.classes)
    for name in ("offset", "size", "shard", "crc32c", "label", "key_hash"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == before
    assert calls == [(min(4 * i, 27), i, 7) for i in range(1, 8)], "images, shards, all shards"
    assert "nothing was written" in index(tmp_path / "out" / "shard-{000000..000006}.tar", block=8).notes[-1]
    with pytest.raises(DataError, match=r"holds the inventory .* already"):
        index(tmp_path / "out" / "shard-00000[012].tar", block=8)


def test_shards_can_be_packed_again_to_the_same_id(tmp_path: Path, source: Path) -> None:
    first = pack(source, tmp_path / "a", seed=5)
    assert pack(tmp_path / "a", tmp_path / "b", **SMALL).id == pack(source, tmp_path / "c", **SMALL).id != first.id
    assert pack(tmp_path / "a" / "shard-*.tar", tmp_path / "d", seed=5).id == first.id
    assert pack(tmp_path / "a" / "shard-000000.tar", tmp_path / "e", seed=5).id == first.id


def test_labels_come_from_cls_or_json_and_names_from_a_file_or_numbers(tmp_path: Path) -> None:
    files = {
        "a.jpg": b"1",
        "a.json": b'{"label": 2}',
        "b.seg.png": b"x",
        "b.json": b'{"label": 0}',
        "b.png": b"2",
        "b.cls": b"1",
    }
    tar(tmp_path / "x.tar", {**files, "nodot": b"", "__meta__/c.jpg": b""})
    inventory = index(tmp_path / "x.tar")
    assert contents(inventory) == {"a": ("2", b"1"), "b": ("1", b"2")}
    (tmp_path / "names").write_text("x\ny\nz")
    shutil.rmtree(tmp_path / "inventory")
    assert contents(index(tmp_path, classes=tmp_path / "names"))["a"] == ("z", b"1")
    (tmp_path / "names").write_text("x\ny")
    with pytest.raises(DataError, match="has 2 names, but label 2 occurs"):
        index(tmp_path, classes=tmp_path / "names")


def test_a_label_that_no_codec_can_hold_is_refused_where_numbers_would_be_its_name(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {"a/0.jpg": b"", "a/0.cls": b"65535"})
    with pytest.raises(
        DataError, match="the largest label is 65535, expected one below 65535; mend the shards' labels"
    ):
        index(tmp_path)


BAD_SHARDS: dict[str, tuple[dict[str, bytes], str]] = {
    "no label": (
        {**shard_files(), "a/9.jpg": b""},
        r"sample 'a/9' in .*x.tar has no label .*; mend it, or take it out of the shard",
    ),
    "no image": ({"a/9.cls": b"1", **shard_files()}, r"sample 'a/9' in .*x.tar has no image \(it has cls\)"),
    "json without": ({"a/9.jpg": b"", "a/9.json": b'{"x": 1}'}, "sample 'a/9' in .* has no label"),
    "no number": ({"a/9.jpg": b"", "a/9.cls": b"1.5"}, "has the label '1.5' in its .cls, expected a number from 0"),
    "no text": ({"a/9.jpg": b"", "a/9.cls": b"\x80\x04K"}, r"has the label b'\\x80\\x04K' in its .cls, expected text"),
    "a name and numbers": (
        {**shard_files(), "a/9.jpg": b"", "a/9.cls": b"cat"},
        "some labels are numbers .*a/0.* and some are names .*cat",
    ),
    "one name": ({"a/9.jpg": b"", "a/9.cls": b"cat"}, r"all 1 sample\(s\) are of the class 'cat' .*, expected two"),
    "negative": ({"a/9.jpg": b"", "a/9.json": b'{"label": -1}'}, "has the label '-1' in its .json"),
    "boolean": ({"a/9.jpg": b"", "a/9.json": b'{"label": true}'}, "has the label 'True' in its .json"),
    "list": ({"a/9.jpg": b"", "a/9.json": b'{"label": [0, 1]}'}, r"has the label '\[0, 1\]' in its .json"),
    "no json": ({"a/9.jpg": b"", "a/9.json": b"["}, "a/9.*: its .json is no JSON"),
    "two keys": (
        {"a/9.jpg": b"", "a/9.json": b'{"label": 3, "class": 5}'},
        r"a/9.* has 2 labels \(.json label = '3', .json class = '5'\); choose with --label-key label",
    ),
    "two files": (
        {"a/9.jpg": b"", "a/9.fine.cls": b"1", "a/9.coarse.cls": b"2"},
        "has 2 labels .*--label-key .fine.cls",
    ),
    "another key": (
        {"a.jpg": b"", "a.json": b'{"label": 1}', "b.jpg": b"", "b.json": b'{"class": 1}'},
        "'b' in .* has its label under 'class', those before it under 'label'",
    ),
    "a kind not read": (
        {"a/9.avif": b"", "a/9.cls": b"1"},
        r"has no image that is read \(.avif is not: write JPEG or PNG\)",
    ),
    "two forms": (
        {"caf\u00e9.jpg": b"", "cafe\u0301.cls": b"1"},
        r"'caf\u00e9' in .* has no label .*, 'cafe\u0301' has cls: they differ only in Unicode form \(NFC and NFD\): 'caf\\xe9' and",
    ),
    "letter case": ({"IMG_1.jpg": b"", "img_1.cls": b"1"}, "they differ only in letter case"),
    "captions": (
        {f"{i}.{e}": d for i in range(12) for e, d in (("jpg", b""), ("txt", b"a dog no. %d" % i))},
        r"labels of 12 samples are 12 different texts .*captions \(.txt\)",
    ),
    "names in two forms": (
        {"a.jpg": b"", "a.cls": "caf\u00e9".encode(), "b.jpg": b"", "b.cls": "cafe\u0301".encode()},
        r"two classes 'caf.*', and they differ only in Unicode form \(NFD and NFC\)",
    ),
    "two images": ({"a/9.jpg": b"", "a/9.png": b"", "a/9.cls": b"1"}, "two images, .jpg and .png"),
    "more of it later": (
        {"a/8.jpg": b"", "a/8.cls": b"1", "a/9.jpg": b"", "a/9.cls": b"1", "a/8.json": b"{}"},
        "sample 'a/8' in .* occurs twice, the second time only as json",
    ),
    "twins": ({"a/9.jpg": b"", "a/9.JPG": b"", "a/9.cls": b"1"}, "a/9.jpg and a/9.JPG, which are one name"),
}


@pytest.mark.parametrize("case", list(BAD_SHARDS))
def test_a_sample_that_is_not_whole_is_refused_naming_it(tmp_path: Path, case: str) -> None:
    files, message = BAD_SHARDS[case]
    tar(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=message):
        index(tmp_path)
    assert names(tmp_path) == {"x.tar"}


def test_incomplete_samples_are_left_out_when_allowed_and_counted(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {"a/8.jpg": b"", **shard_files(), "a/9.cls": b"1"})
    inventory = index(tmp_path, allow_incomplete=True)
    assert inventory.n == 3
    assert inventory.notes[-1] == "2 samples without image or label passed over (1 .cls, 1 .jpg): 'a/8' in x.tar ..."


def test_a_key_in_two_shards_is_refused_naming_both(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    tar(shards / "x.tar", shard_files())
    tar(shards / "y.tar", dict(list(shard_files().items())[:2]))
    with pytest.raises(DataError, match=r"'a/0' in x.tar and 'a/0' in y.tar"):
        index(shards)
    with pytest.raises(DataError, match=r"a/0.jpg in .*x.tar and a/0.jpg in .*y.tar have the same key 'a/0'"):
        pack(shards, tmp_path / "out")


def test_no_cut_of_a_shard_goes_unnoticed(tmp_path: Path) -> None:
    whole = tar(tmp_path / "x.tar", shard_files()).read_bytes()
    end = 512 * 12  # six members of a header and a block each; webdataset reads any such cut without a word
    for length in range(0, end + 1, 256):
        (tmp_path / "x.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.tar"):
            index(tmp_path)
