"""Commit records keep the errors of their codecs, and those of older versions have none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cskd.codecs.measured import Measured
from cskd.errors import CacheError
from cskd.files.durable import json_hash
from cskd.store.cache import Cache
from cskd.store.commit import read_commit
from cskd.store.format import commit_file
from cskd.store.manifest import Manifest
from tests.caches import make_tiny_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_tiny_cache(tmp_path_factory.mktemp("stats"), codecs=["envelope", "int8"], views=2)


def test_what_was_measured_is_in_the_record(cache: Cache) -> None:
    assert all(cache.commit_of(block, 0).errors == {} for block in range(cache.blocks))  # type: ignore[union-attr]
    record, error = cache.root / commit_file(0, 1), Measured(4, 1 / 3, 0.25, 2.0)
    unit, envelope = cache.read(0, 1, "int8"), cache.read(0, 1, "envelope").targets
    record.unlink()
    made = cache.add_unit(0, 1, unit.fields, {"envelope": envelope, "int8": unit.targets}, {}, {"int8": error})
    again = read_commit(cache.root, 0, 1, exact=True)
    assert again == made and again.errors == {"int8": Measured(4, 0.333333, 0.25, 2.0)}
    np.testing.assert_array_equal(cache.read(0, 1, "int8").targets["dense"], unit.targets["dense"])


@pytest.mark.parametrize(
    "stats", [[], {"int8": 1}, {"topk3": Measured(1, 0.1, 0.1, 0.1).facts}, {"int8": {"views": 1}}]
)
def test_stats_that_no_version_writes_are_refused_in_one_line(cache: Cache, stats: object) -> None:
    record = cache.root / commit_file(0, 0)
    before = record.read_bytes()
    commit = json.loads(before)["commit"] | {"stats": stats}
    record.write_text(json.dumps({"commit": commit, "sha256": json_hash(commit)}))
    try:
        with pytest.raises(CacheError, match="is no record of a unit") as no:
            read_commit(cache.root, 0, 0)
        assert "\n" not in str(no.value)
    finally:
        record.write_bytes(before)


@pytest.mark.parametrize("tables", [[], {"features8": "0" * 64}, {"int8": "x"}, {"int8": 1}])
def test_tables_in_a_manifest_that_can_not_be_are_refused(cache: Cache, tables: object) -> None:
    raw = cache.manifest.facts | {"identity": cache.identity.facts, "tables": tables}
    with pytest.raises(ValueError, match="its tables are"):
        Manifest.read(raw)
