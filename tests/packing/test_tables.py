"""Promises about parquet files and Arrow data sets: every row once, classes as the columns say, or one line that says why not."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cskd.errors import DataError
from cskd.packing.pack import pack
from tests.data_sources import SMALL, contents, opened

JPEG, PNG = b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["tench, Tinca tinca", "ant", "crane"]


def table(
    count: int = 4, names: list[str] | None = NAMES, first: int = 0, label: str | None = "label", **columns: Any
) -> pa.Table:
    """Rows as Hugging Face's datasets write them: JPEG and PNG in turn, labels 0, 1, 2, 0, ..."""
    rows = range(first, first + count)
    images = [{"bytes": (PNG if i % 2 else JPEG) + b"%d" % i, "path": f"{i}.jpg"} for i in rows]
    made: dict[str, Any] = {
        "image": pa.array(images, IMAGE),
        **({label: pa.array([i % 3 for i in rows], pa.int64())} if label else {}),
        **columns,
    }
    made = {name: column for name, column in made.items() if column is not None}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names is not None and label:
        features[label] = {"names": names, "_type": "ClassLabel"}
    note = {"info": {"features": features}}
    return pa.table(made).replace_schema_metadata({"huggingface": json.dumps(note)})


def parquet(path: Path, rows: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=3)
    return path


