"""What docs/RESULTS.md is made with: paired statistics, tables, the names of runs, a teacher that goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.results import figures, sweep, tables, teacher
from benchmarks.results.networks import CifarResNet
from benchmarks.results.students import METHODS, StudentRun, all_runs
from benchmarks.results.tables import epochs_to, said, score
from cskd.config import Config
from cskd.files.writer import sole_writer
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.intervals import paired_difference
from cskd.pipeline.train import TrainReport, train
from tests.pipeline.test_pipeline import cached_data, config


def row(method: str, seed: int, top1: float, question: str = "few", **more: Any) -> dict[str, Any]:
    """A line of a tally."""
    head = "class" if method == "none" else "class+distillation"
    curve = [{"epoch": e, f"top1.{head}": top1 * (e + 1) / 10} for e in range(10)]
    return {
        "name": f"{question}/{method}/seed{seed}",
        "question": question,
        "method": method,
        "seed": seed,
        "online": False,
        "score": head,
        "top1": {head: top1, "patches.untrained": 10.0},
        "views": 36,
        "target_bytes": 4_000_000,
        "curve": curve,
        "seconds": 500.0,
        "weights_sha256": "a" * 64,
        "teacher_forwards": 0,
    } | more


def tally() -> list[dict[str, Any]]:
    tops = {"none": (50.0, 51.0, 49.0), "deit-hard": (54.0, 54.5, 53.0), "cskd-linear": (56.0, 57.5, 55.0)}
    return [row(method, seed, top) for method, each in tops.items() for seed, top in enumerate(each)]


def test_a_difference_within_its_interval_is_called_noise() -> None:
    assert "noise" in said(paired_difference([50.0, 52.0], [51.0, 50.0]))
    assert said(paired_difference([56.0, 57.1], [50.0, 51.0])) == "+6.1 ± 0.6"
    assert said(paired_difference([56.0], [50.0])) == "+6.0 (one pair)"


def test_tables_pair_only_the_seeds_that_both_methods_have() -> None:
    rows = [*tally(), row("none", 7, 0.0)]
    line = next(line for line in tables.all_tables(rows)["few"] if line.startswith("| cskd-linear"))
    assert "| 3 | 56.17 | 1.26 | class+distillation | +6.2 ± 0.7 |" in line


def test_an_untrained_head_is_in_no_table() -> None:
    assert "untrained" not in "\n".join(tables.all_tables(tally())["few-heads"])


def test_epochs_to_an_accuracy() -> None:
    assert epochs_to(row("none", 0, 50.0), 25.0) == 5
    assert epochs_to(row("none", 0, 50.0), 50.5) is None


def test_a_page_gets_its_tables_between_the_markers(tmp_path: Path) -> None:
    page, lines = tmp_path / "RESULTS.md", tmp_path / "tally.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in tally()))
    page.write_text("before\n<!-- table few -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):  # again: the same page
        assert tables.main(["--tally", str(lines), "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table few -->\n| method") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and text.count("\n| cskd-linear |") == 1
    page.write_text("<!-- table fwe -->\n<!-- end -->\n")
    assert tables.main(["--tally", str(lines), "--write", str(page)]) == 1


def test_figures_are_drawn(tmp_path: Path) -> None:
    lines = tmp_path / "tally.jsonl"
    more = [row("cskd-linear", 0, 50.0 + n, f"few-views{n}", views=n) for n in (1, 3)]
    lines.write_text("".join(json.dumps(r) + "\n" for r in [*tally(), *more]))
    figures.main(["--tally", str(lines), "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["few_curve.png", "views.png"]


def test_runs_have_names_of_their_own_and_configs_that_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CSKD_RESULTS", str(tmp_path))
    runs = all_runs()
    assert len({run.name for run in runs}) == len(runs)
    methods = {run.method: run.load().loss for run in runs if run.question == "few"}
    assert set(methods) == set(METHODS) and methods["local"].decay == "local" and methods["none"].method == "none"
    same = {
        str((c.recipe, c.student, c.cache.path, c.train.epochs))
        for c in (r.load() for r in runs if r.question == "few")
    }
    assert len(same) == 1, "methods of a question must differ in what is taught alone"


def test_images_are_shifted_and_mirrored_and_keep_their_pixels() -> None:
    torch.manual_seed(0)
    pixels = torch.arange(1, 5 * 3 * 64 + 1, dtype=torch.int32).reshape(5, 3, 8, 8)
    seen = teacher.shift_and_flip(pixels.repeat(40, 1, 1, 1))
    assert seen.shape == (200, 3, 8, 8)
    for i, image in enumerate(seen[:50]):
        inside = image[image > 0]
        assert set(inside.tolist()) <= set(pixels[i % 5].flatten().tolist())
        ways = [np.diff(r[r > 0]) for r in image[0].numpy() if (r > 0).sum() > 1]
        assert len({int(np.sign(w[0])) for w in ways}) <= 1, "a whole image is mirrored, or none of it"


def test_a_pasted_box_has_the_share_that_is_said() -> None:
    torch.manual_seed(1)
    pixels = torch.arange(4)[:, None, None, None].expand(4, 3, 32, 32).contiguous()
    for _ in range(20):
        pasted, share, order = teacher.cut_and_paste(pixels)
        own = (pasted == pixels).float().mean((1, 2, 3))
        moved = order != torch.arange(4)
        assert torch.allclose(own[moved], torch.full_like(own[moved], share))


def test_a_network_with_kernels_of_one_sees_less() -> None:
    def seen(kernels: tuple[int, int, int]) -> int:
        torch.manual_seed(0)
        net = CifarResNet(1, kernels=kernels).eval()
        images = torch.randn(4, 3, 32, 32, requires_grad=True)
        net.forward_features(images)[:, :, 4, 4].abs().sum().backward()
        assert images.grad is not None
        return int((images.grad.abs().amax((0, 1, 2)) > 0).sum())

    assert seen((3, 3, 1)) < seen((3, 3, 3))


class TinyRun(StudentRun):
    """A run of tests/pipeline/test_pipeline.py's images."""

    def load(self, more: tuple[str, ...] = ()) -> Config:
        return config(self.folder.parents[3], f"runs/{self.name}", train={"eval_every": 2})


