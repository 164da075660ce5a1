"""The inventory: one id for one data set, nothing damaged goes unnoticed, and opening it costs no memory."""

from __future__ import annotations

import json
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cskd.dataset.inventory import (
    Inventory,
    Sample,
    ShardFile,
    block_bounds,
    open_inventory,
    write_inventory,
)
from cskd.dataset.inventory_format import DTYPES, copy_inventory, header_hash
from cskd.errors import DataError
from cskd.seeds import key_hash

CLASSES = ["ant", "bee", "cat"]


def rows(n: int = 10, per_shard: int = 4) -> list[Sample]:
    return [Sample(f"{CLASSES[i % 3]}/é{i:03d}", i % 3, 1000 + i, i // per_shard, 512 * i, 7 + i) for i in range(n)]


def make(
    data: Path, samples: list[Sample] | None = None, prefix: str = "s", block: int = 8, **kwargs: Any
) -> Inventory:
    data.mkdir(exist_ok=True)
    samples = rows() if samples is None else samples
    shards = [ShardFile(f"{prefix}-{i}.tar", 5) for i in range(1 + max((s.shard for s in samples), default=0))]
    for shard in shards:
        (data / shard.name).write_bytes(b"12345")
    return write_inventory(data, samples, classes=CLASSES, shards=shards, block=block, **kwargs)


def rewrite_header(data: Path, **changes: Any) -> None:
    path = data / "inventory" / "inventory.json"
    header = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**header, "hash": header_hash(header)}))


def test_every_column_reads_back(tmp_path: Path) -> None:
    made = make(tmp_path, made={"by": "test"}, notes=["one"])
    again = open_inventory(tmp_path, verify=True)
    for inventory in (made, again):
        assert [inventory.key(i) for i in range(inventory.n)] == [row.key for row in rows()]
        assert inventory.key_hash.tolist() == [key_hash(row.key) for row in rows()]
        for name in ("label", "crc32c", "shard", "offset", "size"):
            column = getattr(inventory, name)
            assert column.tolist() == [getattr(row, name) for row in rows()]
            assert column.dtype == np.dtype(DTYPES[name])
        assert (inventory.n, len(inventory), inventory.classes) == (10, 10, CLASSES)
        assert inventory.blocks.tolist() == [0, 8, 10]
        assert [inventory.block_of(i) for i in (0, 7, 8, 9)] == [0, 0, 1, 1]
        assert inventory.shard_path(2) == tmp_path / "s-2.tar"
        assert inventory.find("bee/é004") == 4
        assert inventory.made == {"by": "test"}
        assert inventory.notes == ["one"]


