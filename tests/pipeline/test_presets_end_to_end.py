"""Each preset of CIFAR-10 by the commands of its own header, from a few images to a stock timm model."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.results import involution, networks
from cskd.cli import app
from cskd.config import load_config
from cskd.student import eval_heads
from cskd.student.checkpoint import load_student
from cskd.student.heads import score_head

ROOT = Path(__file__).resolve().parent.parent.parent
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("cifar10*.yaml"))
SMALL = ["train.global_batch=12", "train.warmup_epochs=1", "cache.views=3", "cache.workers=0", "train.workers=0"]
SMALL += ["teacher.min_top1=0", "train.epochs=2", "cache.device=cpu", "train.device=cpu"]
# DearKD's second stage begins with its epoch 4: a run that is cut there goes on with labels alone.
OWN = {"cifar10_transfer": ["student.init=start.safetensors"], "cifar10_dearkd": ["train.epochs=6"]}


def commands(name: str) -> list[list[str]]:
    """What the header of a preset tells its user to type, as a shell would take it apart."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text().replace("\\\n#", "")
    said = re.findall(r"^#   cskd (.*)$", text, re.MULTILINE)
    return [shlex.split(os.path.expandvars(line), comments=True) for line in said]


def run(*arguments: str) -> Any:
    """The facts that a command prints as JSON."""
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def small(name: str, *more: str) -> list[str]:
    return [part for change in (*SMALL, *OWN.get(name, []), *more) for part in ("--set", change)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sample_data: Path) -> Path:
    """A user's folder: configs, images as the headers pack them, only fewer, and what `benchmarks.results` makes."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    results = folder / "runs" / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CSKD_DATA", str(sample_data))
        for command in commands("cifar10"):
            if command[0] == "pack":
                run(*command, "--limit", "24", "--block", "12", "--shard-size", "12")
    (results / "data").mkdir(parents=True)
    for theirs, split in (("few", "train"), ("val", "val")):
        (results / "data" / theirs).symlink_to(folder / "data" / "cifar10" / split)
    torch.manual_seed(0)
    for teacher, net in (("few", networks.build(blocks=3)), ("few_involution", involution.build())):
        (results / "teachers" / teacher).mkdir(parents=True)
        save_file(net.state_dict(), results / "teachers" / teacher / "teacher.safetensors")
    start = timm.create_model("deit_tiny_distilled_patch16_224")
    save_file(start.state_dict(), folder / "start.safetensors")
    return folder


@pytest.fixture
def here(place: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("CSKD_DATA", str(sample_data))
    monkeypatch.setenv("CSKD_RESULTS", "runs/results")
    return place


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_a_preset_runs_by_its_header_and_ends_as_a_model_of_timm(here: Path, name: str) -> None:
    config = load_config(Path(f"configs/{name}.yaml"))
    *before, training = [command for command in commands(name) if command[0] != "pack"]
    assert training[0] == "train"
    for command in before:
        if command[0] == "config":
            *command, _, file = command
            Path(file).write_text(CliRunner().invoke(app, [*command, *small(name)]).stdout)
        else:
            run(*command, *small(name))
    through, cut = Path(config.train.output), here / "cut" / name
    with torch.enable_grad():
        whole = run(*training, *small(name))
        steps = whole["steps"] * 3 // 4
        begun = run(*training, *small(name, f"train.output={cut}", f"train.max_steps={steps}"))
        rest = run(*training, *small(name, f"train.output={cut}"))
    assert (begun["steps"], rest["steps"]) == (steps, whole["steps"] - steps) and whole["teacher_forwards"] == 0
    assert weights(through) == weights(cut)

    facts, tokens = json.loads((through / "config.json").read_text()), config.student.tokens
    model: Any = timm.create_model(
        facts["architecture"],
        num_classes=10,
        checkpoint_path=str(through / "model.safetensors"),
        **facts["model_args"],
    ).eval()
    heads = load_file(through / "heads.safetensors") if tokens else {}
    assert (through / "heads.safetensors").exists() == bool(tokens)
    assert {*heads} == {f"{token}.{part}" for token in tokens for part in ("weight", "bias")}
    student, _ = load_student(through)
    images = torch.randn(2, 3, config.recipe.size, config.recipe.size)
    said = eval_heads(student(images, student.patch_grid), student.trained)
    torch.testing.assert_close(said["class" if tokens else score_head(student.trained)], model(images))
    features = model.forward_features(images)
    for i, token in enumerate(tokens):
        logits = torch.nn.functional.linear(
            features[:, facts["cskd"]["tokens"]["first"] + i], heads[f"{token}.weight"], heads[f"{token}.bias"]
        )
        torch.testing.assert_close(said[f"token:{token}"], logits)
    found = run("eval", str(through), str(config.data.val), "--workers", "0", "--device", "cpu")
    averaged = whole["score"].removesuffix(found["score"])
    assert {head: score["top1"] for head, score in found["heads"].items()} == {
        head.removeprefix(averaged): top1
        for head, top1 in whole["top1"].items()
        if head.startswith(averaged) and (averaged or not head.startswith("ema."))
    }
