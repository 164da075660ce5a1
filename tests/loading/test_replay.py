"""Whatever changes in a view is refused before its first use: pixels, seed, mixing, partner, recipe, code, versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cskd.loading.plan
import cskd.views.digest
import cskd.views.maker
import cskd.views.ops
from cskd.dataset.images import decode
from cskd.errors import CacheError, ConfigError, ReplayError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import verify
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from cskd.store.format import INDEX, SEAL, commit_file
from cskd.store.manifest import Manifest, write_manifest
from cskd.views.mixing import CUTMIX, MIXUP, NONE
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

DEIT = {"size": 32, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=42, block=20, shard=10)
    make_tiny_data(folder / "val", n=12, block=20, shard=10)
    cache_teacher(config(folder, recipe=DEIT), quiet=True)
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """A copy of its own of a cache with DeiT's recipe."""
    shutil.copytree(made, tmp_path / "base")
    return tmp_path / "base"


def run(base: Path, **train_settings: Any) -> Any:
    return train(config(base, recipe=DEIT, train=train_settings), quiet=True)


def change_unit(base: Path, **changes: Callable[[Any], None]) -> None:
    """Replace unit (0, 0) by one with other fields, committed as if stage 1 had made it so."""
    cache = open_cache(base / "cache")
    unit = cache.read(0, 0, "envelope")
    both = {name: cache.read(0, 0, name).targets for name in cache.codecs}
    fields = {name: array.copy() for name, array in unit.fields.items()}
    for name, change in changes.items():
        change(fields[name])
    for file in (commit_file(0, 0), INDEX):  # which holds the record once more
        (base / "cache" / file).unlink(missing_ok=True)
    cache.add_unit(0, 0, fields, both, {})


def first(base: Path, *modes: int) -> int:
    """The first row of unit (0, 0) in one of these mixing modes."""
    return int(np.flatnonzero(np.isin(open_cache(base / "cache").read(0, 0, "envelope").fields["mode"], modes))[0])


@pytest.mark.parametrize(
    ("field", "says"),
    [("lam", r"lambda is \d+, the recipe says \d+"), ("box", r"box is \[.*\], the recipe says \["), ("digest", "")],
)
def test_one_changed_field_stops_training_at_its_sample(base: Path, field: str, says: str) -> None:
    row = first(base, *((CUTMIX,) if field == "box" else (MIXUP, CUTMIX)))

    def bump(values: Any) -> None:
        values[row] += 1

    change_unit(base, **{field: bump})
    with pytest.raises(ReplayError, match=rf"^view 0 of sample 'image0\d\d' replays as digest .*{says}"):
        run(base)


def test_one_changed_mode_stops_training(base: Path) -> None:
    row = first(base, MIXUP)

    def cut(values: Any) -> None:
        values[row] = CUTMIX

    change_unit(base, mode=cut)
    with pytest.raises(ReplayError, match="mixing mode is 2, the recipe says 1"):
        run(base)


@pytest.mark.parametrize(("field", "by"), [("seed", 1), ("partner", 1)])
def test_one_changed_seed_or_partner_is_refused_when_the_unit_is_read(base: Path, field: str, by: int) -> None:
    row = first(base, MIXUP, CUTMIX)

    def bump(values: Any) -> None:
        values[row] += by

    change_unit(base, **{field: bump})
    with pytest.raises(CacheError, match=rf"sample 'image0\d\d' has {field} \w+, (view 0 of it has|the recipe says)"):
        run(base)


def test_other_pairs_in_the_plan_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cskd.loading.plan, "PAIRED", cskd.loading.plan.PAIRED[[1, 2, 0]])
    with pytest.raises(ReplayError, match=r"partner is \d+, the recipe says \d+"):
        run(base)


def test_one_changed_pixel_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = cskd.views.maker.ViewMaker.view

    def spotted(self: Any, image: Any, seed: int) -> Any:
        out = view(self, image, seed)
        if seed == seeds[7]:
            out[5, 6, 1] ^= 1
        return out

    seeds = open_cache(base / "cache").read(0, 0, "envelope").fields["seed"].tolist()
    monkeypatch.setattr(cskd.views.maker.ViewMaker, "view", spotted)
    with pytest.raises(
        ReplayError, match=r"^view 0 of sample 'image007' .* so the pixels differ \(recipe code 1; all lib"
    ):
        run(base)
    assert (
        train(config(base, recipe=DEIT), verify_replay=False, quiet=True).steps > 0
    )  # it was the check that stopped it


