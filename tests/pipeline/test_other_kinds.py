"""A command that is given a thing of another kind than it takes says what the thing is, what is taken, and the next step."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cskd import cli
from cskd.files.folders import mark
from cskd.pipeline.conflicts import own_output
from cskd.storage import open_storage
from tests.caches import make_tiny_cache, make_tiny_data

KINDS = {
    "c.yaml": ("a config", "`cskd check {}` looks at it"),
    "run": ("the folder of a run", "`cskd eval {} DATA` gives its scores"),
    "run/model.safetensors": ("a file of weights", "`cskd eval {} DATA` gives their scores"),
    "cache": ("a cache", "`cskd inspect {}` shows it"),
    "data": ("a packed data set", "`cskd verify {} --images` looks at it"),
    "demo": ("the folder of a demo", "give one of the folders in it"),
    "export": ("an export of `cskd export`", "docs/howto/webdataset.md"),
    "data/00000.tar": ("a tar file", "`cskd pack {} OUT` makes a data set of it"),
    "look.html": ("a page for a browser", "open it in a browser"),
}
RUN = ("run", "run/model.safetensors")
# A command line, with {} for the thing; what it takes; how the line says that
LINES = [
    *((f"{name} {{}}", ("c.yaml",), "takes a config") for name in ("plan", "train", "doctor", "config", "check")),
    ("launch slurm {}", ("c.yaml",), "`cskd launch` takes a config"),
    ("cache-teacher {}", ("c.yaml",), "`cskd cache-teacher` takes a config"),
    ("cache-teacher c.yaml {}", ("c.yaml",), "`cskd cache-teacher` takes a config"),
    ("eval {} data", RUN, "`cskd eval` takes the folder of a run or its weights"),
    ("eval run {}", ("data",), "`cskd eval` takes a packed data set"),
    *((f"{name} {{}}", ("cache",), f"`cskd {name}` takes a cache") for name in ("inspect", "repair", "gc")),
    ("export {} out", ("cache",), "`cskd export` takes a cache"),
    ("verify {}", ("cache", "data"), "`cskd verify` takes a cache or a packed data set"),
    ("verify {} --images", ("cache", "data"), "`cskd verify` takes a cache or a packed data set"),
    ("push {} me/x --dry-run", ("run", "cache"), "`cskd push` takes the folder of a run or a cache"),
    ("inspect cache --data {}", ("data",), "`cskd inspect --data` takes a packed data set"),
    ("inspect cache --student {}", RUN, "`cskd inspect --student` takes the folder of a run or its weights"),
    ("pack {} out", ("data", "data/00000.tar"), "`cskd pack` takes images in folders or archives or a packed data set"),
    ("index {}", ("data", "data/00000.tar"), "`cskd index` takes webdataset shards or a packed data set"),
]
# A command line, with {} for the value of a key; what it may be; how the line says that
KEYS = [
    *((f"{command} --set data.{key}={{}}", ("data",), "expected a packed data set")
      for command in ("train keys.yaml", "cache-teacher new.yaml") for key in ("train", "val")),
    ("train keys.yaml --set cache.path={}", ("cache",), "expected a cache"),
    ("train keys.yaml --set train.caches.x={}", ("cache",), "expected a cache"),
    ("cache-teacher new.yaml --set teacher.model={}", (), "weights are given by teacher.weights"),
    ("train keys.yaml --set student.model={}", (), "weights are given by student.init"),
]  # fmt: skip
# The same of folders alone: of a file what is in it counts. And of outputs, of which those of each kind go on.
FOLDERS = [
    ("cache-teacher new.yaml --set teacher.weights={}", "run", "which holds no weights; give a"),
    ("train keys.yaml --set student.init={}", "run", "which holds no weights; give a .safetensors, a .pt or a run's"),
    ("cache-teacher new.yaml --set teacher.classes={}", "", "one class name a line"),
    ("train keys.yaml --set train.output={}", "run", "give "),
    ("cache-teacher new.yaml --set cache.path={}", "cache", "give "),
    ("train keys.yaml --set train.scratch={}", "demo", "give "),
    ("train keys.yaml --set data.node_cache={}", "demo", "give "),
    ("export cache {}", "export", "give "),
    ("export cache {} --container webdataset", "cache", "give "),
    ("pack images {}", "data", "give "),
    ("index data/00000.tar --out {}", "data", "give "),
    ("demo {}", "demo", "give "),
    ("launch slurm keys.yaml --output {}", "demo", "give "),
    ("launch slurm keys.yaml --output {} --dry-run", "demo", "give "),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    make_tiny_cache(folder)
    own_output(folder / "run")
    for name in ("model.safetensors", "resolved.yaml"):
        (folder / "run" / name).touch()
    for kind in ("demo", "export"):
        (folder / kind).mkdir()
        mark(folder / kind, kind)
    (folder / "c.yaml").write_text("train:\n  epochs: 3\n")
    (folder / "look.html").write_text("<!doctype html><title>x</title>")
    for i in range(2):
        (folder / "images" / "ab"[i]).mkdir(parents=True)
        Image.new("RGB", (40, 40), (i * 100, 50, 50)).save(folder / "images" / "ab"[i] / "0.png")
    config = {
        "data": {"train": "data", "val": "data"},
        "cache": {"path": "cache"},
        "student": {
            "model": "deit_tiny_distilled_patch16_224",
            "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
        },
        "loss": {"method": "deit-hard"},
        "train": {"output": "newrun", "epochs": 3, "global_batch": 4, "warmup_epochs": 1, "workers": 0},
    }
    (folder / "keys.yaml").write_text(yaml.safe_dump(config))
    teacher = {"model": "resnet10t", "kwargs": {"num_classes": 5}}
    (folder / "new.yaml").write_text(yaml.safe_dump(config | {"teacher": teacher, "cache": {"path": "new"}}))
    return folder


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> str:
    monkeypatch.setattr(sys, "argv", ["cskd", *line.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (1, "", 1) and len(err) <= 310
    return err


def refusals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: tuple[str, tuple[str, ...], str]
) -> Iterator[tuple[str, str, str, str]]:
    """Each thing that the command of a line does not take: its kind, its next step, and what is said."""
    command, taken, _ = line
    for thing, (kind, step) in KINDS.items():
        if thing not in taken:
            yield thing, kind, step.format(thing), refused(monkeypatch, capsys, command.format(thing))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0])
def test_a_thing_of_another_kind_is_named_with_the_next_step(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: tuple[str, tuple[str, ...], str],
) -> None:
    monkeypatch.chdir(home)
    for thing, kind, step, err in refusals(monkeypatch, capsys, line):
        assert f"{thing} is {kind}, and " in err and line[2] in err and step in err


@pytest.mark.parametrize("line", KEYS, ids=lambda line: line[0])
def test_a_thing_of_another_kind_that_a_config_names_is_named(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: tuple[str, tuple[str, ...], str],
) -> None:
    monkeypatch.chdir(home)
    for thing, kind, step, err in refusals(monkeypatch, capsys, line):
        assert f"{thing} is {kind}, " in err or f"it is {kind}: " in err
        assert line[2] in err and (step in err or ".model=" in line[0])


@pytest.mark.parametrize("line", FOLDERS, ids=lambda line: line[0])
def test_a_folder_of_another_kind_is_refused_and_nothing_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: tuple[str, str, str]
) -> None:
    monkeypatch.chdir(home)
    command, taken, said = line
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    for thing, (kind, _) in KINDS.items():
        if (home / thing).is_dir() and thing != taken:
            err = refused(monkeypatch, capsys, command.format(thing))
            assert (f"{thing} is {kind}" in err or f" are both {thing}" in err) and said in err
    if "--set" not in command:
        assert "c.yaml is a config, expected a folder" in refused(monkeypatch, capsys, command.format("c.yaml"))
    assert before == {path: path.stat().st_mtime_ns for path in home.rglob("*")}


def test_the_folder_above_what_is_meant_says_what_is_in_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    for name in ("a", "b"):
        shutil.copytree("data", f"sets/{name}")
        shutil.copytree("cache", f"caches/{name}")
    of_data = "sets is the folder above a, b, expected a packed data set; give sets/a"
    for line in ("eval run sets", "train keys.yaml --set data.train=sets", "train keys.yaml --set data.val=sets"):
        assert of_data in refused(monkeypatch, capsys, line)
    assert "caches is the folder above a, b, expected a cache; give caches/a" in refused(
        monkeypatch, capsys, "inspect caches"
    )


def test_a_cache_is_not_begun_in_a_folder_with_another_inventory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_data(tmp_path / "other", n=8)
    for shard in (tmp_path / "other").glob("*.tar"):
        shard.unlink()
    monkeypatch.chdir(home)
    line = f"export cache {tmp_path}/other --container webdataset"
    assert "other holds the inventory " in refused(monkeypatch, capsys, line)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["inventory"]


def test_the_config_that_leads_to_what_is_meant_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert "its config is cache/resolved.yaml" in refused(monkeypatch, capsys, "train cache")
    assert "cache.path in run/resolved.yaml may be what is meant" in refused(monkeypatch, capsys, "inspect run")
    assert "data.train in c.yaml may be what is meant" in refused(monkeypatch, capsys, "eval run c.yaml")


def test_a_folder_whose_shards_have_moved_is_still_data(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_data(tmp_path / "data")
    for shard in (tmp_path / "data").glob("*.tar"):
        shard.unlink()
    shutil.copytree(home / "run", tmp_path / "run")
    assert "none of the 2 image shards is there" in refused(monkeypatch, capsys, f"verify {tmp_path}/data --images")


def test_what_lies_on_an_object_store_is_named_too(
    home: Path, s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for thing in ("run", "cache", "data"):
        for path in (home / thing).rglob("*"):
            if path.is_file():
                open_storage(f"{s3}/{thing}").put(str(path.relative_to(home / thing)), path.read_bytes())
    for command, taken, said in LINES:
        if command.split()[0] in ("eval", "repair", "gc", "export", "verify", "push") or command == "inspect {}":
            for thing in {"run", "cache", "data", "data/00000.tar"} - set(taken):
                err = refused(monkeypatch, capsys, command.format(f"{s3}/{thing}"))
                assert f"{s3}/{thing} is {KINDS[thing][0]}, and " in err and said in err


@pytest.mark.parametrize("command", ["train keys.yaml", "cache-teacher new.yaml", "plan new.yaml", "check keys.yaml"])
def test_a_node_cache_in_what_a_command_is_to_make_is_refused_at_once_and_not_when_it_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["cskd", *command.split(), "--set", "data.node_cache=newrun/copies"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert (
        stop.value.code == 1
        and "data.node_cache newrun/copies lies in train.output newrun; give" in said.out + said.err
    )
    assert (said.out.count("\nok ") > 5) == command.startswith(
        "check"
    )  # what is wrong with one line keeps no other away
    assert not (home / "newrun").exists()
