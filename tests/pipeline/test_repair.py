"""`cskd repair` makes a damaged cache what it was; `cskd gc` removes what killed writers left, and nothing else."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cskd.errors import CacheError, CskdError, DataError
from cskd.files.claims import Claims
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.gc import gc
from cskd.pipeline.care.repair import RepairReport, render, repair
from cskd.pipeline.care.verify import verify
from cskd.seeds import view_seeds
from cskd.store.cache import open_cache
from cskd.store.commit import read_commit
from cskd.store.format import commit_file
from cskd.store.manifest import write_manifest
from cskd.store.seal import seal_cache
from cskd.views.mixing import NONE, partners, quads
from tests.caches import make_tiny_cache, make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=42, block=20, shard=10)
    cache_teacher(config(folder), quiet=True)
    return folder / "cache"


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def shown(report: RepairReport) -> list[str]:
    out = io.StringIO()
    render(report, Console(file=out, width=200))
    return out.getvalue().splitlines()


def times(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_whole_cache_is_left_as_it_is(cache: Path) -> None:
    before, written = files(cache), times(cache)
    report = repair(cache, quiet=True)
    assert (report.restored, report.withdrawn, report.missing, report.rebuilt) == ([], [], 0, 0)
    assert files(cache) == before and times(cache) == written
    assert shown(report)[0] == f"{cache}: whole, nothing to do"


def test_every_kind_of_file_is_found_and_brought_back_byte_for_byte(cache: Path, made: Path) -> None:
    whole = files(made)
    rng = np.random.default_rng(0)
    for name, data in whole.items():
        if name.startswith(("commits/b00000/", "units/b00000/")):
            continue  # of these kinds are those of the other block, too
        flip(cache / name, int(rng.integers(8 * len(data))))
        try:
            found = verify(cache, quiet=True)
        except CskdError:
            pass
        else:
            assert not found.sound, name
        report = repair(cache, quiet=True)
        of_unit = "commits" in name or "units" in name
        assert (len(report.withdrawn), report.rebuilt, len(report.restored)) == (of_unit, of_unit, not of_unit), name
        assert of_unit or report.restored[0].startswith(f"{name.partition('/')[0]}: "), name
        assert verify(cache, quiet=True).sound and files(cache) == whole, name
        assert not of_unit or shown(report)[1].endswith("0 files restored; 1 unit damaged or lost; 1 made")
    again = repair(cache, quiet=True)
    assert (again.restored, again.withdrawn, again.rebuilt) == ([], [], 0)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.copy.json", "resolved.yaml", "inventory", "units/b00000"])
def test_what_is_missing_is_brought_back(cache: Path, made: Path, name: str) -> None:
    path = cache / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = repair(cache, quiet=True)
    assert files(cache) == files(made)
    if name.startswith("units"):
        assert (report.restored, len(report.withdrawn), report.rebuilt) == ([], 3, 3)
    else:
        assert [line.partition(":")[0] for line in report.restored] == [name]
        assert (report.withdrawn, report.rebuilt) == ([], 0)


def test_files_that_were_swapped_are_put_right(cache: Path, made: Path) -> None:
    units = sorted((cache / "units" / "b00000").iterdir())
    a, b = units[0].read_bytes(), units[2].read_bytes()
    units[0].write_bytes(b)
    units[2].write_bytes(a)
    records = [cache / commit_file(1, view) for view in (0, 1)]
    one, two = (record.read_bytes() for record in records)
    records[0].write_bytes(two)
    records[1].write_bytes(one)
    damaged = verify(cache, quiet=True).errors
    assert [e.partition(":")[0] for e in damaged] == [
        f"block {b}, view {v}" for b, v in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert repair(cache, quiet=True).rebuilt == 4
    assert files(cache) == files(made)


def test_both_manifests_damaged_is_said(cache: Path) -> None:
    for name in ("manifest.json", "manifest.copy.json"):
        (cache / name).write_text("{")
    with pytest.raises(CacheError, match="both copies of its manifest are damaged"):
        repair(cache, quiet=True)


def test_the_manifest_of_another_cache_does_not_withdraw_every_unit(cache: Path, made: Path, tmp_path: Path) -> None:
    """It is whole, and so is the copy it differs from: the records tell which of them is this cache's."""
    (tmp_path / "net.py").write_text(TEACHER)
    shutil.copytree(made.parent / "train", tmp_path / "train")
    other = config(tmp_path, recipe={"size": 32, "seed": 5}, cache={"path": str(tmp_path / "other")})
    cache_teacher(other, quiet=True)
    foreign = tmp_path / "other" / "manifest.json"
    shutil.copy(foreign, cache / "manifest.json")
    report = repair(cache, quiet=True)
    assert (report.withdrawn, report.rebuilt) == ([], 0) and "another cache's" in report.restored[0]
    assert files(cache) == files(made)
    for name in ("manifest.json", "manifest.copy.json"):
        shutil.copy(foreign, cache / name)
    with pytest.raises(CacheError, match=r"its 6 commit records are of fingerprint .* another cache's"):
        repair(cache, quiet=True)
    assert len(list(cache.glob("commits/*/*.json"))) == 6


