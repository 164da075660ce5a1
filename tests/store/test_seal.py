"""The seal: a finished cache says that it is, a unit that vanishes later is lost and not unmade, and content can't be exchanged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cskd.errors import CacheError
from cskd.files.durable import json_bytes
from cskd.pipeline.care.repair import repair
from cskd.pipeline.care.verify import verify
from cskd.pipeline.look.inspect_cache import inspect
from cskd.store.cache import Cache, create_cache, open_cache
from cskd.store.commit import Commit, publish, read_commit
from cskd.store.format import INDEX, SEAL, commit_file
from cskd.store.manifest import write_resolved
from cskd.store.seal import read_seal, seal_cache, seal_facts
from tests.caches import make_tiny_cache


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = make_tiny_cache(tmp_path, quarantine=[3])
    seal_cache(cache, 0.1)
    return cache


def test_a_sealed_cache_says_so_and_its_counts_add_up(cache: Cache) -> None:
    seal = read_seal(cache)
    assert seal is not None
    assert (seal.views, seal.units, seal.cached, seal.quarantined) == (3, 6, 27, 3)
    assert seal.cached + seal.quarantined == seal.views * len(cache.inventory)
    assert seal.content_root == cache.content_root()
    report = verify(cache.root, quiet=True)
    assert report.sound and report.sealed and inspect(cache.root).sealed


def test_an_unfinished_cache_is_not_sealed_and_its_missing_units_are_named(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, skip=[(1, 2)])
    with pytest.raises(CacheError, match="lacks 1 units"):
        seal_cache(cache, 0.1)
    report = verify(cache.root, quiet=True)
    assert (report.sealed, report.missing, report.first_missing) == (False, 1, ["block 1, view 2"])
    assert not report.sound and not report.errors and not inspect(cache.root).sealed


def test_a_unit_that_vanishes_from_a_sealed_cache_is_lost_and_not_unmade(cache: Cache) -> None:
    (cache.root / commit_file(1, 0)).unlink()
    report = verify(cache.root, quiet=True)
    assert (report.sound, report.sealed, report.missing) == (False, False, 0)
    assert report.errors[0].startswith("block 1, view 0: ") and "though the cache was sealed" in report.errors[0]
    assert inspect(cache.root).sealed  # readers go by the index, which holds the record once more
    (cache.root / INDEX).unlink()
    assert not inspect(cache.root).sealed


def test_content_that_differs_from_what_was_sealed_is_found(cache: Cache) -> None:
    """A unit and its record may both be valid, of the very same identity, and still be another run's."""
    record = cache.root / commit_file(0, 0)
    commit = read_commit(cache.root, 0, 0)
    assert commit is not None
    record.unlink()
    publish(cache.root, Commit(**{**vars(commit), "content_hash": "0" * 64}))
    with pytest.raises(CacheError, match="was sealed with content"):
        seal_cache(cache, 0.1)
    seal = read_seal(cache)
    assert seal is not None and seal.content_root != cache.content_root()


def test_a_cache_that_grows_keeps_the_seal_of_its_first_views(cache: Cache) -> None:
    grown = create_cache(cache.root, replace(cache.manifest, views=4), cache.inventory)
    write_resolved(grown.root, grown.manifest)
    report = verify(grown.root, quiet=True)
    assert (report.errors, report.missing, report.sealed) == ([], 2, False)
    (cache.root / commit_file(0, 1)).unlink()
    assert "though the cache was sealed" in verify(grown.root, quiet=True).errors[0]


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"seal": {}}', b'{"seal": {"views": "x"}}'])
def test_a_damaged_seal_is_refused_by_its_path(cache: Cache, damage: bytes) -> None:
    (cache.root / SEAL).write_bytes(damage)
    report = verify(cache.root, quiet=True)
    assert not report.sound and not report.sealed and str(cache.root / SEAL) in report.errors[0]
    with pytest.raises(CacheError, match="is not a readable seal"):
        seal_cache(cache, 0.1)


def test_every_flipped_byte_of_a_seal_is_found(cache: Cache) -> None:
    path = cache.root / SEAL
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CacheError):
            read_seal(cache)


def test_a_seal_of_more_views_than_the_cache_has_is_refused(cache: Cache) -> None:
    seal = read_seal(cache)
    assert seal is not None
    facts = seal_facts(type(seal)(**{**vars(seal), "views": 9}))
    (cache.root / SEAL).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CacheError, match="seals 9 views"):
        read_seal(cache)


def test_the_seal_of_another_cache_is_refused_and_repaired(cache: Cache) -> None:
    seal = read_seal(cache)
    assert seal is not None
    whole = (cache.root / SEAL).read_bytes()
    (cache.root / SEAL).write_bytes(json_bytes(seal_facts(replace(seal, fingerprint="0" * 64, content_root="1" * 64))))
    with pytest.raises(CacheError, match=r"sealed\.json is the seal of another cache"):
        read_seal(cache)
    report = repair(cache.root, quiet=True)
    assert (len(report.restored), report.withdrawn, (cache.root / SEAL).read_bytes()) == (1, [], whole)


def test_of_two_runs_the_one_that_made_fewer_views_leaves_the_seal_of_more_as_it_is(cache: Cache) -> None:
    fewer = Cache(cache.root, replace(cache.manifest, views=2), cache.inventory)
    whole = (cache.root / SEAL).read_bytes()
    assert seal_cache(fewer, 0.1).views == 3
    assert (cache.root / SEAL).read_bytes() == whole


def test_too_many_unreadable_images_over_all_blocks_stop_before_the_seal(tmp_path: Path) -> None:
    """Each block may have one: many small blocks could hide what one large one would not."""
    cache = make_tiny_cache(tmp_path, quarantine=[3, 7])
    with pytest.raises(CacheError, match=r"2 of 10 images .*cache.max_quarantine 0.1;"):
        seal_cache(cache, 0.1)
    assert read_seal(cache) is None
    seal_cache(cache, 0.2)
    assert seal_cache(open_cache(cache.root), 0.1).quarantined == 6  # what is sealed is not asked again


def test_an_unsealed_cache_that_is_whole_can_be_read(tmp_path: Path) -> None:
    """As made by a version that did not seal, or by a process that was killed between the last unit and the seal."""
    cache = make_tiny_cache(tmp_path)
    report = verify(cache.root, quiet=True)
    assert report.sound and not report.sealed
    copy = Path(shutil.copytree(cache.root, tmp_path / "copy"))
    assert seal_cache(open_cache(copy), 0.1).content_root == report.content_root
