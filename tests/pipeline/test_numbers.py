"""Every number that a command reports is the truth: with unreadable images, a resume, several workers, views that are left."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import cskd.pipeline.cache_teacher
import cskd.pipeline.demo
import cskd.pipeline.train
from cskd.config import Config
from cskd.pipeline.cache_teacher import CacheReport, cache_teacher
from cskd.pipeline.care.verify import verify
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.show.progress import Progress, timed_start
from cskd.pipeline.train import TrainReport, train
from cskd.store.cache import Cache, open_cache
from tests.caches import make_tiny_cache, make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

N, BAD, VAL, BAD_VAL = 42, (3, 25), 12, (5,)  # images of two blocks, one of each unreadable


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=N, block=20, shard=10, bad=BAD)
    make_tiny_data(folder / "val", n=VAL, block=20, shard=10, bad=BAD_VAL)
    return folder


def settings(base: Path, views: int = 3, name: str = "run", workers: int = 0, **train_: Any) -> Config:
    cache = {"path": str(base / "cache"), "views": views, "workers": workers, "max_quarantine": 0.06}
    return config(base, name, cache=cache, train={"epochs": 2, **train_})


@pytest.fixture(scope="module")
def reports(base: Path) -> tuple[CacheReport, CacheReport, CacheReport]:
    """Two views, a third one later, and once more."""
    return (
        cache_teacher(settings(base, views=2, workers=2), quiet=True),
        cache_teacher(settings(base), quiet=True),
        cache_teacher(settings(base), quiet=True),
    )


@pytest.fixture
def cache(base: Path, reports: object) -> Cache:
    return open_cache(base / "cache")


def cached(cache: Cache, views: range) -> int:
    """Views that have targets, by the records."""
    commits = [cache.commit_of(block, view) for block in range(cache.blocks) for view in views]
    return sum(commit.cached for commit in commits if commit)


def shown(module: Any, report: object) -> str:
    out = io.StringIO()
    module.render(report, Console(file=out, width=300))
    return out.getvalue()


def test_stage_1_counts_the_views_that_have_targets_and_only_its_own(
    cache: Cache, reports: tuple[CacheReport, ...]
) -> None:
    first, more, none = reports
    assert (first.units, first.images) == (4, cached(cache, range(2))) == (4, 2 * (N - len(BAD)))
    assert (more.units, more.images) == (2, cached(cache, range(2, 3))) == (2, N - len(BAD))
    assert (none.units, none.images, none.loop_seconds) == (0, 0, 0.0)
    assert first.quarantined == more.quarantined == none.quarantined == len(BAD)


def test_the_rate_of_stage_1_is_that_of_the_loop_and_not_of_loading(reports: tuple[CacheReport, ...]) -> None:
    slow = dataclasses.replace(reports[0], images=80, loop_seconds=2.0, seconds=50.0)
    assert "80 views in 2.0 s (40 views/s), 50 s with loading" in shown(cskd.pipeline.cache_teacher, slow)
    assert "views/s" not in shown(cskd.pipeline.cache_teacher, reports[2])


def test_progress_of_a_resumed_stage_1_begins_where_the_first_stopped(
    base: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []

    class Spy(Progress):
        def __exit__(self, *error: Any) -> None:
            seen.append((self.start, self.total, self._done))
            super().__exit__(*error)

    monkeypatch.setattr("cskd.pipeline.cache_teacher.Progress", Spy)
    grown = settings(base, name="grown run")  # one of its own: another test trains from all views
    grown = dataclasses.replace(grown, cache=dataclasses.replace(grown.cache, path=str(base / "grown"), views=1))
    cache_teacher(grown, quiet=True)
    cache_teacher(dataclasses.replace(grown, cache=dataclasses.replace(grown.cache, views=3)), quiet=True)
    assert seen == [(0, N, N), (N, 3 * N, 3 * N)]


def test_verify_and_inspect_count_what_the_records_hold(cache: Cache) -> None:
    report, facts = verify(cache.root, images=True, replay=1000, quiet=True), inspect(cache.root)
    made = cached(cache, range(3))
    assert (report.units, report.cached, report.quarantined) == (6, made, 3 * len(BAD)) and report.sound
    assert (report.images_read, report.replayed) == (N, made)
    assert facts.units.present == facts.measured_units == 6 and facts.quarantined.samples == len(BAD)
    assert sum(kind.samples for kind in facts.agreement.values()) == made
    for name, codec in facts.codecs.items():
        size = sum(p.stat().st_size for p in cache.root.glob(f"units/*/*.{name}.*"))
        assert codec.bytes == size and codec.unit_bytes_per_view == size / made


def test_bytes_of_a_codec_are_of_the_units_that_are_there(cache: Cache) -> None:
    path = next(cache.root.glob("units/b00000/v0000.envelope.*"))
    whole = path.read_bytes()
    path.unlink()
    facts = inspect(cache.root)
    path.write_bytes(whole)
    there = sum(
        p.stat().st_size for p in cache.root.glob("units/*/*.int8.*") if p.parent.name + p.name[:5] != "b00000v0000"
    )
    assert (facts.units.present, facts.codecs["int8"].bytes) == (5, there)


def test_training_counts_what_this_run_fed_and_evaluation_counts_the_unreadable(base: Path, cache: Cache) -> None:
    steps, batch = (N - len(BAD)) // 8, 8
    cut = train(settings(base, max_steps=steps + 2, save_every=1), quiet=True)
    rest = train(settings(base), quiet=True)
    again = train(settings(base), quiet=True)
    assert (cut.steps, cut.images) == (steps + 2, (steps + 2) * batch)
    assert (rest.steps, rest.images) == (steps - 2, (steps - 2) * batch)
    assert (again.steps, again.images, again.top1) == (0, 0, rest.top1)
    rows = read_metrics(base / "run")
    assert [row["step"] for row in rows] == [steps, 2 * steps]
    assert [row["unreadable"] for row in rows] == [len(BAD_VAL)] * 2
    scores = evaluate_checkpoint(base / "run", base / "val", 5, 0, None, "cpu", quiet=True)
    assert (scores.images, scores.unreadable) == (VAL, len(BAD_VAL))
    top1 = {name: score.top1 for name, score in scores.heads.items()}
    assert {name: top1[name] for name in top1} == {name: rows[-1][f"top1.{name}"] for name in top1}
    assert all(np.isclose(score * VAL / 100, round(score * VAL / 100)) for score in top1.values())


def test_the_rate_of_training_leaves_start_up_and_evaluation_out() -> None:
    report = TrainReport("x", 10, 800, 60.0, 40.0, 0, {}, "class", "float32", "", [])
    assert "10 steps, 800 images in 60.0 s (40 images/s while stepping)" in shown(cskd.pipeline.train, report)
    seconds: dict[str, float] = {}

    def results() -> Iterator[int]:
        ticks.append(5.0)
        yield 1
        ticks.append(100.0)
        yield 2

    ticks = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cskd.pipeline.show.progress.time.perf_counter", lambda: ticks[-1])
        assert list(timed_start(results(), seconds)) == [1, 2]
    assert seconds == {"start": 5.0}


def test_a_demo_that_is_run_again_says_how_long_its_students_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_tiny_cache(tmp_path / "made", n=10, quarantine=[3])
    tmp_path = tmp_path / "demo"

    def trained(config: Config, quiet: bool) -> TrainReport:
        """By an earlier run."""
        folder = Path(config.train.output)
        folder.mkdir(parents=True)
        rows = [{"epoch": e, "seconds": 7.0, "top1.class": 50.0} for e in range(3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return TrainReport(str(folder), 0, 0, 0.1, 0.0, 0, {"class": 50.0}, "class", "float32", "", [])

    stubs = {"train": trained, "cache_teacher": lambda *_, **__: SimpleNamespace(clean_top1=0.5)}
    stubs |= {name: lambda *_, **__: None for name in ("write_images", "pack_data", "train_teacher")}
    stubs |= {"open_cache": lambda _: cache, "_one_a_class": lambda *_: [0]}
    for name, stub in stubs.items():
        monkeypatch.setattr(cskd.pipeline.demo, name, stub)
    report = cskd.pipeline.demo.run_demo(tmp_path, epochs=3, quiet=True)
    assert {name: s.seconds for name, s in report.students.items()} == dict.fromkeys(
        cskd.pipeline.demo.STUDENTS, 21.0 * len(report.seeds)
    )
    size = sum(p.stat().st_size for p in cache.root.glob("units/*/*"))
    assert report.bytes_per_view == size / (9 * cache.views)
