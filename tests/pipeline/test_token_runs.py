"""A student with tokens of two teachers, and aligners of stages that end and begin: however a step is computed, it is the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from cskd.config import Config, from_dict, to_yaml
from cskd.pipeline.cache_teacher import cache_joint
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.train import train
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

ROOT = Path(__file__).resolve().parent.parent.parent
CODECS = {"first": ["global:8", "stage:body.0:12"], "second": ["envelope", "stage:body.1:12", "features:8"]}
TOKENS = ["conv", "involution"]
TERMS: list[dict[str, Any]] = [
    {"head": "class", "target": "label"},
    {"head": "token:conv", "target": "global", "kind": "kl"},
    {"head": "token:involution", "target": "global", "cache": "second", "epochs": [1, None]},
    {"head": "block:0", "target": "stage:body.0", "kind": "mse", "epochs": [0, 1]},
    {"head": "block:last", "target": "stage:body.1", "cache": "second", "kind": "smooth_l1", "epochs": [1, None]},
    {"head": "tokens", "target": "pooled", "cache": "second", "kind": "mse", "projection": "orthogonal"},
]
WAYS: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "compiled in parts": {"compile": True, "micro_batch": 2, "grad_checkpointing": True},
    "in parts": {"micro_batch": 2},
    "forgetting activations": {"grad_checkpointing": True},
    "views on the device": {"augment": "device"},
    "tracked": {"trackers": ["tensorboard"]},
    "two ranks": {},
    "two ranks, compiled": {"compile": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    make_tiny_data(folder / "train", n=24, block=12, shard=12)
    make_tiny_data(folder / "val", n=8, block=12, shard=12)
    for name, seed in (("first", 1), ("second", 4)):
        (folder / f"{name}.py").write_text(TEACHER.replace("manual_seed(1)", f"manual_seed({seed})"))
    stages = [of_teacher(folder, name) for name in CODECS]
    cache_joint([replace(one, student=replace(one.student, model="")) for one in stages], None, quiet=True)
    train(settings(folder, "plain"), quiet=True)
    return folder


def of_teacher(base: Path, name: str, **sections: Any) -> Config:
    teacher = {"model": f"{base / f'{name}.py'}:build", "batch": 8, "min_top1": 0.0}
    return config(base, teacher=teacher, cache={"path": str(base / name), "codecs": CODECS[name]}, **sections)


def settings(base: Path, name: str, **changes: Any) -> Config:
    run = {"output": str(base / name), "epochs": 2, "opt": "sgd", "warmup_epochs": 0, "autocast": "none", "lr": 0.01}
    run |= {"caches": {"second": str(base / "second")}, "device": "cpu"}
    student = {"model": "vit_tiny_patch16_224", "tokens": TOKENS, "drop_path": 0.0, **changes.pop("student", {})}
    made = of_teacher(base, "first", student=student, train=run | changes)
    return replace(made, loss=from_dict({"loss": {"method": "terms", "terms": TERMS}}).loss)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_it_ends_with_the_same_weights(base: Path, way: str) -> None:
    for package in WAYS[way].get("trackers", []):
        pytest.importorskip(package)
    made = settings(base, way, **WAYS[way])
    if way.startswith("two ranks"):
        file = base / f"{way}.yaml"
        file.write_text(to_yaml(made))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "cli.py")]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *launch, "train", str(file)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        train(made, quiet=True)
    for part in ("model", "heads"):
        one, other = (load_file(base / name / f"{part}.safetensors") for name in ("plain", way))
        assert one.keys() == other.keys()
        assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-5
    rows = [json.loads((base / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("plain", way)]
    losses = [{key: value for key, value in row.items() if key.startswith("loss")} for row in rows]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0]["loss_token_involution_second_global_ce"] > 0
    report = evaluate_checkpoint(base / way, base / "val", 8, 0, None, "cpu", quiet=True)
    assert {"token:conv", "token:involution", "class+token:conv+token:involution"} <= report.heads.keys()


@pytest.mark.slow
def test_a_run_that_starts_from_it_takes_tokens_and_heads_and_no_aligner(base: Path) -> None:
    more = settings(base, "more", lr=0.0, min_lr=0.0, student={"init": str(base / "plain")})
    train(more, quiet=True)
    for part in ("model", "heads"):
        one, other = (load_file(base / name / f"{part}.safetensors") for name in ("plain", "more"))
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    with safe_open(base / "more" / "model.safetensors", "pt") as found:
        assert not [name for name in found.keys() if "projection" in name or "token_heads" in name]  # noqa: SIM118
