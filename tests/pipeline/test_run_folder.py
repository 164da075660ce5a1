"""What a run leaves for people: pictures that can be drawn again, and a card whose snippet runs and whose front matter the hub
reads. Nothing of it stops a run."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import cskd.pipeline.run_folder
from cskd.config import Config
from cskd.errors import PathError
from cskd.pipeline.draw.confusion import from_csv
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.model_card import CARD, escaped, known_dataset, put_card
from cskd.pipeline.run_folder import RunFolder
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.student.checkpoint import load_student
from cskd.student.heads import score_head
from cskd.student.model import eval_heads
from tests.pipeline.test_pipeline import cached_data, config, run_settings

PICTURES = ("results.png", "confusion.png", "train_batch0.png")
BEST = {"epochs": 2, "export": "best", "best": "top1.ema.all"}
PLAIN = {"model": "vit_tiny_patch16_224", "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}}

TERM = {"head": "patches", "target": "cells", "kind": "kl", "decay": "cosine"}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def run(cached: Path) -> Path:
    train(run_settings(cached, cached / "done", **BEST), quiet=True)
    return cached / "done"


def other(cached: Path, output: Path, loss: dict[str, Any], student: dict[str, Any]) -> Config:
    """A short run of another method or student."""
    made = config(cached, "x", loss=loss, student=student, train={"max_steps": 1})
    return dataclasses.replace(made, train=dataclasses.replace(made.train, output=str(output)))


def snippet(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def same_as_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the card's snippet gives what the student's score is, and names the class with the largest share."""
    monkeypatch.chdir(folder)
    (folder.parent / "use.py").write_text(snippet((folder / CARD).read_text(encoding="utf-8")), encoding="utf-8")
    names = runpy.run_path(str(folder.parent / "use.py"))
    student, facts = load_student(folder)
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (45, 50, 3), dtype=np.uint8)).save(folder.parent / "image.png")
    with Image.open(folder.parent / "image.png") as file:
        image = names["prepare"](file)[None]
    with torch.no_grad():
        expected = eval_heads(student(image, (1, 1)), student.trained)[score_head(student.trained)]
        assert torch.allclose(names["model"](image), expected, atol=1e-5)
    found = names["predict"](folder.parent / "image.png")
    assert next(iter(found)) == facts["label_names"][int(expected.argmax())]


