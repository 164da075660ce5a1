"""`cskd inspect`: the facts are those of the cache, replay is checked, and names can do no harm."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from cskd.codecs.base import direct_hard, quantise_blend
from cskd.errors import CacheError, CodecError, DataError, PathError, ReplayError
from cskd.loading.cached_views import find_sample
from cskd.pipeline.look.inspect_cache import inspect, render
from cskd.pipeline.look.inspect_sample import (
    cached_view,
    entropy,
    margin,
    replay,
)
from cskd.pipeline.look.inspection import Inspection, Quarantined, SampleFacts, UnitCounts, UnitPlace, Unreadable
from cskd.pipeline.look.sheets import sample_picture, sheet
from cskd.pipeline.look.views_shown import look_at, sample_facts
from cskd.store.cache import Cache, open_cache
from cskd.store.manifest import Manifest, write_manifest
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from tests.caches import CLASSES, make_tiny_cache, random_logits


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two blocks of five samples, sample 4 quarantined, one unit missing."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_cache(folder, codecs=("envelope", "int8"), quarantine=[4], skip=[(1, 2)])


def truth(cache: Cache, sample: int, view: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that the fixture encoded for a sample."""
    block = cache.inventory.block_of(sample)
    unit = cache.read(block, view, "envelope")
    dense, image = random_logits(len(unit.position), len(cache.classes), cache.grid, seed=1000 * block + view)
    row = int(np.searchsorted(unit.position, sample - cache.inventory.block_range(block)[0]))
    return dense[row : row + 1], image[row : row + 1]


def one_sample(facts: Inspection) -> SampleFacts:
    assert facts.samples is not None and len(facts.samples) == 1
    return facts.samples[0]


def describe_sample(cache: Cache, sample: int, view: int, blend: float) -> SampleFacts:
    return sample_facts(cache, look_at(cache, [sample], view, quantise_blend(blend))[0])


def shown(facts: Inspection, terminal: bool = False, width: int = 80) -> str:
    out = io.StringIO()
    render(facts, Console(file=out, force_terminal=terminal, width=width, no_color=True))
    return out.getvalue()


def test_the_table_counts_what_the_commit_records_say(cache: Cache) -> None:
    facts = inspect(cache.root)
    assert json.loads(json.dumps(facts.facts)) == facts.facts
    assert facts.inventory.samples == 10 and facts.inventory.blocks == 2
    assert facts.units == UnitCounts(views=3, total=6, present=5, missing=1, first_missing=[UnitPlace(1, 2)])
    assert facts.quarantined == Quarantined(1, [Unreadable("image004", "not an image")])
    assert facts.teacher.model == "tiny" and facts.teacher.clean_top1 == 0.5
    size = sum(p.stat().st_size for p in cache.root.glob("units/*/*.envelope.*"))
    envelope = facts.codecs["envelope"]
    assert envelope.bytes == size and envelope.unit_bytes_per_view == size / (3 * 4 + 2 * 5)
    assert 0 < envelope.target_bytes_per_view < envelope.unit_bytes_per_view
    assert facts.errors == [] and {"samples", "student", "png"}.isdisjoint(facts.facts)


def test_agreement_is_that_of_the_logits_with_the_labels(cache: Cache) -> None:
    facts = inspect(cache.root).agreement["mixed"]
    own = {"1": 0, "0.5": 0, "0": 0}
    either, mixed = dict(own), 0
    for block, view in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        unit = cache.read(block, view, "envelope")
        dense, image = random_logits(len(unit.position), len(cache.classes), cache.grid, seed=1000 * block + view)
        rows = np.flatnonzero(unit.fields["mode"])
        mixed += len(rows)
        first = cache.inventory.block_range(block)[0]
        for blend in own:
            hard = direct_hard(dense, image, quantise_blend(float(blend))).numpy()
            for row in rows:
                agrees = hard[row] == unit.fields["label"][row]
                partner = cache.inventory.label[first + unit.fields["partner"][row]]
                own[blend] += int(agrees.sum())
                either[blend] += int((agrees | (hard[row] == partner)).sum())
    assert facts.samples == mixed
    assert facts.own == {k: v / (9 * mixed) for k, v in own.items()}
    assert facts.own_or_partner == {k: v / (9 * mixed) for k, v in either.items()}


def test_unmixed_samples_are_reported_apart_and_all_are_counted(cache: Cache) -> None:
    agreement = inspect(cache.root).agreement
    made = [(b, v) for b in range(2) for v in range(3) if (b, v) != (1, 2)]
    unmixed = sum(int((cache.read(b, v, "int8").fields["mode"] == 0).sum()) for b, v in made)
    assert agreement["unmixed"].samples == unmixed > 0
    assert agreement["mixed"].samples == 3 * 4 + 2 * 5 - unmixed


def test_figures_come_from_as_many_units_as_allowed(cache: Cache) -> None:
    facts = inspect(cache.root, measured_units=2)
    assert facts.measured_units == 2 and facts.agreement["mixed"].samples < 10
    assert "from 2 of the units" in shown(facts)


