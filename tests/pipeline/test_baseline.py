"""A baseline is the baseline: the class head alone, from images alone, evaluated and resumed as what it is."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file

import cskd.pipeline.online
import cskd.pipeline.training_run
from cskd.config import Config, TrainConfig, from_dict, to_yaml
from cskd.errors import CacheError, ConfigError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.conflicts import run_identity
from cskd.pipeline.evaluate import evaluate_checkpoint, render
from cskd.pipeline.show.metrics import read_metrics
from cskd.pipeline.train import train
from cskd.store.manifest import read_manifest
from cskd.student.checkpoint import load_student
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import cached_data, config

ROOT = Path(__file__).resolve().parent.parent.parent
DEIT = {"randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("baseline"), recipe=DEIT, cache={"views": 6})


def cached(base: Path, name: str, **sections: dict[str, Any]) -> Config:
    """Method none from the cache of 6 views, 2 views of an image in an epoch."""
    train = {"epochs": 6, "repeats": 3} | sections.pop("train", {})
    loss = {"method": "none"} | sections.pop("loss", {})
    return config(base, name, recipe=DEIT, cache={"views": 6}, loss=loss, train=train, **sections)


def alone(base: Path, name: str, **sections: dict[str, Any]) -> Config:
    """The same with neither cache nor teacher."""
    made = dataclasses.asdict(cached(base, name, **sections))
    return from_dict({name: made[name] for name in ("data", "recipe", "student", "loss", "train")})


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(cskd.pipeline.online, "load_teacher", load)


def test_images_alone_give_the_student_that_a_cache_of_the_same_views_gives(base: Path, no_teacher: None) -> None:
    train(cached(base, "of the cache"), quiet=True)
    report = train(alone(base, "of images"), quiet=True)
    assert weights(base / "of images") == weights(base / "of the cache")
    assert report.teacher_forwards == 0
    assert "no cache and no teacher; views 0 to 5" in report.notes[0] and "none is used twice" in report.notes[0]
    train(alone(base, "online", train={"views": 6}), online=True, quiet=True)
    assert weights(base / "online") == weights(base / "of the cache")


def test_views_that_are_too_few_wrap_round_as_those_of_a_cache(base: Path) -> None:
    train(cached(base, "three cached", train={"views": 3}), quiet=True)
    report = train(alone(base, "three", train={"views": 3}), quiet=True)
    assert weights(base / "three") == weights(base / "three cached")
    assert "each is used up to 2 times" in report.notes[0]
    with pytest.raises(ConfigError, match=r"train\.views is 4 and train\.repeats 3, .* set train\.views=6, or 0"):
        train(alone(base, "x", train={"views": 4}), quiet=True)


@pytest.mark.parametrize(("epochs", "repeats", "views"), [(5, 1, 5), (6, 3, 6), (7, 3, 9), (1, 3, 3)])
def test_a_run_has_as_many_views_as_it_needs(base: Path, epochs: int, repeats: int, views: int) -> None:
    from cskd.loading.plan import PlanSpec, epoch_plan
    from cskd.machine.ranks import Ranks
    from cskd.pipeline.online import open_baseline

    settings = alone(base, f"needs {epochs}", train={"epochs": epochs, "repeats": repeats})
    source, _, _ = open_baseline(settings, Ranks(), False, quiet=True)
    assert source.views == views
    plan = PlanSpec.over(source, TrainConfig(repeats=repeats, seed=0, global_batch=8, window=8))
    fed = [pair for e in range(epochs) for pair in zip(*vars(epoch_plan(plan, e)).values(), strict=False)]
    assert len({(int(s), int(v)) for s, v, *_ in fed}) == len(fed) > 0


def test_a_baseline_that_was_cut_resumes_whether_or_not_a_cache_was_made_meanwhile(base: Path) -> None:
    train(alone(base, "whole"), quiet=True)
    train(alone(base, "cut", train={"max_steps": 4, "save_every": 1}), quiet=True)
    with pytest.raises(ConfigError, match=r'begun with cache = "none, [0-9a-f]{16}", now it is .*on images alone'):
        train(cached(base, "cut", loss={"method": "deit-hard"}), quiet=True)
    with pytest.raises(ConfigError, match=r"begun with views = 6, now it is 3; set it back with --set train.views=6"):
        train(cached(base, "cut", train={"views": 3}), quiet=True)
    report = train(cached(base, "cut"), quiet=True)  # a cache has been made meanwhile: it goes on as it was begun
    assert any("no cache and no teacher" in note for note in report.notes)
    assert weights(base / "whole") == weights(base / "cut")


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_a_checkpoint_is_fine_tuned_at_another_size_and_on_other_classes(
    base: Path, tmp_path: Path, model: str
) -> None:
    """As configs/cifar10_transfer.yaml, from a made checkpoint of 1,000 classes with a distillation token."""
    shape: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=1000, img_size=48, **shape)
    torch.save({"model": vit.state_dict()}, tmp_path / "w.pth")
    settings = alone(
        base,
        f"fine {model}",
        student={"model": model, "kwargs": shape, "init": str(tmp_path / "w.pth")},
        train={"epochs": 2, "opt": "sgd", "repeats_draw": "random", "lr_every": "epoch", "warmup_epochs": 0},
    )
    report = train(settings, quiet=True)
    said = " ".join(report.notes)
    assert "views 0 to 5" in said and "none is used twice" in said  # three of the first epoch, three of the second
    assert "from 6 x 6 to 4 x 4 patches" in said and "(1000 classes) was dropped: the student has 5" in said
    assert ("distillation token" in said and "left out" in said) == model.startswith("vit")
    assert evaluate_checkpoint(base / f"fine {model}", base / "val", 8, 0, None, "cpu", quiet=True).score == "class"


def test_what_is_missing_is_said_with_the_way_on(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        train(alone(base, "x", data={"train": ""}), quiet=True)
    with pytest.raises(
        ConfigError, match=r"cache\.path is empty and loss\.method cskd-hard .* --set loss\.method=none"
    ):
        train(alone(base, "x", loss={"method": "cskd-hard"}), quiet=True)


def test_views_are_those_of_a_cache_to_be_and_bad_images_are_left_out_as_by_stage_1(base: Path, tmp_path: Path) -> None:
    """The same command before and after stage 1: as many views, the same images left out, the same weights."""
    make_tiny_data(tmp_path / "train", n=42, block=20, shard=10, bad=(3, 25))
    cache = {"path": str(tmp_path / "cache"), "views": 3, "max_quarantine": 0.1}

    def settings(name: str) -> Config:
        data = {"train": str(tmp_path / "train"), "val": ""}
        train = {"output": str(tmp_path / name), "epochs": 4}
        return config(base, name, recipe=DEIT, data=data, cache=cache, loss={"method": "none"}, train=train)

    before = train(settings("before"), quiet=True).notes
    assert any("2 of 42 images can't be decoded and are left out" in note for note in before)
    assert "no cache (cache.path" in before[0] and "cache is not there)" in before[0] and "views 0 to 2" in before[0]
    cache_teacher(settings("before"), quiet=True)
    train(settings("after"), quiet=True)
    assert weights(tmp_path / "before") == weights(tmp_path / "after")


@pytest.mark.slow
def test_two_ranks_train_the_class_head_alone(base: Path, tmp_path: Path) -> None:
    """DistributedDataParallel waits for the gradient of every parameter: the head that gets none is frozen."""
    (tmp_path / "c.yaml").write_text(to_yaml(alone(base, "ranks", train={"output": str(tmp_path / "run")})))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "cli.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "train", str(tmp_path / "c.yaml"), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 6 * 4


# --- which head counts ---


def test_the_score_of_a_run_is_that_of_its_exported_weights(base: Path) -> None:
    report = train(alone(base, "score", train={"autocast": "none"}), quiet=True)
    again = evaluate_checkpoint(base / "score", base / "val", 8, 0, None, "cpu", quiet=True)
    assert (again.score, report.score) == ("class", "ema.class")
    assert again.heads[again.score].top1 == pytest.approx(report.top1[report.score])
    with pytest.raises(
        CacheError, match=r"score is the folder of a run, expected a cache; cache.path in .*`cskd eval "
    ):
        read_manifest(base / "score")  # as `cskd inspect`, verify and others read one


def test_figures_name_untrained_heads_and_the_score_is_what_timm_computes(base: Path) -> None:
    report = train(alone(base, "figures"), quiet=True)
    heads = ["class", "distillation.untrained", "patches.untrained"]
    assert list(report.top1) == [prefix + head for prefix in ("", "ema.") for head in heads]
    assert report.score == "ema.class"  # the averaged weights are those that are exported
    row = read_metrics(base / "figures")[-1]
    assert (row["score"], row["arithmetic"]) == ("ema.class", report.arithmetic)
    note = next(n for n in report.notes if "evaluated as NAME.untrained" in n)
    assert note.startswith(
        "loss.method none trains class of deit_tiny_distilled_patch16_224, not distillation and patches"
    )
    assert len(note) <= 300
    scores = evaluate_checkpoint(base / "figures", base / "val", 8, 0, None, "cpu", quiet=True)
    assert list(scores.heads) == heads and scores.score == "class"
    student, _ = load_student(base / "figures")
    args = json.loads((base / "figures" / "config.json").read_text())["model_args"]
    file = str(base / "figures" / "model.safetensors")
    vit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, checkpoint_path=file, **args).eval()
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(vit(images), student(images).cls_logits)


def test_the_head_that_is_not_trained_keeps_its_first_weights(base: Path) -> None:
    for name, head in (("class", "class"), ("mean", "mean")):
        train(alone(base, f"head {name}", loss={"baseline_head": head}, train={"ema": None}), quiet=True)
    torch.manual_seed(0)
    from cskd.student import build_student

    first = build_student(alone(base, "x").student, 5, 32).backbone.state_dict()["head_dist.weight"]
    of_class, _ = load_student(base / "head class")
    assert torch.equal(of_class.backbone.state_dict()["head_dist.weight"], first)
    of_mean = load_file(base / "head mean" / "model.safetensors")["head_dist.weight"]
    assert not torch.equal(of_mean, first)


@pytest.mark.parametrize(
    ("model", "loss", "said", "score"),
    [
        ("deit", {"method": "deit-hard"}, "not patches", "class+distillation"),
        ("deit", {"method": "deit-hard", "alpha": 0.0}, "with loss.alpha 0 trains class of", "class"),
        ("deit", {"method": "deit-hard", "alpha": 1.0}, "with loss.alpha 1 trains distillation of", "distillation"),
        ("deit", {"method": "cskd-hard", "patch_weight": 0.0}, "with loss.patch_weight 0", "class+distillation"),
        ("deit", {"method": "cskd-hard", "alpha": 0.0}, "not distillation: evaluated", "class"),
        ("vit", {"method": "deit-hard"}, "its one head is taught the label and the teacher's class", "class"),
        ("vit", {"method": "none"}, "not patches", "class"),
    ],
)
def test_a_head_that_the_loss_does_not_train_is_named_at_the_start(
    base: Path, model: str, loss: dict[str, Any], said: str, score: str
) -> None:
    student = {"model": "vit_tiny_patch16_224" if model == "vit" else "deit_tiny_distilled_patch16_224"}
    name = f"{model} {sorted(loss.items())}"
    settings = config(base, name, recipe=DEIT, cache={"views": 6}, student=student, loss=loss, train={"epochs": 2})
    report = train(settings, quiet=True)
    assert any(said in note for note in report.notes), report.notes
    assert report.score == f"ema.{score}" and report.score in report.top1
    untrained = {name.partition(".untrained")[0] for name in report.top1 if name.endswith(".untrained")}
    assert not any(untrained & set(name.removeprefix("ema.").split("+")) for name in report.top1 if "+" in name)


# --- runs of earlier versions ---


def old_run(monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    """A run that was cut, as a version without `loss.baseline_head` left it."""

    def before(*args: Any) -> dict[str, Any]:
        identity = run_identity(*args)
        return identity | {"loss": {k: v for k, v in identity["loss"].items() if k != "baseline_head"}}

    with monkeypatch.context() as patch:
        patch.setattr(cskd.pipeline.training_run, "run_identity", before)
        train(settings, quiet=True)


@pytest.mark.slow
def test_an_old_baseline_is_refused_by_name_or_goes_on_with_what_it_was_begun_with(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = {"method": "none", "baseline_head": "mean"}
    train(cached(base, "mean", loss=mean), quiet=True)
    old_run(monkeypatch, cached(base, "old", loss=mean, train={"max_steps": 4, "save_every": 1}))
    with pytest.raises(ConfigError, match=r"begun with loss\.baseline_head = mean, now it is class; set it back"):
        train(cached(base, "old"), quiet=True)
    train(cached(base, "old", loss=mean), quiet=True)
    assert weights(base / "old") == weights(base / "mean")


@pytest.mark.parametrize(
    ("model", "method"), [("deit_tiny_distilled_patch16_224", "cskd-hard"), ("vit_tiny_patch16_224", "none")]
)
@pytest.mark.slow
def test_old_runs_whose_loss_is_the_same_go_on(
    base: Path, monkeypatch: pytest.MonkeyPatch, model: str, method: str
) -> None:
    loss, student = {"method": method}, {"model": model}
    train(cached(base, f"whole {method}", loss=loss, student=student), quiet=True)
    old_run(monkeypatch, cached(base, f"old {method}", loss=loss, student=student, train={"max_steps": 4}))
    train(cached(base, f"old {method}", loss=loss, student=student), quiet=True)
    assert weights(base / f"old {method}") == weights(base / f"whole {method}")


# --- the arithmetic of an evaluation ---


def test_an_evaluation_says_what_it_was_computed_in(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cskd.machine.arithmetic.cpu_has_bf16", lambda: True)
    seen: list[bool] = []
    real = torch.nn.Linear.forward

    def spy(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = real(self, x)
        seen.append(out.dtype == torch.bfloat16)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    train(alone(base, "bf16", train={"epochs": 2, "autocast": "bf16"}), quiet=True)
    assert read_metrics(base / "bf16")[-1]["arithmetic"] == "bf16"
    for asked, want in ((None, "float32"), ("none", "float32"), ("bf16", "bf16"), ("auto", "bf16")):
        seen.clear()
        more = () if asked is None else (asked,)
        report = evaluate_checkpoint(base / "bf16", base / "val", 8, 0, 0.5, "cpu", True, *more)
        assert (report.arithmetic, set(seen)) == (want, {want == "bf16"})
        assert (report.device, report.size, report.crop_pct) == ("cpu", [32, 32], 0.5)
        console = Console(width=200, record=True, file=io.StringIO())
        render(report, console)
        text = console.export_text()
        assert f"32 x 32 pixels, crop 0.5, {want} on cpu" in text
        assert "class (the score)" in text and "NAME.untrained: a head that the run did not train" in text
