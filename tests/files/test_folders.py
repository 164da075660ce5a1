"""Every folder is of a kind: no command writes into, inside or around a folder of another one, however its path is written."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cskd.files.durable
from cskd import cli
from cskd.config import Config, from_dict
from cskd.dataset.inventory import open_inventory
from cskd.errors import CacheError, CskdError, PathError
from cskd.files.claims import CLAIMS, Claims
from cskd.files.folders import MARKER, kind_of, mark, refuse_output
from cskd.files.writer import sole_writer
from cskd.packing.index import index
from cskd.packing.pack import pack
from cskd.pipeline import outputs
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.repair import repair
from cskd.pipeline.conflicts import own_output
from cskd.pipeline.demo import run_demo
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.train import train
from tests.caches import make_tiny_cache, make_tiny_data


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, data/, caches/one, runs/one (with its marker), demo/ and, as old versions left them, old_run/
    and old_demo/."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("ant", "bee"):
        (folder / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / name / "0.png")
    cache = make_tiny_cache(folder / "caches")
    cache.root.rename(folder / "caches" / "one")
    (folder / "caches" / "data").rename(folder / "data")
    own_output(folder / "runs" / "one")
    (folder / "demo").mkdir()
    mark(folder / "demo", "demo")
    (folder / "old_run" / "resume").mkdir(parents=True)
    (folder / "old_run" / "resolved.yaml").touch()
    for name in ("images/train", "data/train/inventory"):
        (folder / "old_demo" / name).mkdir(parents=True)
    return folder


@pytest.fixture
def home(project: Path, tmp_path: Path) -> Path:
    """A copy of the project."""
    return Path(shutil.copytree(project, tmp_path, dirs_exist_ok=True))


def config(home: Path, **sections: dict[str, Any]) -> Config:
    raw: dict[str, dict[str, Any]] = {
        "data": {"train": str(home / "data")},
        "cache": {"path": str(home / "caches" / "new")},
        "train": {"output": str(home / "runs" / "new"), "device": "cpu", "epochs": 10},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return from_dict(raw)


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "train": lambda home, out: train(config(home, train={"output": str(out)}), quiet=True),
    "train --online": lambda home, out: train(config(home, train={"output": str(out)}), online=True, quiet=True),
    "cache-teacher": lambda home, out: cache_teacher(config(home, cache={"path": str(out)}), quiet=True),
    "pack": lambda home, out: pack(home / "images", out),
    "demo": lambda home, out: run_demo(out, quiet=True),
    "inspect --png": lambda home, out: inspect(home / "caches" / "one", png=out / "x.png"),
    "inspect --html": lambda home, out: inspect(home / "caches" / "one", html=out / "x.html"),
}
OWN = {
    "train": ("runs/one", "old_run"),
    "train --online": ("runs/one", "old_run"),
    "cache-teacher": ("caches/one",),
    "pack": ("data",),
    "demo": ("demo", "old_demo"),
    "inspect --png": ("demo", "old_demo"),
    "inspect --html": ("demo", "old_demo"),
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_folders_know_their_kind_with_and_without_a_marker(home: Path) -> None:
    kinds = {
        **{"data": "data", "caches/one": "cache", "runs/one": "run", "demo": "demo", "old_run": "run"},
        **{"old_demo": "demo", "images": None, "caches": None, "runs": None, ".": None, "nothing": None},
    }
    assert {name: kind_of(home / name) for name in kinds} == kinds
    assert kind_of(Path(__file__).parent.parent / "golden" / "format1" / "cache") == "cache"
    assert kind_of(Path(__file__).parent.parent / "golden" / "format1" / "data") == "data"


@pytest.mark.parametrize("damage", ["manifests", "shards", "marker", "marker of a later version"])
def test_a_damaged_folder_is_still_known(home: Path, damage: str) -> None:
    if damage == "manifests":
        for path in (home / "caches" / "one").glob("manifest*"):
            path.unlink()
        assert kind_of(home / "caches" / "one") == "cache"
    elif damage == "shards":
        for path in (home / "data").glob("*.tar"):
            path.unlink()
        with pytest.raises(PathError, match="inventory without its shards"):
            refuse_output(home / "data", "run", "train.output")
        refuse_output(home / "data", "data", "OUT")
    elif damage == "marker":
        (home / "old_run" / MARKER).write_bytes(b"\xff{")
        assert kind_of(home / "old_run") == "run"
    else:
        (home / "images" / MARKER).write_text('{"kind": "of tomorrow", "version": 2, "more": []}')
        with pytest.raises(PathError, match="is a folder of kind 'of tomorrow'"):
            refuse_output(home / "images", "run", "train.output")


@pytest.mark.parametrize("other", ["data", "caches/one", "runs/one", "old_run", "demo", "old_demo"])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_command_writes_into_or_inside_a_folder_of_another_kind(home: Path, writer: str, other: str) -> None:
    if other in OWN[writer]:
        return
    before = files(home)
    for out in (home / other, home / other / "new", home / other / "inventory" / "x" / ".." / "y"):
        if "demo" in other and out != home / other:
            continue  # there is room for everything in a demo
        with pytest.raises(PathError) as caught:
            WRITERS[writer](home, out)
        text = str(caught.value).replace(str(home), "")
        assert "\n" not in text and len(text) < 300 and ("is " in text or "lies in" in text or "are both" in text)
    assert files(home) == before and not (home / other / "new").exists()


@pytest.mark.parametrize("writer", [name for name in WRITERS if not name.startswith("inspect")])
def test_no_command_writes_around_a_folder_of_another_kind(home: Path, writer: str) -> None:
    (home / "deep" / "er").mkdir(parents=True)
    shutil.move(home / "caches", home / "deep" / "er" / "caches")
    shutil.move(home / "runs", home / "deep" / "er" / "runs")
    for out in (home, home / "deep"):
        with pytest.raises(PathError, match=r"holds|both"):
            WRITERS[writer](home, out)


def test_folders_next_to_each_other_and_in_plain_ones_are_fine(home: Path) -> None:
    for out, kind in (
        ("runs/two", "run"),
        ("caches/two", "cache"),
        ("data2", "data"),
        ("demo/runs/x", "run"),
        ("d", "demo"),
    ):
        refuse_output(home / out, kind, "OUT", inputs={"data.train": home / "data"})
    refuse_output(home / "caches", "cache", "cache.path")  # around its own kind
    refuse_output(home / "data" / "val", "data", "OUT")  # data/imagenet and data/imagenet/val, both packed
    with pytest.raises(PathError, match="lies in"):
        refuse_output(home / "caches" / "one" / "units" / "x", "cache", "cache.path", names=("units",))


def test_a_folder_of_its_own_kind_goes_on_wherever_an_older_version_put_it(home: Path) -> None:
    for kind, name in (("cache", "caches/one"), ("run", "old_run"), ("data", "data")):
        shutil.copytree(home / name, home / "caches" / "one" / kind)
        shutil.copytree(home / name, home / "around" / kind)
        shutil.copytree(home / "runs", home / "around" / kind / "runs")
        shutil.copytree(home / "data", home / "around" / kind / "images")
        refuse_output(home / "caches" / "one" / kind, kind, "OUT")  # inside another
        refuse_output(home / "around" / kind, kind, "OUT")  # around another


def test_links_case_and_dots_lead_to_the_same_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "link").symlink_to(home / "caches" / "one")
    (home / "inner").symlink_to(home / "caches" / "one" / "units")
    (home / "loop").symlink_to(home / "loop")
    monkeypatch.chdir(home / "runs")
    for text in (
        "../link",
        "../link/",
        "../caches/./one//",
        "../runs/../caches/one",
        "../inner/x",
        str(home / "inner"),
    ):
        with pytest.raises(PathError, match="a cache"):
            refuse_output(Path(text), "run", "train.output")
    with pytest.raises((OSError, CskdError)):
        train(config(home, train={"output": str(home / "loop")}), quiet=True)
    with pytest.raises(PathError, match=r"train\.output and data\.train are both"):
        refuse_output(home / "images", "run", "train.output", inputs={"data.train": home / "runs" / ".." / "images"})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"cache": {"path": "runs/new"}}, "train.output and cache.path are both"),
        ({"data": {"val": "runs/new"}}, "train.output and data.val are both"),
        ({"student": {"init": "runs/new"}}, "train.output and student.init are both"),
        ({"student": {"init": "runs/new/model.safetensors"}}, "is a name that train.output"),
        ({"teacher": {"weights": "runs/new/resume/step-00000001.safetensors"}}, "is a name that train.output"),
        ({"teacher": {"classes": "runs/new/config.json"}}, "is a name that train.output"),
    ],
)
def test_the_paths_of_one_config_are_kept_apart(
    home: Path, sections: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(PathError, match=words):
        train(config(home, **sections), quiet=True)
    assert not (home / "runs" / "new").exists()


def test_a_cache_is_no_place_for_the_run_to_come_or_for_its_data(home: Path) -> None:
    new = str(home / "caches" / "new")
    for sections in (
        {"train": {"output": new}},
        {"data": {"train": new}},
        {"data": {"train": str(home / "data"), "val": new}},
    ):
        with pytest.raises(PathError, match=r"cache\.path and .* are both"):
            cache_teacher(config(home, **sections), quiet=True)


def test_packing_into_its_source_is_refused_and_shards_stay_where_they_are(home: Path) -> None:
    with pytest.raises(PathError, match="lies in SRC"):
        pack(home / "images", home / "images" / "packed")
    assert sorted(p.name for p in (home / "images").iterdir()) == ["ant", "bee"]
    for folder in ("caches/one", "runs/one"):
        shutil.copy(next((home / "data").glob("*.tar")), home / folder / "00000.tar")
        shutil.rmtree(home / folder / "inventory", ignore_errors=True)
        with pytest.raises(PathError, match="SHARDS"):
            index(home / folder)
        assert not (home / folder / "inventory").exists()


def test_a_picture_replaces_pictures_only(home: Path) -> None:
    (home / "precious.yaml").write_text("a: b")
    with pytest.raises(PathError, match="is no PNG"):
        inspect(home / "caches" / "one", data=home / "data", png=home / "precious.yaml")
    with pytest.raises(PathError, match="is a folder"):
        inspect(home / "caches" / "one", data=home / "data", png=home / "images")
    for _ in range(2):
        inspect(home / "caches" / "one", data=home / "data", png=home / "x.png")
    with Image.open(home / "x.png") as picture:
        assert picture.format == "PNG"
    with sole_writer(home, "x", name=".x.png.cskd.writer"), pytest.raises(PathError, match="written to by process"):
        inspect(home / "caches" / "one", data=home / "data", png=home / "x.png")
    assert not [p.name for p in home.iterdir() if p.name.startswith(".")]


def test_what_a_command_refuses_is_one_line_and_exit_code_1(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = home / "caches" / "one"
    before = files(cache)
    for line in (
        f"pack {home / 'images'} {cache}",
        f"inspect {cache} --data {home / 'data'} --png {cache / 'manifest.json'}",
    ):
        monkeypatch.setattr(sys, "argv", ["cskd", *line.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1 and capsys.readouterr().err.count("\n") == 1
    assert files(cache) == before


def test_every_folder_is_locked_while_it_is_written_to(home: Path) -> None:
    """pack, index and demo; training: tests/files/test_writer.py."""
    calls: dict[str, Callable[[], object]] = {
        "data2": lambda: pack(home / "images", home / "data2"),
        "data": lambda: index(home / "data"),
        "demo": lambda: run_demo(home / "demo", quiet=True),
    }
    for name, call in calls.items():
        with sole_writer(home / name, "x"), pytest.raises(PathError, match=f"written to by process {os.getpid()}"):
            call()
    assert pack(home / "images", home / "data2").n == 2 and open_inventory(home / "data2").n == 2


def test_a_cache_is_made_or_repaired_not_both(home: Path) -> None:
    cache = home / "caches" / "one"
    before = files(cache)
    with Claims(cache) as claims:
        claims.take("b00000.g0000")
        with pytest.raises(PathError, match=rf"is being made by process {os.getpid()} \(this one\)"):
            repair(cache, data=home / "data", quiet=True)
    with sole_writer(cache, "x"):
        with pytest.raises(PathError, match="is being written to by process"):
            repair(cache, data=home / "data", quiet=True)
        (cache / ".cskd.writer").write_text("elsewhere 7\n- 2026-01-01 00:00:00\n")
        with pytest.raises(PathError, match="is being repaired by process 7 on elsewhere since 2026-01-01"):
            cache_teacher(config(home, cache={"path": str(cache)}), quiet=True)
        (cache / ".cskd.writer").unlink()
    assert files(cache) == before and not (cache / CLAIMS).exists()
    repair(cache, data=home / "data", quiet=True)
    assert files(cache).keys() - before.keys() == {"sealed.json", "index.jsonl.zst"} and not (cache / CLAIMS).exists()


def test_a_place_that_can_not_be_written_to_is_named_and_not_what_was_tried_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".cskd-links-x"))
    monkeypatch.setattr(outputs, "hard_link_error", lambda _: refused)
    with pytest.raises(OSError, match="Read-only") as e:
        outputs.refuse_unfit(str(tmp_path / "cache"))
    assert e.value.filename == str(tmp_path / "cache")


def test_a_disk_without_hard_links_is_found_before_the_teacher_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    monkeypatch.setattr("cskd.pipeline.cache_teacher.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    with pytest.raises(CacheError, match=r"cache\.path .*new: its file system has no hard links"):
        cache_teacher(config(home), quiet=True)
    assert cskd.files.durable.hard_link_error(home) is not None
    assert not (home / "caches" / "new").exists() and not list(home.rglob(".cskd-links*"))


def test_a_run_is_marked_before_anything_else_is_in_it(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data")
    own_output(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [MARKER] and kind_of(tmp_path / "run") == "run"
    with pytest.raises(PathError, match="is the folder of a run"):
        cache_teacher(config(tmp_path, cache={"path": str(tmp_path / "run")}), quiet=True)