@pytest.mark.parametrize("blend", [1.0, 0.5, 0.125, 0.0])
def test_the_grid_of_names_is_the_direct_target_of_every_cell(cache: Cache, blend: float) -> None:
    for sample in (0, 3, 7):
        facts = describe_sample(cache, sample, 1, blend)
        hard = direct_hard(*truth(cache, sample, 1), quantise_blend(blend))[0]
        assert facts.cells == [[CLASSES[int(c)] for c in row] for row in hard]
        assert facts.image_class == CLASSES[int(truth(cache, sample, 1)[1].argmax())]
        assert facts.replay == "equal" and facts.codec == "envelope"


def test_the_margin_is_the_blend_at_which_a_cell_leaves_the_images_class(cache: Cache) -> None:
    codec, targets = cache.codecs["envelope"], cached_view(cache, 2, 0).targets["envelope"]
    found = (margin(codec, targets) * 65536).astype(int)
    dense, image = truth(cache, 2, 0)
    image_class = image.argmax()
    for (i, j), blend in np.ndenumerate(found):
        assert direct_hard(dense, image, int(blend))[0, i, j] == image_class
        if blend < 65536:
            assert direct_hard(dense, image, int(blend) + 1)[0, i, j] != image_class
    extra = targets["n_extra"][0]
    assert ((found == 65536) == (extra == 0)).all() and (extra > 0).any()


def test_entropy_is_that_of_the_cached_logits(cache: Cache) -> None:
    found = entropy(cache.codecs["int8"], cached_view(cache, 2, 0).targets["int8"])
    dense, _ = truth(cache, 2, 0)
    expected = torch.distributions.Categorical(logits=dense[0].permute(1, 2, 0)).entropy().numpy()
    assert np.abs(found - expected).max() < 0.1


def test_replay_is_the_mixed_image_the_teacher_saw(cache: Cache) -> None:
    maker = ViewMaker(cache.inventory, cache.recipe)
    modes = set()
    for sample in (0, 1, 2, 3, 5, 6, 7, 8, 9):
        cached = cached_view(cache, sample, 0)
        modes.add(cached.mode)
        own = maker.view(maker.image(sample), int(cached.fields["seed"]))
        if cached.partner is None:
            expected = own
        else:
            seed = cached_view(cache, cached.partner, 0).fields["seed"]
            other = maker.view(maker.image(cached.partner), int(seed))
            rows = [torch.from_numpy(np.array([cached.fields[k]] * 2, np.int64)) for k in ("mode", "lam", "box")]
            mixed = mix_pixels(torch.from_numpy(np.stack([own, other])), torch.tensor([1, 0]), *rows)[0]
            expected = mixed.permute(1, 2, 0).numpy()
            assert not np.array_equal(expected.round(), own)
        found = replay(cache, cached)
        assert found.dtype == np.float32 and np.array_equal(found, expected)
    assert modes == {"unmixed", "mixup", "cutmix"}


def test_a_replay_that_differs_is_refused_and_named(cache: Cache) -> None:
    cached = cached_view(cache, 2, 1)
    wrong = dataclasses.replace(cached, fields={**cached.fields, "digest": np.uint32(cached.fields["digest"] ^ 1)})
    with pytest.raises(ReplayError, match="view 1 of sample 'image002'"):
        replay(cache, wrong)
    partner = {**cached.partner_fields, "seed": np.uint64(1)}
    with pytest.raises(ReplayError, match=cache.inventory.key(cached.partner or 0)):
        replay(cache, dataclasses.replace(cached, partner_fields=partner))


