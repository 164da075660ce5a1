"""benchmarks/envelope.py and scale.py: the other side is an envelope too, and made caches are ones the stages accept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import envelope, scale
from cskd.codecs import Arrays, get_codec
from cskd.codecs.envelope import EnvelopeCodec
from cskd.store.cache import open_cache
from tests.caches import random_logits


def test_the_walk_over_all_classes_gives_the_codecs_targets() -> None:
    dense, image = random_logits(5, 40, (3, 2))
    image = image + torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    codec = get_codec("envelope", 40, (3, 2))
    assert envelope.differences(codec, dense, image) == 0

    class Wrong(EnvelopeCodec):
        def encode(self, dense_BKhw: torch.Tensor, global_BK: torch.Tensor) -> Arrays:
            arrays = super().encode(dense_BKhw, global_BK)
            return arrays | {"start": np.maximum(arrays["start"], 300) - 300}

    assert envelope.differences(Wrong(40, (3, 2)), dense, image) > 0


def test_a_units_mixtures_are_read_alike_by_stock_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "ROWS", 64)
    dense, image = random_logits(8, 30, (2, 2))
    codec = get_codec("envelope", 30, (2, 2))
    cache = envelope.make_cache(tmp_path, codec, dense.permute(0, 2, 3, 1).numpy(), image.numpy(), 2)
    unit, commit = cache.read(1, 0, "envelope"), cache.commit_of(1, 0)
    assert commit is not None
    stock = envelope.stock_read(cache.root / commit.files[0].path)
    assert sum(a.nbytes for a in stock) == sum(a.nbytes for a in [*unit.fields.values(), *unit.targets.values()])


def test_a_made_cache_lacks_the_units_that_stage_1_makes_and_grows(tmp_path: Path) -> None:
    inventory = scale.make_data(tmp_path / "data", 40)
    for views, left in ((1, [0]), (3, [0, 1, 2]), (7, [6])):
        scale.grow_cache(tmp_path, inventory, views)
        cache = open_cache(tmp_path / "cache")
        assert cache.views == views and cache.missing() == [(0, v) for v in left]
    assert cache.read(0, 5, "envelope").position.tolist() == list(range(40))
