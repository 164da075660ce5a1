"""`cskd check`: every line of a config at once, without a cache, and nothing is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from cskd.config import to_yaml
from cskd.pipeline.look.check_config import ConfigReport, check_config
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=22, block=20, shard=10)
    make_tiny_data(folder / "val", n=6, block=20, shard=10)
    (folder / "c.yaml").write_text(to_yaml(config(folder)))
    return folder


def wrong(report: ConfigReport) -> list[str]:
    return [row.name for row in report.rows if row.state == "wrong"]


def test_a_config_that_works_has_no_wrong_line_and_nothing_is_made(base: Path) -> None:
    before = sorted(base.rglob("*"))
    report = check_config(base / "c.yaml")
    assert (report.ok, wrong(report), sorted(base.rglob("*"))) == (True, [], before)


def test_all_that_is_wrong_is_listed_at_once(base: Path) -> None:
    sets = ["student.model=vit_tinny_patch16_224", "data.val=nowhere", "train.global_batch=15", "train.opt=adamv"]
    sets += ["train.output=/dev/null/x", "train.epoch=3", "student.init=nowhere.pt", "teacher.weights=nowhere.pt"]
    report = check_config(base / "c.yaml", sets)
    expected = {"config", "data.val", "train.views", "train.opt", "train.output", "student.init", "teacher.weights"}
    assert not report.ok and expected <= set(wrong(report))
    assert all(len(row.found) <= 300 for row in report.rows)


def test_a_config_of_stage_1_alone_is_fine(base: Path) -> None:
    report = check_config(base / "c.yaml", ["student.model=", "train.output=", "data.val=", "train.opt=adamv"])
    assert (report.ok, wrong(report)) == (True, [])


@pytest.mark.parametrize(
    "sets",
    [
        ["cache.path="],
        ["cache.path=", "teacher.model="],
        ["cache.path={}/nowhere", "teacher.model="],
        ["cache.path={}/nowhere", "teacher.model=", "data.val="],
        ["cache.path=", "teacher.model=", "loss.method=terms", "loss.terms=[{{head: class, target: label}}]"],
    ],
)
def test_a_baseline_is_looked_at_to_the_end_with_no_cache_and_no_teacher(base: Path, sets: list[str]) -> None:
    report = check_config(base / "c.yaml", ["loss.method=none", *(s.format(base) for s in sets)])
    rows = {row.name: row for row in report.rows}
    assert report.ok and rows["teacher"].found == "no cache is made, no teacher runs"
    assert {n: rows[n].state for n in ("loss", "the grid", "the run")} == dict.fromkeys(
        ("loss", "the grid", "the run"), "ok"
    )
    assert rows["the run"].found == "will be begun"


def test_a_term_that_reads_a_teacher_needs_one_whatever_the_method(base: Path) -> None:
    sets = ["loss.method=none", "cache.path=", "teacher.model=", "loss.terms=[{head: class, target: global}]"]
    assert {"cache.path", "teacher"} <= set(wrong(check_config(base / "c.yaml", sets)))
