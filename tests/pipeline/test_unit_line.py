"""Several threads that commit: the same cache as one, and what goes wrong in one of them ends the stage."""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cskd.config import Config
from cskd.pipeline import unit_line
from cskd.pipeline.cache_teacher import cache_teacher, cache_teachers
from cskd.pipeline.encoding import Encoded
from cskd.pipeline.unit_line import UnitLine, writers_of
from cskd.storage import open_storage
from cskd.storage.posix import Posix
from cskd.store.cache import Cache
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("line")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=42, block=10, shard=10)
    make_tiny_data(folder / "val", n=12, block=20, shard=10)
    return folder


def settings(data: Path, cache: Path) -> Config:
    made = config(data)
    return dataclasses.replace(made, cache=dataclasses.replace(made.cache, path=str(cache)))


def test_one_writer_keeps_up_on_few_cores() -> None:
    assert [writers_of(cores) for cores in (1, 2, 7, 8, 16, 192)] == [1, 1, 1, 2, 4, 4]


def test_several_writers_make_the_cache_of_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, together = Cache.add_unit, threading.Barrier(2, timeout=60)
    roots, names = list[str](), set[str]()

    def side_by_side(self: Cache, block: int, *rest: Any) -> Any:
        names.add(threading.current_thread().name)
        if writers > 1 and block < 2:  # both are at it, whatever the machine is at
            together.wait()
        return real(self, block, *rest)

    monkeypatch.setattr(Cache, "add_unit", side_by_side)
    for writers in (1, 2):
        monkeypatch.setattr(unit_line, "writers_of", lambda cores, n=writers: n)
        roots.append(cache_teacher(settings(data, tmp_path / str(writers)), quiet=True).content_root)
    assert roots[0] == roots[1] and len(names) == 2


def test_an_error_of_a_writer_ends_the_stage(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Cache, "add_unit", full)
    monkeypatch.setattr(unit_line, "writers_of", lambda cores: 3)
    with pytest.raises(OSError, match="No space left"):
        cache_teacher(settings(data, tmp_path / "cache"), quiet=True)


class Cut(KeyboardInterrupt):
    """Where a test ends stage 1."""


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Images of one block, one of them unreadable, of which a pass takes 12 chunks; and the content of their cache."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=90, block=100, shard=10, bad=[5])
    return folder, cache_teacher(saving(folder, folder / "whole"), quiet=True).content_root


def saving(data: Path, cache: Path | str, seconds: float = 0.0) -> Config:
    return config(
        data,
        cache={
            "path": str(cache),
            "views": 4,
            "codecs": ["envelope", "int8", "topk:2"],
            "max_quarantine": 0.1,
            "save_seconds": seconds,
        },
    )


def cut_after(patch: pytest.MonkeyPatch, chunks: int, killed: bool) -> None:
    """End stage 1 before it takes one chunk more. killed: as by kill -9, nothing is done any more."""
    real, left = UnitLine.feed, iter(range(chunks))

    def feed(self: UnitLine, chunk: Any) -> None:
        if next(left, None) is None:
            raise Cut
        real(self, chunk)

    patch.setattr(UnitLine, "feed", feed)
    if killed:
        patch.setattr(UnitLine, "keep", lambda self: "")


def drafts(cache: Path) -> list[Path]:
    return sorted(cache.glob("units/*/*.draft.*"))


@pytest.mark.parametrize("killed", [False, True])
def test_a_pass_that_is_cut_anywhere_goes_on_with_the_batch_that_is_missing(
    long: tuple[Path, str], tmp_path: Path, killed: bool
) -> None:
    """Again and again, before a whole pass could be made: in the end the content is that of a run that was never cut."""
    (data, content), cuts = long, 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            cut_after(patch, 8, killed)
            try:
                report = cache_teacher(saving(data, tmp_path / "cache"), quiet=True)
                break
            except Cut:
                cuts += 1
                assert (cuts > 1 or drafts(tmp_path / "cache")) and cuts < 20
    assert cuts > 1 and report.content_root == content and report.quarantined == 1
    assert not drafts(tmp_path / "cache") and not (tmp_path / "cache" / "claims").exists()


def test_what_a_killed_run_had_is_kept_every_so_many_seconds_alone(long: tuple[Path, str], tmp_path: Path) -> None:
    data, content = long
    for seconds, killed, kept in ((3600.0, True, False), (0.0, True, True), (3600.0, False, True)):
        cache = tmp_path / f"{seconds} {killed}"
        with pytest.MonkeyPatch.context() as patch:
            cut_after(patch, 8, killed)
            with pytest.raises(Cut):
                cache_teacher(saving(data, cache, seconds), quiet=True)
        assert bool(drafts(cache)) == kept
    assert cache_teacher(saving(data, cache, 3600.0), quiet=True).content_root == content


