"""Runs whose blocks are taught by the teacher's earlier stages: from a cache and live, what they leave behind, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from cskd.codecs.base import Outputs
from cskd.config import Config, from_dict
from cskd.errors import ConfigError, StudentError, TeacherError
from cskd.loading.targets import CachedTargets, LiveTargets
from cskd.method.losses import FeatureTargets
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.recompute import recompute
from cskd.pipeline.care.verify import render as render_report
from cskd.pipeline.care.verify import verify
from cskd.pipeline.look.inspect_cache import inspect, render
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from cskd.teacher.model import Teacher
from tests.pipeline.test_pipeline import cached_data, config

CODECS = ["stage:body.0:12", "envelope", "stage:body.1:pca4:8"]
CONV = {"head": "block:0", "target": "stage:body.0", "kind": "mse"}
RELU = {"head": "block:last", "target": "stage:body.1", "kind": "smooth_l1", "resize": "finer", "weight": 2.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("stages"), n=22, cache={"codecs": CODECS, "views": 2})


def settings(base: Path, name: str, terms: list[dict[str, Any]], method: str = "cskd-hard", **changes: Any) -> Config:
    one = {"epochs": 2, "warmup_epochs": 0, "max_steps": 2} | changes
    made = config(base, name, train=one, cache={"codecs": CODECS, "views": 2}, data={"val": ""})
    return replace(made, loss=from_dict({"loss": {"method": method, "terms": terms}}).loss)


def test_live_stages_are_those_of_the_cache_within_its_error_and_hard_targets_the_same(base: Path) -> None:
    runs = {}
    for source, kind in {"cached": CachedTargets, "live": LiveTargets}.items():
        seen: list[Any] = []
        plain: Any = kind.of  # type: ignore[attr-defined]

        def watched(self: Any, *args: Any, plain: Any = plain, seen: list[Any] = seen) -> Any:
            seen.append(plain(self, *args))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "of", watched)
            train(settings(base, source, [CONV, RELU]), online=source == "live", quiet=True)
        runs[source] = seen
    assert len(runs["cached"]) == len(runs["live"]) == 2
    for cached, live in zip(runs["cached"], runs["live"], strict=True):
        assert isinstance(cached, FeatureTargets) and isinstance(live, FeatureTargets)
        maps = live.stages["body.0"]
        span = maps.amax(1, keepdim=True) - maps.amin(1, keepdim=True)
        off = (cached.stages["body.0"] - maps).abs() / span.clamp_min(1e-12)
        assert 0 < float(off.max()) <= 1.01 / (2 * (2**12 - 1))
        rest = cached.stages["body.1"] - live.stages["body.1"]
        assert 0 < float(rest.square().mean()) < 0.1 * float(live.stages["body.1"].var())
        assert torch.equal(live.stages["body.1"], maps.relu())
        assert torch.equal(cached.logits.global_class, live.logits.global_class)  # type: ignore[union-attr]
        assert torch.equal(cached.logits.cell_class, live.logits.cell_class)  # type: ignore[union-attr,arg-type]


def test_first_layers_run_live_in_stage_1s_arithmetic_and_the_rest_is_let_go(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cached map is the live one within its error, the live one is the online one to the bit, and its forwards are counted."""
    seen: dict[str, list[Any]] = {}
    for name, kind, online in (("first layers", CachedTargets, False), ("online", LiveTargets, True)):
        plain, maps = kind.of, seen.setdefault(name, [])

        def watched(self: Any, *args: Any, plain: Any = plain, maps: list[Any] = maps) -> Any:
            maps.append(plain(self, *args))
            return maps[-1]

        monkeypatch.setattr(kind, "of", watched)
        terms: list[dict[str, Any]] = [
            CONV | {"live": True, "target": "stage:body.0"},
            CONV | {"target": "stage:body.1", "name": "kept"},
        ]
        found = train(settings(base, name, terms, max_steps=1), online=online, quiet=True)
        assert found.teacher_forwards == 8
        assert any("up to body.0, with 224 of its 1,165 numbers" in note for note in found.notes) != online
    (live,), (online_,) = seen.values()
    assert torch.equal(live.stages["body.0"], online_.stages["body.0"])
    assert torch.equal(live.logits.cell_class, online_.logits.cell_class)


