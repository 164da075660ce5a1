"""`cskd inspect --student`: the cells are those of the loss, agreement is counted over them, and what does not fit is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cskd.config import Config, LossConfig, StudentConfig, TrainConfig, to_yaml
from cskd.errors import CskdError, DataError, StudentError
from cskd.method.terms import trained_heads
from cskd.pipeline.look.inspect_cache import inspect, render
from cskd.pipeline.look.inspect_sample import cached_view, replay
from cskd.pipeline.look.inspection import Inspection
from cskd.pipeline.show.metrics import MetricsLog
from cskd.store.cache import Cache
from cskd.student import Student, build_student
from cskd.student.checkpoint import ResumeStates, TrainState, export
from cskd.student.optim import Optimisation
from cskd.views.mix_pixels import normalise
from tests.caches import CLASSES, make_tiny_cache
from tests.pipeline.test_html_page import data_of

DEIT, PLAIN = "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
EPOCHS = 3


def make_run(
    folder: Path,
    cache: Cache,
    model: str = DEIT,
    kwargs: dict[str, Any] = TINY,
    method: Any = "cskd-hard",
    size: int = 32,
    classes: list[str] = CLASSES,
    epochs: int = EPOCHS,
    source: str | None = None,
) -> Student:
    """What a run of `epochs` epochs leaves, its weights drawn and not trained: other ones after each epoch."""
    config = Config(
        student=StudentConfig(model, kwargs),
        loss=LossConfig(method),
        train=TrainConfig(ema=None, epochs=EPOCHS, warmup_epochs=0),
    )
    torch.manual_seed(0)
    student = build_student(config.student, len(classes), size)
    student.trained = trained_heads(config.loss, student.distilled)
    optimisation, states, rows = Optimisation(student, config.train, 4), ResumeStates(folder / "resume", 9), []
    (folder / "resume").mkdir(parents=True)
    for epoch in range(epochs):
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter.data, std=0.3)
        states.save(student, optimisation, TrainState(4 * epoch + 4, {"cache": source or cache.fingerprint}))
        rows.append({"epoch": epoch, "step": 4 * epoch + 4, "agreement": 0.25 * epoch})
        export(folder, student, optimisation, config, classes, 4 * epoch + 4)
    log = MetricsLog(folder, 0)
    for row in rows:
        log.add(row)
    (folder / "resolved.yaml").write_text(to_yaml(config))
    return student


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_tiny_cache(tmp_path_factory.mktemp("student"), grid=(2, 2), views=2, quarantine=[4])


@pytest.fixture(scope="module")
def run(cache: Cache) -> Path:
    make_run(cache.root.parent / "run", cache)
    return cache.root.parent / "run"


def text_of(facts: Inspection, width: int = 80, **options: Any) -> str:
    out = io.StringIO()
    render(facts, Console(file=out, width=width, **options))
    return out.getvalue()


@pytest.mark.parametrize("model", [DEIT, PLAIN])
def test_cells_are_what_the_patch_head_says_of_the_replayed_view(cache: Cache, tmp_path: Path, model: str) -> None:
    student = make_run(tmp_path / "run", cache, model, epochs=1).eval()
    facts = inspect(cache.root, student=tmp_path / "run", samples=9, view=1, measured_units=0)
    assert facts.samples is not None and facts.student is not None and facts.samples[0].blend == 1.0
    agree = []
    for one in facts.samples:
        pixels = torch.from_numpy(replay(cache, cached_view(cache, one.sample, 1))).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = student(normalise(pixels, student.mean, student.std), cache.grid).patch_logits
        probability, said = logits[0].softmax(0).max(0)
        assert one.student is not None and one.student.cells == [[CLASSES[c] for c in row] for row in said.tolist()]
        assert np.allclose(one.student.probability, probability, atol=1e-3)
        same = [a == b for both in zip(one.cells, one.student.cells, strict=True) for a, b in zip(*both, strict=True)]
        assert one.student.agreement == np.mean(same)
        agree.append(np.mean(same))
        assert sum(c.student_share or 0 for c in one.classes) == pytest.approx(1)
    assert len(agree) == 9 and facts.student.agreement == pytest.approx(np.mean(agree))


def test_each_epoch_has_what_training_logged_and_what_its_weights_say(cache: Cache, run: Path, tmp_path: Path) -> None:
    facts = inspect(cache.root, student=run, sample="image002").student
    assert facts is not None and [(e.epoch, e.trained) for e in facts.by_epoch] == [(1, 0.0), (2, 0.25), (3, 0.5)]
    assert facts.by_epoch[-1].shown == facts.agreement and facts.views == 9  # of the cache, although one is shown
    assert len({e.shown for e in facts.by_epoch}) > 1
    assert (facts.epochs_done, facts.epochs, facts.notes) == (EPOCHS, EPOCHS, [])
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "resume" / "step-00000004.safetensors").unlink()
    damaged = tmp_path / "run" / "resume" / "step-00000008.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    fewer = inspect(cache.root, student=tmp_path / "run").student
    assert fewer is not None and [e.shown is None for e in fewer.by_epoch] == [True, True, False]
    assert any("digest" in note for note in fewer.notes) and any("2 of 3 epochs" in note for note in fewer.notes)


def test_terminal_json_and_pictures_show_both(cache: Cache, run: Path, tmp_path: Path) -> None:
    facts = inspect(cache.root, student=run, sample="image002", png=tmp_path / "one.png")
    found = json.loads(json.dumps(facts.facts))
    assert found["student"]["by_epoch"][1]["trained"] == 0.25 and len(found["samples"]) == 1
    both: list[dict[str, Any]] = [{}, {"force_terminal": True, "color_system": "truecolor", "no_color": False}]
    for options in both:
        text = text_of(facts, **options)
        assert "student, agrees in" in text and "teacher" in text and "3 of 3 epochs" in text
        assert any(line.split()[:3] == ["2", "25.0", "%"] for line in text.splitlines())
    with Image.open(tmp_path / "one.png") as one:
        alone = inspect(cache.root, sample="image002", png=tmp_path / "alone.png")
        with Image.open(tmp_path / "alone.png") as plain:
            assert one.width == plain.width and one.height > 1.3 * plain.height
    assert "student" not in alone.facts and "student_share" not in alone.facts["samples"][0]["classes"][0]
    inspect(cache.root, student=run, samples=4, png=tmp_path / "sheet.png")
    inspect(cache.root, samples=4, png=tmp_path / "plain.png")
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(tmp_path / "plain.png") as plain:
        assert sheet.width * sheet.height > 1.2 * plain.width * plain.height


def test_the_page_has_what_the_student_says_of_every_view(cache: Cache, run: Path, tmp_path: Path) -> None:
    inspect(cache.root, student=run, html=tmp_path / "page.html", samples=2, measured_units=0)
    data = data_of(tmp_path / "page.html")
    assert data["student"]["by_epoch"][2]["trained"] == 0.5 and len(data["samples"]) == 2
    for sample in data["samples"]:
        for view in sample["views"]:
            facts = inspect(cache.root, student=run, sample=sample["i"], view=view["v"], measured_units=0)
            assert facts.samples is not None and facts.samples[0].student is not None
            assert [CLASSES[c] for c in view["said"]] == [c for row in facts.samples[0].student.cells for c in row]
            assert set(view["slots"]) >= {CLASSES.index(c.name) for c in facts.samples[0].classes}


def test_a_run_of_another_cache_or_without_taught_patches_is_shown_with_a_note(cache: Cache, tmp_path: Path) -> None:
    make_run(tmp_path / "other", cache, epochs=1, source="f" * 64)
    facts = inspect(cache.root, student=tmp_path / "other", sample=0).student
    assert facts is not None and "trained from another cache" in facts.notes[0]
    shutil.rmtree(tmp_path / "other" / "resume")
    facts = inspect(cache.root, student=tmp_path / "other" / "model.safetensors", sample=0).student
    assert facts is not None and [(e.trained, e.shown) for e in facts.by_epoch] == [(0.0, None)]
    make_run(tmp_path / "deit", cache, method="deit-hard", epochs=1)
    facts = inspect(cache.root, student=tmp_path / "deit", sample=0).student
    assert facts is not None and any("deit-hard did not teach its patch tokens" in note for note in facts.notes)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, list[str]]] = {
    "coarser patches": ({"kwargs": {**TINY, "patch_size": 32}}, None, ["1 x 1 patches", "grid of 2 x 2"]),
    "other size": ({"size": 64}, None, ["sees 64 x 64 pixels", "32 x 32", "give a run"]),
    "more classes": ({"classes": [*CLASSES, "one more"]}, None, ["6 classes", "has 5", "give a run"]),
    "other order": ({"classes": CLASSES[::-1]}, None, ["'été' as class 0", "'apple'", "in this order"]),
    "unfinished": ({}, no_weights, ["no model.safetensors yet", "first epoch", "go on with `cskd train"]),
    "a cache": ({}, lambda run: (run / "manifest.json").touch(), ["is a cache", "output folder of `cskd train`"]),
    "no run": ({}, shutil.rmtree, ["no file", "give the folder of a run"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_the_cache_is_refused_in_one_line(cache: Cache, tmp_path: Path, what: str) -> None:
    options, damage, words = REFUSED[what]
    make_run(tmp_path / "run", cache, epochs=1, **options)
    if damage is not None:
        damage(tmp_path / "run")
    with pytest.raises(StudentError) as refused:
        inspect(cache.root, student=tmp_path / "run", sample=0)
    assert all(word in str(refused.value) for word in words) and len(str(refused.value)) <= 300 + len(str(tmp_path)) * 2


def test_a_view_that_can_not_be_replayed_has_no_student(cache: Cache, run: Path, tmp_path: Path) -> None:
    shutil.copytree(cache.root.parent / "data", tmp_path / "data")
    with pytest.raises(DataError):
        inspect(cache.root, student=run, sample=0, data=tmp_path)
    next((tmp_path / "data").glob("*.tar")).write_bytes(b"")
    with pytest.raises(CskdError):
        inspect(cache.root, student=run, sample=0, data=tmp_path / "data")
