"""Promises of cskd.pipeline.show.progress and cskd.pipeline.doctor: what people and logs see, and what they don't."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from cskd.config import Config
from cskd.pipeline import doctor as doctor_module
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.doctor import doctor, render
from cskd.pipeline.show.progress import Pool, Progress, bound_by, duration, rate
from cskd.pipeline.train import train
from cskd.pipeline.training_run import TrainingRun
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(steps: int, seconds: float, terminal: bool = False, quiet: bool = False, start: int = 0, **fields: Any) -> str:
    """The text shown by `steps` updates of one unit, `seconds` apart."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=160, _environ={"TERM": "xterm"})
    total = start + steps
    with Progress("train [x]", total, quiet=quiet, start=start, console=console, clock=clock) as progress:
        for i in range(steps):
            clock.now += seconds
            progress.update(start + i + 1, **fields)
    return out.getvalue()


def test_off_a_terminal_each_line_is_plain_text_with_count_rate_time_left_and_fields() -> None:
    lines = run(steps=40, seconds=0.5, loss="2.30 [red]").splitlines()
    assert lines[0] == "train [x]: 20 of 40 images (50%), 2.00 images/s, 10 s left, loss 2.30 [red]"
    assert lines[-1] == "train [x]: 40 images in 20 s, 2.00 images/s"
    assert "\x1b" not in "".join(lines)


def test_where_nobody_knows_the_total_only_what_is_done_is_shown() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("index", 0, console=Console(file=out, width=160), clock=clock) as progress:
        for shard in range(3):
            clock.now += 10.0
            progress.update(1000 * (shard + 1), shards=f"{shard + 1} of 3")
    assert out.getvalue().splitlines() == [
        "index: 1,000 images, 100 images/s, shards 1 of 3",
        "index: 2,000 images, 100 images/s, shards 2 of 3",
        "index: 3,000 images, 100 images/s, shards 3 of 3",
        "index: 3,000 images in 30 s, 100 images/s",
    ]


def test_a_run_of_a_day_prints_few_lines_and_is_never_silent_for_more_than_ten_minutes() -> None:
    out, clock, at = io.StringIO(), Clock(), []
    with Progress("train", 86_400, console=Console(file=out, width=160), clock=clock) as progress:
        for second in range(1, 86_401):
            clock.now, before = float(second), out.tell()
            progress.update(second)
            if out.tell() > before:
                at.append(second)
    assert at[0] == 10
    assert max(b - a for a, b in itertools.pairwise(at)) <= 600
    assert len(at) < 250


def test_a_terminal_gets_one_bar_with_the_same_figures_and_names_are_not_markup() -> None:
    text = run(steps=40, seconds=0.5, terminal=True, loss="[red]2.3")
    assert "train [x]" in text
    assert "20 of 40 images (50%), 2.00 images/s, 10 s left, loss [red]2.3" in text
    assert text.count("images in 20 s") == 1


def test_quiet_shows_nothing_and_calls_no_field() -> None:
    assert run(steps=40, seconds=1.0, quiet=True, loss=lambda: pytest.fail("a field of a quiet run was computed")) == ""


def test_a_field_is_computed_only_for_lines_that_are_shown() -> None:
    calls: list[int] = []

    def loss() -> str:
        calls.append(1)
        return "1.0"

    text = run(steps=800, seconds=1 / 32, loss=loss)
    assert len(calls) == text.count("loss") == 2  # at 10 s and 20 s of 25


def test_what_a_resumed_run_had_done_before_is_not_in_its_rate() -> None:
    lines = run(steps=40, seconds=0.5, start=1_000_000).splitlines()
    assert lines[0].startswith("train [x]: 1,000,020 of 1,000,040 images (100%), 2.00 images/s, 10 s left")
    assert lines[-1] == "train [x]: 40 images in 20 s, 2.00 images/s"


def test_the_rate_follows_the_last_minute() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("work", 100_000, console=Console(file=out, width=160), clock=clock) as progress:
        done = 0
        for second in range(600):  # 100 images/s for the first half, 10 for the second
            clock.now = float(second)
            done += 100 if second < 300 else 10
            progress.update(done)
    assert ", 10 images/s," in out.getvalue().splitlines()[-2]


