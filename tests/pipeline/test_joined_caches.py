"""A student taught by two teachers: two caches of the same views, joined by block, view and sample."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from rich.console import Console

from cskd.config import Config, from_dict, to_yaml
from cskd.errors import CacheError, ConfigError
from cskd.loading.epoch_table import build_table, open_table
from cskd.loading.joined import JoinedCaches
from cskd.loading.plan import PlanSpec, epoch_plan
from cskd.loading.targets import CachedTargets
from cskd.method.terms import needs
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.look.check_config import check_config
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.planning.plan import plan, render
from cskd.pipeline.setup import open_cached
from cskd.pipeline.train import train
from cskd.student import eval_heads
from cskd.student.checkpoint import load_student
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

TERMS: list[dict[str, Any]] = [
    {"head": "class", "target": "label", "weight": 0.5},
    {"head": "distillation", "target": "global", "weight": 0.5},
    {"head": "patches", "target": "cells", "cache": "second"},
    {"head": "class", "target": "global", "cache": "second", "kind": "kl", "weight": 0.1},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    for name, seed in (("first", 1), ("second", 4)):
        (folder / f"{name}.py").write_text(TEACHER.replace("manual_seed(1)", f"manual_seed({seed})"))
    make_tiny_data(folder / "train", n=24, block=12, shard=12)
    for name in ("first", "second"):
        cache_teacher(settings(folder, name), quiet=True)
    return folder


def settings(base: Path, teacher: str = "first", terms: Any = TERMS, **sections: Any) -> Config:
    codecs = ["envelope"] if teacher == "first" else ["envelope", "int8"]
    made = config(
        base,
        sections.pop("run", "run"),
        data={"val": ""},
        teacher={"model": f"{base / f'{teacher}.py'}:build", "batch": 8, "min_top1": 0.0, "precision": "float64"},
        cache={"path": str(base / f"cache {teacher}"), "codecs": codecs, **sections.pop("cache", {})},
        train={"epochs": 2, "caches": {"second": str(base / "cache second")}, **sections.pop("train", {})},
        **sections,
    )
    return replace(made, loss=from_dict({"loss": {"method": "terms", "terms": terms}}).loss)


def test_targets_of_both_come_to_one_batch_and_are_those_of_each_cache(base: Path, tmp_path: Path) -> None:
    both = open_cached(settings(base))
    assert isinstance(both, JoinedCaches) and list(both.codecs) == ["envelope", "second/envelope", "second/int8"]
    plan = epoch_plan(PlanSpec.over(both, settings(base).train), 1)
    tables = {}
    for name, source in (("both", both), ("second", both.others["second"])):
        loss = settings(base).loss
        if name == "second":
            loss = from_dict(
                {
                    "loss": {
                        "method": "terms",
                        "terms": [{k: v for k, v in t.items() if k != "cache"} for t in TERMS[2:]],
                    }
                }
            ).loss
        spec = CachedTargets(source, loss, 2).spec(1)
        tables[name] = open_table(build_table(source, plan, spec, 0, 8, tmp_path / name))
    for column in ("cell_class", "global_class", *[t for t in tables["second"].targets if t.startswith("target.")]):
        if column in tables["second"].targets:
            found = tables["both"].columns[f"second.{column}"]
            assert np.array_equal(found, tables["second"].columns[column])
    assert not np.array_equal(tables["both"].columns["global_class"], tables["second"].columns["global_class"])
    assert needs(settings(base).loss, "second").hard == "cells" and needs(settings(base).loss).hard == "global"


def test_a_student_of_two_teachers_is_the_same_after_a_restart_and_another_without_the_second(base: Path) -> None:
    whole = train(settings(base, run="whole"), quiet=True)
    train(settings(base, run="cut", train={"max_steps": 3}), quiet=True)
    cut = train(settings(base, run="cut"), quiet=True)
    alone = train(settings(base, run="alone", terms=TERMS[:2], train={"caches": {}}), quiet=True)
    digests = [
        hashlib.sha256((Path(r.output) / "model.safetensors").read_bytes()).hexdigest() for r in (whole, cut, alone)
    ]
    assert digests[0] == digests[1] != digests[2]
    for cache in ("first", "second"):  # its views are those of each of its caches
        facts = inspect(base / f"cache {cache}", student=base / "whole", sample="0").student
        assert facts is not None and not any("another cache" in note for note in facts.notes)
    row = json.loads((base / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["loss_patches_second_cells_ce"] > 0 and row["loss_class_second_global_kl"] > 0


def test_a_token_for_each_teacher_is_trained_resumed_and_scored_from_the_files(base: Path) -> None:
    """Averaged, with the best kept by the mean of the heads, which the card's lines compute from the files as `cskd eval` does."""
    terms = [
        TERMS[0],
        TERMS[2],
        {"head": "token:conv", "target": "global", "epochs": [1, None]},
        {"head": "token:involution", "target": "global", "cache": "second", "kind": "kl"},
    ]
    student = {"model": "deit_tiny_patch16_224", "tokens": ["conv", "involution"]}
    mean = "class+token:conv+token:involution"
    kept: dict[str, Any] = {"best": f"top1.ema.{mean}", "export": "best", "eval_every": 1}

    def run(name: str, **more: Any) -> Path:
        made = settings(base, run=name, terms=terms, student=student, train=kept | more)
        train(replace(made, data=replace(made.data, val=str(base / "train"))), quiet=True)
        return base / name

    whole = run("tokens")
    run("tokens cut", max_steps=4)
    for name in ("model.safetensors", "heads.safetensors", "heads_last.safetensors"):
        assert (run("tokens cut") / name).read_bytes() == (whole / name).read_bytes()
    report, facts = (
        evaluate_checkpoint(whole, base / "train", 8, 0, None, "cpu", quiet=True),
        json.loads((whole / "config.json").read_text()),
    )
    assert [*report.heads] == ["class", "token:conv", "token:involution", "patches", mean, "all"]
    assert report.score == "class" and facts["cskd"]["best"]["score"] == pytest.approx(report.heads[mean].top1)
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["loss_token_involution_second_global_kl"] > 0 and row["loss_token_conv_global_ce"] > 0
    found = inspect(base / "cache second", student=whole, sample="0").student
    assert found is not None and found.agreement is not None

    card = (whole / "README.md").read_text()
    assert r"term token\_conv\_global\_ce times 1 from epoch 1 on, term" in card and "0.5, term" in card
    assert "resolved.yaml\ncskd cache-teacher second/resolved.yaml  # second: train.caches.second in" in card
    lines = card.split("```python\n")[2].partition("```")[0]
    loaded = load_student(whole)[0]
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model(
        facts["architecture"], num_classes=5, checkpoint_path=str(whole / "model.safetensors"), **facts["model_args"]
    )
    script = base / "mean_of_heads.py"
    script.write_text(lines.replace("'heads.safetensors'", repr(str(whole / "heads.safetensors"))))
    names = runpy.run_path(str(script), {"model": model.eval(), "images": images})
    expected = eval_heads(loaded(images, (1, 1)), loaded.trained)[mean]
    torch.testing.assert_close(names["mean"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [({"seed": 7}, "recipe"), ({"erase": 0.5}, "recipe")],
)
def test_caches_of_other_views_are_refused_with_what_differs(
    base: Path, tmp_path: Path, recipe: Any, says: str
) -> None:
    other = {"path": str(tmp_path / "other"), "views": 3}
    cache_teacher(settings(base, "second", cache=other, recipe=recipe), quiet=True)
    with pytest.raises(CacheError, match=f"train.caches.second: .*{says}.*same images by the same recipe"):
        open_cached(settings(base, train={"caches": {"second": other["path"]}}))


def test_a_view_that_the_second_teacher_saw_otherwise_is_refused_by_the_field(base: Path, tmp_path: Path) -> None:
    both = open_cached(settings(base))
    assert isinstance(both, JoinedCaches)
    plan = epoch_plan(PlanSpec.over(both, settings(base).train), 0)
    spec = CachedTargets(both, settings(base).loss, 2).spec(0)
    read = both.others["second"].read

    def altered(block: int, view: int, codec: str) -> Any:
        unit = read(block, view, codec)
        unit.fields["digest"] = unit.fields["digest"] + np.uint32(block == 1)
        return unit

    both.others["second"].read = altered  # type: ignore[method-assign]
    with pytest.raises(CacheError, match=r"block 1, view \d: second and its codec \w+ has another digest"):
        build_table(both, plan, spec, 0, len(plan.sample), tmp_path / "t")


@pytest.mark.parametrize(
    ("terms", "train_", "says"),
    [
        ([{**TERMS[2], "cache": "third"}], {}, r"loss\.terms\[0\]\.cache is 'third'.*second"),
        (TERMS, {"caches": {}}, r"loss\.terms\[2\]\.cache is 'second'.*none"),
        ([*TERMS[:2]], {"caches": {"a/b": "x"}}, r"train\.caches"),
        (TERMS[:2], {}, r"train\.caches\.second is read by no term"),
        ([{**TERMS[1], "kind": "kl"}], {"caches": {}}, r"loss\.terms: .*_kl needs the teacher's logits.*kind: ce"),
    ],
)
def test_caches_that_do_not_fit_the_terms_are_refused(base: Path, terms: Any, train_: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train(settings(base, run="refused", terms=terms, train=train_), quiet=True)


def test_a_student_of_two_live_teachers_is_that_of_their_caches(base: Path) -> None:
    live = train(settings(base, run="live", terms=TERMS[:3]), online=True, quiet=True)
    cached = train(settings(base, run="cached", terms=TERMS[:3]), quiet=True)
    digests = [hashlib.sha256((Path(r.output) / "model.safetensors").read_bytes()).hexdigest() for r in (live, cached)]
    assert digests[0] == digests[1]
    assert (live.teacher_forwards > 0, cached.teacher_forwards) == (True, 0)


def test_a_second_live_teacher_is_that_of_its_cache(base: Path, tmp_path: Path) -> None:
    other = {"path": str(tmp_path / "other"), "views": 3}
    cache_teacher(settings(base, "second", cache=other, recipe={"seed": 7}), quiet=True)
    with pytest.raises(CacheError, match=r"train.caches.second: .*recipe.*this config has"):
        train(settings(base, run="live 2", train={"caches": {"second": other["path"]}}), online=True, quiet=True)
    source = (base / "second.py").read_text()
    (base / "second.py").write_text(source.replace("manual_seed(4)", "manual_seed(5)"))
    try:
        with pytest.raises(CacheError, match=r"the teacher's .* was .*, now it is"):
            train(settings(base, run="live 2"), online=True, quiet=True)
    finally:
        (base / "second.py").write_text(source)


@pytest.mark.parametrize("term", [{**TERMS[1], "kind": "kl"}, {**TERMS[2], "kind": "kl"}], ids=["first", "second"])
def test_check_says_that_a_cache_lacks_what_a_term_reads(base: Path, tmp_path: Path, term: dict[str, Any]) -> None:
    caches = {"second": str(base / "cache first")} if "cache" in term else {}
    made = settings(base, terms=[*TERMS[:2], term], train={"caches": caches})
    (tmp_path / "c.yaml").write_text(to_yaml(made))
    report = check_config(tmp_path / "c.yaml")
    assert not report.ok and "needs the teacher's logits and" in str(report)


@pytest.mark.slow
def test_a_plan_takes_the_cache_it_makes_for_each_of_the_others(base: Path) -> None:
    report = plan(settings(base, train={"epochs": 3}), seconds=0.2, quiet=True)
    (envelope,) = (size for size in report.codecs if size.chosen)
    assert envelope.codec == "envelope"
    console = Console(width=200, file=io.StringIO(), record=True)
    render(report, console)
    assert f"cache.codecs together: {envelope.unit_bytes:,.0f} bytes per view" in console.export_text()
    assert any(note.startswith("train.caches: reading each") for note in report.notes)
