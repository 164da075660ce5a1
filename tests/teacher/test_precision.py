"""What the teacher's arithmetic changes of the hard targets: measured on the views of stage 1, kept, shown, never guessed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cskd.config import TeacherConfig
from cskd.dataset.inventory import open_inventory
from cskd.errors import CacheError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.look.inspect_sample import cached_view, replay
from cskd.pipeline.measure_precision import first_views, measure_precision
from cskd.store.cache import Cache, open_cache
from cskd.store.manifest import read_manifest, write_manifest
from cskd.teacher.arithmetic import BLENDS, Precision, in_words, unchanged
from cskd.teacher.model import load_teacher, teacher_images
from cskd.teacher.precision import arithmetic, is_reference, measure
from cskd.views.maker import ViewMaker
from tests.caches import make_tiny_cache, make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config
from tests.teachers import load, tiny_teacher


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_tiny_cache(tmp_path_factory.mktemp("precision"), n=26, size=64, quarantine=[7])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


def measured(cache: Cache, config: TeacherConfig) -> Precision:
    teacher = load_teacher(config, cache.classes, torch.device("cpu"), cache.recipe.size)
    return measure_precision(teacher, ViewMaker(cache.inventory, cache.recipe), config)


def test_a_teacher_in_plain_float32_costs_no_forward(tiny: TeacherConfig, cache: Cache) -> None:
    teacher = load_teacher(tiny, cache.classes, torch.device("cpu"), 64)
    before = teacher_images()
    found = measure_precision(teacher, ViewMaker(cache.inventory, cache.recipe), tiny)
    assert found == unchanged() and (found.share, found.views, found.notes) == (0.0, 0, [])
    assert teacher_images() == before


def test_the_share_is_that_of_hard_targets_that_differ_from_float32(tiny: TeacherConfig) -> None:
    plain, rough = load(tiny), load(tiny, autocast="bf16")
    views = torch.rand(50, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    found = measure(rough, plain, views)
    (dense, image), (dense16, image16) = plain.forward_dense(views), rough.forward_dense(views)
    for blend in BLENDS:
        mixed, mixed16 = (
            (blend * d.double() + (1 - blend) * i.double()[..., None, None]).argmax(1)
            for d, i in ((dense, image), (dense16, image16))
        )
        assert found.differ is not None
        assert found.differ[f"{blend:g}"] == pytest.approx(
            (mixed != mixed16).double().mean().item(), abs=2 / mixed.numel()
        )
    assert found.share is not None and 0 < found.share < 0.5
    assert (found.backbone, found.head, found.views) == ("bf16", "float32", 50)
    assert measure(plain, plain, views).share == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"autocast": "bf16"}, "bf16"),
        ({"autocast": "bf16", "fold": True}, "bf16"),
        ({"fold": True}, "float32"),
        ({"dtype": "float64"}, "float64"),
    ],
)
def test_whatever_is_not_plain_float32_is_measured(
    tiny: TeacherConfig, cache: Cache, changes: dict[str, Any], name: str
) -> None:
    teacher = load(tiny, cache.classes, **changes)
    assert arithmetic(teacher) == name and not is_reference(teacher)
    found = measured(cache, dataclasses.replace(tiny, **changes))
    assert found.backbone == name and found.views == 16 and found.share is not None
    assert (found.share > 0.001) == (name == "bf16")
    assert (found.notes != []) == (name != "float32" or found.share > 0)


def test_weights_that_are_others_at_each_loading_are_not_compared(tiny: TeacherConfig, cache: Cache) -> None:
    found = measured(cache, dataclasses.replace(tiny, weights=None, autocast="bf16"))
    assert found.share is None and found.views == 0
    assert "was not measured" in found.notes[0] and "each time the teacher is built" in found.notes[0]


def test_it_is_measured_on_the_views_that_stage_1_makes(cache: Cache) -> None:
    maker = ViewMaker(cache.inventory, cache.recipe)
    views = first_views(maker, 20, 4)
    stored = [replay(cache, cached_view(cache, i, 0)) for i in range(26) if i != 7]
    pixels = [torch.from_numpy(view).permute(2, 0, 1) for view in stored]
    matches = [any(torch.equal(view, p) for p in pixels) for view in views]
    assert len(views) >= 16 and sum(matches) >= len(views) - 2  # the one in quarantine is mixed here, and its partner


def test_images_that_can_not_be_decoded_are_left_out(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data", n=8, block=8, shard=8, bad=(0, 3))
    inventory = open_inventory(tmp_path / "data")
    recipe = config(tmp_path).recipe
    assert len(first_views(ViewMaker(inventory, recipe), 64, 4)) == 6


def test_the_share_is_said_at_the_start_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(TEACHER)
    make_tiny_data(tmp_path / "train", n=22, block=20, shard=10)
    settings = config(tmp_path, teacher={"autocast": "bf16"}, train={"max_steps": 1})
    cache_teacher(settings)
    said = capsys.readouterr().err
    assert "note: the teacher's backbone runs in bf16, its head in float32; " in said
    manifest = open_cache(tmp_path / "cache").manifest
    facts = manifest.precision
    assert facts is not None
    assert (facts["backbone"], facts["reference"], facts["views"]) == ("bf16", "float32", 22)
    assert facts["cells_differ"] == pytest.approx(sum(facts["by_blend"].values()) / 3)
    assert inspect(tmp_path / "cache").teacher.precision == facts
    assert any(in_words(facts) in note for note in manifest.notes or [])
    cache_teacher(settings)  # resumed: said again, not measured again
    assert in_words(facts) in capsys.readouterr().err
    plain = config(tmp_path, cache={"path": str(tmp_path / "plain")})
    cache_teacher(plain, quiet=True)
    assert open_cache(tmp_path / "plain").manifest.precision == unchanged().facts


@pytest.mark.parametrize(
    "facts",
    [
        5,
        {},
        {"backbone": "bf16", "head": 3, "cells_differ": 0.1, "by_blend": {"1": 0.1}, "views": 4},
        {"backbone": "bf16", "head": "float32", "cells_differ": "x", "by_blend": {"1": 0.1}, "views": 4},
        {"backbone": "bf16", "head": "float32", "cells_differ": 0.1, "by_blend": {"1": []}, "views": 4},
        {"backbone": "bf16", "head": "float32", "cells_differ": 0.1, "by_blend": None, "views": 4},
        {"backbone": "bf16", "head": "float32", "cells_differ": None, "by_blend": None},
    ],
)
def test_a_manifest_of_somebody_elses_is_refused_for_facts_that_can_not_be(tmp_path: Path, facts: Any) -> None:
    root = make_tiny_cache(tmp_path, n=5, views=1).root
    manifest = read_manifest(root)
    for name, value in (("precision", facts), ("notes", 5), ("notes", [5])):
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(CacheError, match=name):
            write_manifest(root, dataclasses.replace(manifest, **wrong))
            read_manifest(root)
    write_manifest(root, dataclasses.replace(manifest, precision=unchanged().facts, notes=["one"]))
    assert inspect(root).teacher.notes == ["one"]
