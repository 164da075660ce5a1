"""`cskd verify`: a whole cache is sound, and every kind of damage is found with its unit named."""

from __future__ import annotations

import errno
import io
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import cskd.files.read
import cskd.store.commit
from cskd.dataset.remote_shards import FIND_SHARDS
from cskd.errors import DataError
from cskd.pipeline.care.recompute import made_views
from cskd.pipeline.care.verify import render, verify
from cskd.pipeline.show.progress import Progress
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import Commit, publish, write_file
from cskd.store.format import UNIT_FIELDS, commit_file
from cskd.store.seal import seal_cache
from cskd.store.unit import content_hash, pack_unit
from tests.caches import make_tiny_cache, make_tiny_data


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


def moved(cache: Cache) -> Path:
    """The images of a cache, taken away to another folder."""
    data = Path(cache.manifest.data or "")
    return data.rename(data.with_name("moved"))


def test_an_intact_cache_without_its_images_is_sound(cache: Cache) -> None:
    moved(cache)
    assert verify(cache.root, quiet=True).sound
    make_tiny_data(Path(cache.manifest.data or ""), n=7)  # another data set, where the images were
    assert verify(cache.root, quiet=True).sound


@pytest.mark.parametrize("wish", [{"images": True}, {"replay": 5}, {"again": 5}])
def test_images_that_are_asked_for_and_absent_are_one_line_before_the_work(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any]
) -> None:
    there = moved(cache)
    checked: list[int] = []
    monkeypatch.setattr("cskd.pipeline.care.verify.check_unit", lambda *_: checked.append(1))
    with pytest.raises(DataError, match=r"none of the 2 image shards .* is not in .*data; .*--data of"):
        verify(cache.root, quiet=True, **wish)
    make_tiny_data(cache.root.parent / "other", n=7)
    with pytest.raises(DataError, match=r"other holds the data set .*, but .*inventory is of"):
        verify(cache.root, data=cache.root.parent / "other", quiet=True, **wish)
    assert not checked
    if "again" not in wish:
        assert verify(cache.root, data=there, quiet=True, **wish).sound


