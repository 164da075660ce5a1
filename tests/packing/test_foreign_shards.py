"""Shards as other people write them: where labels are, what images are called, how keys look, what is passed over."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cskd.dataset.inventory import Inventory, open_inventory
from cskd.errors import DataError
from cskd.files.folders import kind_of
from cskd.packing.index import index
from cskd.packing.pack import pack
from tests.data_sources import contents, names, tar

NAMES = ["cat", "dog", "eel"]


def label_files(extension: str, *labels: Any) -> dict[str, bytes]:
    """Samples k0, k1, ... with one label each, in a file of that extension."""
    files: dict[str, bytes] = {}
    for i, label in enumerate(labels):
        text = json.dumps(label) if extension.endswith("json") else str(label)
        files |= {f"k{i}.jpg": b"%d" % i, f"k{i}.{extension}": text.encode()}
    return files


def labels_of(tmp_path: Path, files: dict[str, bytes], **options: Any) -> list[str]:
    """The class names of the samples, in order; packing the shard gives the same."""
    tar(tmp_path / "in" / "x.tar", files)
    made = index(tmp_path / "in", **options)
    found = [made.classes[label] for label in made.label]
    if not set(options) - {"classes"}:
        packed = pack(tmp_path / "in", tmp_path / "packed", **options)
        assert contents(packed) == contents(made)
    return found


READ: dict[str, dict[str, bytes]] = {
    "number in .cls": label_files("cls", " 2\n", 0, 1),
    "name in .cls": label_files("cls", "eel", "cat\n", "dog"),
    "name in .txt": label_files("txt", "eel", "cat", "dog "),
    "number in .txt": label_files("txt", 2, 0, 1),
    **{
        f"number in .{name}": label_files(name, 2, 0, 1)
        for name in ("id", "label", "index", "class", "target", "target.cls")
    },
    "upper case": {f"k{i}.{e}": d for i, n in enumerate(b"201") for e, d in (("JPEG", b"%d" % i), ("CLS", bytes([n])))},
    **{
        f"number under {key}": label_files("json", *({key: n} for n in (2, 0, 1)))
        for key in ("label", "Class", "target", "cls", "y")
    },
    "number under class_id": label_files("json", *({"class_id": n, "x": 7} for n in (2, 0, 1))),
    "text number in .json": label_files("json", *({"label": str(n)} for n in (2, 0, 1))),
    "float in .json": label_files("json", *({"label": float(n)} for n in (2, 0, 1))),
    "name in .json": label_files("json", *({"label": n} for n in ("eel", "cat", "dog"))),
    "nested": label_files("json", *({"meta": {"class": n}, "w": 3} for n in (2, 0, 1))),
    "inside label": label_files("json", *({"label": {"id": n}} for n in (2, 0, 1))),
    "bare .json": label_files("json", 2, 0, 1),
    "both keys equal": label_files("json", *({"label": n, "target": n} for n in (2, 0, 1))),
    "label next to a caption": label_files("cls", 2, 0, 1) | {},
}


@pytest.mark.parametrize("case", list(READ))
def test_a_label_is_found_wherever_a_shard_has_it(tmp_path: Path, case: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "names").write_text("\n".join(NAMES))
    assert labels_of(tmp_path, READ[case], classes=tmp_path / "names") == ["eel", "cat", "dog"]


def test_names_without_a_list_are_labels_in_the_order_of_the_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert labels_of(tmp_path, label_files("cls", "eel", "cat", "dog", "cat")) == ["eel", "cat", "dog", "cat"]
    made = open_inventory(tmp_path / "in")
    assert (made.classes, made.label.tolist()) == (NAMES, [2, 0, 1, 0])
    assert "3 class names from the samples, labels in the order of the names" in made.notes
    assert open_inventory(tmp_path / "in", verify=True).id == made.id, "the id is of the final labels"


def into(source: Path, **options: Any) -> Inventory:
    """`pack` into a folder of its own, next to the source's."""
    base = next(folder for folder in source.parents if folder.exists())
    return pack(source, base / f"packed{len(list(base.glob('packed*')))}", **options)