def test_the_inventory_of_another_data_set_is_replaced(cache: Path, made: Path, tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "other", n=30, block=20, shard=10)
    shutil.rmtree(cache / "inventory")
    shutil.copytree(tmp_path / "other" / "inventory", cache / "inventory")
    assert "another data set" in repair(cache, quiet=True).restored[0]
    assert files(cache) == files(made)


def test_moved_images_are_found_with_data(cache: Path, made: Path, tmp_path: Path) -> None:
    (cache / commit_file(0, 0)).unlink()
    moved = shutil.copytree(made.parent / "train", tmp_path / "moved")
    assert repair(cache, data=Path(moved), quiet=True).rebuilt == 1


def test_units_that_were_never_made_are_counted_apart_and_so_is_the_seal(cache: Path, made: Path) -> None:
    for name in ("sealed.json", commit_file(0, 1), commit_file(1, 2)):
        (cache / name).unlink()
    flip(next((cache / "units" / "b00000").glob("v0000.envelope.*")), 99)
    report = repair(cache, quiet=True)
    assert (len(report.withdrawn), report.missing, report.rebuilt) == (1, 2, 3)
    assert report.restored == ["sealed.json: was not there"] and files(cache) == files(made)
    assert shown(report)[-2].endswith(": 1 file restored; 1 unit damaged or lost; 3 made, 2 of which were missing")


def test_a_manifest_in_other_bytes_is_restored_and_counted(cache: Path, made: Path) -> None:
    for name in ("manifest.json", "manifest.copy.json"):
        path = cache / name
        path.write_text(json.dumps(json.loads(path.read_text())))
    report = repair(cache, quiet=True)
    assert report.restored == [
        f"{name}: was not, byte for byte, what was written" for name in ("manifest.json", "manifest.copy.json")
    ]
    assert files(cache) == files(made)


