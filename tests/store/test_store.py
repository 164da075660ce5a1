"""Units, commit records and caches: what is written is what is read, and damage is found and named."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.zstd
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.core.metadata.v3 import ArrayV3Metadata

from cskd.errors import CacheError
from cskd.storage import Place
from cskd.store.cache import Cache, create_cache, first_difference, open_cache
from cskd.store.commit import Commit, publish, read_commit, read_commits
from cskd.store.format import FORMAT, MANIFEST, MANIFEST_COPY, UNIT_FIELDS, commit_file
from cskd.store.manifest import Manifest, begin_manifest, read_manifest, write_manifest
from cskd.store.unit import content_hash, pack_unit, read_unit
from tests.caches import make_tiny_cache


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_tiny_cache(tmp_path)


def unit_path(cache: Cache, block: int = 0, view: int = 0) -> Path:
    commit = cache.commit_of(block, view)
    assert commit is not None
    return cache.root / commit.files[0].path


def test_the_same_arrays_give_the_same_bytes_and_come_back_as_they_were(tmp_path: Path) -> None:
    fields: dict[str, NDArray[Any]] = {"seed": np.arange(7, dtype=np.uint64), "label": np.arange(7, dtype=np.int32)}
    targets: dict[str, NDArray[Any]] = {"extra": np.arange(20, dtype=np.uint16), "empty": np.empty(0, np.uint16)}
    names: dict[str, tuple[str, ...]] = {
        "seed": ("sample",),
        "label": ("sample",),
        "extra": ("segment",),
        "empty": ("segment",),
    }
    data = pack_unit(fields, targets, names, {"codec": "x"})
    assert data == pack_unit(dict(reversed(fields.items())), targets, names, {"codec": "x"})
    path = tmp_path / "unit.zarr.zip"
    path.write_bytes(data)
    for got, expected in zip(read_unit(path), (fields, targets), strict=True):
        assert got.keys() == expected.keys()
        for name, array in expected.items():
            assert got[name].dtype == array.dtype
            assert np.array_equal(got[name], array)


def test_stock_zarr_opens_a_unit_and_sees_every_field_with_its_dimensions(cache: Cache) -> None:
    with zarr.storage.ZipStore(unit_path(cache), mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert group.attrs["format"] == FORMAT
        for name, (dtype, dimensions) in UNIT_FIELDS.items():
            array = group[name]
            assert isinstance(array, zarr.Array)
            assert array.dtype == dtype
            assert isinstance(array.metadata, ArrayV3Metadata)
            assert array.metadata.dimension_names == dimensions


def test_every_flipped_byte_of_a_unit_is_found_or_harmless(cache: Cache) -> None:
    path = unit_path(cache)
    whole = path.read_bytes()
    before = read_unit(path)
    expected = content_hash(before[0], {"x": before[1]})
    for at in np.random.default_rng(0).integers(0, len(whole), 60).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            fields, targets = read_unit(path)
        except CacheError as e:
            assert str(path) in str(e)
            continue
        assert content_hash(fields, {"x": targets}) == expected


def test_a_missing_chunk_is_corruption_and_never_zeros(cache: Cache, tmp_path: Path) -> None:
    path = unit_path(cache)
    less = tmp_path / "less.zarr.zip"
    with zipfile.ZipFile(path) as a, zipfile.ZipFile(less, "w") as b:
        for name in a.namelist():
            if not name.startswith("digest/c/"):
                b.writestr(name, a.read(name))
    with pytest.raises(CacheError, match=r"digest/c/0 is missing"):
        read_unit(less)


def test_the_first_commit_of_a_unit_counts_and_a_second_changes_nothing(cache: Cache) -> None:
    first = cache.commit_of(0, 0)
    assert first is not None
    other = type(first)(**{**vars(first), "content_hash": "0" * 64})
    assert publish(cache.root, other) is False
    assert read_commit(cache.root, 0, 0) == first


def test_a_changed_commit_record_is_refused(cache: Cache) -> None:
    path = cache.root / commit_file(0, 0)
    record = json.loads(path.read_text())
    record["commit"]["cached"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(CacheError, match="does not match its own hash"):
        cache.commit_of(0, 0)


def test_a_record_in_the_place_of_another_unit_is_refused(cache: Cache) -> None:
    a, b = (cache.root / commit_file(0, view) for view in (0, 1))
    b.write_bytes(a.read_bytes())
    with pytest.raises(CacheError, match="view 0"):
        cache.commit_of(0, 1)


def test_counts_that_do_not_add_up_are_refused(cache: Cache) -> None:
    unit = cache.read(0, 0, next(iter(cache.codecs)))
    fields = {name: array[:-1] for name, array in unit.fields.items()}
    with pytest.raises(CacheError, match=r"cached \+ 0 quarantined"):
        cache.add_unit(0, 0, fields, {}, {})


def test_seeds_of_another_view_are_found_when_a_unit_is_read(cache: Cache) -> None:
    name = next(iter(cache.codecs))
    commit, other = cache.commit_of(0, 0), cache.commit_of(0, 1)
    assert commit and other
    (cache.root / commit.files[0].path).write_bytes((cache.root / other.files[0].path).read_bytes())
    with pytest.raises(CacheError, match="has seed"):
        cache.read(0, 0, name)


def test_resuming_with_another_identity_names_the_field_and_both_values(cache: Cache) -> None:
    identity = replace(cache.identity, recipe={**cache.identity.recipe, "flip": 0.25})
    with pytest.raises(CacheError, match=r"recipe\.flip = 0\.5, this config has 0\.25"):
        create_cache(cache.root, replace(cache.manifest, identity=identity), cache.inventory)


def test_a_cache_grows_by_views_and_keeps_its_units(cache: Cache) -> None:
    grown = create_cache(cache.root, replace(cache.manifest, views=cache.views + 3), cache.inventory)
    assert grown.views == cache.views + 3
    assert {view for _, view in grown.missing()} == set(range(cache.views, cache.views + 3))


def test_an_edited_manifest_is_refused(cache: Cache) -> None:
    manifest = json.loads((cache.root / MANIFEST).read_text())
    manifest["identity"]["recipe"]["seed"] = 99
    (cache.root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="does not match its own hash"):
        open_cache(cache.root)


def test_a_manifest_of_another_version_is_written_as_it_was_read(tmp_path: Path) -> None:
    """Keys that are not known stay, those that are not there stay away, and a null stays a null."""
    cache = make_tiny_cache(tmp_path)
    raw = {**cache.manifest.sealed, "later": [1], "precision": None}
    raw["identity"] = {**raw["identity"], "also later": {"a": None}}
    manifest = Manifest.read(raw)
    assert manifest.notes is None and "notes" not in raw
    assert replace(manifest, views=manifest.views).facts | {"identity": raw["identity"]} == {
        key: value for key, value in raw.items() if key not in ("format", "fingerprint", "sha256")
    }
    assert manifest.identity.facts == raw["identity"]
    write_manifest(cache.root, manifest)
    assert read_manifest(cache.root) == manifest
    assert read_manifest(cache.root) != replace(manifest, notes=[])


def test_first_difference_is_the_dotted_name() -> None:
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert first_difference({"a": 1}, {"a": 1}) is None


def test_a_file_and_a_cache_without_inventory_are_named(tmp_path: Path) -> None:
    root = make_tiny_cache(tmp_path).root
    with pytest.raises(CacheError, match=r"manifest\.json is a file, expected a cache, made by"):
        open_cache(root / "manifest.json")
    shutil.rmtree(root / "inventory")
    with pytest.raises(CacheError, match=r"has lost its inventory folder.*cskd repair"):
        open_cache(root)


def test_of_two_that_begin_a_cache_the_first_counts_and_the_other_is_refused(tmp_path: Path) -> None:
    """As two processes do that both found no manifest."""
    cache = make_tiny_cache(tmp_path)
    (cache.root / MANIFEST).unlink()
    begin_manifest(cache.root, cache.manifest)
    identity = replace(cache.identity, recipe={**cache.identity.recipe, "seed": 8})
    other = replace(cache.manifest, identity=identity)
    begin_manifest(cache.root, other)
    assert open_cache(cache.root).fingerprint == cache.fingerprint
    with pytest.raises(CacheError, match=r"was made with recipe\.seed = 7, this config has 8"):
        create_cache(cache.root, other, cache.inventory)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"autocast": "bf16"}, 'teacher.precision = "float32", this config has "bf16"; set teacher.precision back'),
        ({"dtype": "float64"}, 'teacher.precision = "float32", this config has "float64"; set teacher.precision back'),
        ({"device": "cuda"}, 'cache.device = "cpu", this config has "cuda"; set cache.device back'),
        ({"batch": 8}, "teacher.batch = 4, this config has 8; set teacher.batch back"),
    ],
)
def test_another_teacher_is_refused_by_the_key_that_sets_it_today(
    tmp_path: Path, facts: dict[str, Any], said: str
) -> None:
    """Caches name the arithmetic by keys of older configs, which a config of today refuses next to today's."""
    tiny = make_tiny_cache(tmp_path)

    def manifest(**more: Any) -> Manifest:
        teacher = {**tiny.identity.teacher, "autocast": "none", "dtype": "float32", "batch": 4, **more}
        return replace(tiny.manifest, identity=replace(tiny.identity, teacher=teacher))

    root = tmp_path / "other"
    create_cache(root, manifest(), tiny.inventory)
    with pytest.raises(CacheError) as error:
        create_cache(root, manifest(**facts), tiny.inventory)
    assert said in str(error.value)