Command = Callable[..., Inventory]
BOTH = label_files("json", *({"label": n, "class": 2 - n, "meta": {"label": 1 - n % 2}} for n in (2, 0, 1)))


@pytest.mark.parametrize(
    ("key", "expected"),
    [("label", "201"), ("class", "021"), ("meta.label", "110"), (".json", None), ("nothing", None), (".id", "120")],
)
@pytest.mark.parametrize("command", [index, into])
def test_label_key_chooses(tmp_path: Path, command: Command, key: str, expected: str | None) -> None:
    tar(tmp_path / "in" / "x.tar", BOTH | {f"k{i}.id": b"%d" % n for i, n in enumerate((1, 2, 0))})
    if expected is None:
        with pytest.raises(DataError, match=rf"; --label-key is {key}|has 2 labels .*; choose with --label-key label"):
            command(tmp_path / "in", label_key=key)
    else:
        made = command(tmp_path / "in", label_key=key)
        labels = {made.key(i): made.classes[label] for i, label in enumerate(made.label)}
        assert "".join(labels[f"k{i}"] for i in range(3)) == expected
        assert made.made["label_key"] == key


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("Cat", "'Cat', which is not in .*names; 'cat' is: they differ only in letter case: 'Cat' and 'cat'"),
        ("c\u200bat", r"differ only in signs that hardly show.*'c\\u200bat' and 'cat'"),
        ("cats", r"'cats' is not in .*names \(3 names, the nearest is 'cat'\); add it there"),
    ],
)
def test_a_name_that_is_not_in_the_list_is_refused_with_what_differs(tmp_path: Path, label: str, message: str) -> None:
    (tmp_path / "names").write_text("\n".join(NAMES))
    tar(tmp_path / "x.tar", label_files("cls", "dog", label))
    with pytest.raises(DataError, match=message) as caught:
        index(tmp_path, classes=tmp_path / "names")
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300


