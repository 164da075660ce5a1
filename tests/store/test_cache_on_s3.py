"""A cache on an object store is the cache in a folder: same keys, same bytes, same content root; and its care."""

from __future__ import annotations

import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd.errors import CacheError, CskdError, PathError
from cskd.pipeline.care.gc import gc
from cskd.pipeline.care.verify import verify
from cskd.pipeline.look.inspect_cache import inspect
from cskd.storage import open_storage
from cskd.storage.objects import Objects
from cskd.store.cache import Cache, create_cache, open_cache
from cskd.store.commit import publish, write_file
from cskd.store.format import INDEX, SEAL, commit_file
from cskd.store.seal import seal_cache
from tests.caches import make_tiny_cache
from tests.s3 import new_bucket, use_endpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[tuple[Cache, Cache]]:
    """The same sealed cache in a folder and in a bucket; the variables that this process finds the bucket by."""
    folder = tmp_path_factory.mktemp("s3")
    with pytest.MonkeyPatch.context() as patch:
        use_endpoint(patch, s3_endpoint)
        patch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        caches = [
            make_tiny_cache(folder / name, views=2, quarantine=[2], place=place)
            for name, place in (("here", None), ("there", f"{new_bucket(s3_endpoint)}/caches/mine"))
        ]
        for cache in caches:
            seal_cache(cache, 1.0)
        yield caches[0], caches[1]


@pytest.fixture
def again(made: tuple[Cache, Cache], s3: str) -> Cache:
    """A copy of the cache in a bucket of its own."""
    there = made[1]
    copy = open_storage(f"{s3}/copy")
    for about in there.storage.list():
        copy.put(about.key, there.storage.get(about.key))
    return open_cache(copy, index=False)


def test_verify_says_the_same_of_a_damaged_one_in_the_same_order_with_its_units_read_at_the_same_time(
    made: tuple[Cache, Cache], again: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made[0].root, tmp_path / "here")
    here = open_cache(tmp_path / "here", index=False)
    files = {unit: again.commit_of(*unit).files[0].path for unit in ((0, 0), (0, 1), (1, 0))}  # type: ignore[union-attr]
    for storage in (here.storage, again.storage):
        storage.put(files[0, 0], storage.get(files[0, 0])[:-1] + b"x")
        storage.delete(files[0, 1])
        storage.put(files[1, 0], b"more" + storage.get(files[1, 0]))
        storage.put(str(commit_file(1, 1)), b"{")
    together, in_flight, lock, get = threading.Event(), 0, threading.Lock(), Objects.get

    def counted(self: Objects, key: str, *rest: Any, **options: Any) -> bytes:
        nonlocal in_flight
        if key.startswith("units/"):
            with lock:
                in_flight += 1
            if in_flight == 3:  # of the units whose record can be read
                together.set()
            assert together.wait(20)
        return get(self, key, *rest, **options)

    monkeypatch.setattr(Objects, "get", counted)
    found = [verify(cache.location, quiet=True) for cache in (here, again)]
    errors = [[re.sub(r"\S*/(here|copy)", "CACHE", e) for e in report.errors] for report in found]
    assert len(errors[0]) == 4 and errors[0] == [
        e.replace("no such object", "No such file or directory") for e in errors[1]
    ]
    named = ("cache", "errors")
    assert replace(found[0], **dict.fromkeys(named)) == replace(found[1], **dict.fromkeys(named))  # type: ignore[arg-type]


def test_it_holds_what_the_folder_holds(made: tuple[Cache, Cache]) -> None:
    here, there = made
    contents = [{about.key: cache.storage.get(about.key) for about in cache.storage.list()} for cache in made]
    assert contents[0].keys() == contents[1].keys() and INDEX in contents[0]
    differ = {key for key in contents[0] if contents[0][key] != contents[1][key]}
    named = {"manifest.json", "manifest.copy.json", "resolved.yaml", "inventory/inventory.json"}  # name folders
    assert differ <= named
    assert open_cache(here.location).content_root() == open_cache(there.location).content_root()


def test_it_is_read_as_the_folder_is(made: tuple[Cache, Cache]) -> None:
    here, there = (open_cache(cache.location) for cache in made)
    np.testing.assert_array_equal(here.quarantined(), there.quarantined())
    for name, array in here.read(1, 1, "envelope").targets.items():
        np.testing.assert_array_equal(array, there.read(1, 1, "envelope").targets[name])
    report, facts = verify(Path(there.location), replay=2, quiet=True), inspect(Path(there.location))
    assert report.sound and report.sealed and report.cache == facts.cache == there.location
    assert facts.sealed and not facts.errors and facts.agreement == inspect(here.root).agreement
    with pytest.raises(PathError, match=re.escape(there.location)):
        _ = there.root


def test_a_sealed_cache_is_opened_by_few_requests(made: tuple[Cache, Cache]) -> None:
    there = open_cache(made[1].location)
    there.quarantined()
    assert there.missing() == []
    # manifest, header of the inventory, seal and index: no record, and no list of them
    assert there.storage.counts.requests == 4


