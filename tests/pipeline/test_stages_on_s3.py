"""Both stages and the care of a cache on an object store: the same content, and the same weights, as from a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from cskd.config import Config, to_yaml
from cskd.errors import CacheError, CskdError, PathError
from cskd.machine.launch import WORKER, WORKERS, Worker
from cskd.pipeline import outputs, unit_line
from cskd.pipeline.cache_teacher import HOW_MANY, cache_teacher
from cskd.pipeline.care.repair import repair
from cskd.pipeline.care.verify import verify
from cskd.pipeline.passes import Walk
from cskd.pipeline.train import train
from cskd.storage import open_storage
from cskd.storage.objects import Objects
from cskd.store.cache import Cache, open_cache
from cskd.store.format import INDEX, PROBE, SEAL, commit_file
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, cached_data, config, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("s3"))


def placed(base: Path, place: str, **changes: Any) -> Config:
    return config(base, cache={"path": place, **changes})


def test_the_cache_of_a_folder_is_made_there_mended_and_trained_from(
    base: Path, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, place = open_cache(base / "cache"), f"{s3}/caches/mine"
    cut = cache_teacher(placed(base, place, views=2), quiet=True)
    whole = cache_teacher(placed(base, place), quiet=True)
    assert (cut.units, whole.units, whole.cache, whole.content_root) == (4, 2, place, here.content_root())
    storage = open_storage(place)
    assert {about.key for about in storage.list()} == {about.key for about in here.storage.list()}
    sealed, index = storage.get(SEAL), storage.get(INDEX)
    assert sealed == here.storage.get(SEAL) and index == here.storage.get(INDEX)
    file = open_cache(place).commit_of(1, 2).files[0].path  # type: ignore[union-attr]
    storage.put(file, storage.get(file)[:-1])
    storage.delete(str(commit_file(0, 0)))
    storage.delete("manifest.copy.json")
    assert any(HOW_MANY in note for note in whole.notes)
    capsys.readouterr()
    report = repair(Path(place))
    said = capsys.readouterr().err
    assert "note: " in said and HOW_MANY not in said  # a repair is alone
    assert (len(report.withdrawn), report.rebuilt, report.content_root) == (2, 2, whole.content_root)
    assert [line.partition(":")[0] for line in report.restored] == ["manifest.copy.json"]
    assert verify(Path(place), quiet=True).sealed and (storage.get(SEAL), storage.get(INDEX)) == (sealed, index)
    ends = []
    for name, path in (("here", str(base / "cache")), ("there", place)):
        short = {"output": str(tmp_path / name), "epochs": 1, "warmup_epochs": 0}
        train(config(base, cache={"path": path}, train=short), quiet=True)
        ends.append(weights(tmp_path / name))
    assert ends[0] == ends[1]


def test_what_another_process_makes_is_left_to_it(base: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first commit another process finishes all but the last pass: what it had is made twice, no more."""
    place, here, real = f"{s3}/shared", open_cache(base / "cache"), Cache.add_unit
    made = list[tuple[int, int]]()

    def add(self: Cache, block: int, view: int, *rest: Any) -> Any:
        if not made:
            for about in here.storage.list():
                if about.key.startswith(("units/", "commits/")) and "b00001/v0002" not in about.key:
                    self.storage.put(about.key, here.storage.get(about.key))
        made.append((block, view))
        return real(self, block, view, *rest)

    monkeypatch.setattr(Cache, "add_unit", add)
    monkeypatch.setattr(unit_line, "PATIENCE", 0.0)
    monkeypatch.setenv("CSKD_WORKER", "0")  # where nobody says how many there are, it begins anywhere
    monkeypatch.setenv("CSKD_WORKERS", "1")
    one_view = placed(base, place)
    report = cache_teacher(dataclasses.replace(one_view, recipe=dataclasses.replace(one_view.recipe)), quiet=True)
    assert report.content_root == here.content_root() and report.units <= 6
    assert made[0] == (0, 0) and made[-1] == (1, 2) and len(made) <= 3
    assert any("had been made by another one meanwhile" in note for note in report.notes)