KEYS: dict[str, tuple[list[str], list[str]]] = {
    "input.jpg": (["k0.input.jpg", "k0.mask.png", "k0.cls", "k1.input.jpg", "k1.mask.png", "k1.cls"], ["k0", "k1"]),
    "0.jpg": (["k0.0.jpg", "k0.1.jpg", "k0.cls", "k1.0.jpg", "k1.1.jpg", "k1.cls"], ["k0", "k1"]),
    "only image": (["k0.photo.webp", "k0.cls", "k1.photo.png", "k1.cls"], ["k0", "k1"]),
    "folders": (["train/n01/0001.jpg", "train/n01/0001.cls", "train/n02/0001.jpg", "train/n02/0001.cls"], ["train/n01/0001", "train/n02/0001"]),
    "dots": (["img.0001.jpg", "img.0001.cls", "img.0002.jpg", "img.0002.cls"], ["img_0001", "img_0002"]),
    "apart": (["b.jpg", "a.jpg", "a.cls", "b.cls"], ["a", "b"]),
    "all labels last": (["a.jpg", "b.jpg", "a.cls", "b.cls"], ["a", "b"]),
    "long": ([f"{'d' * 90}/{'e' * 90}/{i}{'f' * 120}.{e}" for i in (0, 1) for e in ("jpg", "cls")], [f"{'d' * 90}/{'e' * 90}/{i}{'f' * 120}" for i in (0, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("case", list(KEYS))
def test_images_and_keys_are_those_that_people_mean(tmp_path: Path, case: str) -> None:
    members, keys = KEYS[case]
    second = ("k1", "b.", "1f", "n02", "0002")
    files = {n: b"%d" % any(part in n for part in second) if n.endswith("cls") else n.encode() for n in members}
    tar(tmp_path / "in" / "x.tar", files)
    made = index(tmp_path / "in")
    assert [made.key(i) for i in range(made.n)] == keys
    images = [data.decode() for _, data in (contents(made)[key] for key in keys)]
    assert all(name in members and "mask" not in name and ".1." not in name for name in images)
    assert [len([note for note in made.notes if what in note]) for what in ("next to each other", "have dots")] == [
        case in ("apart", "all labels last"),
        case == "dots",
    ]
    packed = pack(tmp_path / "in", tmp_path / "packed")
    assert {key.replace(".", "_"): value for key, value in contents(made).items()} == contents(packed)


def test_what_is_passed_over_is_counted_by_extension(tmp_path: Path) -> None:
    extras = {f"k{i}.{e}": b"" for i in range(3) for e in ("xml", "txt", "seg.png") if (i, e) != (2, "xml")}
    files = label_files("cls", 0, 1, 3) | extras
    tar(tmp_path / "x.tar", dict(sorted(files.items())) | {"README": b"", "__meta__/c.jpg": b"", "._k0.jpg": b""})
    tar(tmp_path / "y.tar", {})
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\ndoe\n")
    notes = index(tmp_path).notes
    assert (
        "11 other files passed over (3 .seg.png, 3 .txt, 2 .xml, 1 __metadata__, 1 hidden, 1 without extension): ._k0.jpg ..."
        in notes
    )
    assert "3 of 4 classes have images; none: cow" in notes
    assert "1 shards without samples passed over: y.tar" in notes


def test_equal_keys_of_two_shards_are_told_apart_by_a_prefix(tmp_path: Path) -> None:
    for name in ("a/x.tar", "b/x.tar"):
        tar(tmp_path / name, label_files("cls", 0, 1))
    both = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(DataError, match=r"same key: 'k(.)' in a/x.tar and 'k\1' in b/x.tar; .*--key-prefix shard"):
        index(both)
    keys = ["a/x/k0", "a/x/k1", "b/x/k0", "b/x/k1"]
    made = index(both, key_prefix="shard")
    assert [made.key(i) for i in range(made.n)] == keys
    with pytest.raises(
        DataError, match=r"have the same key 'k.'; keys must differ over all shards: --key-prefix shard puts"
    ):
        into(tmp_path / "?" / "x.tar")
    packed = into(tmp_path / "?" / "x.tar", key_prefix="shard")
    assert sorted(packed.key(i) for i in range(packed.n)) == keys and packed.made["key_prefix"] == "shard"


def test_the_shard_in_front_of_a_key_is_taken_for_no_split(tmp_path: Path) -> None:
    for name in ("train-000.tar", "train-001.tar"):
        tar(tmp_path / "in" / name, label_files("cls", 0, 1))
    for made in (index(tmp_path / "in", key_prefix="shard"), into(tmp_path / "in", key_prefix="shard")):
        assert {made.key(i) for i in range(made.n)} == {f"train-00{n}/k{i}" for n in (0, 1) for i in (0, 1)}


def test_the_shard_in_front_of_a_key_is_named_by_where_it_lies_not_by_its_unpacked_copy(tmp_path: Path) -> None:
    plain = tar(tmp_path / "in" / "a.tar", label_files("cls", 0, 1))
    (tmp_path / "in" / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    made = [index(tmp_path / "in", out=tmp_path / out, key_prefix="shard") for out in ("out", "an/other")]
    assert [[one.key(i) for i in range(one.n)] for one in made] == [["a/k0", "a/k1", "b/k0", "b/k1"]] * 2 and made[
        0
    ].id == made[1].id


@pytest.mark.parametrize("option", [{"label_key": "class"}, {"key_prefix": "shard"}, {"allow_incomplete": True}])
def test_what_is_said_of_shards_is_not_passed_over_for_a_source_that_has_none(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("cat/0.png", b"0")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    said = f"--{next(iter(option)).replace('_', '-')} is for webdataset shards, and .* is none; leave it out"
    for name in ("x.zip", "x.parquet"):
        with pytest.raises(DataError, match=said):
            into(tmp_path / name, **option)


def test_pack_reads_shards_as_it_is_told_and_refuses_what_says_nothing(tmp_path: Path) -> None:
    files = {f"k{i}.{kind}": value for i in range(3) for kind, value in (("jpg", b"%d" % i), ("num", b"%d" % (i % 2)))}
    plain = tar(tmp_path / "in" / "x.tar", files | {"lost.jpg": b""})
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    how: dict[str, Any] = {"label_key": ".num", "key_prefix": "shard"}
    with pytest.raises(DataError, match=r"sample 'lost' in .* has no label"):
        into(tmp_path / "y.tar.gz", **how)
    made = into(tmp_path / "y.tar.gz", **how, allow_incomplete=True)
    assert {made.key(i): int(label) for i, label in enumerate(made.label)} == {"y/k0": 0, "y/k1": 1, "y/k2": 0}
    assert made.made["allow_incomplete"] and any("1 samples without image or label" in note for note in made.notes)
    assert into(tmp_path / "in", **how, allow_incomplete=True).n == 3
    with pytest.raises(
        DataError, match="--label-key is for webdataset shards, which have no file of --labels; leave one"
    ):
        into(tmp_path / "in", label_key="class", labels=tmp_path / "labels.csv")
    with pytest.raises(DataError, match="the key prefix is 'x', expected 'shard' or none"):
        into(tmp_path / "in", key_prefix="x")


def test_the_inventory_may_lie_elsewhere_and_compressed_shards_are_unpacked_into_it_once(tmp_path: Path) -> None:
    data, out = tmp_path / "in", tmp_path / "out"
    tar(data / "train-0.tar", label_files("cls", 0, 1))
    plain = tar(tmp_path / "train-1.tar", {f"m{name}": value for name, value in label_files("cls", 1, 0).items()})
    (data / "train-1.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (data / "train-2.tgz").write_bytes(gzip.compress(tar(tmp_path / "z.tar", {}).read_bytes()))
    with pytest.raises(DataError, match=r"2 compressed shard\(s\), .*train-1.tar.gz for one; .*--out DIR"):
        index(data)
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    made = index(data, out=out)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before, "nothing is written there"
    assert kind_of(out) == "data"
    assert {name for name in names(out / "unpacked") if name[0] != "."} == {"train-1.tar", "train-2.tar"}
    stamp = (out / "unpacked" / "train-1.tar").stat().st_ino
    again = open_inventory(out)
    again.check_shards()
    assert contents(again) == {"k0": ("0", b"0"), "k1": ("1", b"1"), "mk0": ("1", b"0"), "mk1": ("0", b"1")}
    assert "nothing was written" in index([data / "train-0.tar", data / "train-*.*gz"], out=out).notes[-1]
    assert (out / "unpacked" / "train-1.tar").stat().st_ino == stamp, "unpacked once"
    shutil.move(data, tmp_path / "moved")
    with pytest.raises(DataError, match=r"shard in/train-0.tar is not in .*; restore it, or say where"):
        open_inventory(out).check_shards()
    assert made.id == again.id


def test_files_one_by_one_are_of_one_split_and_folders_may_be_of_two(tmp_path: Path) -> None:
    train = tar(tmp_path / "a" / "train-000.tar", label_files("cls", 0, 1))
    val = tar(tmp_path / "b" / "val-000.tar", {f"v{name}": data for name, data in label_files("cls", 1).items()})
    with pytest.raises(DataError, match=r"holds shards of the splits train \(1\), val \(1\)"):
        index([train, val])
    with pytest.raises(DataError, match=r"no shard at .*/val-001\.tar"):
        index([train, tmp_path / "b" / "val-{000..001}.tar"])
    (tmp_path / "names").write_text("x\ny")
    assert index([train, val], split="val", out=tmp_path / "val", classes=tmp_path / "names").n == 1
    assert index([tmp_path / "a", tmp_path / "b"]).n == 3