def test_another_implementation_of_one_op_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_op = cskd.views.ops.apply_op

    def changed(image: Any, op: Any, fill: Any) -> Any:
        out = apply_op(image, op, fill)
        return out ^ 1 if op.name == "Posterize" else out

    monkeypatch.setattr(cskd.views.ops, "apply_op", changed)
    with pytest.raises(ReplayError, match=r"seed and mixing are the recipe's, so the pixels differ"):
        run(base, epochs=3)
    assert any("so the pixels differ" in e for e in verify(base / "cache", replay=126, quiet=True).errors)


@pytest.mark.parametrize(("name", "value"), [("RECIPE_CODE_VERSION", 2), ("POLICY", {"version": "2"})])
def test_another_recipe_code_or_image_policy_is_refused_before_the_first_step(
    base: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(f"cskd.store.usable.{name}", value)
    with pytest.raises(CacheError, match=r"was made with (recipe_code = 1|images\..* = .*), this version of cskd has"):
        run(base)


def test_one_changed_recipe_field_is_refused(base: Path) -> None:
    """In the config, in the manifest, and in a manifest whose fingerprint was made to fit."""
    with pytest.raises(ConfigError, match=r"recipe\.erase is 0\.2, the cache .* was made with 0\.25"):
        train(config(base, recipe={**DEIT, "erase": 0.2}), quiet=True)
    path = base / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["recipe"]["erase"] = 0.2
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="does not match its own hash"):
        train(config(base), quiet=True)
    write_manifest(base / "cache", Manifest.read(manifest))
    with pytest.raises(CacheError, match="was made for fingerprint"):
        train(config(base), quiet=True)


def test_other_versions_call_for_golden_views(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ones: go on and say so. Different ones: refused before the first step, in training and in stage 1."""
    versions = cskd.views.digest.library_versions()
    monkeypatch.setattr(cskd.views.digest, "library_versions", lambda: {**versions, "pillow": "99.0"})
    notes = run(base, max_steps=1).notes
    said = f"since the cache was made: pillow {versions['pillow']} -> 99.0; 126 golden views replay exactly"
    assert said in notes
    monkeypatch.setattr(cskd.views.maker, "decode", lambda data: decode(data) ^ 1)  # a decoder that rounds otherwise
    for stage in (lambda: run(base), lambda: cache_teacher(config(base, recipe=DEIT), quiet=True)):
        with pytest.raises(CacheError, match=r"golden samples, replayed since pillow .* -> 99\.0: view 0 of sample"):
            stage()


def test_without_other_versions_nothing_is_replayed_ahead(base: Path) -> None:
    assert not [note for note in run(base, max_steps=1).notes if "golden" in note]


def test_verify_makes_views_again_and_runs_the_teacher_again(base: Path) -> None:
    report = verify(base / "cache", replay=50, again=40, device="cpu", quiet=True)
    assert report.sound and 50 <= report.replayed <= 56 and report.recomputed is not None
    again = report.recomputed
    assert 40 <= again.views <= 46 and again.lookups == again.views * 16 * 17
    assert (again.differing, again.agreement, again.probe) == (0, 1.0, None)
    assert again.largest_logit_difference is not None and 0 < again.largest_logit_difference < 0.1  # int8's own error


def test_verify_finds_a_teacher_that_gives_other_targets(base: Path) -> None:
    cache = open_cache(base / "cache")
    unit = cache.read(0, 0, "envelope")
    both = {name: cache.read(0, 0, name).targets for name in cache.codecs}
    mixed = (unit.fields["mode"] != NONE).sum()
    swapped = {n: cache.codecs[n].take(t, np.arange(len(unit.position))[::-1]) for n, t in both.items()}
    (base / "cache" / commit_file(0, 0)).unlink()
    (base / "cache" / SEAL).unlink(missing_ok=True)  # it would tell by the content alone
    cache.add_unit(0, 0, unit.fields, swapped, {})
    report = verify(base / "cache", again=126, device="cpu", quiet=True)
    assert mixed and report.recomputed and report.recomputed.differing > 0 and report.recomputed.largest_margin > 0
