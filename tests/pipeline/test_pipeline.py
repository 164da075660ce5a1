"""Both stages end to end on a tiny data set: cached once, trained from, resumed, refused where it should be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cskd.pipeline.training_run
from cskd.config import Config, from_dict
from cskd.errors import CacheError, ConfigError, PathError, TeacherError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.export import export_cache
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from cskd.store.commit import Commit, publish, read_commit
from cskd.store.format import INDEX, commit_file
from cskd.teacher.model import teacher_images
from tests.caches import make_tiny_data

TEACHER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1))
        self.fc = nn.Linear(12, 5)

    def forward_features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))

def build():
    return Net()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=42, block=20, shard=10)
    make_tiny_data(folder / "val", n=12, block=20, shard=10)
    return folder


def cached_data(folder: Path, *, n: int = 42, val: int = 12, **sections: dict[str, Any]) -> Path:
    """Training and validation images, a teacher's file and its finished cache in a folder, which is returned."""
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=n, block=20, shard=10)
    make_tiny_data(folder / "val", n=val, block=20, shard=10)
    cache_teacher(config(folder, "run", **sections), quiet=True)
    return folder


def run_settings(base: Path, output: Path, **changes: Any) -> Config:
    """`config` with these keys of its `train` section, and results in `output`."""
    made = config(base, "run", train=changes)
    return dataclasses.replace(made, train=dataclasses.replace(made.train, output=str(output)))


def config(base: Path, name: str = "run", **sections: dict[str, Any]) -> Config:
    raw: dict[str, dict[str, Any]] = {
        "data": {"train": str(base / "train"), "val": str(base / "val") if (base / "val").is_dir() else ""},
        "teacher": {"model": f"{base / 'net.py'}:build", "batch": 8, "min_top1": 0.0},
        "recipe": {"size": 32},
        "cache": {"path": str(base / "cache"), "views": 3, "workers": 0, "codecs": ["envelope", "int8"]},
        "student": {
            "model": "deit_tiny_distilled_patch16_224",
            "kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
            "drop_path": 0.1,
        },
        "loss": {"method": "cskd-hard"},
        "train": {
            "output": str(base / name),
            "epochs": 3,
            "global_batch": 8,
            "warmup_epochs": 1,
            "workers": 0,
            "ema": 0.9,
            "clip_grad": 1.0,
        },
    }
    for section, values in sections.items():
        raw[section] |= values
    return from_dict(raw)


@pytest.fixture(scope="module")
def cached(base: Path) -> Path:
    report = cache_teacher(config(base), quiet=True)
    assert (report.units, report.images, report.quarantined) == (6, 126, 0)
    return base


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_finished_cache_is_not_made_again_and_keeps_its_content(cached: Path) -> None:
    before = open_cache(cached / "cache").content_root()
    report = cache_teacher(config(cached), quiet=True)
    assert report.units == 0
    assert report.content_root == before


def test_content_does_not_depend_on_workers_or_on_where_a_run_was_cut(cached: Path) -> None:
    elsewhere = config(cached, cache={"path": str(cached / "again"), "workers": 2})
    cut = dataclasses.replace(elsewhere, cache=dataclasses.replace(elsewhere.cache, views=2))
    cache_teacher(cut, quiet=True)
    assert cache_teacher(elsewhere, quiet=True).content_root == open_cache(cached / "cache").content_root()


