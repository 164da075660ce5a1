"""Several threads that commit: the same cache as one, and what goes wrong in one of them ends the stage."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

from cskd.config import Config
from cskd.pipeline import unit_line
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.unit_line import writers_of
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
