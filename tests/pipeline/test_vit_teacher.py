"""Caches of teachers without logits of cells: a ViT's patch tokens, and one without a classifier."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd.codecs import get_codec
from cskd.config import Config, from_dict
from cskd.errors import CacheError, CodecError, ConfigError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.export import export
from cskd.pipeline.care.verify import verify
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import config

VIT = """
import timm, torch
def build(num_classes=5):
    torch.manual_seed(1)
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=num_classes, reg_tokens=2
    )
"""
FEATURES: list[dict[str, Any]] = [
    {"head": "class", "target": "label"},
    {"head": "tokens", "target": "features", "kind": "mse"},
    {"head": "tokens", "target": "pooled", "kind": "smooth_l1"},
]
CODECS = ["features:12", "features:pca16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    (folder / "vit.py").write_text(VIT)
    make_tiny_data(folder / "train", n=16, block=8, shard=8)
    for kind in ("classes", "bare"):
        cache_teacher(settings(folder, kind), quiet=True)
    return folder


def settings(base: Path, kind: str, codecs: Any = None, terms: Any = FEATURES, **train_: Any) -> Config:
    codecs = codecs or (CODECS if kind == "bare" else [*CODECS, "global:8"])
    kwargs = {"num_classes": 0} if kind == "bare" else {}
    model = {"model": f"{base / 'vit.py'}:build", "kwargs": kwargs, "dense": "none", "batch": 8, "min_top1": 0.0}
    made = config(
        base,
        f"run {kind}",
        data={"val": ""},
        teacher=model,
        cache={"path": str(base / f"cache {kind}"), "codecs": codecs, "views": 1},
        train={"epochs": 1, "warmup_epochs": 0, "global_batch": 8, **train_},
    )
    return replace(made, loss=from_dict({"loss": {"method": "terms", "terms": terms}}).loss)


@pytest.mark.parametrize("kind", ["classes", "bare"])
def test_features_of_a_vit_are_cached_taught_checked_and_looked_at(base: Path, kind: str) -> None:
    cache: Any = open_cache(base / f"cache {kind}")
    assert cache.grid == (4, 4) and cache.codecs["features12"].channels == 24
    assert (cache.manifest.clean_top1 is None) == (kind == "bare")
    report = train(settings(base, kind), quiet=True)
    row = json.loads((Path(report.output) / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["loss_tokens_features_mse"] > 0 and report.teacher_forwards == 0
    again = verify(base / f"cache {kind}", again=16, quiet=True)
    assert not again.errors and again.recomputed is not None and again.recomputed.probe is None
    assert (
        0 < (again.recomputed.largest_feature_difference or 0) < 6 / (2 * 4095)
    )  # a step of 12 bits over six deviations
    assert again.recomputed.differing == 0 and (again.recomputed.lookups > 0) == (kind == "classes")
    facts = inspect(base / f"cache {kind}", sample="0" if kind == "classes" else None)
    gives = {"classes": "features; of the image its class", "bare": "features; of the image no class"}
    measured = facts.codecs["features12"].measured
    assert facts.codecs["features12"].gives == gives[kind] and measured is not None and 0 < measured["lost"] < 1e-5


@pytest.mark.parametrize("kind", ["classes", "bare"])
def test_what_a_map_alone_does_not_hold_is_refused(base: Path, kind: str) -> None:
    cache = open_cache(base / f"cache {kind}")
    targets = cache.read(0, 0, "features12").targets
    with pytest.raises(CodecError, match="features alone"):
        cache.codecs["features12"].logits(targets)
    if kind == "bare":
        with pytest.raises(CodecError, match="no classifier"):
            cache.codecs["features12"].hard(targets, 0)
    else:
        hard = cache.codecs["features12"].hard(targets, 1 << 15)
        assert np.array_equal(hard[:, 2, 1], cache.read(0, 0, "global8").targets["global_class"])


@pytest.mark.parametrize(
    ("kind", "codecs", "terms", "says"),
    [
        ("classes", ["envelope"], FEATURES, "stores logits of cells, and teacher.dense: none gives none"),
        ("bare", ["features:8", "global:8"], FEATURES, "stores the image's logits, and the teacher has no classifier"),
        ("bare", CODECS, [{"head": "class", "target": "global"}], "reads the teacher's classes"),
        ("classes", CODECS, [{"head": "patches", "target": "cells"}], "teaches cells"),
        ("bare", CODECS, [{"head": "class", "target": "global", "kind": "kl"}], "needs the teacher's logits"),
    ],
)
def test_configs_that_ask_for_more_are_refused(
    base: Path, tmp_path: Path, kind: str, codecs: Any, terms: Any, says: str
) -> None:
    made = settings(base, kind, codecs, terms)
    made = replace(made, train=replace(made.train, output=str(tmp_path / "run")))
    refused: pytest.ExceptionInfo[Exception]
    if terms is FEATURES:
        with pytest.raises(CodecError, match=says) as refused:
            cache_teacher(replace(made, cache=replace(made.cache, path=str(tmp_path / "c"))), quiet=True)
    else:
        with pytest.raises(ConfigError, match=says) as refused:
            train(made, quiet=True)
    assert len(str(refused.value)) <= 300
    if terms is not FEATURES and "kl" not in str(terms):
        with pytest.raises(ConfigError):
            train(replace(made, train=replace(made.train, output=str(tmp_path / "live"))), online=True, quiet=True)


def test_the_pca_of_a_map_alone_is_near_and_its_unit_packs(base: Path) -> None:
    cache: Any = open_cache(base / "cache bare")
    fine, small = (cache.read(0, 0, name).targets for name in ("features12", "featurespca16"))
    true, found = (
        cache.codecs[name].features_torch({k: torch.from_numpy(np.array(a)) for k, a in targets.items()})
        for name, targets in (("features12", fine), ("featurespca16", small))
    )
    spread = true - true.mean((0, 2, 3), keepdim=True)
    assert 0 < float((true - found).square().mean() / spread.square().mean()) < 0.2
    assert get_codec("features:pca16", 5, (4, 4)).soft


@pytest.mark.parametrize("option", ["sample", "samples", "png", "html", "student"])
def test_a_cache_without_classes_says_so_where_they_are_wanted(base: Path, tmp_path: Path, option: str) -> None:
    given: dict[str, Any] = {"sample": "0", "samples": 2, "student": tmp_path}
    with pytest.raises(CacheError, match=r"cache bare holds features alone, since .* leave --sample"):
        inspect(base / "cache bare", **{option: given.get(option, tmp_path / f"x.{option}")})
    with pytest.raises(CacheError, match=r"cache bare holds features alone, since .* --container webdataset"):
        export(base / "cache bare", tmp_path / "out", quiet=True)