def test_training_from_a_cache_in_tars_ends_in_the_same_weights(cached: Path, tmp_path: Path) -> None:
    """Written so by stage 1, which goes on where it was cut, and copied from zarr: content, table and weights are the same."""
    cache = {"path": str(tmp_path / "tars"), "container": "webdataset"}
    first = config(cached, cache=cache)
    cache_teacher(dataclasses.replace(first, cache=dataclasses.replace(first.cache, views=2)), quiet=True)
    assert cache_teacher(first, quiet=True).content_root == open_cache(cached / "cache").content_root()
    export_cache(cached / "cache", tmp_path / "copy", "webdataset", quiet=True)
    ends = set()
    for root in (cached / "cache", tmp_path / "tars", tmp_path / "copy"):
        train(
            config(
                cached,
                cache={"path": str(root)},
                train={"output": str(tmp_path / f"run-{root.name}"), "epochs": 1, "warmup_epochs": 0},
            ),
            quiet=True,
        )
        ends.add(weights(tmp_path / f"run-{root.name}"))
    assert len(ends) == 1
    assert {p.suffix for p in (tmp_path / "tars" / "units").rglob("v*")} == {".tar"}
    with pytest.raises(ConfigError, match=r"cache.container is webdataset, .* was begun in zarr; .*cskd export"):
        cache_teacher(config(cached, cache={"container": "webdataset"}), quiet=True)
    grown = config(cached, cache={"path": str(tmp_path / "copy"), "views": 4})  # says no container: goes on in its own
    assert cache_teacher(grown, quiet=True).units == 2
    assert {p.suffix for p in (tmp_path / "copy" / "units").rglob("v*")} == {".tar"}


