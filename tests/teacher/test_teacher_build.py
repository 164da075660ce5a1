"""The network is the one asked for, its weights are the file's, and every mistake is one line that helps."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from cskd.config import TeacherConfig
from cskd.errors import TeacherError
from cskd.teacher.build import build, build_model, load_weights, weights_sha256

TINY: dict[str, Any] = {"channels": [8, 8, 8, 8], "num_classes": 4}
OWN = """
from torch import nn

def build(width=4):
    if width > 8:
        raise ValueError("too wide")
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))

def number():
    return 3

constant = 4
"""


def config(**kwargs: Any) -> TeacherConfig:
    return TeacherConfig(**{"model": "resnet18", "kwargs": TINY, **kwargs})


def trained() -> nn.Module:
    torch.manual_seed(7)
    return timm.create_model("resnet18", **TINY)


def refusal(c: TeacherConfig) -> str:
    with pytest.raises(TeacherError) as e:
        build(c)
    assert "\n" not in str(e.value)
    return str(e.value)


def own_file(folder: Path, text: str = OWN) -> str:
    (folder / "own.py").write_text(text)
    return f"{folder / 'own.py'}:build"


def test_a_built_teacher_is_float32_frozen_and_in_eval_mode() -> None:
    built = build(config())
    assert not built.model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in built.model.parameters())
    assert built.source == {"model": "resnet18", "kwargs": TINY}
    assert built.stated["input_size"] == 224 and len(built.stated["mean"]) == 3
    assert "random" in built.notes[0]


@pytest.mark.parametrize("form", ["safetensors", "half", "ema", "parallel"])
def test_every_usual_form_of_checkpoint_gives_the_same_network(tmp_path: Path, form: str) -> None:
    model = trained()
    state: dict[str, Tensor] = {
        k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    path = tmp_path / ("w.safetensors" if form in ("safetensors", "half") else "w.pth.tar")
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "half":
        safetensors.torch.save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    else:
        other = {k: torch.zeros_like(v) for k, v in state.items()}
        torch.save(
            {
                "ema": {"state_dict": other, "state_dict_ema": state},
                "parallel": {"model": {f"module.{k}": v for k, v in state.items()}},
            }[form],
            path,
        )
    built = build(config(weights=str(path)))
    assert weights_sha256(built.model) == weights_sha256(model)
    if form == "ema":
        assert any("state_dict_ema" in note for note in built.notes)


def test_the_hash_covers_parameters_buffers_and_names() -> None:
    model: Any = trained()
    before = weights_sha256(model)
    assert weights_sha256(trained()) == before
    model.bn1.running_mean[0] += 1e-6
    assert weights_sha256(model) != before
    a, b = nn.Sequential(), nn.Sequential()
    layer = nn.Linear(2, 2)
    a.add_module("x", layer)
    b.add_module("y", layer)
    assert weights_sha256(a) != weights_sha256(b)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = trained().state_dict()
    for k in [k for k in state if k.startswith("layer4.1.bn")]:
        del state[k]
    state["extra.weight"] = torch.zeros(2)
    state["fc.weight"] = torch.zeros(1000, 8)
    path = tmp_path / "w.pth"
    torch.save(state, path)
    text = refusal(config(weights=str(path)))
    assert "8 missing: layer4.1.bn1.weight, layer4.1.bn1.bias, layer4.1.bn1.running_mean, ..." in text
    assert "1 unexpected: extra.weight" in text
    assert "1 of another shape: fc.weight [1000, 8] for [4, 8]" in text and "num_classes" in text


def test_checkpoints_without_the_batch_counter_load(tmp_path: Path) -> None:
    model = trained()
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pth")
    assert load_weights(build_model("resnet18", TINY), tmp_path / "w.pth") == []


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_and_missing_weights_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert f"no file {path}" in refusal(config(weights=str(path)))
    path.write_bytes(b"\x80\x02not weights")
    assert str(path) in refusal(config(weights=str(path)))


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "w.pth")
    assert "no state dict" in refusal(config(weights=str(tmp_path / "w.pth")))


def test_weights_out_of_reach_say_so_in_one_line() -> None:  # conftest puts the hub offline
    text = refusal(config(model="resnet18.a1_in1k", weights="hub", kwargs={}))
    assert "can't be had" in text and "give a file" in text


def test_a_hub_out_of_reach_is_one_line_and_its_library_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    unreachable = type("ConnectError", (Exception,), {"__module__": "httpx"})
    logger = logging.getLogger("huggingface_hub.utils._http")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]

    def create(*_: object, **__: object) -> None:
        logger.warning("Retrying in 1s [Retry 1/5].")
        raise LocalEntryNotFoundError(f"An error happened {'and so on ' * 20}") from unreachable("no such host")

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    logger.addHandler(handler)
    try:
        text = refusal(config(model="resnet18.a1_in1k", weights="hub", kwargs={}))
    finally:
        logger.removeHandler(handler)
    assert said == []
    assert "the hub can't be reached (ConnectError: no such host); see to the network" in text and "..." not in text


def test_unknown_models_and_kwargs_are_named() -> None:
    assert "'resnet50'" in refusal(config(model="resnet5O", kwargs={}))
    assert "teacher.model is empty" in refusal(config(model=""))
    assert "wdth" in refusal(config(kwargs={"wdth": 3}))


def test_an_own_file_is_imported_by_its_content(tmp_path: Path) -> None:
    where = own_file(tmp_path)
    built = build(TeacherConfig(model=where, kwargs={"width": 6}))
    assert isinstance(built.model, nn.Sequential) and isinstance(built.model[0], nn.Conv2d)
    assert built.model[0].out_channels == 6
    assert built.source["model"] == "build" and built.source["kwargs"] == {"width": 6}
    assert str(tmp_path) not in str(built.source)  # a moved file is the same teacher
    edited = build(TeacherConfig(model=own_file(tmp_path, OWN + "\n# edited")))
    assert edited.source["file_sha256"] != built.source["file_sha256"]


def test_an_own_file_may_import_its_neighbours_which_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    for folder, width in (("a", 4), ("b", 6)):
        (tmp_path / folder / "blocks").mkdir(parents=True)
        (tmp_path / folder / "blocks" / "__init__.py").write_text(f"WIDTH = {width}\n")
        (tmp_path / folder / "own.py").write_text(
            "from torch import nn\nfrom blocks import WIDTH\ndef build():\n    return nn.Conv2d(3, WIDTH, 1)\n"
        )
    path = list(sys.path)
    built = [build(TeacherConfig(model=f"{tmp_path / folder / 'own.py'}:build")) for folder in "aba"]
    assert [b.model.out_channels for b in built] == [4, 6, 4]  # of one name, and each its own
    assert built[0].source == built[2].source and list(built[0].source["neighbours"]) == ["blocks/__init__.py"]
    assert built[0].source["neighbours"] != built[1].source["neighbours"]
    assert built[0].source["file_sha256"] == built[1].source["file_sha256"]
    (tmp_path / "a" / "blocks" / "__init__.py").write_text("WIDTH = 2 * 4\n")
    assert build(TeacherConfig(model=f"{tmp_path / 'a' / 'own.py'}:build")).source != built[0].source
    assert sys.path == path and "blocks" not in sys.modules


@pytest.mark.parametrize(
    ("model", "kwargs", "reason"),
    [
        ("absent.py:build", {}, "no file"),
        ("own.py:nothing", {}, "no function 'nothing'"),
        ("own.py:constant", {}, "no function 'constant'"),
        ("own.py:number", {}, "returned a int"),
        ("own.py:build", {"width": 9}, "ValueError: too wide"),
        ("own.py:build", {"height": 9}, "height"),
        ("broken.py:build", {}, "ModuleNotFoundError"),
    ],
)
def test_faults_of_an_own_file_are_named(tmp_path: Path, model: str, kwargs: dict[str, Any], reason: str) -> None:
    own_file(tmp_path)
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there\n")
    assert reason in refusal(TeacherConfig(model=str(tmp_path / model), kwargs=kwargs))


def test_the_hub_has_no_weights_for_an_own_file(tmp_path: Path) -> None:
    assert "'hub' is for timm models" in refusal(TeacherConfig(model=own_file(tmp_path), weights="hub"))