def test_without_the_images_no_unit_is_withdrawn_and_one_line_says_where_they_were_sought(
    cache: Path, made: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(made.parent / "train", tmp_path / "elsewhere")
    flip(next((cache / "units" / "b00000").glob("v0000.envelope.*")), 99)
    (cache / "resolved.yaml").unlink()
    before = files(cache)
    restored = "cache: 1 file restored, 1 unit can't be made again"
    with pytest.raises(DataError, match=rf"{restored}: .* is the folder above elsewhere, .*; give .*elsewhere"):
        repair(cache, data=tmp_path, quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"1 unit can't be made again: no inventory at .*--data"):
        repair(cache, data=tmp_path / "empty", quiet=True)
    make_tiny_data(tmp_path / "other", n=30, block=20, shard=10)
    with pytest.raises(DataError, match=r"other holds the data set"):
        repair(cache, data=tmp_path / "other", quiet=True)
    shard = data / "00001.tar"
    shard.rename(tmp_path / "shard")
    with pytest.raises(DataError, match=r"1 unit can't be made again: shard 00001.tar is not in .*--data"):
        repair(cache, data=data, quiet=True)
    assert {name: raw for name, raw in files(cache).items() if name != "resolved.yaml"} == before
    (tmp_path / "shard").rename(shard)
    assert repair(cache, data=data, quiet=True).rebuilt == 1 and files(cache) == files(made)


def test_where_the_teacher_is_gone_what_was_done_is_said_in_one_line(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path)
    seal_cache(cache, 0.1)
    (cache.root / commit_file(0, 0)).unlink()
    (cache.root / "resolved.yaml").unlink()
    with pytest.raises(CskdError, match=r"cache: 1 file restored, 1 unit can't be made again: teacher.model is empty"):
        repair(cache.root, quiet=True)


def test_gc_removes_what_is_old_and_not_committed(cache: Path, made: Path) -> None:
    left = [
        cache / "units" / "b00000" / "v0000.envelope.0000000000000000.zarr.zip",
        cache / "units" / "b00000" / ".v0000.x.tmp",
        cache / "commits" / "b00001" / ".v0000.json.1.abc.tmp",
        cache / ".manifest.json.2.abc.tmp",
        cache / "claims" / "b00000.g0000",
        cache / ".inventory.partial.7.abc" / "key.npy",
    ]
    for folder in (left[-1].parent, left[-2].parent):
        folder.mkdir()
    for path in left:
        path.write_bytes(b"12345")
        os.utime(path, (0, 0))
    young = cache / "units" / "b00001" / ".v0001.y.tmp"
    young.write_bytes(b"1")
    names = sorted(str(p.relative_to(cache)) for p in left)
    listed = gc(cache, dry_run=True)
    assert sorted(listed.removed) == names and all(path.exists() for path in left)
    report = gc(cache)
    assert (sorted(report.removed), report.bytes, report.young) == (names, 30, 1)
    assert not left[-1].parent.exists()
    young.unlink()
    (cache / "claims").rmdir()
    assert files(cache) == files(made)


def test_gc_counts_the_bytes_that_come_free_and_a_second_name_or_a_link_is_none(cache: Path, tmp_path: Path) -> None:
    """As a kill between the link and the removal of the temp file leaves it."""
    (tmp_path / "elsewhere").write_bytes(b"1" * 1000)
    (cache / "units" / "b00000" / ".v0000.y.tmp").symlink_to(tmp_path / "elsewhere")
    os.link(cache / commit_file(0, 0), cache / "commits" / "b00000" / ".v0000.json.7.abc.tmp")
    before = sum(p.lstat().st_size for p in cache.rglob("*") if p.is_file() and not p.name.endswith(".json.7.abc.tmp"))
    report = gc(cache, older_than=0)
    assert len(report.removed) == 2 and (tmp_path / "elsewhere").exists() and (cache / commit_file(0, 0)).exists()
    assert before - sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) == report.bytes


def test_gc_keeps_units_of_views_that_an_older_manifest_does_not_know(cache: Path, made: Path) -> None:
    write_manifest(cache, replace(open_cache(cache).manifest, views=2))
    assert gc(cache, older_than=0).removed == []


def test_gc_needs_no_images(cache: Path, made: Path, tmp_path: Path) -> None:
    """Nor minds what lies today where they were."""
    make_tiny_data(tmp_path / "other", n=30, block=20, shard=10)
    write_manifest(cache, replace(open_cache(cache).manifest, data=str(tmp_path / "other")))
    assert gc(cache, older_than=0).removed == []


def test_gc_takes_no_file_from_under_a_writer(cache: Path) -> None:
    with Claims(cache) as claims:
        assert claims.take("b00000.g0000") is not None
        with pytest.raises(CacheError, match="being written to"):
            gc(cache, older_than=0)
        assert gc(cache, older_than=60).removed == []
    gc(cache, older_than=0)


