"""A cache of the image's logits alone: what trains from it does, what asks for cells is refused before anything loads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import cskd.pipeline.cache_teacher
from cskd.codecs import get_codec
from cskd.config import from_dict
from cskd.errors import CodecError, ConfigError
from cskd.loading.replay_dataset import ReplayDataset
from cskd.loading.targets import codec_for
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.export import export
from cskd.pipeline.care.recompute import recompute
from cskd.pipeline.care.verify import verify
from cskd.pipeline.look.inspect_cache import inspect, render
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from tests.pipeline.test_html_page import data_of
from tests.pipeline.test_pipeline import cached_data, config

CODECS = ["global:8", "global:top2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("global")
    return cached_data(folder, n=22, cache={"codecs": CODECS, "views": 2}, loss={"method": "deit-soft"})


@pytest.mark.parametrize(
    "loss", [{"method": "deit-soft"}, {"method": "deit-hard"}, {"method": "cskd-soft", "decay": "global"}]
)
def test_methods_that_ask_for_the_image_alone_train_from_it(base: Path, loss: dict[str, str]) -> None:
    name = "-".join(loss.values())
    one = {"epochs": 1, "warmup_epochs": 0, "ema": None, "max_steps": 2}
    made = config(base, name, loss=loss, train=one, cache={"codecs": CODECS}, data={"val": ""})
    assert train(made, quiet=True).steps == 2
    assert np.isfinite(json.loads((base / name / "metrics.jsonl").read_text().splitlines()[-1])["loss"])


@pytest.mark.parametrize("method", ["cskd-hard", "cskd-soft"])
def test_methods_that_ask_for_cells_are_refused_before_anything_loads(
    base: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cskd.pipeline.cache_teacher, "load_teacher", None)
    fresh = {"codecs": CODECS, "path": str(base / "none")}
    for stage, made in (
        (train, config(base, method, loss={"method": method})),
        (cache_teacher, config(base, method, loss={"method": method}, cache=fresh)),
    ):
        with pytest.raises(ConfigError, match=f"{method} teaches cells .* the image's targets alone") as no:
            stage(made, quiet=True)
        assert "\n" not in str(no.value) and len(str(no.value)) <= 300 + len(str(base))


def test_the_labels_kept_are_those_of_both_images_of_a_mixed_view(base: Path) -> None:
    cache = open_cache(base / "cache")
    mixed = 0
    for block in range(cache.blocks):
        unit = cache.read(block, 1, "global8")
        label = cache.inventory.label[slice(*cache.inventory.block_range(block))]
        partner = unit.fields["partner"]
        other = np.where(partner < 0, unit.fields["label"], label[np.maximum(partner, 0)])
        np.testing.assert_array_equal(unit.targets["label_class"], np.stack([unit.fields["label"], other], 1))
        mixed += int((other != unit.fields["label"]).sum())
    assert mixed > 5


def test_it_is_verified_recomputed_and_inspected_like_any_other(base: Path, tmp_path: Path) -> None:
    cache = open_cache(base / "cache")
    assert verify(cache.root, quiet=True).errors == []
    found = recompute(cache, 8, "cpu", quiet=True)
    assert found.differing == 0 and found.largest_logit_difference is not None
    assert found.largest_logit_difference < 0.02
    facts = inspect(cache.root, png=tmp_path / "a.png", html=tmp_path / "a.html")
    assert [codec.gives for codec in facts.codecs.values()] == ["of the image alone: its class, its logits"] * 2
    assert list(facts.agreement["mixed"].own) == ["0"]  # the image's class, which every cell has


def test_inspect_speaks_of_no_cells_where_there_are_none(base: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    for shown in ({"samples": 16}, {"sample": 3, "png": tmp_path / "a.png"}):  # a line each; all of one
        render(inspect(base / "cache", **shown), Console(file=out))
    said = out.getvalue().replace(str(tmp_path), "")
    assert ", of the image alone\n" in said
    assert [word for word in ("cell", "segments", "blend") if word in said] == [], said
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height  # the view and its class, no two rows of three
    inspect(base / "cache", html=tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert (data["cells"], data["about"]["gives"]["global8"]) == (False, "of the image alone: its class, its logits")
    with pytest.raises(CodecError, match="those of blend 0; leave --blend out"):
        inspect(base / "cache", sample=3, blend=0.5)


def test_a_method_reads_the_codec_that_holds_no_more_than_it_asks_for(base: Path) -> None:
    names = ["int8", "envelope", "global:8", "topk:2"]
    codecs = {name: get_codec(name, 5, (3, 3)) for name in names}
    loss = {
        method: codec_for(from_dict({"loss": {"method": method}}).loss, codecs, "here")[method.endswith("soft")]
        for method in ("cskd-hard", "cskd-soft", "deit-soft", "deit-hard")
    }
    assert loss == {"cskd-hard": "envelope", "cskd-soft": "int8", "deit-soft": "global:8", "deit-hard": "global:8"}


def test_the_library_gives_the_image_s_targets_and_refuses_cells(base: Path) -> None:
    targets = ReplayDataset(base / "cache")[0].targets
    assert targets.image_logits.shape == (5,) and int(targets.at(0.0)[0, 0]) == int(targets.image_class)
    for ask in (targets.at, targets.logits_at, targets.hard, targets.soft):
        with pytest.raises(CodecError, match="image's targets alone, which are those of blend 0") as no:
            ask(0.5)
        assert len(str(no.value)) <= 300


@pytest.mark.parametrize("asked", [{"blends": ["1,0"]}, {"envelope": True}])
def test_targets_of_cells_are_not_exported_where_there_are_none(base: Path, tmp_path: Path, asked: Any) -> None:
    with pytest.raises(CodecError, match="those of blend 0; leave --blends"):
        export(base / "cache", tmp_path / "out", quiet=True, **asked)
    assert not (tmp_path / "out").exists()
    export(base / "cache", tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["blends"] == [0.0]


def test_exported_logits_are_those_of_the_smallest_error_and_stay_those_that_were_begun_with(
    base: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", open_cache(base / "cache")
    report = export(base / "cache", out, quiet=True)
    about, tar = json.loads((out / "export.json").read_text()), out / "00000.view000.tar"
    assert report.logits == about["logits"] == "global8"
    exact = cache.codecs["global8"].logits(cache.read(0, 0, "global8").targets)[1]
    for row, exported in enumerate(images_of(tar)):
        np.testing.assert_allclose(exported["logits"], exact[row], rtol=1e-5)
    del about["logits"]  # an older version, which gave none of codecs without cells
    for begun, kept in (({}, None), ({"logits": "globaltop2"}, "globaltop2")):
        tar.unlink()
        (out / "export.json").write_text(json.dumps(about | begun))
        assert export(base / "cache", out, quiet=True).logits == kept
    assert images_of(tar)[0]["logits"] != pytest.approx(exact[0].tolist(), rel=1e-5)


def images_of(tar: Path) -> list[Any]:
    with tarfile.open(tar) as file:
        names = [name for name in file.getnames() if name.endswith(".global.json")]
        return [json.load(file.extractfile(name)) for name in names]  # type: ignore[arg-type]
