"""What model.safetensors holds is asked for by name and said; the best weights are kept by a named score; averages warm up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.utils.model_ema import ModelEmaV3

import cskd.pipeline.training_run
from cskd.config import Config, LossConfig, from_dict
from cskd.errors import ConfigError
from cskd.pipeline.evaluate import HeadScores, evaluate_checkpoint, score_heads
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.student.best import Best, score_asked, score_names
from cskd.student.optim import average_notes, share_of_start
from tests.pipeline.test_pipeline import cached_data, run_settings
from tests.student.test_checkpoint import start


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("best"))


def settings(base: Path, output: Path, **changes: Any) -> Config:
    return run_settings(base, output, **{"epochs": 4, **changes})


def scored(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let the evaluations of a run give these to its live class head, counted from its first epoch on."""
    left = list(scores)

    def call(*args: Any) -> Any:
        found, unreadable = score_heads(*args)
        return found | {"class": HeadScores(left.pop(0), 100.0)}, unreadable

    monkeypatch.setattr(cskd.pipeline.training_run, "score_heads", call)


def tensors(path: Path) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in load_file(path).items()}


def weights(run: Path) -> str:
    return str(json.loads((run / "config.json").read_text())["cskd"]["weights"])


@pytest.mark.parametrize(
    ("export", "ema", "best", "said", "others"),
    [
        ("auto", 0.9, None, "ema: decay 0.9 with warm-up", {"model_last"}),
        ("auto", None, None, "live", set()),
        ("ema", 0.9, None, "ema: decay 0.9 with warm-up", {"model_last"}),
        ("live", 0.9, None, "live", {"model_ema"}),
        ("best", 0.9, "top1.class", "best: top1.class", {"model_last", "model_ema"}),
        ("live", None, "top1.class", "live", {"model_best"}),
    ],
)
def test_the_export_holds_what_was_asked_for_and_says_so(
    cached: Path, tmp_path: Path, export: str, ema: float | None, best: str | None, said: str, others: set[str]
) -> None:
    report = train(settings(cached, tmp_path, export=export, ema=ema, best=best, max_steps=5), quiet=True)
    assert report.weights == weights(tmp_path) and report.weights.startswith(said)
    assert {p.stem for p in tmp_path.glob("model_*")} == others
    state = load_file(next((tmp_path / "resume").glob("step-*")))
    part = "ema" if said.startswith("ema") else "model"
    live = {n.partition("/")[2]: t.numpy().tobytes() for n, t in state.items() if n.startswith(f"{part}/")}
    assert tensors(tmp_path / "model.safetensors") == live


