"""`cskd verify`: a whole cache is sound, and every kind of damage is found with its unit named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cskd.store.cache import Cache
from cskd.store.format import commit_file
from pipeline.verify import verify
from tests.caches import make_tiny_cache


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_tiny_cache(tmp_path)


def test_a_whole_cache_is_sound_and_its_counts_add_up(cache: Cache) -> None:
    report = verify(cache.root, quiet=True)
    assert report.sound
    assert report.units == cache.blocks * cache.views
    assert report.cached + report.quarantined == len(cache.inventory) * cache.views
    assert report.content_root == cache.content_root()


def test_every_flipped_bit_of_a_unit_file_is_found_and_the_unit_named(cache: Cache) -> None:
    commit = cache.commit_of(0, 1)
    assert commit is not None
    path = cache.root / commit.files[0].path
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, 8 * len(whole), 12).tolist():
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        report = verify(cache.root, quiet=True)
        assert len(report.errors) == 1
        assert report.errors[0].startswith("block 0, view 1: ")
    path.write_bytes(whole)
    assert verify(cache.root, quiet=True).sound


def test_a_missing_file_a_missing_record_and_a_damaged_one_are_told_apart(cache: Cache) -> None:
    commit = cache.commit_of(0, 0)
    assert commit is not None
    (cache.root / commit.files[0].path).unlink()
    (cache.root / commit_file(0, 1)).write_text("{")
    report = verify(cache.root, quiet=True)
    assert not report.sound
    assert "can't be read" in report.errors[0]
    assert "not a readable commit record" in report.errors[1]
    (cache.root / commit_file(0, 1)).unlink()
    report = verify(cache.root, quiet=True)
    assert (report.missing, len(report.errors)) == (1, 1)
