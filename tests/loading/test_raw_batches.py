"""Views made on the device: batches, weights and refusals are those of views that the workers make."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file

from cskd.config import RecipeConfig
from cskd.dataset.images import decode, decode_into, decoded_size
from cskd.errors import ConfigError, ImageError, ReplayError
from cskd.loading import raw_batches
from cskd.loading.feed import on_device
from cskd.loading.raw_batches import DeviceViews, RawBatchMaker
from cskd.loading.stage2 import BatchMaker
from cskd.machine.side_stream import SideStream
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.train import train
from cskd.store.cache import Cache, open_cache
from cskd.views import on_device as views_on_device
from cskd.views import ops
from cskd.views.maker import ViewMaker
from cskd.views.on_device import agreement
from tests.caches import make_tiny_data
from tests.loading.test_stage2_batches import tasks_of
from tests.pipeline.test_pipeline import TEACHER, config

DEIT = {"size": 32, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=42, block=20, shard=10)
    make_tiny_data(folder / "val", n=12, block=20, shard=10)
    cache_teacher(config(folder, recipe=DEIT), quiet=True)
    return folder


def run(base: Path, **settings: Any) -> Any:
    return train(config(base, recipe=DEIT, train=settings), quiet=True)


def makers(cache: Cache) -> tuple[BatchMaker, RawBatchMaker, DeviceViews]:
    views, recorded = ViewMaker(cache.inventory, cache.recipe), cache.recorded()
    return (
        BatchMaker(views, None, 1.0, recorded),
        RawBatchMaker(views, None, 1.0, recorded),
        DeviceViews(views, recorded),
    )


@pytest.mark.parametrize("room", ["all", "some", "none"])
def test_batches_are_those_of_the_workers_wherever_a_view_is_made(
    made: Path, room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that would take too much memory become views in the worker."""
    cache = open_cache(made / "cache")
    monkeypatch.setattr(raw_batches, "_LEAST", 0)
    monkeypatch.setattr(raw_batches, "_TIMES", {"all": 100, "some": 0.4, "none": 0}[room])
    host, raw, views = makers(cache)
    for task in tasks_of(cache, tmp_path / "scratch", repeats=3, batch=12):
        expected, sent = host(task), raw(task)
        images = len(set(expected["sample"].tolist()))
        sides = 12 * 32 * 32 if room == "none" else 0
        assert (len(sent["images"]) == sides) == (room == "none") and images <= 6
        found = views(on_device(sent, CPU), SideStream(CPU))
        assert found.check is not None
        found.check()
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected if name != "seconds")


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_those_of_a_run_whose_views_the_workers_make(made: Path, workers: int, tmp_path: Path) -> None:
    weights = []
    for augment in ("host", "device"):
        out = str(tmp_path / augment)
        run(made, augment=augment, output=out, workers=workers, repeats=3)
        weights.append(load_file(Path(out) / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one pixel of each batch is another on the device."""

    def drifting(*arguments: Any) -> torch.Tensor:
        views = views_on_device.make_views(*arguments)
        views[1, 0, 0, 0] ^= 1
        return views

    monkeypatch.setattr(raw_batches, "make_views", drifting)


def test_a_view_that_the_device_makes_otherwise_is_refused_before_it_is_trained_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift(monkeypatch)
    with pytest.raises(ReplayError, match=r"made on the device, not on the host: set train.augment: host \(view \d"):
        run(made, augment="device", output=str(tmp_path / "out"))
    config_unchecked = config(made, recipe=DEIT, train={"augment": "device", "output": str(tmp_path / "unchecked")})
    assert train(config_unchecked, verify_replay=False, quiet=True).steps


def test_a_digest_that_the_host_does_not_find_either_is_refused_in_the_words_of_the_host(
    made: Path, tmp_path: Path
) -> None:
    _, raw, views = makers(open_cache(made / "cache"))
    for task in tasks_of(open_cache(made / "cache"), tmp_path / "scratch", repeats=1, batch=8):
        sent = raw(task)
        sent.about.rows["digest"][3] ^= 1
        found = views(on_device(sent, CPU), SideStream(CPU))
        assert found.check is not None
        with pytest.raises(ReplayError, match=r"^view \d of sample .* so the pixels differ"):
            found.check()


@pytest.mark.parametrize("name", ["Rotate", "Equalize", "Sharpness"])
def test_an_operation_that_differs_is_named_before_the_first_step(
    made: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ops.apply

    def other(image: Any, params: Any) -> Any:
        out = plain(image, params)
        return out ^ np.uint8(1) if any(op.name == name for op in params.ops) else out

    monkeypatch.setattr(agreement, "apply", other)
    with pytest.raises(ConfigError, match=f"operation {name} gives .* other bytes on cpu .* set train.augment: host"):
        run(made, augment="device", output=str(tmp_path / "out"))


def test_views_are_tried_in_the_arithmetic_that_will_make_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TF32 products a GPU makes them in float64, without in float32."""
    around, seen = list[bool](), list[list[bool]]()

    @contextlib.contextmanager
    def noted(tf32: bool, device: torch.device) -> Iterator[None]:
        around.append(tf32)
        yield
        around.pop()

    def tried(*_: Any) -> int:
        seen.append(around.copy())
        return 1000

    monkeypatch.setattr("cskd.pipeline.train.float32_products", noted)
    monkeypatch.setattr("cskd.pipeline.setup.refuse_device_views", tried)
    run(made, augment="device", output=str(tmp_path / "out"), max_steps=1)
    assert seen == [[True]] and not around


def test_what_a_device_can_not_make_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RecipeConfig(randaugment="rand-m9")
    agreement.refuse_recipe(recipe, CPU)
    with pytest.raises(ConfigError, match="the device mps, expected cuda, or cpu"):
        agreement.refuse_recipe(recipe, torch.device("mps"))
    monkeypatch.setattr(agreement, "OPERATIONS", views_on_device.OPERATIONS - {"Posterize"})
    with pytest.raises(ConfigError, match="operation Posterize of the recipe is the host's"):
        agreement.refuse_recipe(recipe, CPU)
    agreement.refuse_recipe(dataclasses.replace(recipe, randaugment=None, color_jitter=0.4), CPU)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF"])
def test_an_image_is_decoded_into_memory_of_the_size_its_header_says(form: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    data = io.BytesIO()
    Pillow.fromarray(pixels).save(data, form)
    out = np.zeros((40, 30, 3), np.uint8)
    decode_into(data.getvalue(), out)
    assert decoded_size(data.getvalue()) == (40, 30) and np.array_equal(out, decode(data.getvalue()))
    with pytest.raises(ImageError, match="decodes to 40 x 30 pixels, its header says 50 x 30"):
        decode_into(data.getvalue(), np.zeros((50, 30, 3), np.uint8))
