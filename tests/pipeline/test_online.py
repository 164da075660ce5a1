"""Training with the teacher beside the student: the same run as from a cache, to the last bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cskd.config import Config, from_dict
from cskd.errors import CacheError, ConfigError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.train import train
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

DEIT = {"randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=42, block=20, shard=10)
    make_tiny_data(folder / "val", n=12, block=20, shard=10)
    cache_teacher(settings(folder), quiet=True)
    return folder


def settings(base: Path, name: str = "run", **sections: dict[str, Any]) -> Config:
    teacher = {"model": f"{base / 'net.py'}:build", "batch": 8, "min_top1": 0.0, "precision": "float64"}
    recipe = {"size": 32, **DEIT}
    train = {"repeats": 3, "epochs": 4} | sections.pop("train", {})
    return config(base, name, teacher=teacher, recipe=recipe, train=train, **sections)


def weights(run: str) -> str:
    return hashlib.sha256((Path(run) / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("method", "decay"),
    [
        ("cskd-hard", "linear"),
        ("cskd-hard", "quadratic"),
        ("cskd-hard", "cosine"),
        ("cskd-hard", "local"),
        ("deit-hard", "linear"),
        ("none", "linear"),
    ],
)
def test_a_student_of_the_cache_and_one_of_the_live_teacher_are_equal(base: Path, method: str, decay: str) -> None:
    loss = {"method": method, "decay": decay}
    cached = train(settings(base, f"cached {method} {decay}", loss=loss), quiet=True)
    online = train(settings(base, f"online {method} {decay}", loss=loss), online=True, quiet=True)
    assert weights(online.output) == weights(cached.output)
    assert (cached.teacher_forwards, online.teacher_forwards > 0) == (0, method != "none")
    assert cached.top1 == online.top1


TERMS = [
    {"head": "class", "target": "label", "weight": 0.5, "smoothing": 0.1},
    {"head": "patches", "target": "cells", "name": "fused"},
    {"head": "patches", "target": "cells", "decay": "local", "weight": 0.5, "name": "local", "epochs": [1, 3]},
    {"head": "distillation", "target": "global"},
]


def test_terms_with_decays_of_their_own_are_equal_from_the_cache_and_live(base: Path) -> None:
    loss = from_dict({"loss": {"method": "terms", "terms": TERMS}}).loss
    runs = [replace(settings(base, f"{name} terms"), loss=loss) for name in ("cached", "online")]
    cached, online = train(runs[0], quiet=True), train(runs[1], online=True, quiet=True)
    assert weights(online.output) == weights(cached.output)
    rows = [json.loads(line) for line in (Path(cached.output) / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("loss_local", 0) > 0 for row in rows] == [False, True, True, False]


def test_classes_and_logits_in_one_loss_come_from_the_codecs_that_are_exact_for_them(base: Path) -> None:
    soft = {"head": "distillation", "target": "global", "kind": "kl", "tau": 2.0}
    loss = from_dict({"loss": {"method": "terms", "terms": [*TERMS[:2], soft]}}).loss
    cache = {"codecs": ["envelope", "int8"], "path": str(base / "both")}
    one_step = {"max_steps": 1}
    runs = [replace(settings(base, f"{n} both", cache=cache, train=one_step), loss=loss) for n in ("cached", "online")]
    cache_teacher(runs[0], quiet=True)
    rows = []
    for run, online in zip(runs, (False, True), strict=True):
        report = train(run, online=online, quiet=True)
        rows.append(json.loads((Path(report.output) / "metrics.jsonl").read_text().splitlines()[0]))
    assert [rows[0][f"loss_{name}"] for name in ("class_label_ce", "fused")] == [
        rows[1][f"loss_{name}"] for name in ("class_label_ce", "fused")
    ]
    of_soft = [row["loss_distillation_global_kl"] for row in rows]
    assert 0 < abs(of_soft[0] - of_soft[1]) < 0.01 * of_soft[1]  # what int8 rounds


def test_another_decay_gives_another_student(base: Path) -> None:
    """Equal hashes above mean something: the targets reach the weights."""
    runs = [settings(base, f"decay {d}", loss={"method": "cskd-hard", "decay": d}) for d in ("linear", "global")]
    assert len({weights(train(run, online=True, quiet=True).output) for run in runs}) == 2


def test_soft_targets_of_the_live_teacher_need_no_codec(base: Path) -> None:
    report = train(settings(base, "soft", loss={"method": "cskd-soft"}), online=True, quiet=True)
    assert report.steps > 0 and report.teacher_forwards > 0


def test_a_run_that_was_cut_online_resumes_online_only(base: Path) -> None:
    whole = train(settings(base, "whole"), online=True, quiet=True)
    train(settings(base, "cut", train={"max_steps": 3}), online=True, quiet=True)
    with pytest.raises(ConfigError, match="begun with online = true, now it is false; start it with --online"):
        train(settings(base, "cut"), quiet=True)
    again = train(settings(base, "cut"), online=True, quiet=True)
    assert again.steps == whole.steps - 3
    assert weights(again.output) == weights(whole.output)


def test_images_that_can_t_be_decoded_are_left_out_as_from_a_cache(base: Path, tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "train", n=42, block=20, shard=10, bad=(3, 25))
    places: dict[str, dict[str, Any]] = {
        "data": {"train": str(tmp_path / "train")},
        "cache": {"path": str(tmp_path / "cache"), "max_quarantine": 0.05},
    }
    cache_teacher(settings(base, "bad", **places), quiet=True)
    runs = [str(tmp_path / name) for name in ("cached", "online")]
    for run, online in zip(runs, (False, True), strict=True):
        train(settings(base, "bad", **places, train={"output": run}), online=online, quiet=True)
    assert weights(runs[0]) == weights(runs[1])


def test_too_many_images_that_can_t_be_decoded_stop_a_run(base: Path, tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "train", n=42, block=20, shard=10, bad=(3, 5))
    with pytest.raises(CacheError, match=r"2 of 20 images of a block are unreadable.* 'image003'"):
        train(settings(base, "few", data={"train": str(tmp_path / "train")}), online=True, quiet=True)


def test_one_unreadable_image_in_each_of_many_blocks_stops_both_ways(base: Path, tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "train", n=42, block=20, shard=10, bad=(3, 25))
    places = {"data": {"train": str(tmp_path / "train")}, "cache": {"path": str(tmp_path / "cache")}}
    for run in (
        lambda: cache_teacher(settings(base, "bad", **places), quiet=True),
        lambda: train(settings(base, "bad", **places), online=True, quiet=True),
    ):
        with pytest.raises(CacheError, match=r"2 of 42 images are unreadable, more than cache.max_quarantine 0.001;"):
            run()


def test_online_needs_the_images(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        train(settings(base, "none", data={"train": ""}), online=True, quiet=True)
