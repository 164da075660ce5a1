"""benchmarks/gpu gives what figures it can: a part that fails or hangs loses only its own."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import clocks
from benchmarks.gpu.bench import FULL, TINY, Bench, Sizes
from benchmarks.gpu.clocks import Enough, Watch, buffers, second_half
from benchmarks.gpu.stage2 import warm_of
from benchmarks.gpu.traces import busy_and_gaps
from tests.benchmarks.test_benchmark_train_step import Gpu

ROOT = Path(__file__).resolve().parents[2]
main = importlib.import_module("benchmarks.gpu.__main__")


def run(folder: Path, *arguments: str, seconds: int) -> tuple[str, list[dict[str, object]]]:
    """What the benchmark prints and writes, in small sizes on the CPU."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--out", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_figures_are_printed_and_written_at_once_and_a_table_ends_the_run(tmp_path: Path) -> None:
    said, rows = run(tmp_path, "--only", "views", "light", "--budget", "60", seconds=120)
    found = {(row["section"], row["name"]): row["value"] for row in rows}
    assert found["views", "views that differ"] == 0
    assert float(str(found["light", "bf16+fold stage 1 / bare"])) > 0
    assert "FAILED" not in found.values()
    table = said[said.rindex(" in all") :]
    assert all(f"{section} {name}:" in table for section, name in found if name != "section took")


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    _, rows = run(tmp_path, "--budget", "1500", seconds=1600)
    failed = [row for row in rows if row["value"] in ("FAILED", "not run") or "stopped" in str(row["note"])]
    assert all(str(row["note"]).startswith("RuntimeError: no ") for row in failed), failed
    assert {row["section"] for row in rows} == {section.name for section in main.SECTIONS}


def test_a_section_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object) -> int:
        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / "new").write_text(str(child.pid))
        (tmp_path / "new").rename(tmp_path / "child")
        time.sleep(600)
        return 0

    # Its time is over when its child is there, on a busy machine too.
    clock = SimpleNamespace(monotonic=lambda: float((tmp_path / "child").exists()), sleep=time.sleep)
    monkeypatch.setattr(main, "time", clock)
    monkeypatch.setattr(main, "work", hang)
    assert main.in_process(main.SECTIONS[0], argparse.Namespace(), 1.0) == "stopped after 1 s"
    state, deadline = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat"), time.monotonic() + 60
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while state.read_text().split()[2] != "Z":  # a signal that was sent is not yet one that has come
            assert time.monotonic() < deadline


def test_how_a_crash_ended_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "work", lambda *_: os._exit(7))
    assert main.in_process(main.SECTIONS[0], argparse.Namespace(), 5.0) == "exit 7, see gpu.log"


def test_the_table_shortens_notes_not_figures() -> None:
    rows = [{"section": "tiny", "name": f"f{i}", "value": 1.0, "unit": "ms", "note": "n" * 300} for i in range(150)]
    table = main.table("a GPU", rows, 1.0)
    assert len(table) <= main.MOST_TABLE
    assert all(f"tiny f{i}: 1 ms" in table for i in range(150))


def test_the_clock_of_a_step_stops_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, gpu, each = Watch(warm=2, steps=3), Gpu(monkeypatch), iter(range(9))
    results = watch.timed_start(each, dict.fromkeys(("decode", "augment", "teacher"), 0.0))
    with pytest.raises(Enough):
        for gpu.step in results:
            watch.update(gpu.step, lambda: "0.000")
    assert gpu.waits == [1, 4]


def test_the_rate_is_that_of_the_second_half() -> None:
    assert second_half([(0.0, 0), (10.0, 50), (11.0, 75), (12.0, 100)]) == 25


def test_time_in_which_kernels_overlap_counts_once() -> None:
    assert busy_and_gaps([(0, 4), (2, 6), (3, 5), (8, 10)]) == (8, [2], 10)


@pytest.mark.parametrize("student", ["tiny", "small", "base"])
@pytest.mark.parametrize("sizes", [FULL, TINY])
def test_the_clock_of_a_run_starts_when_all_buffers_are_there_and_sees_no_end_of_an_epoch(
    student: str, sizes: Sizes, tmp_path: Path
) -> None:
    run, bench = sizes.students[student], Bench(tmp_path, tmp_path, sizes, torch.device("cpu"))
    warm, epoch = warm_of(bench, run), sizes.many // run.batch
    assert warm > buffers(sizes.workers)
    assert warm // epoch == (warm + run.steps) // epoch
    assert warm % epoch


def test_buffers_that_come_while_the_clock_runs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "NEW_BUFFERS", came := [])
    watch = Watch()
    for done in range(1, 9):
        if done in (1, 2, 6):
            came.append(0.02)
        watch.update(done)
    assert watch.new_buffers == "1 new buffers of 20 ms"
