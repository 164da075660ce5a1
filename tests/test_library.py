"""The public interface: small, typed and lazy; stages as functions, with parts of a user's own."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cskd
from cskd.config import Config, from_dict, load_config
from cskd.errors import CacheError, CodecError, ConfigError, PathError
from tests.caches import make_tiny_data

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "examples" / "own_parts.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    make_tiny_data(folder / "train", n=18, block=10, shard=10)
    return folder


def sections(base: Path) -> dict[str, Any]:
    """A config as a dict of Python's own types, all own parts out of the example."""
    return {
        "data": {"train": base / "train"},
        "teacher": {
            "model": f"{OWN}:build",
            "kwargs": {"width": 8},
            "batch": np.int64(8),
            "min_top1": 0.0,
            "check": "note",
        },
        "recipe": {"size": 32, "scale": (0.5, 1.0)},
        "cache": {"path": base / "cache", "views": 2, "workers": 0, "codecs": ["envelope", f"{OWN}:Float16"]},
        "student": {
            "model": "vit_tiny_patch16_224",
            "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
        },
        "loss": {"method": "cskd-soft", "terms": [{"own": f"{OWN}:entropy", "weight": 0.5}]},
        "train": {"output": base / "run", "epochs": 1, "global_batch": 8, "workers": 0, "warmup_epochs": 0},
    }


@pytest.fixture(scope="module")
def report(base: Path) -> cskd.CacheReport:
    return cskd.cache_teacher(sections(base), quiet=True)