@pytest.mark.parametrize("method", ["none", "deit-hard", "deit-soft", "cskd-hard", "cskd-soft"])
def test_every_method_trains_from_one_cache_without_the_teacher(cached: Path, method: str) -> None:
    before = teacher_images()
    report = train(config(cached, f"run-{method}", loss={"method": method}), quiet=True)
    assert report.steps == 3 * (42 // 8)
    assert report.teacher_forwards == teacher_images() - before == 0
    rows = read_metrics(cached / f"run-{method}")
    assert [r["epoch"] for r in rows] == [0, 1, 2]
    assert all(np.isfinite(r["loss"]) for r in rows)
    heads = {
        "none": {"class", "distillation.untrained", "patches.untrained"},
        "deit": {"class", "distillation", "patches.untrained", "class+distillation"},
        "cskd": {"class", "distillation", "patches", "class+distillation", "all"},
    }[method[:4]]
    assert report.top1.keys() == heads | {f"ema.{head}" for head in heads}
    assert not list((cached / f"run-{method}" / "scratch").rglob("*.npy"))


def test_the_hard_targets_of_the_loss_are_the_teachers_own(cached: Path) -> None:
    """Replays stage 1's arithmetic outside the pipeline: views, mixing, teacher, blend."""
    from cskd.loading.epoch_table import build_table
    from cskd.loading.plan import PlanSpec, epoch_plan
    from cskd.loading.sources import TargetSpec
    from cskd.loading.stage2 import BatchMaker, TrainTask
    from cskd.method.ckf import blend_at, hard_targets
    from cskd.teacher.model import load_teacher
    from cskd.views.maker import ViewMaker
    from cskd.views.mix_pixels import mix_pixels

    cache = open_cache(cached / "cache")
    c = config(cached)
    teacher = load_teacher(c.teacher, cache.classes, torch.device("cpu"), 32)
    spec = PlanSpec(cache.inventory.blocks, np.zeros(42, bool), cache.inventory.id, cache.recipe, 3, 1, 0, 8, 8)
    for epoch in range(3):
        plan, blend = epoch_plan(spec, epoch), blend_at(epoch, 3, "linear")
        target = TargetSpec("cells", "envelope", blend)
        table = build_table(cache, plan, target, 0, len(plan.sample), cached / "table")
        batch = BatchMaker(ViewMaker(cache.inventory, cache.recipe), None, 1.0)(TrainTask(table, 0, 40))
        pixels = mix_pixels(*(batch[n] for n in ("pixels", "partner", "mode", "lam", "box")))
        dense, image = teacher.forward_dense(pixels)
        assert torch.equal(batch["cell_class"], hard_targets(dense, image, blend))
        assert torch.equal(batch["global_class"], image.argmax(1))
        assert (batch["mode"] != 0).any()


def test_training_that_was_cut_mid_epoch_ends_in_the_same_weights(cached: Path) -> None:
    train(config(cached, "whole"), quiet=True)
    for stop in (3, 8, 0):
        train(config(cached, "cut", train={"save_every": 1, "max_steps": stop}), quiet=True)
    assert weights(cached / "whole") == weights(cached / "cut")


@pytest.mark.parametrize("cut", ["score_heads", "export"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_training_that_was_cut_at_the_end_of_an_epoch_does_not_take_it_for_done(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, epoch: int
) -> None:
    """Before it was evaluated or its weights were written; `save_every` divides the steps of the epoch."""

    def settings(name: str) -> Config:
        made = config(cached, "whole", train={"save_every": 1})
        return dataclasses.replace(made, train=dataclasses.replace(made.train, output=str(tmp_path / name)))

    train(settings("whole"), quiet=True)
    real, calls = getattr(cskd.pipeline.training_run, cut), list[int]()

    def killed(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == epoch + 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cskd.pipeline.training_run, cut, killed)
        with pytest.raises(KeyboardInterrupt):
            train(settings("cut"), quiet=True)
    train(settings("cut"), quiet=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    scores = [
        [(r["epoch"], r["step"], r["top1.class"]) for r in read_metrics(tmp_path / run)] for run in ("whole", "cut")
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 3


def test_worker_processes_change_nothing(cached: Path) -> None:
    train(config(cached, "workers0"), quiet=True)
    train(config(cached, "workers2", train={"workers": 2}), quiet=True)
    assert weights(cached / "workers0") == weights(cached / "workers2")


def test_the_exported_weights_are_timms_own_names(cached: Path) -> None:
    import timm

    train(config(cached, "plain"), quiet=True)
    facts = json.loads((cached / "plain" / "config.json").read_text())
    model = timm.create_model(
        facts["architecture"],
        num_classes=5,
        checkpoint_path=str(cached / "plain" / "model.safetensors"),
        **facts["model_args"],
    )
    assert model.state_dict().keys() == load_file(cached / "plain" / "model.safetensors").keys()


def test_a_bad_image_is_quarantined_and_counted_and_its_partners_stay_unmixed(base: Path, tmp_path: Path) -> None:
    import shutil

    from cskd.dataset.inventory import Sample, ShardFile, open_inventory, write_inventory

    data = tmp_path / "bad"
    shutil.copytree(base / "train", data)
    old = open_inventory(data)
    shard = bytearray(old.shard_path(0).read_bytes())
    at, size = int(old.offset[3]), int(old.size[3])
    shard[at : at + size] = b"\0" * size
    old.shard_path(0).write_bytes(shard)
    import google_crc32c

    crc = [int(c) for c in old.crc32c]
    crc[3] = google_crc32c.value(b"\0" * size)
    rows = [
        Sample(old.key(i), int(old.label[i]), crc[i], int(old.shard[i]), int(old.offset[i]), int(old.size[i]))
        for i in range(len(old))
    ]
    shutil.rmtree(data / "inventory")
    write_inventory(data, rows, classes=old.classes, shards=[ShardFile(*s) for s in old.shards], block=20)
    c = config(
        base, "run-bad", data={"train": str(data)}, cache={"path": str(tmp_path / "cache"), "max_quarantine": 0.1}
    )
    report = cache_teacher(c, quiet=True)
    assert report.quarantined == 1
    cache = open_cache(tmp_path / "cache")
    assert cache.quarantined().tolist() == [i == 3 for i in range(42)]
    for view in range(3):
        commit = cache.commit_of(0, view)
        assert commit and commit.cached + len(commit.quarantine) == commit.samples
        unit = cache.read(0, view, "envelope")
        assert (unit.fields["partner"] != 3).all()
    assert train(c, quiet=True).steps == 3 * (41 // 8)


def test_training_on_an_unfinished_cache_is_refused_with_the_command_that_finishes_it(cached: Path) -> None:
    path = cached / "unfinished"
    cache_teacher(config(cached, cache={"path": str(path)}), quiet=True)
    for file in (commit_file(1, 2), INDEX):
        (path / file).unlink()
    with pytest.raises(
        CacheError, match=r"lacks 1 of 6 units, the first is block 1, view 2; finish it with `cskd cache"
    ):
        train(config(cached, "x", cache={"path": str(path)}), quiet=True)


def test_the_finished_views_of_an_unfinished_cache_train_as_a_cache_of_them_alone(cached: Path) -> None:
    """What is refused names how many views are ready; those are a cache of so many views."""
    path = {"path": str(cached / "half")}
    cache_teacher(config(cached, cache=path), quiet=True)
    for file in (commit_file(1, 2), INDEX):
        (cached / "half" / file).unlink()
    with pytest.raises(CacheError, match=r"or train on the first 2 views with --set train\.views=2"):
        train(config(cached, "half run", cache=path), quiet=True)
    assert train(config(cached, "half run", cache=path, train={"views": 2}), quiet=True).steps > 0
    alone = {"path": str(cached / "two"), "views": 2}
    cache_teacher(config(cached, cache=alone), quiet=True)
    train(config(cached, "two run", cache=alone), quiet=True)
    assert weights(cached / "half run") == weights(cached / "two run")
    with pytest.raises(ConfigError, match=r"train\.views is 4, .* has 3"):
        train(config(cached, "x", cache=path, train={"views": 4}), quiet=True)


def test_a_recipe_that_contradicts_the_cache_is_refused(cached: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.flip is 0\.1, the cache .* was made with 0\.5"):
        train(config(cached, "x", recipe={"flip": 0.1}), quiet=True)


def test_soft_methods_without_a_soft_codec_are_refused(base: Path) -> None:
    hard = {"path": str(base / "hard-only"), "codecs": ["envelope"], "views": 1}
    cache_teacher(config(base, cache=hard), quiet=True)
    with pytest.raises(ConfigError, match=r"cache\.codecs: \[envelope, int8\]"):
        train(config(base, "x", cache=hard, loss={"method": "cskd-soft"}), quiet=True)


def test_a_teacher_near_chance_is_refused_before_the_first_unit(base: Path) -> None:
    path = base / "chance"
    with pytest.raises(TeacherError, match="chance"):
        cache_teacher(config(base, teacher={"min_top1": 0.99}, cache={"path": str(path)}), quiet=True)
    assert not path.exists()


def test_a_racing_second_commit_leaves_the_first(cached: Path) -> None:
    root = cached / "cache"
    first = read_commit(root, 0, 0)
    assert first is not None
    assert publish(root, Commit(**{**vars(first), "content_hash": "f" * 64})) is False
    assert read_commit(root, 0, 0) == first


def test_a_cache_in_the_folder_of_its_data_is_refused(base: Path) -> None:
    with pytest.raises(PathError, match=r"cache\.path and data\.train are both"):
        cache_teacher(config(base, cache={"path": str(base / "train")}), quiet=True)
    assert not (base / "train" / "manifest.json").exists()


def test_a_run_is_not_resumed_in_another_precision(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"max_steps": 2, "save_every": 1, "autocast": "auto"}
    unfused = []
    monkeypatch.setattr("cskd.student.model.Student.unfuse_attention", lambda _: unfused.append(True))
    for has in (False, True):
        monkeypatch.setattr("cskd.machine.arithmetic.cpu_has_bf16", lambda has=has: has)
        train(config(cached, f"precision {has}", train=changes), quiet=True)
        assert len(unfused) == has
    with pytest.raises(
        ConfigError, match=r"begun with train\.autocast = none, now it is bf16; .*--set train\.autocast=none"
    ):
        train(config(cached, "precision False", train=changes), quiet=True)