def test_processes_make_their_shares_and_never_begin_where_another_one_is(base: Path, s3: str) -> None:
    cache = open_cache(base / "cache")
    there = Cache(f"{s3}/x", cache.manifest, cache.inventory)
    left = [(block, view) for view in range(300) for block in range(there.blocks)]  # 600 passes
    there.missing = lambda *_: left  # type: ignore[method-assign]
    there.recipe = dataclasses.replace(cache.recipe, mix_group=1)

    def begun(*worker: int) -> int:
        (block, views), *_ = Walk(there, Worker(*worker)).following() or []
        return views[0] * there.blocks + block

    assert len({begun() for _ in range(20)}) > 10  # nobody says how many there are: anywhere
    assert [begun(number, 4) for number in range(4)] == [0, 1, 2, 3]
    walks = [Walk(there, Worker(number, 4)) for number in range(4)]
    shares = [walk.following() or [] for walk in walks]
    assert sorted(chain(*shares)) == sorted((block, (view,)) for block, view in left)
    gone = {*shares[0], *shares[1][:50], *shares[2][:140]}
    left = [(block, view) for block, view in left if (block, (view,)) not in gone]
    for _ in range(30):  # of what worker 1 or 3 has before it, and not its next ones
        taken = walks[0].following() or []
        of = next(share for share in shares if taken[0] in share)
        assert of in (shares[1], shares[3]) and taken == of[-len(taken) :] and len(taken) <= 105
    left = [(0, 298), (1, 299)]  # too little: who comes waits, and takes one when nothing has happened
    assert walks[0].following() is None
    alone = Walk(there, Worker(0, 64))
    asked = [alone.following() for _ in range(12)]
    assert asked[0] is None and any(asked) and all(len(passes) == 1 for passes in asked if passes)
    left = []
    assert walks[0].following() == []


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("s3://nobody/x", "there is no bucket 'nobody'"),
        ("https://127.0.0.1/x", "is on a web server, which is only read"),
        ("ftp://host/x", "is an address (ftp:)"),
        ("hf://datasets/me/x", "the hub is only read"),
    ],
)
def test_places_that_can_hold_no_cache_are_refused_before_the_teacher_loads(
    base: Path, s3: str, monkeypatch: pytest.MonkeyPatch, place: str, says: str
) -> None:
    monkeypatch.setattr("cskd.pipeline.cache_teacher.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    with pytest.raises(CskdError) as info:
        cache_teacher(placed(base, place), quiet=True)
    assert says in str(info.value) and len(str(info.value)) <= 300 and "\n" not in str(info.value)


def test_a_place_with_other_things_or_without_conditional_writes_is_refused(
    base: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_storage(s3).put("photos/a.jpg", b"x")
    with pytest.raises(PathError, match=r"holds photos, which is no file of a cache|holds photos/a\.jpg"):
        outputs.refuse_cache_output(placed(base, s3))
    outputs.refuse_cache_output(placed(base, f"{s3}/own"))
    open_storage(f"{s3}/begun").put(f"{PROBE}0", b"first")  # of a process that died there, or begins right now
    outputs.refuse_cache_output(placed(base, f"{s3}/begun"))
    assert outputs.refuse_unfit(f"{s3}/own") == "writable, has conditional writes"
    assert [*open_storage(f"{s3}/own").list()] == []
    monkeypatch.setattr(Objects, "create", lambda self, key, data: self.put(key, data) or True)
    with pytest.raises(CacheError, match="let a second writer replace"):
        outputs.refuse_unfit(f"{s3}/own")


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_many_processes_make_the_cache_of_one_and_less_than_a_pass_each_twice(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: bool
) -> None:
    """Real processes, each of which has 0.2 seconds to a batch, and 40 passes of 6 batches between them."""
    count = 6
    make_tiny_data(tmp_path / "train", n=192, block=48, shard=48)
    line = "        return self.body(x)\n"
    slow = '        __import__("time").sleep(float(__import__("os").environ.get("SLOW", "0")))\n'
    assert line in TEACHER
    (tmp_path / "net.py").write_text(TEACHER.replace(line, slow + line))
    sections: dict[str, Any] = {"cache": {"views": 40, "threads": 1, "device": "cpu"}}
    alone = config(tmp_path, **sections)
    (tmp_path / "shared.yaml").write_text(to_yaml(placed(tmp_path, f"{s3}/{told}", **sections["cache"])))
    root = cache_teacher(alone, quiet=True).content_root
    command = [sys.executable, "-m", "cskd", "cache-teacher", str(tmp_path / "shared.yaml"), "--json"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "SLOW": "0.2"}
    running = [
        subprocess.Popen(
            command,
            env=environ | ({WORKER: str(i), WORKERS: str(count)} if told else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for i in range(count)
    ]
    reports = [json.loads(process.communicate(timeout=500)[0]) for process in running]
    notes = [note for report in reports for note in report["notes"] if "made by another one meanwhile" in note]
    twice = sum(float(note.rsplit(" ", 1)[1]) for note in notes)
    with capsys.disabled():
        print(f"\n{count} processes, told how many: {told}: {twice:.2f} passes of 40 made twice; root {root}")
    assert {report["content_root"] for report in reports} == {root}
    assert sum(report["units"] for report in reports) == 160 and twice <= count