def test_an_interrupt_says_how_much_it_cost(
    long: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_after(monkeypatch, 8, killed=False)
    with pytest.raises(Cut):
        cache_teacher(saving(long[0], tmp_path / "cache"))
    pattern = (
        r"note: interrupted: \d+ views that the teacher was at are lost, about .* s of work; those before them are kept"
    )
    assert re.search(pattern, capsys.readouterr().err)


@pytest.fixture(scope="module")
def cut(long: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of which a pass was cut."""
    cache = tmp_path_factory.mktemp("cut") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 8, killed=False)
        with pytest.raises(Cut):
            cache_teacher(saving(long[0], cache), quiet=True)
    return cache


@pytest.mark.parametrize("damage", ["torn", "no file of ours", "other versions", "of another view", "twice"])
def test_a_draft_that_is_damaged_or_foreign_is_passed_over(
    long: tuple[Path, str], cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    data, content = long
    cache = Path(shutil.copytree(cut, tmp_path / "cache"))
    found = drafts(cache)
    assert len(found) > 3
    for path in found:
        raw, name = path.read_bytes(), path.name
        if damage == "torn":
            path.write_bytes(raw[:-100])
        elif damage == "no file of ours":
            path.write_bytes(b"PK\3\4" + bytes(range(256)))
        elif damage == "of another view":
            path.rename(path.with_name(f"v0003{name[5:]}" if not name.startswith("v0003") else f"v0002{name[5:]}"))
        elif damage == "twice":
            path.with_name(name.replace(".draft.", ".draft.0")).write_bytes(raw)
    if damage == "other versions":
        monkeypatch.setattr("cskd.store.draft.library_versions", lambda: {"Pillow": "1.0"})
    assert cache_teacher(saving(data, cache), quiet=True).content_root == content


def test_a_batch_that_an_interrupt_finds_half_counted_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a pass of which one batch is missing would be taken for whole."""

    class Interrupted(deque[Any]):
        def popleft(self) -> Any:
            monkeypatch.setattr(Interrupted, "popleft", deque.popleft)
            raise Cut

    class Unit:
        def add(self, *batch: Any) -> None:
            pass

    def finished(self: UnitLine, work: Any) -> None:
        raise AssertionError("one of two batches is missing")

    monkeypatch.setattr(UnitLine, "_finish", finished)
    unit, targets, rows = Unit(), Future[Any](), np.arange(4)
    targets.set_result(Encoded({}, {}, 0.0, 0.0))
    work = unit_line._Pass(0, 0, np.arange(8), [unit], (0,), Path("claim"))  # type: ignore[list-item]
    line = UnitLine.__new__(UnitLine)
    line.images = line.unreadable = 0
    line._cache = SimpleNamespace(storage=Posix(tmp_path))  # type: ignore[assignment]
    line._seconds, line._saved, line._config = defaultdict(float), time.monotonic(), Config()
    line._underway = Interrupted([unit_line._Encoding(work, 0, unit, 4, rows, rows, targets)])  # type: ignore[arg-type]
    with pytest.raises(Cut):
        line._collect()
    line._collect()
    assert work.rows == 4 and not work.complete and not line._underway


@pytest.mark.parametrize("teachers", [1, 2])
def test_a_pass_that_another_process_has_committed_is_given_up_in_the_middle(
    long: tuple[Path, str], s3: str, monkeypatch: pytest.MonkeyPatch, teachers: int
) -> None:
    """The other one has put its first record there, and is killed: what else there is of the pass is made by whoever comes next."""
    (data, content), real, batches = long, UnitLine._look, list[int]()
    whole, places = open_storage(data / "whole"), [f"{s3}/{name}" for name in "ab"[:teachers]]

    def look(self: UnitLine, work: Any) -> None:
        if self._cache.location == places[0]:
            batches.append(work.rows)
        if len(batches) == 2 and self._cache.location == places[0]:
            for about in whole.list():
                if f"/b00000/v{work.views[0]:04d}" in about.key:
                    open_storage(places[0]).put(about.key, whole.get(about.key))
        real(self, work)
        if work.look is not None:
            work.look.exception()  # waits

    monkeypatch.setattr(UnitLine, "_look", look)
    monkeypatch.setattr(unit_line, "PATIENCE", 0.0)
    reports = cache_teachers([saving(data, place) for place in places], quiet=True)
    assert [(report.content_root, report.quarantined) for report in reports] == [(content, 1)] * teachers
    assert [report.units for report in reports] == [3, 4][:teachers]
    notes = [note for report in reports for note in report.notes if "made by another one meanwhile" in note]
    assert len(notes) == 1 and 0 < float(notes[0].rsplit(" ", 1)[1]) < 1
    assert all(any("CSKD_WORKERS=N" in note for note in report.notes) for report in reports)


@pytest.mark.parametrize(("passes", "most"), [(1.0, 1), (2.5, 2), (100.0, 3)])
def test_passes_that_wait_for_a_writer_are_bounded_by_bytes_as_well_as_by_count(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: float, most: int
) -> None:
    """By count three writers may have three; one is always taken, however large it is, and the teacher makes the next."""
    add_unit, feed, finish, committed = Cache.add_unit, UnitLine.feed, UnitLine._finish, UnitLine._committed
    sizes, waiting, awaited = list[int](), list[int](), threading.Event()

    def held_up(*arguments: Any) -> Any:
        assert awaited.wait(60)
        return add_unit(*arguments)

    def waits(self: UnitLine) -> None:
        awaited.set()
        committed(self)

    def fed(self: UnitLine, chunk: Any) -> None:
        feed(self, chunk)
        waiting.append(len(self._writing))

    def finished(self: UnitLine, work: Any) -> None:
        finish(self, work)
        sizes.append(self._writing[-1][1])
        monkeypatch.setattr(unit_line, "HELD", passes * max(sizes))

    monkeypatch.setattr(Cache, "add_unit", held_up)
    monkeypatch.setattr(UnitLine, "_committed", waits)
    monkeypatch.setattr(UnitLine, "feed", fed)
    monkeypatch.setattr(UnitLine, "_finish", finished)
    monkeypatch.setattr(unit_line, "writers_of", lambda cores: 3)
    cache_teacher(settings(data, tmp_path / "cache"), quiet=True)
    assert max(waiting) == most and max(sizes) > 3 * 10 * 5 * 4 * 4  # int8: views, images, classes, cells