def test_one_absent_shard_is_one_line_with_its_images_and_the_others_are_read(
    cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    seal_cache(cache, 0.1)
    shard = cache.inventory.shard_path(0)
    shard.unlink()
    report = verify(cache.root, images=True, replay=5)
    assert report.errors == [f"shard 00000.tar is not in {shard.parent}; {FIND_SHARDS}; 5 images are in it"]
    assert "note: shard 00000.tar" in capsys.readouterr().err.splitlines()[0]
    assert (report.images_read, report.replayed, report.sealed) == (5, 0, True)
    assert report.notes == ["--replay was not done, since there are errors"]
    shard.mkdir()
    assert verify(cache.root, images=True, quiet=True).errors == [
        f"{shard} can't be read: it is a folder, expected a file (Is a directory); give another path; 5 images are in it"
    ]


def test_a_shard_of_which_no_image_is_as_it_was_is_one_line_and_a_few_bad_images_are_each_named(cache: Cache) -> None:
    shard, inventory = cache.inventory.shard_path(1), cache.inventory
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    for i in (6, 8):
        damaged[int(inventory.offset[i])] ^= 1
    shard.write_bytes(damaged)
    report = verify(cache.root, images=True, quiet=True)
    assert [e.split("'")[1] for e in report.errors] == ["image006", "image008"] and report.images_read == 10
    shard.write_bytes(bytes(len(whole)))
    errors = verify(cache.root, images=True, quiet=True).errors
    assert len(errors) == 1 and f"{shard}: none of its 5 images is as it was" in errors[0]


def test_a_disk_that_fails_is_given_up_after_a_few_images(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes three tries with a wait between: a shard of 4,096 would take an hour."""
    monkeypatch.setattr("cskd.pipeline.care.verify.LISTED", 2)
    monkeypatch.setattr("cskd.dataset.shard_reader.RETRY_WAIT", 0.0)
    monkeypatch.setattr("cskd.dataset.shard_reader.pread", fail)
    report = verify(cache.root, images=True, quiet=True)
    assert len(report.errors) == 6 and report.images_read == 4
    assert [e.rpartition(": ")[2] for e in report.errors[2::3]] == ["3 further images were not read"] * 2


def fail(*_: object) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_each_record_is_parsed_once_and_each_file_of_a_unit_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_tiny_cache(tmp_path, codecs=("envelope", "int8"))
    seal_cache(cache, 0.1)
    reads, parses, opened = Counter[str](), Counter[str](), cskd.files.read.open_regular
    parse = cskd.store.commit._parse

    def count_opens(path: str | Path) -> int:
        reads[str(Path(path).relative_to(cache.root))] += 1
        return opened(path)

    def count_parses(raw: Any, path: str, *unit: int) -> Commit:
        parses[str(Path(path).relative_to(cache.root))] += 1
        return parse(raw, path, *unit)

    for module in ("cskd.files.read", "cskd.store.unit", "cskd.storage.posix"):
        monkeypatch.setattr(f"{module}.open_regular", count_opens)
    monkeypatch.setattr("cskd.store.commit._parse", count_parses)
    assert verify(cache.root, quiet=True).sealed
    units = [(b, v) for b in range(cache.blocks) for v in range(cache.views)]
    assert parses == Counter(commit_file(*unit).as_posix() for unit in units)
    files = Counter({name: n for name, n in reads.items() if name.startswith(("units/", "commits/"))})
    expected = [p for kind in ("units", "commits") for p in (cache.root / kind).rglob("*") if p.is_file()]
    assert files == Counter(str(p.relative_to(cache.root)) for p in expected) and len(expected) == 3 * len(units)


@pytest.mark.parametrize("field", ["label", "digest", "more"])
def test_files_of_one_unit_that_disagree_in_a_field_are_found(tmp_path: Path, field: str) -> None:
    """Each is whole and is the one that the record names, and the content hash is that of one of them."""
    cache = make_tiny_cache(tmp_path, codecs=("envelope", "int8"))
    commit = cache.commit_of(0, 1)
    assert commit is not None
    units = {name: cache.read(0, 1, name) for name in cache.codecs}
    for changed in cache.codecs:
        files, contents = [], {name: dict(unit.fields) for name, unit in units.items()}
        contents[changed][field] = contents[changed].get(field, contents[changed]["label"]) + 1
        for name, unit in units.items():
            names = {n: UNIT_FIELDS.get(n, (None, ("sample",)))[1] for n in contents[name]}
            data = pack_unit(contents[name], unit.targets, {**names, **cache.codecs[name].dimensions}, {})
            files.append(write_file(cache.root, 0, 1, name, data, 0))
        targets = {name: unit.targets for name, unit in units.items()}
        (cache.root / commit_file(0, 1)).unlink()
        publish(cache.root, replace(commit, files=files, content_hash=content_hash(contents["int8"], targets)))
        errors = verify(cache.root, quiet=True).errors
        assert len(errors) == 1 and errors[0].startswith("block 0, view 1: ")
        assert f"int8.{files[1].sha256[:16]}.zarr.zip has other {field} than units/b00000/v0001.envelope" in errors[0]


def test_of_an_unfinished_cache_the_next_step_is_said(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, skip=[(1, 2)])
    report = verify(cache.root, replay=100, quiet=True)
    assert (report.missing, report.errors, report.replayed, report.sealed) == (1, [], 25, False)
    out = io.StringIO()
    render(report, Console(file=out, width=200))
    assert "missing: block 1, view 2; `cskd cache-teacher` with its config makes them" in out.getvalue()


def test_progress_of_a_replay_ends_at_the_views_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_tiny_cache(tmp_path, quarantine=[3], skip=[(1, 2)])
    assert made_views(open_cache(cache.root)) == 27 - 5
    totals: dict[str, int] = {}
    monkeypatch.setattr(
        "cskd.pipeline.care.recompute.Progress",
        lambda what, total, *a, **k: totals.update({what: total}) or Progress(what, total, *a, **k),
    )
    assert verify(cache.root, replay=1000, quiet=True).replayed == 22 == totals["replay"]
