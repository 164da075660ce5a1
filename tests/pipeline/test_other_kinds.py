"""A command that is given a thing of another kind than it takes says what the thing is, what is taken, and the next step."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

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
    return folder


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> str:
    monkeypatch.setattr(sys, "argv", ["cskd", *line.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (1, "", 1) and len(err) <= 310
    return err


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0])
def test_a_thing_of_another_kind_is_named_with_the_next_step(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: tuple[str, tuple[str, ...], str],
) -> None:
    monkeypatch.chdir(home)
    command, taken, said = line
    for thing, (kind, step) in KINDS.items():
        if thing not in taken:
            err = refused(monkeypatch, capsys, command.format(thing))
            assert f"{thing} is {kind}, and " in err and said in err and step.format(thing) in err


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
