"""What a loss does not reach of a student: ranks don't wait for its gradients, and it stays as it is on one rank."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # in its documentation, not in its __all__

from cskd.config import Config, from_dict, to_yaml
from cskd.machine.ranks import Ranks
from cskd.machine.threads import choose_threads
from cskd.pipeline.train import train
from cskd.pipeline.train_step import TrainStep
from cskd.pipeline.training_run import open_run
from tests.pipeline.test_pipeline import cached_data, config

ROOT = Path(__file__).resolve().parent.parent.parent
CODECS = ["stage:body.0:12", "envelope", "features:8"]
CELLS = {"head": "patches", "target": "cells", "kind": "ce"}
GLOBAL = {"head": "distillation", "target": "global", "kind": "ce"}
LABEL = {"head": "class", "target": "label"}
STAGE = {"head": "block:0", "target": "stage:body.0", "kind": "mse"}
FEATURES = {"head": "tokens", "target": "features", "kind": "mse"}
POOLED = {"head": "tokens", "target": "pooled", "kind": "mse", "projection": "orthogonal", "name": "pooled"}
OWN = """
def undeclared(output, labels, targets):
    return output.cls_logits.square().mean()

def changing(output, labels, targets):
    return (output.dist_logits if labels.label[0] % 2 else output.cls_logits).square().mean()
"""
LOSSES: dict[str, list[dict[str, Any]]] = {
    "one after the other": [GLOBAL | {"epochs": [0, 1]}, CELLS | {"epochs": [1, None]}],
    "own that changes": [{"own": "own.py:changing"}, CELLS],
}
MORE_LOSSES: dict[str, list[dict[str, Any]]] = {
    "distillation alone": [GLOBAL],
    "patches alone": [CELLS],
    "a first block and distillation": [STAGE, GLOBAL],
    "tokens and patches": [FEATURES, CELLS],
    "projections of later": [LABEL | {"epochs": [0, 1]}, POOLED | {"epochs": [1, None]}, STAGE | {"epochs": [2, None]}],
    "hints first": [STAGE | {"epochs": [0, 1]}, CELLS | {"epochs": [1, None]}],
    "own that ends": [{"own": "own.py:undeclared", "epochs": [0, 1]}, CELLS],
    "own that begins": [{"own": "own.py:undeclared", "epochs": [1, None]}, GLOBAL],
}
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
OF_TOKEN = {"head": "token:conv", "target": "global", "kind": "ce"}
STUDENTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "tokens": (
        {"model": "vit_tiny_patch16_224", "kwargs": SMALL, "tokens": ["conv", "involution"]},
        [LABEL | {"epochs": [0, 2]}, OF_TOKEN | {"epochs": [1, None]}],
    ),
    "pooled by attention": ({"model": "vit_tiny_patch16_224", "kwargs": SMALL | {"global_pool": "map"}}, [CELLS]),
    "batch norms": ({"model": "test_resnet", "kwargs": {"output_stride": 8}}, [CELLS | {"epochs": [1, None]}, STAGE]),
}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = cached_data(tmp_path_factory.mktemp("reach"), n=22, cache={"codecs": CODECS, "views": 3})
    (base / "own.py").write_text(OWN)
    return base


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """DistributedDataParallel waits for the same gradients in a group of one process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def settings(base: Path, output: Path, terms: list[dict[str, Any]], **sections: Any) -> Config:
    train = {"output": str(output), "opt": "adamw", "weight_decay": 0.5, "micro_batch": 2, "autocast": "none"}
    train |= {"warmup_epochs": 0, "lr": 0.01} | sections.pop("train", {})
    made = config(base, cache={"codecs": CODECS}, data={"val": ""}, train=train, **sections)
    own = [term | ({"own": str(base / term["own"])} if "own" in term else {}) for term in terms]
    return dataclasses.replace(made, loss=from_dict({"loss": {"method": "terms", "terms": own}}).loss)


def trained(made: Config, ranks: int) -> dict[str, Tensor]:
    """Weights after two steps in each of three epochs. With two ranks this one has all rows: the mean over ranks is its own."""
    run = open_run(made, Ranks(), torch.device("cpu"), False, False, True, choose_threads(1, "", 0, gpu=False), None)
    tasks, batches = run.batches()
    with tasks:
        batch = dict(next(batches))
    step = TrainStep(dataclasses.replace(run, ranks=Ranks(0, ranks)))
    for number in range(6):
        step(batch, number // 2, number, {"teacher": 0.0, "student": 0.0})
    parts = [part for part in (run.student, run.optimisation.projections) if part is not None]
    return {f"{i} {name}": t for i, part in enumerate(parts) for name, t in part.state_dict().items()}


def refuse_other_weights(made: Config) -> None:
    alone, shared = trained(made, 1), trained(made, 2)
    assert [name for name in alone if not torch.equal(alone[name], shared[name])] == []


@pytest.mark.parametrize("terms", LOSSES.values(), ids=LOSSES)
def test_ranks_train_what_one_process_does(cached: Path, tmp_path: Path, group: None, terms: Any) -> None:
    """With a weight decay that would change whatever has a gradient of zero."""
    refuse_other_weights(settings(cached, tmp_path / "run", terms))


@pytest.mark.slow
@pytest.mark.parametrize("terms", MORE_LOSSES.values(), ids=MORE_LOSSES)
def test_ranks_train_what_one_process_does_of_more_losses(
    cached: Path, tmp_path: Path, group: None, terms: Any
) -> None:
    refuse_other_weights(settings(cached, tmp_path / "run", terms))


@pytest.mark.slow
@pytest.mark.parametrize(("student", "terms"), STUDENTS.values(), ids=STUDENTS)
def test_ranks_train_what_one_process_does_of_more_students(
    cached: Path, tmp_path: Path, group: None, student: Any, terms: Any
) -> None:
    refuse_other_weights(settings(cached, tmp_path / "run", terms, student={"drop_path": 0.0} | student))


@pytest.mark.slow
@pytest.mark.parametrize("terms", LOSSES.values(), ids=LOSSES)
def test_two_ranks_of_torchrun_end_with_the_weights_of_one(cached: Path, tmp_path: Path, terms: Any) -> None:
    train(settings(cached, tmp_path / "alone", terms, train={"opt": "sgd"}), quiet=True)
    made = tmp_path / "c.yaml"
    made.write_text(to_yaml(settings(cached, tmp_path / "two", terms, train={"opt": "sgd"})))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "cli.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, "train", str(made)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "two"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