def test_a_failed_run_does_not_say_that_it_is_done() -> None:
    out, clock = io.StringIO(), Clock()
    with pytest.raises(KeyboardInterrupt), Progress("train", 10, console=Console(file=out), clock=clock) as progress:
        clock.now = 5.0
        progress.update(5)
        raise KeyboardInterrupt
    assert out.getvalue() == ""


def test_progress_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("train", 10, clock=clock) as progress:
        clock.now = 20.0
        progress.update(5)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "5 of 10 images" in shown.err


def test_bound_by_names_the_longest_part_of_the_busiest_pool_and_the_speed_of_each_part() -> None:
    loader, lanes, writer = Pool(2, {"decode": 0.8, "augment": 0.4}), Pool(1, {"teacher": 1.2, "encode": 0.1}), 0.05
    assert bound_by([loader, lanes, Pool(1, {"write": writer, "idle": 0.0})], 1.5, 600) == (
        "bound by teacher (busy 1.3 s of 1.5 s): teacher 500 images/s · decode 1,500 images/s · augment 3,000 images/s · "
        "encode 6,000 images/s · write 12,000 images/s"
    )
    assert bound_by([], 0.0, 0) == bound_by([Pool(1, {"write": 0.0})], 0.0, 0) == "bound by nothing: no time was spent"


def test_what_a_gpu_does_for_teacher_and_student_is_one_part_of_an_online_run() -> None:
    """The check of the logits waits for both, so that the seconds of each say nothing."""
    seconds = {"decode": 1.0, "augment": 2.0, "teacher": 5.0, "student": 0.5, "evaluate": 1.0}
    parts = {}
    for device in ("cpu", "cuda"):
        run: Any = SimpleNamespace(workers=2, targets=SimpleNamespace(runs_teacher=True), device=torch.device(device))
        parts[device] = [dict(pool.seconds) for pool in TrainingRun.pools(run, seconds, 0.0)][1]
    assert parts["cpu"] == {"teacher": 5.0, "student": 0.5, "evaluate": 1.0}
    assert parts["cuda"] == {"teacher and student": 5.5, "evaluate": 1.0}


def test_bound_by_says_how_many_cores_the_loader_needs_to_keep_up() -> None:
    loader, device, reader = (
        Pool(4, {"decode": 6.0, "augment": 14.0}),
        Pool(1, {"student": 2.0}),
        Pool(1, {"read": 0.1}),
    )
    line = bound_by([loader, device, reader], 6.0, 100, cores=True)
    assert line.startswith("bound by augment ") and line.endswith("the loader needs 10 cores, it had 4 workers")
    # What is handed to a device takes no longer than its work, so that this is the most.
    queued = bound_by([loader, device, reader], 6.0, 100, cores=True, queued=True)
    assert queued.endswith("the loader needs 10 cores at most, it had 4 workers")
    slow = Pool(1, {"student": 6.0})  # here the device holds the work up, and is seen at work all the time
    assert bound_by([loader, slow], 6.0, 100, cores=True, queued=True).endswith("needs 4 cores, it had 4 workers")
    assert "cores" not in bound_by([loader, device], 6.0, 100)
    one = bound_by([Pool(1, {"decode": 0.5}), slow], 5.0, 100, cores=True)
    assert one.startswith(
        "bound by student (busy 5.0 s of 5.0 s)"
    )  # batches that overlap are no more than all of the time
    assert one.endswith("the loader needs 1 core, it had 1 worker")


