"""Caches of the feature map: trained from, verified, mended, shared by several processes, refused for other teachers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cskd.codecs.features import FeaturesCodec
from cskd.errors import CacheError, ConfigError, TeacherError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.export import export_cache
from cskd.pipeline.care.gc import gc
from cskd.pipeline.care.recompute import recompute
from cskd.pipeline.care.repair import repair
from cskd.pipeline.care.verify import verify
from cskd.pipeline.hub.contents import contents_of
from cskd.pipeline.train import train
from cskd.store.cache import Cache, open_cache
from cskd.store.tables import write_tables
from tests.pipeline.test_pipeline import TEACHER, cached_data, config

CODECS = ["envelope", "features:8", "features:pca12:6"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_data(tmp_path_factory.mktemp("features"), n=22, cache={"codecs": CODECS, "views": 2})


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def test_soft_targets_train_from_it_and_hard_ones_come_from_the_envelope(base: Path) -> None:
    one = {"epochs": 1, "warmup_epochs": 0, "ema": None, "max_steps": 2}
    made = config(base, "soft", loss={"method": "cskd-soft"}, train=one, cache={"codecs": CODECS}, data={"val": ""})
    assert train(made, quiet=True).steps == 2
    assert np.isfinite(json.loads((base / "soft" / "metrics.jsonl").read_text().splitlines()[-1])["loss"])
    assert open_cache(base / "cache").hard_codec == "envelope"


def test_it_holds_the_teachers_logits_and_features(base: Path) -> None:
    cache = open_cache(base / "cache")
    assert verify(cache.root, quiet=True).errors == []
    for name, worst in (("features8", 0.02), ("featurespca12b6", 0.5)):
        only = Cache(cache.root, cache.manifest, cache.inventory)
        only.codecs = {name: cache.codecs[name]}
        found = recompute(only, 8, "cpu", quiet=True)
        assert found.largest_logit_difference is not None and 0 < found.largest_logit_difference < worst
    maps = []
    for name in ("features8", "featurespca12b6"):
        codec, unit = cache.codecs[name], cache.read(0, 1, name)
        assert isinstance(codec, FeaturesCodec)
        maps.append(codec.features_torch({n: torch.from_numpy(a.copy()) for n, a in unit.targets.items()}))
    assert maps[0].shape == (len(unit.position), 12, *cache.grid)
    assert float((maps[0] - maps[1]).square().mean() / maps[0].var()) < 0.5  # four directions decide five classes


@pytest.mark.parametrize("lost", ["", ".copy"])
def test_tables_that_are_damaged_or_lost_come_back_from_their_other_copy(base: Path, copied: Path, lost: str) -> None:
    files = sorted(f for f in (copied / "codecs").iterdir() if (".copy" in f.name) == bool(lost))
    before = [f.read_bytes() for f in files]
    files[0].unlink()
    files[1].write_bytes(before[1][:-1] + b"x")
    errors = verify(copied, quiet=True).errors
    assert sum("is missing" in e or "is damaged" in e for e in errors) >= 2
    report = repair(copied, data=base / "train", quiet=True)
    assert len(report.restored) == 2 and not report.withdrawn and report.rebuilt == 0
    assert [f.read_bytes() for f in files] == before
    assert verify(copied, quiet=True).errors == []


def test_tables_go_where_the_units_go(base: Path, copied: Path, tmp_path: Path) -> None:
    """To the hub both copies; into another container both, although of one codec the first was lost here, and the second damaged of the
    other one: every reader takes the one that is whole."""
    names = {f"codecs/{file.name}" for file in (copied / "codecs").iterdir()}
    found = {file.path for file in contents_of(copied, "me/cache", False).files}
    assert len(names) == 4 and {name for name in found if name.startswith("codecs/")} == names
    second = {file for file in (copied / "codecs").iterdir() if ".copy" in file.name}
    next(file for file in {*(copied / "codecs").glob("features8.*")} - second).unlink()
    next(file for file in second if "featurespca" in file.name).write_bytes(b"x")
    with pytest.raises(CacheError, match="is missing; `cskd repair`"):
        contents_of(copied, "me/cache", False)
    made = export_cache(copied, tmp_path / "tars", "webdataset", quiet=True)
    assert made.content_root == open_cache(base / "cache").content_root()
    assert verify(tmp_path / "tars", data=base / "train", quiet=True, replay=2, again=2).errors == []
    assert {f"codecs/{file.name}" for file in (tmp_path / "tars" / "codecs").iterdir()} == names


def test_tables_of_which_both_copies_are_lost_are_fitted_again_the_same(base: Path, copied: Path) -> None:
    root = open_cache(copied).content_root()
    shutil.rmtree(copied / "codecs")
    with pytest.raises(CacheError, match=r"both copies .* are lost") as no:
        repair(copied, data=base / "train", quiet=True)
    assert "\n" not in str(no.value)
    with pytest.raises(CacheError, match=r"both copies .* are lost"):
        open_cache(copied).read(0, 0, "features8")
    cache_teacher(config(base, cache={"codecs": CODECS, "views": 2, "path": str(copied)}), quiet=True)
    assert verify(copied, quiet=True).errors == [] and open_cache(copied).content_root() == root


def test_of_several_processes_the_first_manifest_decides_whose_tables_count(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "cskd.pipeline.cache_teacher"
    here = config(base, cache={"codecs": ["features:8"], "views": 1, "path": str(tmp_path / "cache")})

    def late(root, identity, teacher, maker):  # type: ignore[no-untyped-def]
        """Another process puts its manifest in place between this one's fit and its manifest."""
        monkeypatch.undo()
        cache_teacher(here, quiet=True)
        rng = np.random.default_rng(0)
        other = {"weight": rng.normal(size=(5, 12)).astype(np.float32), "bias": np.zeros(5, np.float32)}
        return {"features8": write_tables(root, "features8", other)}

    monkeypatch.setattr(f"{module}.fit_tables", late)
    cache_teacher(here, quiet=True)
    cache = open_cache(tmp_path / "cache")
    assert verify(cache.root, quiet=True).errors == []
    assert cache.manifest.tables == {
        k: v for k, v in (open_cache(base / "cache").manifest.tables or {}).items() if k == "features8"
    }
    removed = gc(cache.root, older_than=0).removed
    assert len(removed) == 2 and all(name.startswith("codecs/features8.") for name in removed)
    assert verify(cache.root, quiet=True).errors == []


