"""A cache of each format version, committed as it was written: it stays readable, and reads the same.

Made by `tests.caches.make_tiny_cache` in the folder tests: views=3, quarantine=(6,), the three codecs, then sealed. Never made
again: a version that changes the format adds a folder.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from cskd.pipeline.care.verify import verify
from cskd.store.cache import open_cache
from cskd.store.seal import read_seal

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
ROOTS = {"format1": "6b8b044685326ae36edb7f16e8462eac7b3f012280ab6d024b4c3486c0a72c7a"}
TARGETS = {  # sha256 of the hard targets of every unit at four blends, by codec
    ("format1", "envelope"): "c366caf728938e3225a4af32ea44ac285db6aea3a90910b99f7061d0af2de941",
    ("format1", "int8"): "dcc5584b155669d762cd5e960b881cc46ef35c9dde3220810667dafdcdded8b0",
    ("format1", "topk2"): "153dc04959db0a8dd1cbc65d407986c9b6857144573fa2d527199cf1b46e3502",
}


@pytest.mark.parametrize("version", ROOTS)
def test_a_cache_of_an_older_format_is_sound_sealed_and_of_the_same_content(version: str) -> None:
    folder = GOLDEN / version
    report = verify(folder / "cache", data=folder / "data", images=True, quiet=True)
    assert report.errors == []
    assert report.content_root == ROOTS[version]
    assert (report.units, report.missing, report.cached, report.quarantined) == (6, 0, 27, 3)
    seal = read_seal(open_cache(folder / "cache", data=folder / "data"))
    assert seal is not None
    assert seal.content_root == ROOTS[version]


@pytest.mark.parametrize(("version", "codec"), TARGETS)
def test_its_hard_targets_are_those_it_was_made_with(version: str, codec: str) -> None:
    cache = open_cache(GOLDEN / version / "cache", data=GOLDEN / version / "data")
    found = hashlib.sha256()
    for block in range(cache.blocks):
        for view in range(cache.views):
            targets = cache.read(block, view, codec).targets
            for blend in (0, 20_000, 32_768, 65_536):
                found.update(cache.codecs[codec].hard(targets, blend).tobytes())
    assert found.hexdigest() == TARGETS[version, codec]


def test_one_changed_byte_of_it_is_found(tmp_path: Path) -> None:
    folder = GOLDEN / "format1"
    shutil.copytree(folder / "cache", tmp_path / "cache")
    unit = sorted((tmp_path / "cache").rglob("*.envelope.*.zarr.zip"))[0]
    damaged = bytearray(unit.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    unit.write_bytes(damaged)
    report = verify(tmp_path / "cache", data=folder / "data", quiet=True)
    assert [error[:17] for error in report.errors] == ["block 0, view 0: "]