@pytest.fixture
def moved(cache: Cache, tmp_path: Path) -> Path:
    """A copy of the cache whose shards are not where the manifest says."""
    shutil.copytree(cache.root, tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    manifest["data"] = str(tmp_path / "gone")
    write_manifest(tmp_path / "cache", Manifest.read(manifest))
    return tmp_path / "cache"


def test_without_image_shards_the_table_works_and_the_picture_is_refused(
    cache: Cache, moved: Path, tmp_path: Path
) -> None:
    facts = inspect(moved, sample="image002")
    assert facts.units.present == 5 and one_sample(facts).cells
    assert "--data" in one_sample(facts).replay and one_sample(facts).replay.startswith("no: ")
    with pytest.raises(DataError, match="--data"):
        inspect(moved, sample="image002", png=tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    there = inspect(moved, sample="image002", data=cache.inventory.root)
    assert one_sample(there).replay == "equal"


def test_broken_units_are_listed_and_the_rest_is_shown(moved: Path) -> None:
    first = next(moved.glob("units/b00000/v0000.envelope.*"))
    raw = bytearray(first.read_bytes())
    raw[len(raw) // 2] ^= 1
    first.write_bytes(raw)
    next(moved.glob("units/b00000/v0001.int8.*")).unlink()
    (moved / "commits" / "b00001" / "v0000.json").write_text("{")
    facts = inspect(moved)
    assert [e.split(":")[0] for e in facts.errors] == [
        "block 0, view 0",
        "block 0, view 1",
        "block 1, view 0",
    ]
    assert facts.units.present == 2 and facts.units.missing == 1 and facts.measured_units == 2
    assert shown(facts).count("\nerror: ") == 3


def test_samples_are_found_by_key_or_number(cache: Cache) -> None:
    assert find_sample(cache, "image007") == find_sample(cache, "7") == find_sample(cache, 7) == 7
    for wrong in ("image999", "-1", "10", 10):
        with pytest.raises(DataError):
            find_sample(cache, wrong)


def test_what_can_not_be_shown_is_refused_with_the_reason(cache: Cache) -> None:
    with pytest.raises(CacheError, match=r"'image004'.*quarantined \(not an image\)"):
        inspect(cache.root, sample=4)
    with pytest.raises(CacheError, match="view 3"):
        inspect(cache.root, sample=0, view=3)
    with pytest.raises(CacheError, match="block 1, view 2"):
        inspect(cache.root, sample=7, view=2)
    with pytest.raises(CodecError, match=r"1\.5"):
        inspect(cache.root, blend=1.5)
    with pytest.raises(CacheError, match="no cache"):
        inspect(cache.root / "nothing")
    (cache.root.parent / "file").touch()
    with pytest.raises(PathError, match="file is a file, expected a folder; give another one"):
        inspect(cache.root, sample=0, png=cache.root.parent / "file" / "x.png")


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_shown_as_they_are_in_aligned_columns(cache: Cache, terminal: bool) -> None:
    facts = inspect(cache.root, sample=1, blend=1.0)
    rows = shown(facts, terminal).splitlines()[-3:]
    words = {"a very long class name indeed": "a very long c…", "n01440764": "tench"}
    cells = [[words.get(c, c) for c in row] for row in one_sample(facts).cells]
    width = max(len(c) for row in cells for c in row)
    assert rows == [("  " + "  ".join(c.ljust(width) for c in row)).rstrip() for row in cells]
    assert any("bee [bold]" in row for row in rows)


def test_the_grid_fits_the_terminal(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, grid=(2, 7), views=1, classes=["word" * 5] + [c * 16 for c in "abcd"])
    facts = inspect(cache.root, sample=1, blend=1.0)
    narrow, piped = (shown(facts, terminal).splitlines()[-2:] for terminal in (True, False))
    assert max(map(len, narrow)) <= 80 < max(map(len, piped))


def test_wide_and_hostile_names_keep_the_columns_and_the_terminal(tmp_path: Path) -> None:
    names = ["寿司寿司寿司寿司寿司", "\x1b[31mred\x07", "[/bold]", "x" * 99, "a"]
    cache = make_tiny_cache(tmp_path, classes=names, views=1)
    for sample in range(5):
        text = shown(inspect(cache.root, sample=sample, blend=1.0))
        assert "\x1b" not in text and "\x07" not in text
        cells = describe_sample(cache, sample, 0, 1.0).cells
        for row, shares in zip(text.splitlines()[-3:], cells, strict=True):
            assert cell_len(row) <= 2 + 3 * 14 + 2 * 2
            assert ("[/bold]" in shares) == ("[/bold]" in row)
    sample_picture(cache, look_at(cache, [1], 0, 0)[0])


def test_a_terminal_gets_a_table_and_a_pipe_gets_lines(cache: Cache) -> None:
    facts = inspect(cache.root, sample=0)
    assert "\nunits: 5 of 6 present (3 views), 1 missing" in shown(facts, width=20)
    assert "units         " in shown(facts, terminal=True)


@pytest.mark.parametrize("codecs", [("envelope",), ("int8",), ("topk:3", "envelope")])
def test_pictures_have_six_panels_of_at_least_224_pixels(tmp_path: Path, codecs: tuple[str, ...]) -> None:
    cache = make_tiny_cache(tmp_path, codecs=codecs, views=1)
    one = sample_picture(cache, look_at(cache, [0], 0, 0)[0])
    several = sheet(cache, [0, 1, 9], 0)
    assert one.width >= 3 * 224 and one.height >= 2 * 224
    assert several.width >= 6 * 224 and several.height >= 3 * 224
    assert sheet(cache, [0, 1, 9], 0).tobytes() == several.tobytes()
    with pytest.raises(CacheError, match="at least one"):
        sheet(cache, [], 0)


def test_a_png_is_written_for_a_sample_or_for_a_few(cache: Cache, tmp_path: Path) -> None:
    facts = inspect(cache.root, sample=0, png=tmp_path / "new" / "one.png")
    assert facts.png is not None and facts.png == facts.facts["png"]
    with Image.open(facts.png) as one:
        assert one.format == "PNG" and one.tobytes() == sample_picture(cache, look_at(cache, [0], 0, 0)[0]).tobytes()
    assert "one.png" in shown(facts)


def test_inspecting_changes_nothing(cache: Cache, tmp_path: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in cache.root.rglob("*")}
    inspect(cache.root, sample=0, png=tmp_path / "x.png")
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in cache.root.rglob("*")} == before
    assert open_cache(cache.root).content_root() == cache.content_root()
