"""`cskd repair` makes a damaged cache what it was; `cskd gc` removes what killed writers left, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cskd.augment.mixing import NONE, partners, quads
from cskd.errors import CacheError, CskdError
from cskd.files.claims import Claims
from cskd.seeds import view_seeds
from cskd.store.cache import open_cache
from cskd.store.commit import read_commit
from cskd.store.format import commit_file
from cskd.store.seal import seal_cache
from pipeline.cache_teacher import cache_teacher
from pipeline.gc import gc
from pipeline.repair import repair
from pipeline.verify import verify
from tests.caches import make_tiny_cache, make_tiny_data
from tests.test_pipeline import TEACHER, config


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


def test_a_whole_cache_is_left_as_it_is(cache: Path) -> None:
    before = files(cache)
    report = repair(cache, quiet=True)
    assert (report.restored, report.withdrawn, report.rebuilt) == ([], [], 0)
    assert files(cache) == before


def test_every_kind_of_file_is_found_and_brought_back_byte_for_byte(cache: Path, made: Path) -> None:
    whole = files(made)
    rng = np.random.default_rng(0)
    for name, data in whole.items():
        flip(cache / name, int(rng.integers(8 * len(data))))
        try:
            found = verify(cache, quiet=True)
        except CskdError:
            pass
        else:
            assert not found.sound, name
        report = repair(cache, quiet=True)
        assert report.rebuilt == int("commits" in name or "units" in name), name
        assert verify(cache, quiet=True).sound and files(cache) == whole, name


@pytest.mark.parametrize("name", ["manifest.json", "manifest.copy.json", "resolved.yaml", "inventory", "units/b00000"])
def test_what_is_missing_is_brought_back(cache: Path, made: Path, name: str) -> None:
    path = cache / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    repair(cache, quiet=True)
    assert files(cache) == files(made)


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
    open_.add_unit(1, 2, {name: field[keep] for name, field in fields.items()}, targets, {4: "made up"}, {})
    (cache / "sealed.json").unlink()
    assert [e.partition(":")[0] for e in verify(cache, quiet=True).errors] == ["block 1, view 2"]
    report = repair(cache, quiet=True)
    assert report.rebuilt == 3 and verify(cache, quiet=True).sealed
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
        CacheError, match=r"v0001.json is not a readable commit record .*`cskd repair .*cache` makes it"
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