def test_the_best_weights_are_those_of_the_best_epoch_also_after_a_resume(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later epoch that is worse, and one that is as good, don't replace them."""
    run = settings(cached, tmp_path / "run", export="best", best="top1.class", save_every=1)
    at_best = settings(cached, tmp_path / "epoch 1", export="live", max_steps=10)
    train(at_best, quiet=True)
    with monkeypatch.context() as patch:
        scored(patch, 10.0, 70.0, 5.0)
        train(dataclasses.replace(run, train=dataclasses.replace(run.train, max_steps=13)), quiet=True)
        assert weights(tmp_path / "run") == "best: top1.class 70.00 at step 10"
    with monkeypatch.context() as patch:
        scored(patch, 20.0, 70.0)
        report = train(run, quiet=True)
    assert report.weights == "best: top1.class 70.00 at step 10"
    assert tensors(tmp_path / "run" / "model.safetensors") == tensors(tmp_path / "epoch 1" / "model.safetensors")
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["cskd"]
    assert (facts["best"]["name"], facts["best"]["score"], facts["best"]["step"]) == ("top1.class", 70.0, 10)
    assert [p.name for p in (tmp_path / "run" / "resume").glob("best-*.safetensors")] == ["best-00000010.safetensors"]


def test_the_score_of_an_epoch_that_max_steps_cut_does_not_count_when_the_run_goes_on(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is exported while the run stands there; a run that nothing stopped never sees it."""
    run = settings(cached, tmp_path, export="best", best="top1.class")
    cut = dataclasses.replace(run, train=dataclasses.replace(run.train, max_steps=7))
    with monkeypatch.context() as patch:
        scored(patch, 10.0, 90.0)
        assert train(cut, quiet=True).weights == "best: top1.class 90.00 at step 7"
    assert train(cut, quiet=True).weights == "best: top1.class 90.00 at step 7"
    with monkeypatch.context() as patch:
        scored(patch, 30.0, 20.0, 20.0)
        assert train(run, quiet=True).weights == "best: top1.class 30.00 at step 10"


def test_best_weights_that_were_lost_are_not_claimed(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(cached, tmp_path, export="best", best="top1.class")
    with monkeypatch.context() as patch:
        scored(patch, 90.0)
        train(dataclasses.replace(run, train=dataclasses.replace(run.train, max_steps=5)), quiet=True)
    next((tmp_path / "resume").glob("best-*.safetensors")).write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        scored(patch, 10.0, 20.0, 15.0)
        report = train(run, quiet=True)
    assert any("is missing or damaged" in note for note in report.notes)
    assert report.weights == "best: top1.class 20.00 at step 15"


def test_a_finished_run_exports_what_is_asked_for_now(cached: Path, tmp_path: Path) -> None:
    train(settings(cached, tmp_path), quiet=True)
    before = tensors(tmp_path / "model_last.safetensors")
    report = train(settings(cached, tmp_path, export="live"), quiet=True)
    assert (report.steps, report.weights) == (0, "live")
    assert tensors(tmp_path / "model.safetensors") == before
    report = train(settings(cached, tmp_path, export="live", lr=0.5), quiet=True)
    assert "the run is finished, so that train.lr = 0.5 in place of 0.001 changes nothing" in report.notes
    assert "changed" not in json.loads((tmp_path / "config.json").read_text())["cskd"]


def test_another_score_starts_again_with_a_note(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        scored(patch, 100.0)
        train(settings(cached, tmp_path, best="top1.class", max_steps=5), quiet=True)
    report = train(settings(cached, tmp_path, best="top5.class", max_steps=10), quiet=True)
    assert any("train.best changed from top1.class to top5.class at step 5" in note for note in report.notes)
    facts = json.loads((tmp_path / "config.json").read_text())["cskd"]["best"]
    assert (facts["name"], facts["step"]) == ("top5.class", 10)


def test_the_scores_that_may_be_named_are_those_of_an_evaluation(cached: Path, tmp_path: Path) -> None:
    train(settings(cached, tmp_path, max_steps=5), quiet=True)
    row = read_metrics(tmp_path)[0]
    student, _ = start()
    assert {name for name in row if name.startswith("top")} == set(score_names(student, averaged=True))
    assert score_asked(None, student, averaged=True) == "top1.ema.class+distillation"
    student.taught_by(LossConfig("none"))
    assert score_asked(None, student, averaged=False) == "top1.class"
    assert "top1.distillation" not in score_names(student, averaged=False)
    assert (
        evaluate_checkpoint(tmp_path, cached / "val", 4, 0, None, "cpu", True).heads["all"].top1 == row["top1.ema.all"]
    )
    with pytest.raises(ConfigError, match=r"train\.best is 'top1\.clas', expected one of top1\.class,") as refused:
        train(settings(cached, tmp_path / "x", best="top1.clas"), quiet=True)
    assert len(str(refused.value)) <= 300


def test_a_best_needs_a_validation_set_and_an_average_its_decay(cached: Path, tmp_path: Path) -> None:
    alone = settings(cached, tmp_path, export="best")
    alone = dataclasses.replace(alone, data=dataclasses.replace(alone.data, val=""))
    with pytest.raises(ConfigError, match=r"train\.export is best and data\.val is empty"):
        train(alone, quiet=True)
    with pytest.raises(ConfigError, match=r"train\.export is 'ema', expected live or best without train\.ema"):
        from_dict({"train": {"export": "ema"}})


def test_a_record_of_a_best_that_is_none_is_passed_over() -> None:
    good = Best("top1.class", 70.0, 10, "0" * 64)
    assert Best.of(good.record()) == good
    for odd in (None, 5, {}, good.record() | {"score": float("nan")}, good.record() | {"step": -1}):
        assert Best.of(odd) is None


# --- the average ---


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("updates", [1, 2, 7, 300])
def test_the_share_of_the_first_weights_is_what_timms_average_holds(warmup: bool, updates: int) -> None:
    """An average of a one that is followed by zeros."""
    live = torch.nn.Linear(1, 1, bias=False).double()
    average = ModelEmaV3(live, decay=0.99, use_warmup=warmup)
    for update in range(1, updates + 1):
        with torch.no_grad():
            live.weight.fill_(1.0 if update == 1 else 0.0)
        average.update(live, step=update)
    assert average.module.weight.item() == pytest.approx(share_of_start(0.99, warmup, updates), abs=1e-9)


def test_an_average_that_holds_its_beginning_is_noted_at_the_start(cached: Path, tmp_path: Path) -> None:
    """The issue's figures: 1,251 steps an epoch."""
    assert "still holds 22% of the weights" in average_notes(0.99996, False, 30 * 1251)[0]
    assert "still holds 61% of the weights" in average_notes(0.99996, False, 10 * 1251)[0]
    assert average_notes(0.99996, False, 300 * 1251) == average_notes(0.99996, True, 30 * 1251) == []
    assert average_notes(None, False, 10) == []
    advised = float(average_notes(0.99996, False, 30 * 1251)[0].split("train.ema=")[1].split()[0])
    assert average_notes(advised, False, 30 * 1251) == []
    report = train(settings(cached, tmp_path, ema=0.999, ema_warmup=False, max_steps=3), quiet=True)
    assert any("after 3 updates the average still holds 100%" in note for note in report.notes)
    assert weights(tmp_path) == "ema: decay 0.999"