def test_every_name_of_the_interface_exists_and_is_stated_for_type_checkers_too() -> None:
    stated = {
        alias.name: str(node.module)
        for branch in ast.parse((ROOT / "cskd" / "__init__.py").read_text()).body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stated == cskd._HOME and set(stated) == set(cskd.__all__) <= set(dir(cskd))
    for name, module in stated.items():
        assert getattr(cskd, name) is getattr(importlib.import_module(module), name)
        assert getattr(cskd, name).__doc__ or name == "Arrays"
    with pytest.raises(AttributeError, match="ReplayDataset"):
        cskd.__getattr__("ReplayDatasets")


def test_the_stages_run_as_functions_with_own_teacher_codec_and_term(
    base: Path, report: cskd.CacheReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (report.units, report.images, report.quarantined) == (4, 36, 0)
    facts = cskd.inspect(base / "cache", sample=0, blend=1)
    assert facts.sealed and facts.samples and facts.samples[0].replay == "equal"
    assert facts.codecs["float16"].soft and not facts.codecs["float16"].exact_hard
    identity = json.loads((base / "cache" / "manifest.json").read_text())["identity"]
    assert identity["codecs"] == ["envelope", "float16"] and set(identity["codec_code"]) == {"float16"}
    trained = cskd.train(sections(base), {"train.max_steps": 2}, quiet=True)
    assert trained.steps == 2 and trained.teacher_forwards == 0
    row = json.loads((base / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["loss_entropy"] < 0
    total = 0.5 * row["loss_label"] + 0.5 * row["loss_dist"] + row["loss_patch"] + 0.5 * row["loss_entropy"]
    assert row["loss"] == pytest.approx(total, rel=1e-4)
    with pytest.raises(ConfigError, match=r"loss\.terms"):
        cskd.train(sections(base), {"loss.terms": [], "train.max_steps": 3}, quiet=True)
    targets = cskd.ReplayDataset(base / "cache", codecs=[f"{OWN}:Float16"])[0].targets
    assert torch.equal(targets.at(0.5), targets.logits_at(0.5).argmax(0))


def test_a_cache_with_an_unknown_codec_says_how_to_name_it_and_the_environment_does(
    base: Path, report: cskd.CacheReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cskd.codecs import own

    monkeypatch.setattr(own, "_known", {})
    with pytest.raises(CacheError, match="CSKD_CODECS"):
        cskd.inspect(base / "cache")
    monkeypatch.setenv("CSKD_CODECS", f"{OWN}:Float16")
    assert not cskd.inspect(base / "cache").errors


@pytest.mark.parametrize(
    "call",
    [
        lambda base: cskd.cache_teacher(base / "absent.yaml"),
        lambda base: cskd.cache_teacher({"teacher": {"modell": "x"}}),
        lambda base: cskd.cache_teacher({"data": {"train": base / "absent"}, "cache": {"path": base / "c"}}),
        lambda base: cskd.train({"train": {"epochs": "many"}}),
        lambda base: cskd.train({}, ["train.epochs"]),
        lambda base: cskd.train({}, "train.epochs=1"),
        lambda base: cskd.train({}, {"train.epochs.x": 1, "train.epochs": 1}),
        lambda base: cskd.train([1, 2]),  # type: ignore[arg-type]
        lambda base: cskd.train({}, 3),  # type: ignore[arg-type]
        lambda base: cskd.train({}, [3]),  # type: ignore[list-item]
        lambda base: cskd.train({"cache": {"path": base / "absent"}, "train": {"output": "/dev/null/x"}}, quiet=True),
        lambda base: cskd.train({1: 2}),  # type: ignore[dict-item]
        lambda base: cskd.inspect(base / "absent"),
        lambda base: cskd.inspect("s3://bucket/cache"),
        lambda base: cskd.inspect(""),
        lambda base: cskd.inspect(base / "cache", blend=2),
        lambda base: cskd.inspect(base / "cache", sample="nobody"),
        lambda base: cskd.inspect(base / "cache", png=Path("/dev/null/x.png")),
    ],
)
def test_a_stage_that_can_not_run_raises_one_line(base: Path, report: cskd.CacheReport, call: Any) -> None:
    with pytest.raises(cskd.CskdError) as caught:
        call(base)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_a_refusal_of_the_system_is_of_the_family_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("cskd.pipeline.train.train", full)
    with pytest.raises(PathError, match="No space left"):
        cskd.train(sections(base))


def test_overrides_are_those_of_the_command_line_and_dicts(base: Path, tmp_path: Path) -> None:
    raw = sections(base)
    by_text = load_config(raw, ["train.epochs=7", "teacher.mean=[0.1, 0.2, 0.3]", "loss.method=none"])
    by_dict = load_config(raw, {"train.epochs": np.int32(7), "teacher.mean": (0.1, 0.2, 0.3), "loss.method": "none"})
    assert by_text == by_dict == load_config(by_text) and raw == sections(base)
    assert by_text.train.epochs == 7 and by_text.given >= {"train.epochs", "teacher.mean"}
    again = load_config(by_text, {"train.epochs": 8})
    assert again.train.epochs == 8 and again.given == by_text.given
    made = Config(train=dataclasses.replace(Config().train, epochs=9))
    assert load_config(made, {"train.seed": 1}).given == {"train.epochs", "train.seed"}
    assert load_config({}) == from_dict({})


BAD = {
    "empty": "x = 1",
    "broken": "raise OSError('no')",
    "syntax": "def",
    "number": "Mine = build = term = 3",
    "name": "import cskd\nfrom examples.own_parts import Float16\n"
    "class Mine(Float16):\n    def __init__(s, c, g):\n        super().__init__(c, g); s.name = 'Int8/../x'",
    "taken": "from examples.own_parts import Float16\n"
    "class Mine(Float16):\n    def __init__(s, c, g):\n        super().__init__(c, g); s.name = 'topk7'",
    "other": "def Mine(c, g): return 1",
    "raises": "def Mine(c, g): raise KeyError('k')\ndef build(): raise KeyError('k')",
    "heads": "def term(o, l, t): return o.cls_logits.sum()\nterm.heads = ('tail',)",
    "twice": "def label(o, l, t): return o.cls_logits.sum()",
}


@pytest.mark.parametrize("what", [*BAD, "absent"])
@pytest.mark.parametrize("part", ["Mine", "build", "term"])
def test_own_parts_that_can_not_be_are_refused_by_the_key_that_names_them(
    tmp_path: Path, base: Path, what: str, part: str
) -> None:
    from cskd.codecs import known_own
    from cskd.method.terms import expanded, own_terms
    from cskd.teacher.build import build

    file = tmp_path / "mine.py"
    if what != "absent":
        file.write_text(BAD[what])
    text = f"{file}:{'label' if what == 'twice' and part == 'term' else part}"
    raw: dict[str, Any] = {"teacher": {"model": text}, "loss": {"terms": [{"own": text}]}}
    tries: dict[str, Any] = {
        "Mine": lambda: known_own(text),
        "build": lambda: build(from_dict(raw).teacher),
        "term": lambda: (own_terms(from_dict(raw).loss), expanded(from_dict(raw).loss)),
    }
    key = {"Mine": "cache.codecs", "build": "teacher.model", "term": "loss.terms"}[part]
    with pytest.raises(cskd.CskdError, match=key) as caught:
        tries[part]()
    assert "mine.py" in str(caught.value) and len(str(caught.value).replace(str(tmp_path), "")) <= 300


@pytest.mark.parametrize("value", ["x", float("inf"), True, None, [1]])
def test_a_weight_of_a_term_is_a_number(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"loss\.terms"):
        from_dict({"loss": {"terms": [{"own": "a.py:b", "weight": value}]}})


def test_a_cache_never_says_which_code_runs(base: Path, tmp_path: Path) -> None:
    from cskd.codecs import get_codec

    canary = tmp_path / "canary.py"
    canary.write_text("raise SystemExit('ran')")
    for name in (f"{canary}:Mine", "examples.own_parts:Float16", "os:system"):
        with pytest.raises(CodecError, match="unknown codec"):
            get_codec(name, 5, (2, 2))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package with entry points of all three groups."""
    (tmp_path / "ownpkg17.py").write_text(
        "from examples.own_parts import Float16, build, entropy\n"
        "class Packed(Float16):\n    def __init__(s, c, g):\n        super().__init__(c, g); s.name = 'packed'\n"
    )
    about = tmp_path / "ownpkg17-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ownpkg17\nVersion: 1.0\n")
    groups = {
        "teachers": "tinycnn = ownpkg17:build",
        "codecs": "packed = ownpkg17:Packed",
        "losses": "calm = ownpkg17:entropy",
    }
    (about / "entry_points.txt").write_text("".join(f"[cskd.{group}]\n{point}\n" for group, point in groups.items()))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "ownpkg17"


def test_entry_points_and_modules_name_own_parts(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cskd.codecs import get_codec, known_own, own
    from cskd.method.terms import own_terms
    from cskd.teacher.build import build

    monkeypatch.setattr(own, "_known", {})
    assert get_codec("packed", 5, (2, 2)).name == known_own(f"{package}:Packed") == "packed"
    for model in ("tinycnn", f"{package}:build"):
        built = build(from_dict({"teacher": {"model": model, "kwargs": {"classes": 3}}}).teacher)
        assert built.model.fc.out_features == 3 and len(built.source["file_sha256"]) == 64  # type: ignore[union-attr]
    terms = own_terms(
        from_dict({"loss": {"terms": [{"own": "calm"}, {"own": f"{package}:entropy", "weight": 0.5}]}}).loss
    )
    assert [term.name for term in terms] == ["calm", "entropy"]
    with pytest.raises(cskd.CskdError, match=r"teacher\.model.*absentpkg"):
        build(from_dict({"teacher": {"model": "absentpkg.models:build"}}).teacher)
