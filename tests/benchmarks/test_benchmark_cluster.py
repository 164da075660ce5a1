"""The simulated cluster: its counts are those of the table code, and each table of docs/SCALE.md is one that it makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.cluster import UNITS, Facts, Found, all_tables, count, figures
from benchmarks.marked import fill
from benchmarks.stage1_waste import simulated

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "SCALE.md"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return count(tmp_path_factory.mktemp("cluster"), [(2, 4)], blocks=2, block=512, passes=300)


def test_each_node_reads_a_unit_once_and_each_of_its_ranks_a_share(found: Found) -> None:
    epoch = found.epochs[2, 4]
    assert epoch.of.requests == 6 and epoch.node.requests == 12  # a unit's file and its record
    assert epoch.store.requests == 24 and epoch.store.bytes == 2 * epoch.node.bytes
    assert epoch.alone.bytes == pytest.approx(epoch.node.bytes)
    assert 0.2 * epoch.node.bytes <= epoch.rank.bytes <= 0.4 * epoch.node.bytes
    made = figures(Facts(), found)
    assert made["gb_per_epoch_2x4_before"] == pytest.approx(4 * made["gb_per_epoch_2x4"])
    records = found.start.records * UNITS
    assert records.requests >= UNITS and 300 <= records.bytes / UNITS <= 1000


def test_the_page_asks_for_tables_that_there_are_and_holds_64_ranks_to_9_gb(found: Found) -> None:
    page = PAGE.read_text()
    tables = all_tables(Facts(), found)
    assert set(re.findall(r"<!-- table ([\w-]+) -->", page)) == tables.keys()
    filled = fill(page, tables, "SCALE.md")
    assert all("\n".join(table) in filled for table in tables.values())
    with pytest.raises(KeyError, match=r"SCALE\.md asks for table none, known: constants"):
        fill("<!-- table none -->\n<!-- end -->", tables, "SCALE.md")
    row = re.search(r"\| 8 x 8 \| \*\*targets, one table a node\*\* .* requests, ([\d.]+) GB \|\n", page)
    assert row is not None and float(row[1]) <= 9


@pytest.mark.parametrize(
    ("workers", "known", "absent"), [(1, True, 0), (8, True, 0), (8, False, 0), (8, True, 6), (1, False, 0)]
)
def test_workers_without_claims_waste_about_a_pass_each_and_finish_what_others_left(
    workers: int, known: bool, absent: int
) -> None:
    waste = simulated(workers, 200, known, 0.1, absent=absent)
    assert waste.twice <= (4 if absent else 2) and 1 <= waste.seconds < 1.6 and (workers > 1 or not waste.twice)
