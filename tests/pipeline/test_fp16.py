"""Training in fp16: a scaled loss, updates that are left out, and what of it is kept; here on the CPU, which can do it slowly."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cskd.config import Config, TrainConfig
from cskd.errors import ConfigError, NotFiniteError, StudentError
from cskd.machine.arithmetic import arithmetic, float32_products, half
from cskd.machine.ranks import Ranks
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.run_state import _MOST_SKIPS, RunState
from cskd.pipeline.setup import half_notes
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.student.optim import Optimisation
from cskd.student.resume import digest
from tests.pipeline.test_pipeline import cached_data, run_settings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("fp16"))


def settings(base: Path, output: Path, **changes: Any) -> Config:
    return run_settings(base, output, **{"epochs": 2, "autocast": "fp16", "save_every": 1, **changes})


def overflow_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the loss of these steps have gradients beyond fp16's range, as a scale that is too high makes them."""
    real = Optimisation.update

    def update(self: Optimisation, loss: Tensor, step: int) -> Any:
        if step in steps:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return real(self, loss, step)

    monkeypatch.setattr(Optimisation, "update", update)


def state(run: Path, step: int) -> dict[str, Any]:
    with safe_open(run / "resume" / f"step-{step:08d}.safetensors", framework="pt") as f:
        body: dict[str, Any] = json.loads(f.metadata()["cskd"])
    return body


def test_fp16_learns_what_float32_does_up_to_its_rounding(cached: Path, tmp_path: Path) -> None:
    rows = {}
    for autocast in ("none", "fp16"):
        report = train(settings(cached, tmp_path / autocast, autocast=autocast), quiet=True)
        assert report.arithmetic == {"none": "float32", "fp16": "fp16"}[autocast]
        rows[autocast] = read_metrics(tmp_path / autocast)[-1]
    assert rows["fp16"]["loss"] == pytest.approx(rows["none"]["loss"], rel=2e-3)
    assert rows["fp16"]["loss"] != rows["none"]["loss"]
    assert "skipped_steps" in rows["fp16"] and "skipped_steps" not in rows["none"]


@pytest.mark.parametrize("micro", [None, 4])
def test_an_update_that_overflows_is_left_out_and_counted(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int | None
) -> None:
    overflow_at(monkeypatch, {2})
    train(settings(cached, tmp_path / "run", micro_batch=micro, keep=10, epochs=2, max_steps=4), quiet=True)
    before, after, later = (load_file(tmp_path / "run/resume" / f"step-0000000{n}.safetensors") for n in (2, 3, 4))
    live = [name for name in before if name.startswith(("model/", "optimizer/"))]
    assert all(torch.equal(before[name], after[name]) for name in live)
    assert not all(torch.equal(after[name], later[name]) for name in live)
    scales = [state(tmp_path / "run", n)["scaler"]["scale"] for n in range(1, 5)]
    assert scales[1] == 2 * scales[2] == 2 * scales[3]
    left_out = int(
        math.log2(65536.0 / scales[3])
    )  # of the first ones some overflow by themselves, as the scale finds its place
    (row,) = read_metrics(tmp_path / "run")
    assert row["skipped_steps"] == left_out >= 1 and math.isfinite(row["loss"])


def test_gradients_are_unscaled_before_they_are_clipped(cached: Path, tmp_path: Path) -> None:
    from tests.student.test_student import build, images

    norms = {}
    for autocast in ("none", "fp16"):
        student = build()
        made = TrainConfig(clip_grad=0.5, opt="sgd", warmup_epochs=0, autocast=autocast)
        norms[autocast] = Optimisation(student, made, 10).update(student(images()).cls_logits.square().mean(), 0)
    assert norms["none"] is not None and norms["fp16"] is not None
    torch.testing.assert_close(norms["none"], norms["fp16"])


