"""The demo says what it measured: the same start for every method, a spread over seeds, and no image it was chosen on."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

import cskd.pipeline.demo
from cskd.config import Config, to_dict
from cskd.errors import ConfigError
from cskd.pipeline.demo import STUDENTS, Settings, StudentResult, _config, _training, render, run_demo, verdict
from cskd.pipeline.demo_curve import Curve, draw_curves
from cskd.pipeline.demo_data import POOL, digits
from cskd.pipeline.intervals import paired_difference, spread
from cskd.pipeline.train import TrainReport, train

SMALL = Settings(epochs=1, seeds=2, per_class=4, copies=2, views=1, teacher_epochs=40)


@pytest.mark.parametrize("epochs", [1, 2, 24])
@pytest.mark.parametrize("student", STUDENTS)
def test_the_warm_up_is_shorter_than_the_training(tmp_path: Path, student: str, epochs: int) -> None:
    train = _config(tmp_path, student, 0, Settings(epochs=epochs)).train
    assert train.epochs == epochs
    assert train.warmup_epochs < epochs
    assert train.eval_every <= epochs


def test_methods_differ_in_the_loss_alone_and_seeds_in_the_seed(tmp_path: Path) -> None:
    def of(student: str, seed: int) -> dict[str, dict[str, object]]:
        values = to_dict(_config(tmp_path, student, seed, Settings()))
        values["train"].pop("output")
        return values

    base = of("none", 0)
    for student in STUDENTS:
        other = of(student, 0)
        assert other.pop("loss")["method"] == STUDENTS[student]
        assert other == {name: value for name, value in base.items() if name != "loss"}
    assert of("none", 3) == {**base, "train": {**base["train"], "seed": 3}}


def test_no_scan_for_choosing_the_settings_is_in_the_demo() -> None:
    demo, tuning = digits(10), digits(10, tuning=True)
    assert {name: len(s.labels) for name, s in demo.items()} == {"train": 100, "val": 1797 - POOL - 100}
    assert {name: len(s.labels) for name, s in tuning.items()} == {"train": 100, "val": POOL - 100}
    assert np.bincount(demo["train"].labels).tolist() == [10] * 10
    parts = [part.images for split in (demo, tuning) for part in split.values()]
    every = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    assert sorted(image.tobytes() for part in parts for image in part) == sorted(image.tobytes() for image in every)
    with pytest.raises(ConfigError, match="0 scans of every digit"):
        digits(0)


@pytest.mark.slow
def test_a_whole_demo_of_two_seeds_and_what_is_done_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after four of six students; the same call goes on, and the baseline's head is the one that was trained."""
    out, trained = tmp_path / "demo", list[tuple[str, int]]()

    def counted(config: Config, quiet: bool) -> TrainReport:
        if stop and len(trained) == 4:
            raise KeyboardInterrupt
        report = train(config, quiet=quiet)
        trained.append((Path(config.train.output).name, report.steps))
        return report

    monkeypatch.setattr(cskd.pipeline.demo, "train", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run_demo(out, quiet=True, settings=SMALL, processes=1)
    assert [name for name, steps in trained if steps] == ["none-0", "deit-0", "cskd-0", "none-1"]
    stop = False
    trained.clear()
    report = run_demo(out, quiet=True, settings=SMALL, processes=1)
    assert [name for name, steps in trained if steps] == ["deit-1", "cskd-1"]
    assert [s.head for s in report.students.values()] == ["class", "class+distillation", "class+distillation"]
    assert {s.teacher_forwards for s in report.students.values()} == {0}
    assert all(len(s.top1) == 2 and min(s.top1) <= s.mean <= max(s.top1) for s in report.students.values())
    assert report.images == {"train": 40, "val": 1797 - POOL - 40}
    with Image.open(report.paths["curves"]) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    monkeypatch.undo()
    again = run_demo(out, quiet=True, settings=SMALL, processes=2)
    assert {n: s.top1 for n, s in again.students.items()} == {n: s.top1 for n, s in report.students.items()}
    values = json.loads(json.dumps(dataclasses.asdict(report)))["students"]
    assert values["none"]["minus_none"] is None
    assert values["cskd"]["minus_none"].keys() == {"mean", "low", "high", "pairs"}


def result(top1: list[float], none: list[float] | None = None) -> StudentResult:
    several = len(top1) > 1
    difference = None if none is None or not several else paired_difference(top1, none)
    mean = sum(top1) / len(top1)
    return StudentResult("class", top1, mean, spread(top1) if several else None, difference, 1.0, 0)


@pytest.mark.parametrize(
    ("cskd", "words"),
    [
        ([95.0, 95.5, 96.0], "cskd is above none by more than the spread over 3 seeds: +5.0 points"),
        ([90.2, 90.6, 91.3], "cskd is NOT above none by more than the spread"),  # smaller than the spread
        ([99.0, 90.0, 91.5], "cskd is NOT above none by more than the spread"),  # of one seed alone
        ([85.0, 85.5, 86.0], "cskd is NOT above none by more than the spread over 3 seeds: -5.0 points"),
    ],
)
def test_the_verdict_follows_the_numbers(cskd: list[float], words: str) -> None:
    none = [90.0, 90.5, 91.0]
    assert verdict({"none": result(none), "cskd": result(cskd, none)}).startswith(words)


def test_one_seed_is_no_evidence() -> None:
    students = {"none": result([90.0]), "cskd": result([99.0], [90.0])}
    assert verdict(students) == "cskd is +9.0 points from none; one seed has no spread to compare that with"


def test_the_table_shows_spread_difference_and_head() -> None:
    none = [90.0, 90.5, 91.0]
    students = {"none": result(none), "cskd": result([95.0, 95.5, 96.0], none)}
    report = cskd.pipeline.demo.DemoReport(
        99.0, {"train": 100, "val": 1097}, [0, 1, 2], students, verdict(students), 200.0, 5.0, {}
    )
    out = io.StringIO()
    render(report, Console(file=out, width=80))
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in out.getvalue().splitlines()]
    assert ["none", "90.5 ± 0.5", "", "1", "class"] in rows
    assert ["cskd", "95.5 ± 0.5", "+5.0 (+5.0..+5.0)", "1", "class"] in rows
    assert report.verdict in " ".join(out.getvalue().split())