def test_units_that_quarantine_other_samples_than_the_rest_are_found_and_the_block_is_made_again(
    cache: Path, made: Path
) -> None:
    """Which images are bad can't depend on the view: one of the units is wrong, though each is whole."""
    open_ = open_cache(cache)
    commit = read_commit(cache, 1, 2)
    assert commit is not None
    (cache / commit_file(1, 2)).unlink()
    unit = {codec: open_.read(1, 1, codec) for codec in open_.codecs}
    fields = dict(next(iter(unit.values())).fields)
    keep = np.arange(len(fields["key_hash"])) != 4
    fields |= {"seed": view_seeds(open_.recipe.seed, open_.inventory.id, fields["key_hash"], 2)}
    order = quads(len(keep), open_.recipe, open_.inventory.id, 1, 0)
    mixed = partners(order, open_.recipe, 2)
    fields |= {"partner": np.where(fields["mode"] != NONE, mixed, -1).astype(np.int32)}
    targets = {name: codec.take(unit[name].targets, np.flatnonzero(keep)) for name, codec in open_.codecs.items()}
    open_.add_unit(1, 2, {name: field[keep] for name, field in fields.items()}, targets, {4: "made up"})
    (cache / "sealed.json").unlink()
    assert [e.partition(":")[0] for e in verify(cache, quiet=True).errors] == ["block 1, view 2"]
    report = repair(cache, quiet=True)
    assert report.rebuilt == 3 and verify(cache, quiet=True).sealed
    assert [line.partition(":")[0] for line in report.withdrawn] == [f"block 1, view {view}" for view in range(3)]
    assert report.restored == ["sealed.json: was not there"]
    gc(cache, older_than=0)
    assert files(cache) == files(made)


def test_a_lost_unit_is_made_again_and_a_damaged_seal_anew(cache: Path, made: Path) -> None:
    (cache / commit_file(0, 1)).unlink()
    report = repair(cache, quiet=True)
    assert report.withdrawn[0].startswith("block 0, view 1: its record") and report.rebuilt == 1
    flip(cache / "sealed.json", 100)
    assert repair(cache, quiet=True).restored[0].startswith("sealed.json: ")
    assert files(cache) == files(made)


def test_stage_1_stops_at_a_damaged_record_and_says_how_it_is_mended(cache: Path, made: Path) -> None:
    """It may not take the damaged one's place in silence, and must not be taken for one that is there."""
    (cache / commit_file(0, 1)).write_bytes((made / commit_file(0, 1)).read_bytes()[:100])
    with pytest.raises(
        CacheError,
        match=r"v0001.json is not a readable commit record .*`cskd repair` makes it again; so does this: remove commits",
    ):
        cache_teacher(config(made.parent, cache={"path": str(cache)}), quiet=True)


def test_gc_stops_where_a_record_is_damaged(cache: Path) -> None:
    (cache / commit_file(0, 1)).write_text("{")
    before = files(cache)
    with pytest.raises(CacheError, match="not a readable commit record"):
        gc(cache, older_than=0)
    assert files(cache) == before
    assert open_cache(cache).views == 3


def test_a_manifest_that_is_another_json_is_named_and_brought_back(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path)
    seal_cache(cache, 0.1)
    whole = (cache.root / "manifest.json").read_bytes()
    (cache.root / "manifest.json").write_bytes((cache.root / "commits/b00000/v0001.json").read_bytes())
    with pytest.raises(CacheError, match=r"manifest\.json has format None.*cskd repair"):
        verify(cache.root, quiet=True)
    repair(cache.root, quiet=True)
    assert (cache.root / "manifest.json").read_bytes() == whole


def test_every_file_outside_the_units_that_vanishes_is_named_and_brought_back(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path)
    seal_cache(cache, 0.1)
    for path in sorted(p for p in cache.root.rglob("*") if p.is_file() and p.suffix in (".npy", ".json", ".yaml")):
        if "commits" in path.parts or path.name == "sealed.json":  # without a seal a cache is whole, and says so
            continue
        whole = path.read_bytes()
        path.unlink()
        try:
            errors = verify(cache.root, quiet=True).errors
        except CskdError as e:
            errors = [str(e)]
        assert any(path.name in error or str(path.parent) in error for error in errors), path
        repair(cache.root, quiet=True)
        assert path.read_bytes() == whole
