"""A run whose loss or weights are no numbers any more stops before it writes any of them, and what it advises works."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cskd.config import Config
from cskd.errors import ConfigError, NotFiniteError, StudentError, TeacherError
from cskd.files.weights import first_not_finite
from cskd.machine.ranks import Ranks
from cskd.method.losses import DistillationLoss
from cskd.pipeline.run_state import RunState
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.student.checkpoint import ResumeStates, TrainState, export, load_student
from cskd.student.optim import Optimisation
from tests.pipeline.test_pipeline import cached_data, config, run_settings
from tests.student.test_checkpoint import NAMES, advance, head_of, start

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("finite"))


def settings(base: Path, output: Path, **changes: Any) -> Config:
    steep = {
        "save_every": 1,
        "epochs": 6,
        "opt": "sgd",
        "clip_grad": None,
        "warmup_epochs": 5,
        "warmup_lr": 1e-3,
        "weight_decay": 0.0,
    }
    return run_settings(base, output, **{**steep, **changes})


def poison(monkeypatch: pytest.MonkeyPatch, at: int, value: float, gradient: bool) -> None:
    """From call `at` of the loss on (counted from 1) it is `value`, with such gradients or with none."""
    real, calls = DistillationLoss.__call__, list[int]()

    def call(self: DistillationLoss, *args: Any) -> Any:
        calls.append(1)
        loss, terms = real(self, *args)
        return (loss * value if gradient else loss + value if len(calls) >= at else loss) if len(
            calls
        ) >= at else loss, terms

    monkeypatch.setattr(DistillationLoss, "__call__", call)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_a_loss_that_is_no_number_stops_the_run_at_its_step_and_nothing_of_it_is_written(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, gradient: bool, clip_grad: float | None
) -> None:
    run = settings(cached, tmp_path / "run", lr=1e-3, clip_grad=clip_grad, epochs=8)
    with monkeypatch.context() as patch:
        poison(patch, 8, value, gradient)
        with pytest.raises(ConfigError, match=rf"the loss is {value} at step 8; .*--set train\.lr=0\.0001") as stop:
            train(run, quiet=True)
    assert "from the state of step 6 (later ones set aside: 1)" in str(stop.value) and len(str(stop.value)) <= 300
    assert finite(tmp_path / "run") == {"step-00000006", "diverged-00000007"}
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == [0]
    train(settings(cached, tmp_path / "run", lr=1e-4, clip_grad=clip_grad, epochs=8, max_steps=12), quiet=True)
    assert all(math.isfinite(v) for r in read_metrics(tmp_path / "run") for v in r.values() if isinstance(v, float))


def finite(run: Path) -> set[str]:
    """Names of the states; every weight file of the run is finite."""
    for path in run.rglob("*.safetensors"):
        assert first_not_finite(load_file(path)) is None, path
    return {path.stem for path in (run / "resume").iterdir()}


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"lr": 300.0, "clip_grad": 0.01}], ids=["lower lr", "clip_grad"])
def test_a_run_that_diverged_goes_on_as_advised(cached: Path, tmp_path: Path, change: dict[str, float]) -> None:
    """Weights of 1e20 are finite, and nothing comes of going on from them: a state from before is kept and taken."""
    run = tmp_path / "run"
    for _ in range(2):  # the same command stops in the same place
        with pytest.raises(ConfigError, match=r"at step \d+; the same command with --set train\.lr=") as stop:
            train(settings(cached, run, lr=300.0), quiet=True)
        assert len(finite(run)) >= 1
    assert "set aside" in str(stop.value)
    report = train(settings(cached, run, **change), quiet=True)
    assert any("train.lr changed" in n or "train.clip_grad changed" in n for n in report.notes)
    assert report.steps > 20
    finite(run)


def test_without_a_state_the_advice_is_to_start_again(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 2, NAN, True)
        with pytest.raises(ConfigError, match=r"the loss is nan at step 2, before a state was saved; start again with"):
            train(settings(cached, tmp_path / "run", save_every=0), quiet=True)
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert train(settings(cached, tmp_path / "run", lr=1e-4, max_steps=3), quiet=True).steps == 3


def test_weights_that_went_wrong_in_the_last_update_are_found_before_they_are_saved(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss was finite: the gradient was not."""
    real = Optimisation.update

    def update(self: Optimisation, loss: torch.Tensor, step: int) -> Any:
        norm = real(self, loss, step)
        if step == 4:  # the last of an epoch
            with torch.no_grad():
                self.student.backbone.get_parameter("head.weight")[0, 0] = INF
        return norm

    monkeypatch.setattr(Optimisation, "update", update)
    with pytest.raises(ConfigError, match=r"model/head\.weight is not finite at step 5; "):
        train(settings(cached, tmp_path / "run"), quiet=True)
    assert finite(tmp_path / "run") == {"step-00000003", "step-00000004"}
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["weights", "average", "optimiser"])
def test_a_state_that_is_not_finite_is_never_written(tmp_path: Path, name: str) -> None:
    states, run = ResumeStates(tmp_path), advance(start(), 0, 1)
    states.save(*run, TrainState(1))
    student, optimisation = run
    assert optimisation.averaged is not None
    parameter = head_of(student)
    moment = optimisation.optimizer.state[parameter]["exp_avg"]
    broken = {"weights": parameter, "average": head_of(optimisation.averaged), "optimiser": moment}[name]
    with torch.no_grad():
        broken[0, 0] = NAN
    with pytest.raises(NotFiniteError, match="not finite at step 2"):
        states.save(*run, TrainState(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_weights_that_are_not_finite_do_not_replace_an_export_that_is(tmp_path: Path) -> None:
    run = advance(start(), 0, 1)
    settings = Config(train=dataclasses.replace(Config().train, ema=0.9))
    export(tmp_path, *run, settings, NAMES)
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
    with torch.no_grad():
        head_of(run[0])[0, 0] = NAN
    with pytest.raises(NotFiniteError, match="of the live weights is not finite"):
        export(tmp_path, *run, settings, NAMES)
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()} == before


def test_a_state_that_is_not_finite_is_passed_over_as_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions wrote such states."""
    states, run = ResumeStates(tmp_path), advance(start(), 0, 1)
    states.save(*run, TrainState(1))
    with monkeypatch.context() as patch:
        patch.setattr("cskd.student.resume.first_not_finite", lambda _: None)
        with torch.no_grad():
            head_of(run[0])[0, 0] = NAN
        states.save(*run, TrainState(2))
    state = states.load(*start(seed=1))
    assert state is not None and state.step == 1
    assert "not finite; continuing from an earlier state" in state.warnings[0]
    (tmp_path / "step-00000001.safetensors").unlink()
    with pytest.raises(StudentError, match=r"every state in .* is not finite"):
        states.load(*start(seed=1))


def test_a_state_that_led_on_stays_until_a_newer_one_does(tmp_path: Path) -> None:
    states, run = ResumeStates(tmp_path, keep=2), start()
    for step, good in ((1, None), (2, 1), (3, 2), (4, 2), (5, 2)):
        states.save(*run, TrainState(step), good)
    assert list(states.infos()) == [5, 4, 2]
    states.set_aside({5, 4})
    assert list(states.infos()) == [2] and (tmp_path / "diverged-00000005.safetensors").exists()
    for step in (3, 4, 5):
        states.save(*run, TrainState(step), step - 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004.safetensors", "step-00000005.safetensors"]


def test_logits_of_an_evaluation_that_are_no_numbers_stop_the_run(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cskd.student import eval_heads

    def broken(out: Any, trained: Any) -> dict[str, torch.Tensor]:
        heads = eval_heads(out, trained)
        heads["patches"] = heads["patches"].index_fill(0, torch.tensor([0]), NAN)
        return heads

    monkeypatch.setattr("cskd.pipeline.evaluate.eval_heads", broken)
    with pytest.raises(
        ConfigError, match=r"2 of 12 images get logits from 'patches' that are not finite at step 5; the"
    ):
        train(settings(cached, tmp_path / "run", lr=1e-3), quiet=True)
    assert read_metrics(tmp_path / "run") == []


def test_a_checkpoint_that_is_not_finite_is_not_evaluated(tmp_path: Path) -> None:
    export(tmp_path, *advance(start(ema=None), 0, 1), Config(), NAMES)
    weights = load_file(tmp_path / "model.safetensors")
    weights["head.weight"][0, 0] = NAN
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StudentError, match=r"head\.weight is not finite"):
        load_student(tmp_path)


def test_all_ranks_stop_at_the_step_at_which_one_of_them_does() -> None:
    """A sum over ranks, as all see it, with the other rank's loss."""

    class Two(Ranks):
        def sum(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(torch.tensor([1.0, NAN, NAN])) if x.ndim == 1 else x

    state = RunState(Two(1, 2), torch.device("cpu"), (), 5)
    for step in (1, 2, 3):
        state.add(torch.tensor(1.0), {}, step)
    with pytest.raises(NotFiniteError, match="the loss is nan at step 2;"):
        state.check(3, *start())


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_numbers_of_every_width_are_looked_at(dtype: torch.dtype) -> None:
    good, bad = torch.tensor([1.0, 2.0]).to(dtype), torch.tensor([1.0, math.nan]).to(dtype)
    whole = torch.tensor([1, 2])
    assert first_not_finite({"a": good, "b": whole}) is None
    assert first_not_finite({"a": good, "b": bad}) == "b"


def test_logits_of_a_live_teacher_that_are_no_numbers_stop_the_run(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the codecs refuse them in stage 1: an argmax of NaN would be a class like any other."""
    from cskd.codecs import Outputs
    from cskd.loading.targets import LiveTargets

    class Broken:
        batch, has_cells, has_classes = 2, True, True

        def outputs_of(self, x: torch.Tensor, stages: tuple[str, ...]) -> Outputs:
            return Outputs(torch.full((len(x), 5, 1, 1), NAN), torch.zeros(len(x), 5))

    monkeypatch.setattr("cskd.loading.targets.mixed_pixels", lambda batch, device: torch.zeros(2, 3, 8, 8))
    targets = LiveTargets(Broken(), config(cached).loss, 3)  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match="the teacher's logits hold NaN"):
        targets.of({}, 0, torch.device("cpu"))
