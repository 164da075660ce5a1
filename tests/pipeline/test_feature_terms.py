"""Runs taught by the teacher's features: from a cache and live, cut and resumed, and what they leave behind."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cskd.config import Config, from_dict, to_dict
from cskd.errors import ConfigError, StudentError
from cskd.loading.replay_batch import Targets
from cskd.loading.targets import CachedTargets, LiveTargets
from cskd.method.losses import BothTargets, FeatureTargets, SoftTargets
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.conflicts import refuse_other_run
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from tests.pipeline.test_pipeline import cached_data, config

CODECS = ["envelope", "features:4", "features:12", "features:pca12"]
VKD = {"head": "tokens", "target": "pooled", "kind": "smooth_l1", "projection": "orthogonal", "standardise": True}
TERMS: list[dict[str, Any]] = [VKD, {"head": "tokens", "target": "features", "kind": "mse", "epochs": [1, 2]}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("terms"), n=22, cache={"codecs": CODECS, "views": 2})


def settings(base: Path, name: str, terms: Any = TERMS, method: str = "cskd-hard", **changes: Any) -> Config:
    one = {"epochs": 2, "warmup_epochs": 0, "save_every": 1} | changes
    made = config(base, name, train=one, cache={"codecs": CODECS, "views": 2}, data={"val": ""})
    return replace(made, loss=from_dict({"loss": {"method": method, "terms": terms}}).loss)


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "resume").glob("step-*.safetensors"))[-1])


def test_a_cut_run_goes_on_to_the_same_bits_and_exports_the_student_alone(base: Path) -> None:
    train(settings(base, "through"), quiet=True)
    for steps in (1, 3, 0):
        train(settings(base, "cut", max_steps=steps), quiet=True)
    through, cut = state(base / "through"), state(base / "cut")
    assert through.keys() == cut.keys() and all(torch.equal(through[name], cut[name]) for name in through)
    names = [name for name in through if name.startswith("projection/")]
    assert names == ["projection/0.parametrizations.weight.original", "projection/1.bias", "projection/1.weight"]
    assert all(f"optimizer/{name}/exp_avg" in through for name in names)
    rows = [json.loads(line) for line in (base / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss_tokens_features_mse"] > 0 for row in rows] == [False, True]
    assert all(row["loss_tokens_pooled_smooth_l1"] > 0 for row in rows)
    for file in ("model.safetensors", "model_last.safetensors"):
        with safe_open(base / "cut" / file, "pt") as found:
            assert {f"model/{name}" for name in found.keys()} == {n for n in through if n.startswith("model/")}  # noqa: SIM118
    back = "set it back in the config, or start another run"
    with pytest.raises(ConfigError, match=rf"begun with items of loss\.terms = 2, now it is 1; {back}"):
        train(settings(base, "cut", [VKD]), quiet=True)
    with pytest.raises(ConfigError, match=rf"begun with loss\.terms\[0\]\.kind = smooth_l1, now it is mse; {back}"):
        train(settings(base, "cut", [VKD | {"kind": "mse", "name": "tokens_pooled_smooth_l1"}, TERMS[1]]), quiet=True)


def test_live_features_are_those_of_the_cache_within_its_step_and_hard_targets_the_same(base: Path) -> None:
    runs = {}
    for source in ("cached", "live"):
        seen: list[Any] = []
        kind: Any = {"cached": CachedTargets, "live": LiveTargets}[source]
        plain = kind.of

        def watched(self: Any, *args: Any, plain: Any = plain, seen: list[Any] = seen) -> Any:
            seen.append(plain(self, *args))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "of", watched)
            terms = [*TERMS, {"head": "class", "target": "global", "kind": "kl"}]
            train(settings(base, f"{source} run", terms, max_steps=2), online=source == "live", quiet=True)
        runs[source] = seen
    assert len(runs["cached"]) == len(runs["live"]) == 2
    codec = open_cache(base / "cache").codecs["features12"]
    for cached, live in zip(runs["cached"], runs["live"], strict=True):
        assert isinstance(cached, FeatureTargets) and isinstance(live, FeatureTargets)
        assert cached.features is not None and live.features is not None
        span = live.features.amax(1, keepdim=True) - live.features.amin(1, keepdim=True)
        assert codec.error.endswith(f"{2 * (2**12 - 1)}")
        off = (cached.features - live.features).abs() / span.clamp_min(1e-12)
        assert 0 < float(off.max()) <= 1.01 / (2 * (2**12 - 1))
        assert isinstance(cached.logits, BothTargets) and isinstance(live.logits, BothTargets)
        assert torch.equal(cached.logits.hard.global_class, live.logits.hard.global_class)
        assert cached.logits.hard.cell_class is not None and live.logits.hard.cell_class is not None
        assert torch.equal(cached.logits.hard.cell_class, live.logits.hard.cell_class)
        assert isinstance(cached.logits.soft, SoftTargets)


def test_a_cache_without_features_is_refused_with_the_codec_to_cache_before_stage_1_too(
    base: Path, tmp_path: Path
) -> None:
    for codecs in (["envelope", "int8"], ["global:8"], ["topk:3"]):
        made = replace(
            settings(base, "none"), cache=replace(settings(base, "x").cache, path=str(tmp_path / "c"), codecs=codecs)
        )
        with pytest.raises(
            ConfigError, match=r"tokens_pooled_smooth_l1 needs the teacher's features .*features:8\]"
        ) as refused:
            cache_teacher(replace(made, loss=replace(made.loss, method="deit-hard")), quiet=True)
        assert len(str(refused.value)) <= 300


def test_the_features_of_a_pca_codec_will_do(base: Path) -> None:
    cache = open_cache(base / "cache")
    cache.codecs = {"envelope": cache.codecs["envelope"], "pca": cache.codecs["featurespca12"]}
    targets = CachedTargets(cache, settings(base, "pca").loss, 2)
    assert targets.maps == {"": (12, cache.grid)}
    assert (targets.spec(0).codec, targets.spec(0).also) == ("envelope", "pca")


@pytest.mark.parametrize("name", ["features4", "featurespca12"])
def test_what_a_cache_stores_is_decoded_in_full_precision_whatever_is_around(base: Path, name: str) -> None:
    cache = open_cache(base / "cache")
    cache.codecs = {"envelope": cache.codecs["envelope"], name: cache.codecs[name]}
    loss = from_dict({"loss": {"method": "cskd-soft", "terms": [VKD]}}).loss
    of_a_run, codec = CachedTargets(cache, loss, 2), cache.codecs[name]
    stored = codec.take(cache.read(0, 0, name).targets, np.arange(4))
    batch = {f"target.{field}": torch.from_numpy(array) for field, array in stored.items()}

    def decoded() -> list[torch.Tensor]:
        found = of_a_run.of(batch, 0, torch.device("cpu"))
        assert isinstance(found, FeatureTargets) and isinstance(found.logits, SoftTargets)
        assert found.features is not None and found.logits.dense_logits is not None
        in_a_program = Targets.of({name: codec}, {name: stored}).logits_at(0.5)
        return [found.features, found.logits.global_logits, found.logits.dense_logits, in_a_program]

    alone = decoded()
    with torch.autocast("cpu", torch.bfloat16):
        around = decoded()
    assert all(torch.equal(a, b) for a, b in zip(alone, around, strict=True))


def test_a_teacher_grid_that_is_finer_than_the_student_is_refused(base: Path) -> None:
    made = settings(base, "coarse", [TERMS[1]], "deit-hard")
    kwargs = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    with pytest.raises(StudentError, match="too few for the teacher's grid"):
        train(replace(made, student=replace(made.student, kwargs=kwargs)), quiet=True)


def test_a_run_of_before_projections_goes_on(tmp_path: Path) -> None:
    loss = from_dict({"loss": {"method": "terms", "terms": [{"head": "class", "target": "label"}]}}).loss
    now = {"loss": json.loads(json.dumps(to_dict(loss)))}
    begun = json.loads(json.dumps(now))
    del begun["loss"]["terms"][0]["projection"]
    refuse_other_run(begun, now, tmp_path, distilled=True)
    begun["loss"]["terms"][0]["tau"] = 2.0
    with pytest.raises(ConfigError, match=re.escape("loss.terms")):
        refuse_other_run(begun, now, tmp_path, distilled=True)