def test_a_resumed_run_goes_on_with_the_scale_of_its_state(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_at(monkeypatch, {1, 2})
    for name, stops in (("whole", [7]), ("cut", [3, 7])):
        for stop in stops:
            train(settings(cached, tmp_path / name, max_steps=stop), quiet=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    assert state(tmp_path / "whole", 7)["scaler"] == state(tmp_path / "cut", 7)["scaler"]
    assert state(tmp_path / "cut", 7)["scaler"]["scale"] <= 65536.0 / 4
    rows = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert [row["skipped_steps"] for row in rows[0]] == [row["skipped_steps"] for row in rows[1]]
    assert rows[0][0]["skipped_steps"] >= 2
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def rewritten(run: Path, step: int, **changes: Any) -> None:
    """A state with other entries in its JSON, None: without; its digest is right."""
    path = run / "resume" / f"step-{step:08d}.safetensors"
    body = state(run, step) | changes
    text = json.dumps({k: v for k, v in body.items() if v is not None}, sort_keys=True)
    tensors = load_file(path)
    save_file(tensors, path, {"cskd": text, "sha256": digest(tensors, text)})


def test_a_state_without_a_scale_or_with_one_that_is_none(cached: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(cached, run, max_steps=2, keep=1), quiet=True)
    for scaler in (
        {"scale": 1.0},
        {**state(run, 2)["scaler"], "scale": 0.0},
        {**state(run, 2)["scaler"], "scale": "1"},
        [1],
    ):
        rewritten(run, 2, scaler=scaler)
        with pytest.raises(StudentError, match=r"has the loss scale .* expected .* remove the state"):
            train(settings(cached, run, max_steps=3), quiet=True)
    rewritten(run, 2, scaler=None)  # as an optimiser of somebody else's leaves it: a new scale
    assert train(settings(cached, run, max_steps=3), quiet=True).steps == 1
    assert state(run, 3)["scaler"]["scale"] >= 1024.0
    rewritten(run, 3, scaler={**state(run, 3)["scaler"], "scale": 8.0})
    train(settings(cached, run, max_steps=4), quiet=True)
    assert state(run, 4)["scaler"]["scale"] == 8.0


def test_a_run_in_which_every_step_overflows_stops(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_at(monkeypatch, set(range(100)))
    with pytest.raises(
        ConfigError, match=r"gradients overflow fp16 in 31 steps in a row, the last at step 31; .*train\.lr="
    ):
        train(settings(cached, tmp_path / "run", epochs=8, save_every=0), quiet=True)


@pytest.mark.parametrize("every", [1, 50])
def test_a_loss_of_an_update_that_was_left_out_counts_in_no_mean(every: int) -> None:
    run = RunState(Ranks(), CPU, ("label",), 10, scaled=True)
    run._every = every
    left_out, taken = torch.tensor(1.0), torch.tensor(0.0)
    for step, (loss, skipped) in enumerate([(math.inf, left_out), (2.0, taken), (math.nan, left_out), (4.0, taken)], 1):
        run.add(torch.tensor(loss), {"label": torch.tensor(loss)}, step, skipped)
    run._look(4)
    assert run.row() == {"loss": 3.0, "loss_label": 3.0, "skipped_steps": 2}
    assert run.mean_loss() == "3.000"
    again = RunState(Ranks(), CPU, ("label",), 10, scaled=True)
    again.restore(json.loads(json.dumps(run.record())), 4, 10)
    assert again.row() == run.row()
    with pytest.raises(NotFiniteError, match="the loss is nan at step 5"):  # no overflow: the weights are at fault
        run.add(torch.tensor(math.nan), {}, 5, taken)
        run._look(5)
    assert _MOST_SKIPS > 16 + 8  # a scale that starts at 2^16 and ends far below 1 has found nothing that fits


@pytest.mark.parametrize(
    ("capability", "kind"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "none")]
)
def test_auto_is_fp16_on_gpus_without_bf16_whatever_others_have(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kind: str
) -> None:
    of = {GPU: capability, torch.device("cuda", 1): (7, 5) if kind == "bf16" else (9, 0)}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of.__getitem__)
    assert half("auto", GPU) == kind
    assert [half(setting, GPU) for setting in ("none", "bf16", "fp16")] == ["none", "bf16", "fp16"]
    assert ["slower than float32" in note for note in half_notes("fp16", torch.device("cpu"))] == [True]
    said = half_notes("auto", GPU)
    assert [note.partition(";")[0] for note in said] == ["train.autocast auto is fp16: cuda:0 has no bf16"] * (
        kind == "fp16"
    )


def test_the_report_says_which_products_are_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    conv, matmul = SimpleNamespace(fp32_precision="tf32"), SimpleNamespace(fp32_precision="tf32")
    fake = SimpleNamespace(cudnn=SimpleNamespace(conv=conv), cuda=SimpleNamespace(matmul=matmul))
    monkeypatch.setattr("cskd.machine.arithmetic.torch.backends", fake)
    assert arithmetic("none", GPU) == "float32, convolutions and matrix products tf32"
    assert arithmetic("none", CPU) == "float32"
    matmul.fp32_precision = "none"
    assert arithmetic("none", GPU) == "float32, convolutions tf32"
    conv.fp32_precision = "ieee"
    assert arithmetic("none", GPU) == "float32"


@pytest.mark.parametrize("on", [True, False])
def test_training_asks_for_its_products_and_a_cache_and_an_evaluation_for_exact_ones(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    asked: list[tuple[bool, torch.device]] = []

    def noted(tf32: bool, device: torch.device) -> contextlib.AbstractContextManager[None]:
        asked.append((tf32, device))
        return float32_products(tf32, device)

    for module in ("cache_teacher", "train", "evaluate"):
        monkeypatch.setattr(f"cskd.pipeline.{module}.float32_products", noted)
    config = settings(cached, tmp_path / "run", max_steps=1, tf32=on, autocast="none")
    cache_teacher(config, quiet=True)
    train(config, quiet=True)
    evaluate_checkpoint(tmp_path / "run", cached / "val", 8, 0, None, "cpu", True)
    assert asked == [(False, CPU), (on, CPU), (False, CPU)]


def test_products_are_set_on_cuda_devices_alone_and_set_back() -> None:
    backends: Any = torch.backends
    own = (backends.cudnn.conv, backends.cuda.matmul)
    before = [backend.fp32_precision for backend in own]
    for on in (True, False):
        with float32_products(on, GPU):
            assert [backend.fp32_precision == "tf32" for backend in own] == [on, on]
            assert arithmetic("none", GPU).endswith("tf32") == on
        assert [backend.fp32_precision for backend in own] == before
        with float32_products(on, CPU):
            assert [backend.fp32_precision for backend in own] == before