def test_other_tables_are_another_content(base: Path, copied: Path) -> None:
    cache = open_cache(copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    assert set(manifest["tables"]) == {"features8", "featurespca12b6"}
    before = cache.content_root()
    cache.manifest.tables["features8"] = "0" * 64  # type: ignore[index]
    assert cache.content_root() != before


def test_a_teacher_whose_head_is_not_one_linear_layer_is_refused_before_the_first_view(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(
        TEACHER.replace("self.fc = nn.Linear(12, 5)", "self.fc = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 5))")
    )
    made = config(base, cache={"codecs": ["features:8"], "path": str(tmp_path / "cache")})
    teacher = {"model": f"{tmp_path / 'net.py'}:build", "batch": 8, "min_top1": 0.0}
    with pytest.raises(TeacherError, match="codec 'features8' needs a teacher whose head") as no:
        cache_teacher(
            config(base, cache={"codecs": ["features:8"], "path": str(tmp_path / "cache")}, teacher=teacher), quiet=True
        )
    assert "\n" not in str(no.value) and len(str(no.value)) <= 300
    assert not (tmp_path / "cache" / "manifest.json").exists() and made.cache.codecs == ["features:8"]


def test_two_names_of_one_codec_are_refused(base: Path, tmp_path: Path) -> None:
    made = config(base, cache={"codecs": ["features:pca8", "features:pca8:4"], "path": str(tmp_path / "cache")})
    with pytest.raises(ConfigError, match="features:pca8 and features:pca8:4, which are one codec"):
        cache_teacher(made, quiet=True)