@pytest.mark.parametrize("left", ["images", "data", "cache", "runs", "teacher.safetensors"])
def test_a_demo_of_an_earlier_layout_is_refused_by_one_line(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(ConfigError, match=r"^.* holds a demo of another version.*; give another folder$"):
        run_demo(tmp_path, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == [left]


def test_students_of_other_epochs_are_named_before_anything_is_made(tmp_path: Path) -> None:
    made = {"layout": cskd.pipeline.demo.LAYOUT, **dataclasses.asdict(Settings(epochs=3))}
    (tmp_path / "demo.json").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a demo with epochs 3, asked for 2; give another folder"):
        run_demo(tmp_path, epochs=2, quiet=True)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["demo.json"]


def test_curves_of_one_seed_and_one_evaluation_can_be_drawn(tmp_path: Path) -> None:
    curves = {"none": Curve(np.array([1]), np.array([[10.0]])), "cskd": Curve(np.array([1]), np.array([[100.0]]))}
    draw_curves(tmp_path / "x.png", curves, 95.0, "title")
    assert (tmp_path / "x.png").stat().st_size > 5_000


def test_the_demo_says_which_students_train(tmp_path: Path) -> None:
    configs = [_config(tmp_path, name, seed, SMALL) for seed in range(2) for name in STUDENTS]
    assert _training(configs, 2, 2) == "training 3 of 6, cskd-soft, seed 0; 4 of 6, none, seed 1"
    assert _training(configs, 6, 2) == ""


@pytest.mark.slow
def test_students_end_with_a_demo_that_ends_under_them(tmp_path: Path) -> None:
    """Of an interrupt that reaches only the main process, as `timeout -s INT` sends it."""
    (tmp_path / "student.py").write_text(
        "import os, time\n"
        "def train(config):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    import cskd.pipeline.demo as demo\n    from pathlib import Path\n"
        "    demo._student = train\n    demo._teach(Path('x'), demo.Settings(), 2, True)\n"
    )
    command = [sys.executable, "student.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        students = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in students):
        assert time.monotonic() < deadline, "students are left behind"
        time.sleep(0.1)
