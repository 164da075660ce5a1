"""Several teachers in one pass over the images: each cache is the one that a run of its own makes, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cskd.config import Config
from cskd.errors import ConfigError
from cskd.loading.stage1 import ChunkMaker
from cskd.machine.launch import Worker
from cskd.pipeline.cache_teacher import cache_joint, cache_teacher, cache_teachers
from cskd.pipeline.joint_line import joint_passes
from cskd.pipeline.unit_line import UnitLine
from cskd.store.cache import open_cache
from cskd.store.seal import read_seal
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

CODECS = {"first": ["envelope"], "second": ["features:8", "global:8"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    for name, seed in (("first", 1), ("second", 4)):
        (folder / f"{name}.py").write_text(TEACHER.replace("manual_seed(1)", f"manual_seed({seed})"))
    make_tiny_data(folder / "train", n=24, block=12, shard=12, bad=(5,))
    for name in CODECS:
        cache_teacher(settings(folder, name), quiet=True)
    return folder


def settings(base: Path, name: str, where: Path | None = None, **sections: Any) -> Config:
    path = str((where or base) / f"cache {name}")
    cache = {"path": path, "codecs": CODECS[name], "views": 6, "max_quarantine": 0.5, **sections.pop("cache", {})}
    teacher = {"model": f"{base / f'{name}.py'}:build", "batch": 8, "min_top1": 0.0, **sections.pop("teacher", {})}
    made = config(base, "run", data={"val": ""}, teacher=teacher, cache=cache, **sections)
    return replace(made, student=replace(made.student, model=""))


def files(root: Path) -> dict[str, bytes]:
    """Content by name: the units, their records and the tables."""
    kept = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix in (".zip", ".json", ".safetensors")]
    return {str(p.relative_to(root)): p.read_bytes() for p in kept if p.name not in ("manifest.json", "config.yaml")}


def assert_as_alone(base: Path, where: Path) -> None:
    for name in CODECS:
        alone, joint = files(base / f"cache {name}"), files(where / f"cache {name}")
        units = [key for key in alone if key.endswith(".zip")]
        assert units and {key: joint[key] for key in units} == {key: alone[key] for key in units}
        assert joint.keys() == alone.keys()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Views that were made, chunk by chunk."""
    made: list[int] = []
    plain = ChunkMaker.__call__

    def counted(self: ChunkMaker, task: Any) -> Any:
        made.append(len(task.views) * len(task.position))
        return plain(self, task)

    monkeypatch.setattr(ChunkMaker, "__call__", counted)
    yield made


def test_each_view_is_made_once_and_each_cache_is_its_own(base: Path, tmp_path: Path, decoded: list[int]) -> None:
    reports = cache_teachers([settings(base, name, tmp_path) for name in CODECS], quiet=True)
    assert_as_alone(base, tmp_path)
    assert [r.content_root for r in reports] == [_root(base / f"cache {name}") for name in CODECS]
    assert sum(decoded) == 24 * 6 + 4  # once for both; the tables of features are fitted on 4


def _root(path: Path) -> str:
    seal = read_seal(open_cache(path))
    assert seal is not None
    return seal.content_root


def test_a_teacher_that_is_ahead_waits_and_a_killed_pass_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [settings(base, name, tmp_path) for name in CODECS]
    plain, fed = UnitLine.feed, list[int]()

    class Killed(BaseException):
        pass

    def until(self: UnitLine, chunk: Any) -> None:
        fed.append(1)
        if len(fed) > 5:
            raise Killed
        plain(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(UnitLine, "feed", until)
        patch.setattr(UnitLine, "keep", lambda self: "")  # as SIGKILL: nothing more is written
        with pytest.raises(Killed):
            cache_teachers(both, quiet=True)
    cache_teacher(replace(both[1], cache=replace(both[1].cache, views=3)), quiet=True)  # the second goes ahead
    done = len(open_cache(Path(both[0].cache.path)).missing())
    assert done > 0
    cache_teachers(both, quiet=True)
    assert_as_alone(base, tmp_path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"recipe": {"erase": 0.5}}, "recipe.erase is 0.5 for cache.path"),
        ({"teacher": {"batch": 4}}, "teacher.batch is 4"),
        ({"cache": {"views": 3}}, "cache.views is 3"),
        ({"data": {"train": "other"}}, "data.train .*other images"),
        ({"cache": {"path": "same"}}, "is that of two configs"),
    ],
)
def test_what_differs_is_refused_by_its_key(base: Path, tmp_path: Path, changed: Any, says: str) -> None:
    first = settings(base, "first", tmp_path)
    second = settings(base, "second", tmp_path, **{k: v for k, v in changed.items() if k != "data"})
    if "data" in changed:
        make_tiny_data(tmp_path / "other", n=8)
        second = replace(second, data=replace(second.data, train=str(tmp_path / "other")))
    if changed.get("cache", {}).get("path"):
        second = replace(second, cache=replace(second.cache, path=first.cache.path))
    with pytest.raises(ConfigError, match=says) as refused:
        cache_teachers([first, second], quiet=True)
    assert len(str(refused.value)) <= 300
    assert "manifest.json" not in [p.name for p in tmp_path.rglob("*")]


def test_devices_are_for_one_config(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"--devices.*share the work"):
        cache_joint([settings(base, name) for name in CODECS], "all")


def test_a_line_that_waits_for_other_processes_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, slept = iter([None, None, None, [(1, (2, 3))], []]), list[float]()
    has = iter([[(0, (0, 1))], [], [], [], []])
    lines: list[Any] = [
        SimpleNamespace(missing=lambda _, of=of: next(of), group_of=lambda views: views[0] // 2, patience=lambda: 7.0)
        for of in (waits, has)
    ]
    monkeypatch.setattr("cskd.pipeline.joint_line.time.sleep", slept.append)
    assert joint_passes(lines, Worker()) == [{1: (0, (0, 1))}] and slept == []
    assert joint_passes(lines, Worker()) == [{0: (1, (2, 3))}] and slept == [7.0, 7.0]
    assert joint_passes(lines, Worker()) == [] and slept == [7.0, 7.0]


def test_a_line_that_waits_is_asked_again_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whenever another line has done something: it would take what another process is just making for left by a dead one."""
    clock, asked = [0.0], list[float]()
    line = UnitLine.__new__(UnitLine)
    line._asks_at, line.units, line.images = 0.0, 0, 0
    line._cache = SimpleNamespace(  # type: ignore[assignment]
        storage=None, blocks=1, inventory=SimpleNamespace(n=8), recipe=SimpleNamespace(mix_group=2)
    )
    line._walk = SimpleNamespace(following=lambda: asked.extend(clock))  # type: ignore[assignment]
    monkeypatch.setattr("cskd.pipeline.unit_line.time", SimpleNamespace(monotonic=lambda: clock[0]))
    for clock[0] in (0.0, 10.0, 59.0, 61.0, 120.0, 122.0):
        assert line.missing(Worker()) is None
    assert asked == [0.0, 61.0, 122.0] and line.patience() == 60.0
