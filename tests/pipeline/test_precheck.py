"""Before the first unit: stage 1 refuses what stage 2 would, and says all that a user should know."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import cskd.pipeline.cache_teacher
import cskd.pipeline.online
from cskd.config import Config
from cskd.errors import CacheError, ConfigError, CskdError, DataError, PlanError, StudentError, TeacherError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from tests.caches import CLASSES, make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

RANDOM = "the weights are those that build() gave"
GUESSED = "the teacher does not state its mean and std: ImageNet's are used; teacher.mean and std set them"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precheck")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=22, block=20, shard=10)
    make_tiny_data(folder / "val", n=6, block=20, shard=10)
    make_tiny_data(folder / "other", n=6, block=20, shard=10, classes=CLASSES[::-1])
    (folder / "file").write_text("")
    cache_teacher(config(folder), quiet=True)
    return folder


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a teacher fails: whatever is refused was refused before."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the teacher was loaded")

    for module in (cskd.pipeline.cache_teacher, cskd.pipeline.online):
        monkeypatch.setattr(module, "load_teacher", refuse)


def test_no_training_images_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    settings = Config()
    settings = dataclasses.replace(
        settings, cache=dataclasses.replace(settings.cache, path=str(tmp_path / "new" / "cache"))
    )
    before = tmp_path.stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        cache_teacher(settings, quiet=True)
    assert (list(tmp_path.iterdir()), tmp_path.stat().st_mtime_ns) == ([], before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": {"size": 40}}, r"was made with recipe\.size = 32, this config has 40; set recipe\.size back"),
        ({"cache": {"codecs": ["envelope"]}}, r"was made with cache\.codecs = .*; set cache\.codecs back"),
        ({"teacher": {"batch": 4}}, r"was made with teacher\.batch = 8, this config has 4; set teacher\.batch back"),
        ({"data": {"train": "val"}}, r"was made with data\.train = .*; set data\.train back"),
    ],
)
def test_what_a_cache_was_not_begun_with_is_all_that_is_said(
    base: Path, changes: dict[str, dict[str, Any]], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "data" in changes:
        changes = {"data": {"train": str(base / "val")}}
    changed: dict[str, Any] = {"student": {"model": "vit_tinny_patch16_224"}, **changes}
    with pytest.raises(CacheError, match=said):
        cache_teacher(config(base, **changed))
    assert capsys.readouterr().err == ""


FAULTS: list[tuple[type[CskdError], str, dict[str, dict[str, Any]]]] = [
    (
        StudentError,
        "student.model 'vit_tinny_patch16_224'.*did you mean",
        {"student": {"model": "vit_tinny_patch16_224"}},
    ),
    (StudentError, "resnet18 can.t be built with .*mend student.kwargs", {"student": {"model": "resnet18"}}),
    (StudentError, "student.kwargs", {"student": {"kwargs": {"patch_sice": 8}}}),
    (StudentError, "student.init: no file .*nowhere", {"student": {"init": "nowhere.safetensors"}}),
    (StudentError, "does not see the last 2 rows", {"student": {"kwargs": {"patch_size": 10}}}),
    (DataError, "data.val: no inventory at", {"data": {"val": "nowhere"}}),
    (DataError, "data.val .* other classes", {"data": {"val": "{base}/other"}}),
    (PlanError, "train.global_batch is 15", {"train": {"global_batch": 15}}),
    (PlanError, "train.global_batch 1024", {"train": {"global_batch": 1024}}),
    (PlanError, "train.repeats is 2", {"train": {"repeats": 2}}),
    (ConfigError, "train.views is 4, cache.views 3", {"train": {"views": 4}}),
    (ConfigError, "train.warmup_epochs", {"train": {"warmup_epochs": 3}}),
    (ConfigError, "train.opt is 'adamv'", {"train": {"opt": "adamv"}}),
    (ConfigError, "train.output .*file is no folder", {"train": {"output": "{base}/file"}}),
    (ConfigError, "train.output .*file is no folder", {"train": {"output": "{base}/file/below"}}),
    (ConfigError, "recipe.padding is 32", {"recipe": {"crop": "padded", "padding": 32}}),
]


def faulty(base: Path, changes: dict[str, dict[str, Any]], cache: str) -> Config:
    filled = json.loads(json.dumps(changes).replace("{base}", str(base)))
    return config(base, cache={"path": str(base / cache)}, **filled)


@pytest.mark.parametrize(("kind", "words", "changes"), FAULTS)
def test_what_stage_2_would_refuse_stage_1_refuses_before_the_teacher_is_loaded(
    base: Path, no_teacher: None, kind: type[CskdError], words: str, changes: dict[str, dict[str, Any]]
) -> None:
    for stage in (cache_teacher, lambda c, quiet: train(c, online=True, quiet=quiet)):
        with pytest.raises(kind, match=words) as refused:
            stage(faulty(base, changes, "none"), quiet=True)
        assert len(str(refused.value)) <= 300 + len(str(base)) and "\n" not in str(refused.value)
    assert not (base / "none").exists()


def test_a_soft_method_without_a_soft_codec_is_refused_but_for_a_teacher_that_runs_live(
    base: Path, no_teacher: None
) -> None:
    settings = config(base, loss={"method": "cskd-soft"}, cache={"path": str(base / "none"), "codecs": ["envelope"]})
    with pytest.raises(ConfigError, match=r"cskd-soft needs .* cache.codecs holds only \['envelope'\]"):
        cache_teacher(settings, quiet=True)
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        train(settings, online=True, quiet=True)


def test_patches_coarser_than_the_teachers_cells_are_refused_before_the_clean_check(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cskd.pipeline.cache_teacher, "clean_check", None)
    coarse = {"kwargs": {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}}
    with pytest.raises(StudentError, match="2 x 2 patches, too few for the teacher's grid of 4 x 4"):
        cache_teacher(faulty(base, {"student": coarse}, "none"), quiet=True)
    with pytest.raises(TypeError):  # a method that does not teach patches: on to the clean check
        cache_teacher(faulty(base, {"student": coarse, "loss": {"method": "deit-hard"}}, "none"), quiet=True)


def test_a_config_of_stage_1_alone_is_legal(base: Path, tmp_path: Path) -> None:
    settings = config(
        base,
        cache={"path": str(tmp_path / "cache")},
        student={"model": ""},
        train={"output": "", "global_batch": 1024, "opt": "adamv"},
        data={"val": ""},
    )
    assert cache_teacher(settings, quiet=True).units == 3


@pytest.mark.parametrize("changes", [f[2] for f in FAULTS[:2] + FAULTS[5:9]])
def test_a_cache_that_was_begun_is_finished_whatever_has_become_of_stage_2(
    base: Path, changes: dict[str, dict[str, Any]]
) -> None:
    report = cache_teacher(faulty(base, changes, "cache"), quiet=True)
    assert any("training will be refused: " in note for note in report.notes)
    assert report.content_root == open_cache(base / "cache").content_root()


def test_checking_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    cache_teacher(config(base, cache={"path": str(tmp_path / "cache")}, train={"output": str(out)}), quiet=True)
    assert not out.parent.exists()


def test_notes_come_before_the_clean_check_even_where_it_refuses(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(
        base, cache={"path": str(base / "none")}, teacher={"min_top1": 0.99}, train={"output": str(base / "o")}
    )
    for stage in (cache_teacher, lambda c: train(c, online=True)):
        with pytest.raises(TeacherError, match="clean images"):
            stage(settings)
        said = capsys.readouterr().err
        assert f"note: {RANDOM}" in said and f"note: {GUESSED}" in said


def test_notes_are_said_at_every_start_and_kept(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(
        base,
        cache={"path": str(tmp_path / "cache")},
        recipe={"size": 48},
        train={"output": str(tmp_path / "run"), "max_steps": 1},
    )
    about = [RANDOM, GUESSED, "views of 48 x 48 pixels are enlarged"]
    for _ in ("begun", "resumed"):
        report = cache_teacher(settings)
        said = capsys.readouterr().err
        for note in about:
            assert said.count(f"note: {note}") == 1 and sum(n.startswith(note) for n in report.notes) == 1
    manifest = open_cache(tmp_path / "cache").manifest
    shown = inspect(tmp_path / "cache").teacher
    assert (
        shown.notes == manifest.notes and [n for n in about if not any(m.startswith(n) for m in manifest.notes)] == []
    )
    trained = train(settings)
    said = capsys.readouterr().err
    for note in about:
        assert said.count(f"note: {note}") == 1 and sum(n.startswith(note) for n in trained.notes) == 1
    shutil.rmtree(tmp_path / "run")
    online = train(settings, online=True)
    said = capsys.readouterr().err
    assert all(said.count(f"note: {note}") == 1 for note in about) and any(
        n.startswith("online:") for n in online.notes
    )


def test_a_student_that_meets_the_cells_badly_is_noted_by_both_stages(base: Path, tmp_path: Path) -> None:
    settings = config(
        base,
        cache={"path": str(tmp_path / "cache")},
        student={"kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}},
        teacher={"grid": [3, 3]},
        recipe={"crop": "center"},
        train={"output": str(tmp_path / "run"), "max_steps": 1},
    )
    first, second = cache_teacher(settings, quiet=True).notes, train(settings, quiet=True).notes
    for words in (
        "8 x 8 patches are averaged to the teacher's 3 x 3",
        "4 x 4 cells are averaged to teacher.grid 3 x 3",
        "the middle 87.5 %",
    ):
        assert any(words in note for note in first) and any(words in note for note in second)
    kept = open_cache(tmp_path / "cache").manifest.notes
    assert kept is not None and not any(
        "patches are averaged" in note for note in kept
    )  # of a student, not of the cache


def test_what_is_said_or_refused_now_keeps_nothing_that_was_begun_before_from_going_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that no new cache may have, and a loss with a term that counts in no epoch of the run."""
    terms = [{"head": "class", "target": "label"}, {"head": "distillation", "target": "global", "epochs": [3, None]}]
    settings = config(
        base,
        recipe={"scale": [1.1, 1.2]},
        cache={"path": str(tmp_path / "cache")},
        loss={"method": "terms", "terms": terms},
        train={"output": str(tmp_path / "run"), "max_steps": 1},
    )
    with pytest.raises(ConfigError, match=r"recipe\.scale"):
        cache_teacher(settings, quiet=True)
    with monkeypatch.context() as older:
        older.setattr("cskd.pipeline.precheck.refuse_views", lambda _: None)
        assert cache_teacher(settings, quiet=True).units
    idle = "loss.terms[1].epochs is [3.0, null] and train.epochs 3: the term counts in no epoch of 0 to 2"
    assert idle in cache_teacher(settings, quiet=True).notes and idle in train(settings, quiet=True).notes