def test_damage_is_found_and_left_overs_go(again: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    file = again.commit_of(0, 0).files[0].path  # type: ignore[union-attr]
    data = again.storage.get(file)
    again.storage.put("units/b00000/v0000.envelope.0000000000000000.zarr.zip", b"left over")
    with pytest.raises(CacheError, match="take --older-than 600 or more"):
        gc(Path(again.location), older_than=0)
    monkeypatch.setattr("cskd.pipeline.care.gc.SETTLED", 0.0)
    assert gc(Path(again.location), older_than=0).removed == ["units/b00000/v0000.envelope.0000000000000000.zarr.zip"]
    again.storage.put(file, data[:-9] + b"x" + data[-8:])
    errors = verify(Path(again.location), quiet=True).errors
    assert len(errors) == 1 and f"{again.location}/{file} has {len(data)} bytes that don't match its hash" in errors[0]
    again.storage.delete(file)
    (error,) = inspect(Path(again.location)).errors
    assert f"{file} is not there" in error
    with pytest.raises(CacheError, match="repair"):
        open_cache(again.location).read(0, 0, "envelope")


def test_a_second_cache_is_refused_and_a_place_without_one_said(made: tuple[Cache, Cache], s3: str) -> None:
    there = made[1]
    other = replace(there.manifest, identity=replace(there.identity, grid=(5, 5)))
    with pytest.raises(CacheError, match="was made with grid"):
        create_cache(there.location, other, there.inventory)
    with pytest.raises(CacheError, match=f"no cache at {s3}/none"):
        open_cache(f"{s3}/none")
    with pytest.raises(CskdError, match="there is no bucket 'nobody'"):
        open_cache("s3://nobody/none")


@pytest.mark.parametrize("where", [0, 1])
def test_an_index_never_lies(made: tuple[Cache, Cache], again: Cache, tmp_path: Path, where: int) -> None:
    """It counts where it is of what is sealed; else the records do."""
    cache = (
        again
        if where
        else Cache(Path(shutil.copytree(made[0].root, tmp_path / "x")), made[0].manifest, again.inventory)
    )
    index, seal = cache.storage.get(INDEX), cache.storage.get(SEAL)

    def opened() -> Cache:
        return open_cache(cache.location, images=False)

    assert opened().index is not None
    record = str(commit_file(1, 0))
    data = cache.storage.get(record)
    cache.storage.delete(record)  # by hand: stage 1 looks at the records, and makes it again
    assert open_cache(cache.location, images=False, index=False).missing() == [(1, 0)] and opened().missing() == []
    assert "its record" in verify(Path(cache.location), quiet=True).errors[0]
    cache.storage.put(record, data)
    damages = (index[:-3], index[:40] + b"\0" + index[41:], b"", b"\x28\xb5\x2f\xfd" + index[4:20])
    for damage in damages[: 1 if where else None]:
        cache.storage.put(INDEX, damage)
        assert opened().index is None and opened().content_root() == cache.content_root()
        (error,) = verify(Path(cache.location), quiet=True).errors
        assert f"{cache.location}/{INDEX} does not hold the records" in error
    seal_cache(cache, 1.0)
    assert cache.storage.get(INDEX) == index
    cache.storage.put(SEAL, seal.replace(b'"views": 2', b'"views": 1'))
    assert opened().index is None
    cache.storage.delete(SEAL)
    assert opened().index is None
    cache.storage.delete(INDEX)  # as an older version sealed it
    cache.storage.put(SEAL, seal)
    assert opened().index is None and verify(Path(cache.location), quiet=True).sealed


def test_a_unit_made_again_under_another_name_is_read_by_its_record(made: tuple[Cache, Cache], tmp_path: Path) -> None:
    """As by `cskd repair` on another machine with another zstd, while a run goes on that knows the index of before."""
    cache = Cache(
        Path(shutil.copytree(made[0].root, tmp_path / "x")), made[0].manifest, made[0].inventory, reads_index=True
    )
    assert cache.index is not None
    old, whole = cache.index.commit(1, 1), cache.read(1, 1, "envelope")
    path = cache.root / old.files[0].path
    with zipfile.ZipFile(path, "a") as z:
        z.comment = b"the same arrays in other bytes"
    data = path.read_bytes()
    path.unlink()
    (cache.root / commit_file(1, 1)).unlink()
    file = write_file(cache.storage, 1, 1, "envelope", data, old.files[0].target_bytes)
    assert publish(cache.storage, replace(old, files=[file])) and not path.exists()
    np.testing.assert_array_equal(cache.read(1, 1, "envelope").targets["start"], whole.targets["start"])
    (cache.root / commit_file(1, 1)).unlink()
    with pytest.raises(CacheError, match="repair"):
        cache.read(1, 1, "envelope")
