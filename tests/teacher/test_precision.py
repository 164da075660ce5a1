"""What the teacher's arithmetic changes of the hard targets: measured on the views of stage 1, kept, shown, never guessed."""

from __future__ import annotations

import dataclasses
from functools import partial
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
from cskd.teacher.precision import is_reference, measure
from cskd.views.maker import ViewMaker
from tests.caches import make_tiny_cache, make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config
from tests.teachers import load, tiny_teacher

BACKENDS: Any = torch.backends


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
    plain, rough = load(tiny), load(tiny, precision="bf16")
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
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "bf16", "fold": True}, "bf16"),
        ({"fold": True}, "float32"),
        ({"precision": "float64"}, "float64"),
    ],
)
def test_whatever_is_not_plain_float32_is_measured(
    tiny: TeacherConfig, cache: Cache, changes: dict[str, Any], name: str
) -> None:
    teacher = load(tiny, cache.classes, **changes)
    assert teacher.precision == name and not is_reference(teacher)
    found = measured(cache, dataclasses.replace(tiny, **changes))
    assert found.backbone == name and found.views == 16 and found.share is not None
    assert (found.share > 0.001) == (name == "bf16")
    assert (found.notes != []) == (name != "float32" or found.share > 0)


def test_weights_that_are_others_at_each_loading_are_not_compared(tiny: TeacherConfig, cache: Cache) -> None:
    found = measured(cache, dataclasses.replace(tiny, weights=None, precision="bf16"))
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
    settings = config(tmp_path, teacher={"precision": "bf16"}, train={"max_steps": 1})
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


def test_each_arithmetic_is_another_teacher_and_fp16_is_nearer_than_bf16(tiny: TeacherConfig) -> None:
    teachers = {name: load(tiny, precision=name) for name in ("float32", "bf16", "fp16", "float64")}
    views = torch.rand(100, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255
    shares = {name: measure(teacher, teachers["float32"], views).share for name, teacher in teachers.items()}
    assert shares["float32"] == 0
    assert shares["float64"] is not None and shares["fp16"] is not None and shares["bf16"] is not None
    assert shares["float64"] < shares["fp16"] < shares["bf16"]
    assert len({str(teacher.fingerprint.facts) for teacher in teachers.values()}) == 4


def test_the_kind_of_device_is_part_of_the_teacher_and_no_news_to_caches_made_on_cpus(tiny: TeacherConfig) -> None:
    mine = load(tiny).fingerprint
    there = dataclasses.replace(mine, device="cuda")
    assert "device" not in mine.facts and there.facts == {**mine.facts, "device": "cuda"}
    assert dataclasses.replace(there, precision="tf32").facts["autocast"] == "tf32"


def test_the_backbone_computes_in_what_was_asked_for_and_the_head_in_ieee(
    tiny: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("cskd.teacher.model.precision_here", lambda precision, *_: precision)
    for precision in ("float32", "tf32"):
        teacher = load(tiny, precision=precision)
        teacher.device = torch.device("cuda")  # asked for its kind alone: tensors stay where they are
        backbone, apply = teacher.backbone, teacher.head.apply

        def run(x: torch.Tensor, part: Any) -> Any:
            seen.append(BACKENDS.cudnn.conv.fp32_precision)
            return part(x)

        teacher.backbone = partial(run, part=backbone)
        teacher.head = dataclasses.replace(teacher.head, apply=partial(run, part=apply))
        teacher.forward_dense(torch.rand(2, 3, 64, 64) * 255)
    assert [p == "tf32" for p in seen] == [False] * (len(seen) // 2) + [True] + [False] * (len(seen) // 2 - 1)


TWO_WAYS = """
import torch
from torch import nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.classes = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 5)
    def forward_features(self, x): return self.features(x)
    def forward_head(self, x): return self.classes(x.mean((2, 3)))
    def forward(self, x): return self.forward_head(self.forward_features(x))
class Dense(Own):
    def forward_dense(self, x):
        assert torch.backends.cudnn.conv.fp32_precision == self.expected
        x = self.features(x)
        return self.classes(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), self.forward_head(x)
def build(dense, expected="none"):
    torch.manual_seed(0)
    net = Dense() if dense else Own()
    net.expected = expected
    return net
"""


def test_an_own_forward_dense_computes_in_what_other_teachers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(TWO_WAYS)
    monkeypatch.setattr("cskd.teacher.model.precision_here", lambda precision, *_: precision)
    config = TeacherConfig(model=f"{tmp_path / 'own.py'}:build")
    views = torch.rand(2, 3, 64, 64) * 255
    plain = load(config, kwargs={"dense": False}).forward_dense(views)
    teacher = load(config, kwargs={"dense": True, "expected": BACKENDS.cudnn.conv.fp32_precision})
    for ours, its in zip(teacher.forward_dense(views), plain, strict=True):
        torch.testing.assert_close(ours, its)
    net: Any = getattr(teacher.head.apply, "__self__")  # noqa: B009
    teacher.device = torch.device("cuda")
    for precision, expected in (("float32", "none"), ("tf32", "tf32")):
        teacher.precision, net.expected = precision, expected
        teacher.forward_dense(views)
        assert teacher.head_precision == precision