def test_more_samples_than_are_buffered_read_back(tmp_path: Path) -> None:
    samples = [Sample(f"k{i}", i % 3, i, i // 4096, i, i) for i in range(9000)]
    inventory = make(tmp_path, samples)
    assert [inventory.key(i) for i in (0, 4095, 4096, 8999)] == ["k0", "k4095", "k4096", "k8999"]
    assert inventory.crc32c.tolist() == list(range(9000))


def test_find_names_a_missing_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample 'dog/1'"):
        make(tmp_path).find("dog/1")


def test_id_does_not_depend_on_file_names_offsets_or_options(tmp_path: Path) -> None:
    moved = [row._replace(offset=row.offset + 1024) for row in rows()]
    assert make(tmp_path / "a").id == make(tmp_path / "b", moved, prefix="other", made={"seed": 1}, notes=["x"]).id


def test_id_is_the_one_of_format_version_1(tmp_path: Path) -> None:
    """A change of this value would orphan every cache there is."""
    assert make(tmp_path).id == "83a3d935a550612b4edab00a67bfd28b921fa8278d63e379b36ade0d6bdaa42f"


@pytest.mark.parametrize(
    "change",
    [{"key": "ant/other"}, {"label": 1}, {"crc32c": 5}],
    ids=["key", "label", "bytes"],
)
def test_id_changes_with_each_sample(tmp_path: Path, change: dict[str, Any]) -> None:
    changed = rows()
    changed[3] = changed[3]._replace(**change)
    assert make(tmp_path / "a").id != make(tmp_path / "b", changed).id


def test_id_changes_with_order_and_with_block_bounds(tmp_path: Path) -> None:
    swapped = rows()
    swapped[0], swapped[1] = swapped[1], swapped[0]
    ids = {make(tmp_path / "a").id, make(tmp_path / "b", swapped).id, make(tmp_path / "c", block=4).id}
    assert len(ids) == 3


@pytest.mark.parametrize("field", ["id", "classes", "num_samples", "blocks", "shards", "made", "notes", "columns"])
def test_a_changed_header_is_refused(tmp_path: Path, field: str) -> None:
    make(tmp_path)
    path = tmp_path / "inventory" / "inventory.json"
    header = json.loads(path.read_text())
    header[field] = 3
    path.write_text(json.dumps(header))
    with pytest.raises(DataError, match="does not match its own hash"):
        open_inventory(tmp_path)


def test_a_missing_foreign_or_newer_inventory_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no inventory at .*'cskd pack' or 'cskd index'"):
        open_inventory(tmp_path)
    make(tmp_path)
    rewrite_header(tmp_path, version=2)
    with pytest.raises(DataError, match="version 2, expected 1"):
        open_inventory(tmp_path)
    rewrite_header(tmp_path, format="something else")
    with pytest.raises(DataError, match="is not an inventory"):
        open_inventory(tmp_path)
    (tmp_path / "inventory" / "inventory.json").write_text("{")
    with pytest.raises(DataError, match="is not readable"):
        open_inventory(tmp_path)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_shard_outside_the_data_folder_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    rewrite_header(tmp_path, shards=[{"name": name, "bytes": 1}])
    with pytest.raises(DataError, match="expected a path inside the data folder"):
        open_inventory(tmp_path)


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_damaged_column_is_found(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    path = tmp_path / "inventory" / f"{name}.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{name}.npy does not match its recorded sha256|holds"):
        open_inventory(tmp_path, verify=True)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{name}.npy is not readable"):
        open_inventory(tmp_path)
    np.save(path, np.zeros(3, DTYPES[name]))
    with pytest.raises(DataError, match=f"{name}.npy holds 3 entries|key.npy holds"):
        open_inventory(tmp_path)
    np.save(path, np.zeros(10, np.float32))
    with pytest.raises(DataError, match=f"{name}.npy is float32"):
        open_inventory(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}.npy is not readable"):
        open_inventory(tmp_path)


def test_two_equal_keys_are_refused_naming_both(tmp_path: Path) -> None:
    twice = [*rows(), Sample("ant/é003", 0, 1, 3, 0, 1)]
    with pytest.raises(DataError, match=r"'ant/é003' in s-0.tar and 'ant/é003' in s-3.tar"):
        make(tmp_path, twice)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_class_is_refused_naming_the_sample(tmp_path: Path, label: int) -> None:
    samples = rows()
    samples[5] = samples[5]._replace(label=label)
    with pytest.raises(DataError, match=rf"'cat/é005' has label {label}, expected 0..2"):
        make(tmp_path, samples)


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        make(tmp_path, [])


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from rows()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_inventory(tmp_path, broken(), classes=CLASSES, shards=[ShardFile(f"{i}", 1) for i in range(3)])
    assert list(tmp_path.iterdir()) == []


def test_another_inventory_is_never_overwritten_and_the_same_one_is_kept(tmp_path: Path) -> None:
    first = make(tmp_path)
    before = (tmp_path / "inventory" / "inventory.json").stat().st_mtime_ns
    assert "nothing was written" in make(tmp_path, made={"by": "again"}).notes[-1]
    assert (tmp_path / "inventory" / "inventory.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=f"holds the inventory {first.id[:12]} already"):
        make(tmp_path, rows(9))
    assert open_inventory(tmp_path).id == first.id


def test_it_pickles_as_its_path_and_keeps_the_place_of_moved_shards(tmp_path: Path) -> None:
    make(tmp_path / "data", [Sample(f"k{i}", 0, i, 0, 0, 1) for i in range(5000)])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    inventory = open_inventory(tmp_path / "data", data=elsewhere)
    raw = ForkingPickler.dumps(inventory)
    again = ForkingPickler.loads(raw)
    assert len(raw) < 1000
    assert (again.id, again.root, again.key(7)) == (inventory.id, elsewhere, "k7")


def test_columns_are_mapped_not_read(tmp_path: Path) -> None:
    column = make(tmp_path).label
    assert not column.flags.owndata and not column.flags.writeable


def test_a_copy_reads_the_shards_that_were_moved_or_packed_again(tmp_path: Path) -> None:
    original = make(tmp_path / "data")
    copy_inventory(original, tmp_path / "cache")
    copy_inventory(original, tmp_path / "cache")  # again, as a resume does
    moved = [row._replace(offset=row.offset + 512) for row in rows()]
    make(tmp_path / "again", moved, prefix="renamed")
    copy = open_inventory(tmp_path / "cache" / "inventory", data=tmp_path / "again", verify=True)
    assert copy.id == original.id
    assert copy.offset[0] == 512 and copy.shard_path(0) == tmp_path / "again" / "renamed-0.tar"
    assert open_inventory(tmp_path / "cache", data=tmp_path / "data").shard_path(0) == tmp_path / "data" / "s-0.tar"
    assert open_inventory(tmp_path / "cache", data=tmp_path / "gone").id == original.id  # shards are not needed to open


def test_data_of_another_id_is_refused_naming_both(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b", rows(9))
    with pytest.raises(DataError, match=f"{second.id[:12]}.*{first.id[:12]}"):
        open_inventory(tmp_path / "a", data=tmp_path / "b")
    with pytest.raises(DataError, match="already"):
        copy_inventory(first, tmp_path / "b")


def test_check_shards_names_what_is_missing_or_changed(tmp_path: Path) -> None:
    inventory = make(tmp_path)
    inventory.check_shards()
    (tmp_path / "s-1.tar").write_bytes(b"123")
    with pytest.raises(DataError, match=r"s-1.tar has 3 bytes, the inventory says 5"):
        inventory.check_shards()
    (tmp_path / "s-1.tar").unlink()
    with pytest.raises(DataError, match=r"s-1.tar is not in .*data.train or data.val in the config, or --data"):
        inventory.check_shards()


def test_a_shard_that_comes_back_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of shard 0 after one of shard 1"):
        make(tmp_path, [Sample("a", 0, 0, 1, 0, 0), Sample("b", 0, 0, 0, 0, 0)])


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 20000))
def test_blocks_are_whole_shards_of_about_the_asked_size(counts: list[int], block: int) -> None:
    bounds = block_bounds(counts, block).tolist()
    ends = np.cumsum([0, *counts]).tolist()
    assert bounds[0] == 0 and bounds[-1] == sum(counts)
    assert bounds == sorted(set(bounds)) and set(bounds) <= set(ends)
    sizes = np.diff(bounds)
    largest = max(counts)
    assert all(size <= block + block // 4 + largest for size in sizes)
    assert all(size >= min(block - largest / 2, largest / 2) for size in sizes[:-1])
    assert len(sizes) == 1 or sizes[-1] >= block // 4


def test_a_full_shard_pair_is_one_block() -> None:
    assert block_bounds([4096] * 12 + [848], 8192).tolist() == [0, 8192, 16384, 24576, 32768, 40960, 50000]


def test_it_imports_no_torch() -> None:
    code = "import sys, cskd.dataset.inventory, cskd.packing.pack; sys.exit(bool({'torch', 'webdataset'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