def test_a_loader_that_holds_up_the_rest_is_told_what_relieves_it() -> None:
    student, words = Pool(1, {"student": 2.0}), {}
    for device, augment in (("cuda", "host"), ("cuda", "device"), ("cpu", "host")):
        train = SimpleNamespace(augment=augment)
        run: Any = SimpleNamespace(device=torch.device(device), workers=4, config=SimpleNamespace(train=train))
        for part in ("decode", "augment"):
            run.pools = lambda *_, part=part: [Pool(4, {part: 14.0}), student]
            words[device, augment, part] = TrainingRun.bound_by(run, {}, 0.0, 6.0, 100).split("it had 4 workers")[1]
        run.pools = lambda *_: [Pool(4, {"decode": 1.0}), student]
        assert TrainingRun.bound_by(run, {}, 0.0, 6.0, 100).endswith("it had 4 workers")
    raw = "; shards packed with `cskd pack --raw` leave nothing to decode"
    assert {words[key] for key in words if key[2] == "decode"} == {raw}
    assert words["cuda", "host", "augment"] == "; with train.augment: device the GPU does this"
    assert words["cuda", "device", "augment"] == words["cpu", "host", "augment"] == ""


def test_bound_by_counts_together_what_the_same_workers_do() -> None:
    """Neither part of the loader takes as long as the student, but its two processes do both."""
    loader, main = Pool(2, {"decode": 1.6, "augment": 1.4}), Pool(1, {"student": 1.2})
    assert bound_by([loader, main], 1.6, 600).startswith("bound by decode (busy 1.5 s of 1.6 s): student 500 images/s")


def test_both_stages_report_the_speed_of_every_part(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(TEACHER)
    make_tiny_data(tmp_path / "train", n=42, block=20, shard=10)
    c = config(tmp_path, data={"val": ""}, train={"epochs": 2})
    said = {"stage 1": cache_teacher(c, quiet=True).bound_by, "stage 2": train(c, quiet=True).bound_by}
    said["online"] = train(config(tmp_path, "live", data={"val": ""}), online=True, quiet=True).bound_by
    parts = {
        "stage 1": {"decode", "augment", "teacher", "encode", "write"},
        "stage 2": {"read", "decode", "augment", "student"},
        "online": {"read", "decode", "augment", "teacher", "student"},
    }
    for stage, names in parts.items():
        bottleneck, *rates = re.findall(r"([a-z]+) (?:\(busy|[\d,.]+ (?:views|images)/s)", said[stage])
        assert bottleneck in names and set(rates) == names, said[stage]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.7, "1 min 0 s"),
        (63, "1 min 3 s"),
        (7500, "2 h 5 min"),
        (86400 * 3 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_doctor_reports_rows_that_json_and_a_table_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = doctor()
    names = {row.name for row in report.checks}
    assert json.loads(json.dumps(dataclasses.asdict(report)))["checks"][0].keys() == {
        "name",
        "value",
        "state",
        "advice",
    }
    assert {
        "python",
        "torch",
        "timm",
        "zarr",
        "pillow",
        "JPEG decoder",
        "crc32c",
        "start methods",
        "hard links",
    } <= names
    assert report.ok == all(row.state != "fail" for row in report.checks)
    assert all(row.advice for row in report.checks if row.state != "ok")
    assert list(tmp_path.iterdir()) == []
    out = io.StringIO()
    render(report, Console(file=out, width=200))
    assert all(name in out.getvalue() for name in names)


def test_doctor_warns_of_a_slow_checksum_and_of_a_disk_without_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("google_crc32c.implementation", "python")
    monkeypatch.setattr(os, "link", no_links)
    rows = {row.name: row for row in doctor().checks}
    assert rows["crc32c"].state == rows["hard links"].state == "warn"
    assert "another disk" in rows["hard links"].advice


def test_doctor_reports_a_broken_installation_instead_of_failing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config) -> list[doctor_module.Check]:
        raise ImportError("libcudart.so: no such file [1]")

    monkeypatch.setitem(doctor_module.PROBES, "torch", broken)
    report = doctor()
    assert not report.ok
    assert "ImportError: libcudart.so: no such file [1]" in [c.value for c in report.checks if c.state == "fail"]
    out = io.StringIO()
    render(report, Console(file=out, width=200))
    assert "file [1]" in out.getvalue()


def test_a_speed_below_one_is_not_told_as_zero() -> None:
    assert [rate(*of, "images") for of in ((64, 236.0), (1, 0.0), (3000, 2.0))] == [
        "0.27 images/s",
        "0 images/s",
        "1,500 images/s",
    ]