def test_a_finished_run_gives_the_line_that_its_checkpoint_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSKD_RESULTS", str(cached_data(tmp_path)))
    calls: list[bool] = []

    def counted(config: Config, online: bool, quiet: bool) -> TrainReport:
        calls.append(True)
        return train(config, online=online, quiet=quiet)

    monkeypatch.setattr(sweep, "train", counted)
    run = TinyRun("few", "cskd-linear", 0)
    line = sweep.finish(run, "cpu")
    again = evaluate_checkpoint(run.folder, tmp_path / "val", 4, 0, None, "cpu", quiet=True)
    assert score(line) == again.heads[again.score].top1 and line["arithmetic"] == "float32"
    assert [point["epoch"] for point in line["curve"] if "top1.class" in point] == [1, 2]
    assert line["teacher_forwards"] == 0 and line["views"] == 3 and line["target_bytes"] > 0
    tally = tmp_path / "tally.jsonl"
    tally.write_text(json.dumps(line) + "\n" + json.dumps(line | {"seconds": 1.0}) + "\n")
    assert [row["seconds"] for row in sweep.read_tally(tally)] == [1.0], "the last line of a run counts"
    assert sweep.finish(run, "cpu")["weights_sha256"] == line["weights_sha256"] and len(calls) == 2


def test_a_run_that_another_sweep_is_at_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSKD_RESULTS", str(cached_data(tmp_path)))
    monkeypatch.setattr(sweep, "all_runs", lambda: [TinyRun("few", "cskd-linear", 0)])
    with sole_writer(tmp_path / "runs" / "few" / "cskd-linear" / "seed0", "wait"):
        assert sweep.main(["--run", "few/cskd-linear/seed0", "--device", "cpu"]) == sweep.HELD