def test_a_death_between_the_two_copies_of_the_manifest_is_made_good(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path)
    (cache.root / MANIFEST_COPY).unlink()
    create_cache(cache.root, cache.manifest, cache.inventory)
    assert (cache.root / MANIFEST_COPY).read_bytes() == (cache.root / MANIFEST).read_bytes()


@pytest.mark.parametrize("chunk_bytes", [64, 64 * 2**20])
def test_a_unit_reads_as_stock_zarr_reads_it_in_one_chunk_or_many(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("cskd.store.unit.CHUNK_BYTES", chunk_bytes)
    unit = cache.read(0, 0, next(iter(cache.codecs)))
    targets = {**unit.targets, "empty": np.empty((0, 3), np.float16), "odd": np.arange(35, dtype=np.float32)}
    names = {name: dimensions for name, (_, dimensions) in UNIT_FIELDS.items()}
    names |= {name: tuple("abc"[: array.ndim]) for name, array in targets.items()}
    path = tmp_path / "unit.zarr.zip"
    path.write_bytes(pack_unit(unit.fields, targets, names, {}))
    found = read_unit(path)
    with zarr.storage.ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        for place, arrays in zip(("", "targets/"), found, strict=True):
            for name, array in arrays.items():
                stock = group[f"{place}{name}"]
                assert isinstance(stock, zarr.Array)
                assert (array.dtype, array.shape) == (stock.dtype, stock.shape)
                np.testing.assert_array_equal(array, np.asarray(stock[...]))
    assert found[0].keys() == unit.fields.keys() and found[1].keys() == targets.keys()


def rezipped(path: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of a unit file with some members replaced, its zip checksums in order."""
    copy = path.with_name("changed.zarr.zip")
    with zipfile.ZipFile(path) as a, zipfile.ZipFile(copy, "w", compression) as b:
        for name in a.namelist():
            b.writestr(name, change.get(name, a.read(name)))
    return copy


def test_chunks_that_hold_more_or_less_than_their_array_are_refused_unread(cache: Cache) -> None:
    """A small frame that decodes to gigabytes, and one that fills an array in part; each with a right crc32c."""
    path = unit_path(cache)
    with zipfile.ZipFile(path) as z:
        whole = numcodecs.zstd.decompress(z.read("digest/c/0")[:-4])
    for data in (whole * 1000, whole[:-4], b""):
        frame = numcodecs.zstd.compress(data, 9)
        chunk = frame + google_crc32c.value(frame).to_bytes(4, "little")
        with pytest.raises(CacheError, match=rf"digest/c/0 decompresses to {len(data)} bytes, expected {len(whole)}"):
            read_unit(rezipped(path, {"digest/c/0": chunk}))


def test_compressed_members_and_chunks_with_a_wrong_checksum_of_their_own_are_refused(cache: Cache) -> None:
    path = unit_path(cache)
    with pytest.raises(CacheError, match="expected a stored member"):
        read_unit(rezipped(path, {}, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path) as z:
        chunk = z.read("digest/c/0")
    with pytest.raises(CacheError, match="digest/c/0 does not match its checksum"):
        read_unit(rezipped(path, {"digest/c/0": chunk[:-1] + bytes([chunk[-1] ^ 1])}))


def test_each_record_is_read_once_by_a_loop_that_asks_what_is_missing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 asks after every pass: with 47,100 units that must not be 47,100 files each time."""
    read = list[tuple[int, int]]()

    def counted(root: Place, wanted: Sequence[tuple[int, int]]) -> list[Commit | None]:
        read.extend(wanted)
        return read_commits(root, wanted)

    monkeypatch.setattr("cskd.store.cache.read_commits", counted)
    units = [(b, v) for b in range(cache.blocks) for v in range(cache.views)]
    record = cache.root / commit_file(0, 1)
    whole = record.read_bytes()
    record.unlink()
    assert cache.missing() == [(0, 1)] and not cache.quarantined().any()
    assert read == [unit for unit in units if unit != (0, 1)]
    record.write_bytes(whole)
    assert cache.missing() == cache.missing() == [] and read[-1] == (0, 1) and len(read) == len(units)
    record.unlink()
    assert cache.missing() == [(0, 1)] and cache.missing([0, 2]) == [], "a withdrawn unit is missing again"
    record.write_bytes(whole[:-20])
    with pytest.raises(CacheError, match="not a readable commit record"):
        cache.missing()


def test_an_array_too_large_for_what_is_stored_of_it_is_refused_before_it_is_made(cache: Cache) -> None:
    path = unit_path(cache)
    with zipfile.ZipFile(path) as z:
        about = json.loads(z.read("digest/zarr.json"))
    about["shape"] = about["chunk_grid"]["configuration"]["chunk_shape"] = [2**33]
    with pytest.raises(CacheError, match=r"digest has chunks \[8589934592\] of 34359738368 bytes"):
        read_unit(rezipped(path, {"digest/zarr.json": json.dumps(about).encode()}))