def arrow(path: Path, rows: pa.Table) -> Path:
    """As `save_to_disk` writes it: an IPC stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)
    return path


def test_one_parquet_file_is_a_data_set(tmp_path: Path) -> None:
    images, source = opened(parquet(tmp_path / "x.parquet", table()), tmp_path / "w")
    assert source.classes == NAMES
    assert images == {f"x/{i:08d}": (NAMES[i % 3], (PNG if i % 2 else JPEG) + b"%d" % i) for i in range(4)}
    assert [source.listing.extension(i) for i in range(2)] == ["jpg", "png"]
    assert source.notes == ["images from column 'image', labels from 'label'"]


@pytest.mark.parametrize("write", [parquet, arrow])
def test_files_of_a_split_are_one_data_set(tmp_path: Path, write: Callable[[Path, pa.Table], Path]) -> None:
    end = "parquet" if write is parquet else "arrow"
    for i in range(2):
        write(tmp_path / "src" / "data" / f"train-0000{i}-of-00003.{end}", table(first=4 * i))
    write(tmp_path / "src" / "data" / f"test-00000-of-00001.{end}", table(2, first=50))
    if write is arrow:  # what datasets' map left there
        write(tmp_path / "src" / "data" / "cache-fffe.arrow", table(2))
    with pytest.raises(DataError, match="holds tables of the splits train, test; pick one with --split train, or"):
        opened(tmp_path / "src", tmp_path / "w")
    inventory = pack(tmp_path / "src", tmp_path / "out", split="train", **SMALL)
    assert {data for _, data in contents(inventory).values()} == {
        (PNG if i % 2 else JPEG) + b"%d" % i for i in range(8)
    }
    assert inventory.classes == NAMES and not (tmp_path / "out" / ".packing").exists()
    assert any("are not there: number 2" in note for note in inventory.notes)
    assert len(opened(tmp_path / "src", tmp_path / "w", split="test")[0]) == 2


def test_splits_may_be_folders(tmp_path: Path) -> None:
    arrow(tmp_path / "src" / "train" / "data-00000-of-00001.arrow", table())
    arrow(tmp_path / "src" / "test" / "data-00000-of-00001.arrow", table(2))
    (tmp_path / "src" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(opened(tmp_path / "src", tmp_path / "w", split="train")[0]) == 4


def test_labels_are_names_numbers_or_the_column_asked_for(tmp_path: Path) -> None:
    plain = parquet(tmp_path / "plain.parquet", table(names=None))
    assert opened(plain, tmp_path / "a")[1].classes == ["0", "1", "2"]
    (tmp_path / "c.txt").write_text("x\ny\nz\n")
    images, source = opened(plain, tmp_path / "b", classes=tmp_path / "c.txt")
    assert source.classes == ["x", "y", "z"] and {name for name, _ in images.values()} == {"x", "y", "z"}
    texts = parquet(tmp_path / "t.parquet", table(names=None, label="id", breed=pa.array(list("baba"))))
    assert opened(texts, tmp_path / "c")[1].classes == ["a", "b"]
    twice = parquet(tmp_path / "twice.parquet", table(names=["crane", "ant", "crane"]))
    assert opened(twice, tmp_path / "d")[1].classes == ["crane (0)", "ant", "crane (2)"]
    two = table(fine_label=pa.array([0, 1, 0, 1]))
    note = json.loads(two.schema.metadata[b"huggingface"])
    note["info"]["features"]["fine_label"] = {"names": ["p", "q"], "_type": "ClassLabel"}
    both = parquet(tmp_path / "two.parquet", two.replace_schema_metadata({"huggingface": json.dumps(note)}))
    with pytest.raises(
        DataError, match="has several columns of labels: label, fine_label; pick one with --labels label"
    ):
        opened(both, tmp_path / "e")
    assert opened(both, tmp_path / "f", labels=Path("fine_label"))[1].classes == ["p", "q"]


def test_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    images = [{"bytes": data, "path": None} for data in (JPEG, b"\0\0\0\x1cftypavif", JPEG, b"what")]
    path = parquet(tmp_path / "x.parquet", table(image=pa.array(images, IMAGE)))
    found, source = opened(path, tmp_path / "w")
    assert len(found) == 2
    assert "2 images of kinds that are not read passed over (1 avif, 1 unknown): row 1 of x.parquet ..." in source.notes


def rows(**columns: Any) -> Callable[[Path], Path]:
    return lambda root: parquet(root / "x.parquet", table(**columns))


def several(*paths: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        for i, path in enumerate(paths):
            parquet(root / path, table(names=NAMES if i == 0 else ["a", "b", "c"]))
        return root

    return make


def damaged(root: Path) -> Path:
    path = parquet(root / "x.parquet", table(400))
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(data)
    return path


def same(root: Path) -> Path:
    """100 MB of one image, which the file has once."""
    root.mkdir()
    image = JPEG + random.Random(0).randbytes(1 << 16)
    rows = pa.table({"image": pa.array([image] * 1_500), "label": pa.array([0, 1, 2] * 500)})
    pq.write_table(rows, root / "x.parquet", row_group_size=1_500)
    return root / "x.parquet"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no image": (rows(image=pa.array([{"bytes": None, "path": "/etc/passwd"}] * 4, IMAGE)), "row 0 of .* has no image"),
    "a null image": (rows(image=pa.array([None] * 4, IMAGE)), "row 0 of .* has no image in 'image'"),
    "no label": (rows(label=None, y=pa.array([0, None, 1, 0])), r"row 1 of .* has no label in 'y' \(None: a test set"),
    "a test set": (rows(label=None, y=pa.array([-1] * 4), names=None), r"row 0 of .* no label in 'y' \(-1: a test set"),
    "labels beyond the names": (rows(names=["a", "b"]), "row 2 of .* has the label 2, expected one below 2"),
    "no label column": (
        rows(label=None, z=pa.array([0] * 4), names=None),
        "no column 'label', only image, z; name one",
    ),
    "no image column": (rows(image=None, x=pa.array([0] * 4)), "has 0 columns of image bytes .label, x., expected one"),
    "two image columns": (
        rows(image=None, a=pa.array([JPEG] * 4), b=pa.array([JPEG] * 4)),
        "has 2 columns of image bytes .a, b., expected one",
    ),
    "other names in another file": (several("a-1.parquet", "a-2.parquet"), "have other columns or class names"),
    "two configurations": (several("small/a.parquet", "large/a.parquet"), "holds tables in 2 folders: large, small"),
    "a name of two lines": (rows(names=["a\nb", "c", "d"]), "has a line break in it"),
    "damaged": (damaged, "can't be read as a table: .*copy or download it again"),
    "one image 1,500 times": (same, "expected at most 200 from one"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_tables_that_are_not_clear_are_refused_by_name(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        opened(make(tmp_path / "src"), tmp_path / "w")
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300 and "\n" not in str(caught.value)


def test_without_pyarrow_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "x.parquet", table())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        DataError, match=r"x.parquet is read with pyarrow, .* not installed: pip install 'cskd\[parquet\]'"
    ):
        opened(path, tmp_path / "w")
