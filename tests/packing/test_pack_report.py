"""What `cskd pack` and `cskd index` print: images are images, classes are those that have images, notes come first."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cskd.cli import app
from cskd.pipeline.pack import PackReport, index_data, pack_data, render
from tests.data_sources import FILES, folder, prefixed


def shown(report: PackReport) -> str:
    out = io.StringIO()
    render(report, Console(file=out, width=200))
    return out.getvalue()


def test_index_counts_images_not_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_data(folder(tmp_path / "src", FILES), tmp_path / "out", shard_size=4, quiet=True)
    assert capsys.readouterr().err == ""
    report = index_data(tmp_path / "out")
    assert "index: 27 images in " in capsys.readouterr().err
    assert (report.samples, report.shards, report.classes, report.classes_with_images) == (27, 7, 3, 3)
    assert ": 27 images of 3 classes in 7 shards " in shown(report)


def test_a_limit_says_how_many_of_the_classes_have_images_and_keeps_the_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = pack_data(folder(tmp_path / "src", FILES), tmp_path / "out", limit=5)
    assert (report.samples, report.classes, report.classes_with_images) == (5, 3, 2)
    assert ": 5 images of 2 of 3 classes in 1 shard (" in shown(report)
    err = capsys.readouterr().err
    assert err.index("note: 5 of 27 images taken, as limited; labels stay those of all 3 classes") < err.index(
        "pack: 5 "
    )
    assert "note: 2 of 3 classes have images; none: ant" in err
    assert err.count("taken, as limited") == 1 and "as limited" not in shown(report)
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee\ncat\n"


def test_progress_never_counts_backwards_from_listing_to_packing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cskd.pipeline.show.progress.Progress._interval", lambda self, now: 0.0)
    made = pack_data(folder(tmp_path / "src", FILES), tmp_path / "a", shard_size=4)
    capsys.readouterr()
    pack_data(Path(made.folder), tmp_path / "b")
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("list: 4 images, ") for line in lines)
    assert [line for line in lines if line.startswith("list: ")][-1].startswith("list: 27 images in ")
    assert any(line.startswith("pack: 27 of 27 images (100%), ") for line in lines)
    assert not any("-" in line.partition(": ")[2] or " of 0 " in line for line in lines)


def test_the_command_line_refuses_several_splits_and_takes_one(tmp_path: Path) -> None:
    folder(tmp_path / "src", {**prefixed("train/"), **prefixed("val/")})
    run = CliRunner()
    refused = run.invoke(app, ["pack", str(tmp_path / "src"), str(tmp_path / "out"), "--json"])
    assert "pick one with --split train (or give src/train)" in str(refused.exception)
    args = ["pack", str(tmp_path / "src"), str(tmp_path / "out"), "--split", "val", "--json"]
    taken = json.loads(run.invoke(app, args).stdout)
    assert taken["samples"] == 27
    assert taken["notes"] == ["taken from val in src, as asked with --split"]
    indexed = json.loads(run.invoke(app, ["index", str(tmp_path), "--split", "out", "--json"]).stdout)
    assert (indexed["folder"], indexed["inventory"]) == (taken["folder"], taken["inventory"])
