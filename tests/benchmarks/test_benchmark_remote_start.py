"""The benchmark of a cache on an object store opens one as it says it does."""

from __future__ import annotations

from pathlib import Path

from benchmarks import remote_start


def test_a_sealed_cache_is_opened_by_its_index(tmp_path: Path, s3: str) -> None:
    rows = remote_start.measure(tmp_path, s3, blocks=3, views=4, records=8)
    found = {name: (row["records"], row["requests"]) for name, row in rows.items()}
    assert found["sealed: index, inventory here already"] == (12, 4)
    # manifest, header, no seal, a list of records, and 8 of them
    assert found["not sealed: records, many in flight"][0] == 8
    assert found["not sealed: records, one by one"] == (8, 8)