def test_aligners_are_trained_and_logged_and_not_exported(base: Path) -> None:
    train(settings(base, "through", [CONV, RELU], max_steps=0), quiet=True)
    with safe_open(sorted((base / "through" / "resume").glob("step-*"))[-1], "pt") as found:
        names = [name for name in found.keys() if name.startswith("projection/")]  # noqa: SIM118
    assert names == ["projection/0.bias", "projection/0.weight", "projection/1.bias", "projection/1.weight"]
    row = json.loads((base / "through" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["loss_block_0_stage_body_0_mse"] > 0 and row["loss_block_last_stage_body_1_smooth_l1"] > 0
    with safe_open(base / "through" / "model.safetensors", "pt") as found:
        assert not [name for name in found.keys() if "projection" in name]  # noqa: SIM118


def test_inspect_names_stages_with_their_measured_errors_and_verify_reads_them(base: Path) -> None:
    assert verify(base / "cache", quiet=True).errors == []
    assert open_cache(base / "cache").hard_codec == "envelope"
    facts, console = inspect(base / "cache"), Console(record=True, width=200)
    for name, lost in (("stage-body.0-12", 1e-6), ("stage-body.1-pca4b8", 0.1)):
        measured = facts.codecs[name].measured
        assert measured is not None and 0 < measured["lost"] < lost and measured["views"] == 24
    with console.capture() as shown:
        render(facts, console)
    assert "the map of the teacher's stage body.0" in shown.get() and "% of the variance lost" in shown.get()


def test_the_teacher_run_again_gives_the_stored_maps_of_stages_within_their_error(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(base / "cache")
    same = recompute(cache, 8, "cpu", quiet=True)
    assert same.stages.keys() == {"stage-body.0-12", "stage-body.1-pca4b8"}
    for found in same.stages.values():
        assert found.cells > 100 and found.beyond == 0 and 0 < found.largest_difference < 1
    plain = Teacher.outputs_of

    def off(self: Teacher, pixels: torch.Tensor, stages: Sequence[str] = ()) -> Outputs:
        made = plain(self, pixels, stages)
        return made._replace(stages={name: 1.01 * x for name, x in made.stages.items()})

    monkeypatch.setattr(Teacher, "outputs_of", off)
    report = verify(base / "cache", again=8, quiet=True)
    other, console = report.recomputed, Console(record=True, width=1000)
    assert other is not None and other.stages["stage-body.0-12"].beyond > 100
    render_report(report, console)
    assert f"stage-body.0-12 by {other.stages['stage-body.0-12'].largest_difference:.3g} (" in console.export_text()


@pytest.mark.parametrize(
    ("codecs", "said"),
    [
        (["envelope", "stage:bodi.0:8"], "no module 'bodi.0'; did you mean 'body.0'"),
        (["envelope", "stage:3:8"], "no stage 3: it states no stages .* such as body"),
        (["envelope", "stage:fc:8"], r"stage fc of the teacher gives a tensor \[2, 5\], expected a map"),
    ],
)
def test_a_stage_that_the_teacher_does_not_have_is_refused_before_the_first_view(
    base: Path, tmp_path: Path, codecs: list[str], said: str
) -> None:
    with pytest.raises(TeacherError, match=said) as no:
        cache_teacher(config(base, cache={"codecs": codecs, "path": str(tmp_path / "cache")}), quiet=True)
    assert "\n" not in str(no.value) and len(str(no.value)) <= 300
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("term", "error", "said"),
    [
        (
            {"target": "stage:body.2"},
            ConfigError,
            r"the teacher's stage 'body.2' .* holds 'body.0', 'body.1'; cache with",
        ),
        ({"head": "block:2"}, StudentError, "head block:2, and student .* has blocks 0 to 1"),
    ],
)
def test_a_stage_that_no_codec_holds_and_a_block_beyond_the_depth_are_refused(
    base: Path, term: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as no:
        train(settings(base, "none", [CONV | term]), quiet=True)
    assert "\n" not in str(no.value) and len(str(no.value)) <= 300


def test_a_live_stage_of_a_further_cache_is_refused_by_what_to_do() -> None:
    with pytest.raises(
        ConfigError, match=r"live runs the teacher of the first cache alone, not that of cache: other; leave"
    ) as e:
        from_dict({"loss": {"method": "cskd-hard", "terms": [CONV | {"live": True, "cache": "other"}]}})
    assert len(str(e.value)) <= 300


def test_a_cache_of_stages_alone_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no targets of classes.*add envelope"):
        cache_teacher(config(base, cache={"codecs": CODECS[:1], "path": str(tmp_path / "cache")}), quiet=True)