def test_a_run_leaves_pictures_and_a_card_that_loads_its_student(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PICTURES:
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200
    same_as_snippet(run, monkeypatch)


@pytest.mark.parametrize(
    ("loss", "student", "blends"),
    [
        ({"method": "none"}, {}, []),
        ({"method": "deit-hard"}, PLAIN, []),
        ({"method": "deit-hard", "terms": [TERM]}, {}, ["blend.cosine"]),
    ],
    ids=["none", "one head", "hard and soft terms"],
)
def test_the_snippet_loads_every_kind_of_student(
    cached: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loss: dict[str, Any],
    student: dict[str, Any],
    blends: list[str],
) -> None:
    """One head doubled and one silenced, one head alone, and two."""
    train(other(cached, tmp_path / "run", loss, student), quiet=True)
    assert (tmp_path / "run" / "train_batch0.png").exists()
    assert [name for name in read_metrics(tmp_path / "run")[0] if name.startswith("blend")] == blends
    same_as_snippet(tmp_path / "run", monkeypatch)


def test_the_hub_reads_the_front_matter_with_the_top1_of_every_head(run: Path) -> None:
    text = (run / CARD).read_text(encoding="utf-8")
    data: Any = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", None)
    assert {"timm", "cskd"} <= set(data.tags)
    best = json.loads((run / "config.json").read_text())["cskd"]["best"]
    row = next(row for row in read_metrics(run) if row["step"] == best["step"])
    found = {result.metric_name.rpartition(", ")[2]: result.metric_value for result in data.eval_results}
    heads = ("class", "distillation", "patches", "class+distillation", "all")
    assert found == {head: round(row[f"top1.ema.{head}"], 3) for head in heads}
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["name"] == "done"
    for fact in (
        "teacher forwards | 0 |",
        "fingerprint",
        "epochs | 2 of 2",
        "train.seed 0",
        "cskd train resolved.yaml",
    ):
        assert fact in text


def test_the_table_of_confusion_is_that_of_the_best_and_the_last_weights(cached: Path, run: Path) -> None:
    classes = json.loads((run / "config.json").read_text())["label_names"]
    best, last = from_csv((run / "confusion.csv").read_bytes(), classes)
    assert (best.weights, last.weights, last.step) == ("best", "last", read_metrics(run)[-1]["step"])
    score = {"model.safetensors": best, "model_ema.safetensors": last}
    for file, kept in score.items():
        report = evaluate_checkpoint(run / file, cached / "val", 8, 0, None, "cpu", quiet=True)
        assert report.heads[report.score].top1 == pytest.approx(kept.top1)


def test_what_was_removed_is_drawn_again_by_the_command_of_the_finished_run(cached: Path, run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("results.png", "confusion.png", CARD)}
    for name in before:
        (run / name).unlink()
    train(run_settings(cached, run, **BEST), quiet=True)
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("how", ["edited", "own", "windows", "link", "folder", "binary"])
def test_a_card_that_is_not_the_generated_one_is_kept(tmp_path: Path, how: str) -> None:
    path = tmp_path / CARD
    assert put_card(tmp_path, "one\n") == "" == put_card(tmp_path, "two\n")
    assert path.read_text().startswith("two\n")
    generated = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        (tmp_path / "mine.md").write_bytes(generated)
        path.symlink_to("mine.md")
    else:
        edits = {
            "edited": generated.replace(b"two", b"license: mit"),
            "own": b"# mine\n",
            "windows": generated.replace(b"\n", b"\r\n"),
        }
        path.write_bytes(edits.get(how, b"\xff\xfe" + generated))
    kept = path.read_bytes() if path.is_file() else None
    assert "is kept as it is" in put_card(tmp_path, "three\n")
    assert (path.read_bytes() if path.is_file() else None) == kept and (path.is_symlink() == (how == "link"))


def test_pictures_that_fail_stop_no_run_and_each_is_said_once(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    for broken in ("draw_results", "draw_confusion", "draw_batch", "model_card"):
        monkeypatch.setattr(cskd.pipeline.run_folder, broken, fails)
    monkeypatch.setattr(cskd.pipeline.run_folder, "SHARE", 1.0)  # at the end of each epoch
    report = train(run_settings(cached, tmp_path / "run", epochs=2), quiet=True)
    said = sorted(note for note in report.notes if "could not be made" in note and "no room" in note)
    assert [Path(note.partition(" could")[0]).name for note in said] == sorted([CARD, *PICTURES])
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_rank_that_does_not_write_draws_nothing(cached: Path, run: Path, tmp_path: Path) -> None:
    class Other:
        writer, views, config, output = (
            None,
            type("V", (), {"inventory": type("I", (), {"classes": ["a"]})}),
            None,
            tmp_path,
        )

    folder = RunFolder(Other(), lambda line: pytest.fail(line))  # type: ignore[arg-type]
    folder.found = {"": None}  # type: ignore[dict-item]
    folder.evaluated(3)
    folder.draw([{"epoch": 0, "lr": 1.0}], last=True)
    assert folder.found == {} and os.listdir(tmp_path) == []


def test_eval_writes_what_each_class_is_taken_for_and_replaces_only_its_own(
    cached: Path, run: Path, tmp_path: Path
) -> None:
    def evaluate(path: Path) -> Any:
        return evaluate_checkpoint(run, cached / "val", 8, 0, None, "cpu", quiet=True, confusion=path)

    report = evaluate(tmp_path / "c.png")
    classes = json.loads((run / "config.json").read_text())["label_names"]
    (found,) = from_csv((tmp_path / "c.csv").read_bytes(), classes)
    assert found.top1 == pytest.approx(report.heads[report.score].top1)
    with Image.open(tmp_path / "c.png") as picture:
        assert min(picture.size) > 200
    evaluate(tmp_path / "c.png")
    (tmp_path / "c.csv").write_text("mine\n")
    for path, said in (("c.png", "is there and is no table"), ("d.csv", "expected the path of a PNG")):
        with pytest.raises(PathError, match=said):
            evaluate(tmp_path / path)
    with pytest.raises(PathError, match="the folder of a run"):
        evaluate(run / "c.png")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("tench", "tench"),
        ("a|b", r"a\|b"),
        ("**b** <i>", r"\*\*b\*\* \<i\>"),
        ("[x](http://y)", r"\[x\](http://y)"),
        ("- item", "&#45; item"),
        ("1. item", "&#49;. item"),
        ("a\n# b", r"a \# b"),
        ("`c` $d$ :cat: &lt;", r"\`c\` \$d\$ \:cat: \&lt;"),
    ],
)
def test_names_are_shown_as_they_are_in_markdown(name: str, shown: str) -> None:
    assert escaped(name) == shown


def test_a_data_set_is_named_only_where_its_classes_tell(run: Path) -> None:
    digits = [str(n) for n in range(10)]
    cifar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert [known_dataset(c) for c in (digits, cifar, [f"n{n:08d}" for n in range(1000)], ["a"])] == [
        "",
        "uoft-cs/cifar10",
        "ILSVRC/imagenet-1k",
        "",
    ]
