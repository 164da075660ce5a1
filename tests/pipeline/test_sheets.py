"""Sheets of `cskd inspect --png`: a tile for each sample, in the shape of a sheet, with the same colours everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cskd.codecs.base import BLEND_ONE
from cskd.errors import CacheError
from cskd.pipeline.draw.pictures import CLASS_COLOURS, fitted_photo, veil_map
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.look.sheets import MOST_TILES, contact_sheet
from cskd.pipeline.look.views_shown import draw_samples, look_at, sample_facts
from cskd.store.cache import Cache
from tests.caches import make_tiny_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_tiny_cache(tmp_path_factory.mktemp("sheets"), grid=(2, 3), views=2, quarantine=[4])


@pytest.mark.parametrize("count", [2, 7, 16, 64])
def test_a_sheet_has_a_sensible_size_and_shape(cache: Cache, count: int) -> None:
    looks = look_at(cache, [0, 1, 2, 3, 5, 6, 7, 8, 9], 0, BLEND_ONE)
    sheet = contact_sheet(cache, [looks[i % 9] for i in range(count)], "title")
    assert 300 <= sheet.width <= 4500 and sheet.height <= 3200
    assert 0.8 <= sheet.width / sheet.height <= 2.8 or count < 7
    pixels = np.asarray(sheet)
    assert count == 7 or (pixels[-60:, -200:] < 200).any(), "the last places are empty"


def test_samples_are_those_named_then_those_drawn(cache: Cache, tmp_path: Path) -> None:
    def samples(**options: object) -> list[int]:
        facts = inspect(cache.root, measured_units=0, **options)  # type: ignore[arg-type]
        assert facts.samples is not None
        return [one.sample for one in facts.samples]

    assert samples(sample=[7, "image002", 7]) == [7, 2]
    several = samples(sample=[7, 2], samples=5)
    assert several[:2] == [7, 2] and len(set(several)) == 5 and 4 not in several
    assert (
        samples(samples=3, seed=1) == samples(samples=3, seed=1, png=tmp_path / "x.png") != samples(samples=3, seed=2)
    )
    assert sorted(samples(samples=500)) == sorted(samples(png=tmp_path / "all.png")) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert inspect(cache.root, measured_units=0, html=tmp_path / "x.html", samples=3).samples is None
    with pytest.raises(CacheError, match=f"at most {MOST_TILES} samples, 300 were"):
        contact_sheet(cache, look_at(cache, [0] * 300, 0, 0), "")
    with pytest.raises(CacheError, match=r"view 2 is outside this cache's 0\.\.1"):
        samples(samples=3, view=2)


def test_the_first_colours_mean_the_same_in_every_view(cache: Cache) -> None:
    for look in look_at(cache, [0, 1, 2, 3, 5, 6, 7, 8, 9], 1, 30_000):
        roles = [look.image_class, *look.labels]
        for c in roles:
            slot = 0 if c == roles[0] else roles.index(c)
            assert look.key.colour(c) == CLASS_COLOURS[slot] and look.key.letter(c) == "ABC"[slot]
        facts = sample_facts(cache, look)
        assert sum(one.share for one in facts.classes) == pytest.approx(1)
        assert facts.cells == [[cache.classes[c] for c in row] for row in look.cells.tolist()]
        assert {one.name for one in facts.classes} >= {c for row in facts.cells for c in row} | {facts.label}
        assert [len(row) for row in facts.margin] == [len(row) for row in facts.cells] == [3, 3]


def test_drawing_spreads_over_blocks_and_leaves_out_what_has_no_targets(cache: Cache) -> None:
    bad = np.zeros(10, bool)
    bad[[0, 4]] = True
    drawn = draw_samples(cache, bad, [0, 1], 4, 3)
    assert {len(chosen) for chosen in drawn.values()} == {2} and not bad[[s for c in drawn.values() for s in c]].any()
    assert draw_samples(cache, bad, [1], 9, 0, [8]) == {1: [8, *draw_samples(cache, bad, [1], 9, 0, [8])[1][1:]]}


def test_whole_images_keep_their_shape_and_a_veil_lets_clear_cells_through() -> None:
    wide = np.asarray(fitted_photo(np.zeros((40, 80, 3), np.uint8), 100))
    assert (wide[25:75] == 0).all() and (wide[:24] > 200).all() and (wide[76:] > 200).all()
    over = Image.new("RGB", (60, 60), (200, 100, 50))
    veiled = np.asarray(veil_map(np.array([[True, False, True]]), over))
    assert (veiled[:, :20] == (200, 100, 50)).all() and veiled[:, 20:40].max() < 90 and veiled[30, 50, 0] == 200
