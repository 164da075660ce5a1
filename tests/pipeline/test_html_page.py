"""`cskd inspect --html`: one file, nothing from outside, and what it shows is what stage 2 feeds."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cskd import cli
from cskd.codecs.base import BLEND_ONE
from cskd.codecs.winners import Winners
from cskd.dataset.inventory import Inventory
from cskd.errors import CacheError, PathError
from cskd.loading.cached_views import find_sample
from cskd.method.ckf import blend_at
from cskd.pipeline.look.html_data import DECAYS, STEPS
from cskd.pipeline.look.html_figures import Figures
from cskd.pipeline.look.html_page import embedded, page_of
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.look.inspect_sample import cached_view, margin, replay
from cskd.pipeline.outputs import PAGE_START
from cskd.store.cache import Cache
from tests.caches import make_tiny_cache

HOSTILE = [
    "</script><script>hacked = 1</script>",
    "<img src=x onerror='hacked = 1'>",
    "\"'><b>&amp;",
    "\u202eabc\u2028",
    "%%DATA%%",
]


def data_of(page: Path | bytes) -> dict[str, Any]:
    """The JSON of a page, found as a browser finds it."""
    text = (page if isinstance(page, bytes) else page.read_bytes()).decode()
    found: dict[str, Any] = json.loads(parsed(text).inside["application/json"])
    return found


class Parsed(html.parser.HTMLParser):
    """The elements of a page, its script, style and data, and the policy."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self.at = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.at = dict(attrs).get("type") or tag

    def handle_data(self, data: str) -> None:
        if self.at in ("script", "style", "application/json", "title"):
            self.inside[self.at] = self.inside.get(self.at, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.at = ""


def parsed(text: str) -> Parsed:
    parser = Parsed()
    parser.feed(text)
    return parser


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two blocks of five samples with names that HTML would take for its own, sample 4 quarantined, one unit missing."""
    folder = tmp_path_factory.mktemp("page")
    return make_tiny_cache(folder, ("envelope", "int8"), views=5, quarantine=[4], skip=[(1, 2)], classes=HOSTILE)


@pytest.fixture(scope="module")
def page(cache: Cache) -> Path:
    inspect(cache.root, html=cache.root.parent / "page.html", seed=3)
    return cache.root.parent / "page.html"


@pytest.fixture(scope="module")
def data(page: Path) -> dict[str, Any]:
    return data_of(page)


def test_a_page_asks_for_nothing_and_runs_its_own_script_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = parsed(text)
    for tag, attrs in found.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs), (tag, attrs)
        for name in ("src", "href", "srcset", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:,")), (tag, attrs)
    assert [tag for tag, _ in found.tags].count("script") == 2 and "img" not in {tag for tag, _ in found.tags}
    assert "@import" not in text and "url(" not in found.inside["style"] and "//" not in found.inside["style"]
    policy = next(attrs["content"] for _, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(found.inside[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_names_of_strangers_stay_text(page: Path, data: dict[str, Any]) -> None:
    shown = {name for _, name in data["names"].values()}
    assert shown <= {*HOSTILE[:3], "\\u202eabc\\u2028", HOSTILE[4]} and len(shown) == 5
    raw = page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    assert not re.search("[<>&\u2028\u202e]", raw)
    title = parsed(page_of({}, HOSTILE[0] + HOSTILE[3]).decode()).inside["title"]
    assert title == HOSTILE[0] + "\\u202eabc\\u2028"
    assert json.loads(embedded({HOSTILE[0]: ["a\nb", 1.5, None]})) == {HOSTILE[0]: ["a\\nb", 1.5, None]}


def taught(view: dict[str, Any], blend: int) -> list[int]:
    """The rule of the page's script, in Python."""
    ends = np.cumsum(view["n"])
    cells = []
    for end, count in zip(ends.tolist(), view["n"], strict=True):
        active = [view["c"][i] for i in range(end - count, end) if view["s"][i] < blend]
        cells.append(active[-1] if active else view["teacher"])
    return cells


@pytest.mark.parametrize("codecs", [("envelope", "int8"), ("int8",), ("topk:2",)])
def test_cells_have_the_class_that_stage_2_reads_at_every_step(
    cache: Cache, data: dict[str, Any], codecs: tuple[str, ...], tmp_path: Path
) -> None:
    if codecs != ("envelope", "int8"):
        cache = make_tiny_cache(tmp_path, codecs, views=1, n=5)
        inspect(cache.root, html=tmp_path / "page.html", samples=4, measured_units=0)
        data = data_of(tmp_path / "page.html")
    name = cache.hard_codec
    assert (
        data["codec"] == name and data["exact"] == (name == "envelope") and data["soft"] in codecs[-1].replace(":", "")
    )
    starts = {s + d for sample in data["samples"] for view in sample["views"] for s in view["s"] for d in (0, 1)}
    blends = {b for decay in DECAYS for b in data["blends"][decay][:: 5 if name == "envelope" else 67]}
    for sample in data["samples"][:3]:
        for view in sample["views"][:2]:
            cached = cached_view(cache, sample["i"], view["v"])
            hard = cache.codecs[name].hard
            for blend in sorted({*(sorted(starts)[:20]), *blends, 0, BLEND_ONE}):
                assert taught(view, blend) == hard(cached.targets[name], blend).reshape(-1).tolist(), blend
            assert view["margin"] == round(float(margin(cache.codecs[name], cached.targets[name]).mean()), 4)
            assert len(view["entropy"]) == len(view["n"])


def test_the_slider_has_the_blends_of_stage_2(data: dict[str, Any]) -> None:
    assert data["one"] == BLEND_ONE and data["steps"] == STEPS
    for decay, end in (("linear", 0), ("quadratic", 0), ("cosine", 0), ("local", BLEND_ONE), ("global", 0)):
        assert data["blends"][decay] == [*(blend_at(e, STEPS, decay) for e in range(STEPS)), end]  # type: ignore[arg-type]


def pixels(uri: str) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,")))) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_are_the_replayed_views_and_facts_those_of_the_unit(cache: Cache, data: dict[str, Any]) -> None:
    modes = Counter[str]()
    for sample in data["samples"]:
        assert pixels(sample["src"]).shape == (sample["size"][1], sample["size"][0], 3)
        assert (
            sample["key"] == cache.inventory.key(sample["i"]) and sample["label"] == cache.inventory.label[sample["i"]]
        )
        for view in sample["views"]:
            cached = cached_view(cache, sample["i"], view["v"])
            modes[view["mode"]] += 1
            assert np.array_equal(pixels(view["src"]), replay(cache, cached).round())
            assert (
                view["seed"] == f"{int(cached.fields['seed']):016x}"
                and view["digest"] == f"{cached.fields['digest']:08x}"
            )
            assert (view["partner"] or {}).get("i") == cached.partner and view["mode"] == cached.mode
            assert view["lam"] == cached.fields["lam"] and view["words"][0].startswith("crop ")
            assert view["box"] == (cached.fields["box"].tolist() if cached.mode == "cutmix" else None)
            assert view["meant"] in (sample["label"], (view["partner"] or sample)["label"])
    assert set(modes) == {"unmixed", "mixup", "cutmix"}


def test_the_figures_count_every_row_of_their_units(cache: Cache, data: dict[str, Any]) -> None:
    # Views 0, 1, 2 and 4 of the first block, 0, 1, 3 and 4 of the other.
    figures, rows = data["figures"], 4 * 4 + 5 * 4
    assert figures["units"] == 8 and figures["views"] == rows
    assert sum(n for *_, n in figures["matrix"]["counts"]) == rows == sum(row["n"] for row in figures["agreement"])
    assert sum(n for _, n in figures["segments"]) == sum(figures["margins"]) == 9 * rows
    right = sum(n for label, found, n in figures["matrix"]["counts"] if label == found)
    assert figures["right"] == right and sum(n for *_, n in figures["mistakes"]) <= rows - right
    shown = Counter((v["meant"], v["teacher"]) for s in data["samples"] for v in s["views"])
    assert shown == {(label, found): n for label, found, n in figures["matrix"]["counts"]}  # all are on this page
    agree = np.zeros(3)
    for sample in data["samples"]:
        for view in sample["views"]:
            labels = {sample["label"], (view["partner"] or sample)["label"]}
            agree += [np.mean([c in labels for c in taught(view, blend)]) for blend in (BLEND_ONE, BLEND_ONE // 2, 0)]
    total = np.sum([np.multiply(row["shares"], row["n"]) for row in figures["agreement"]], axis=0)
    assert np.allclose(total, agree, atol=1e-3)


def test_a_matrix_of_many_classes_shows_mistakes_with_pictures_and_counts_the_rest() -> None:
    first = np.arange(500, dtype=np.uint16) % 90
    none = np.zeros(0, np.uint16)
    label = np.where(np.arange(500) % 3, first, 89 - first).astype(np.int64)
    fields: dict[str, np.ndarray[Any, Any]] = {"mode": np.zeros(500, np.uint8), "lam": np.zeros(500, np.uint16)}
    figures = Figures(90)
    figures.add(Winners(first, np.zeros((500, 1, 2), np.int64), none, none), label, label, fields)
    shown = [(41, 48), (7, 7), (86, 3)]
    facts = figures.facts(shown)
    assert len(facts["matrix"]["classes"]) == 24 and {41, 48, 3, 86} <= set(facts["matrix"]["classes"])
    counts = {(row, column): n for row, column, n in facts["matrix"]["counts"]}
    assert sum(counts.values()) == 500 and counts[-1, -1] > 300
    assert counts[41, 48] == sum((label == 41) & (first == 48)) > 0
    assert len(facts["agreement"]) == 24 and facts["classes_seen"] == 60
    assert facts["mistakes"][0][2] == max(
        n for (row, column), n in counts.items() if row != column and -1 not in (row, column)
    )


def test_the_choice_of_samples_is_that_of_the_seed(cache: Cache, data: dict[str, Any], tmp_path: Path) -> None:
    def drawn(name: str, **options: Any) -> list[int]:
        facts = inspect(cache.root, html=tmp_path / name, samples=2, measured_units=0, **options).html
        samples = [s["i"] for s in data_of(tmp_path / name)["samples"]]
        assert facts and facts.samples == len(samples) == 2 and facts.bytes == (tmp_path / name).stat().st_size
        return samples

    assert sorted(s["i"] for s in data["samples"]) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert drawn("a", seed=1) == drawn("b", seed=1) != drawn("c", seed=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert drawn("d", sample="image007", view=3)[0] == 7
    assert 3 in [v["v"] for v in data_of(tmp_path / "d")["samples"][0]["views"]]


def test_the_command_of_a_sample_finds_it(cache: Cache, data: dict[str, Any], tmp_path: Path) -> None:
    for sample in data["samples"]:
        words = shlex.split(sample["command"])
        assert words[:3] == ["cskd", "inspect", str(cache.root)]
        assert find_sample(cache, words[3].removeprefix("--sample=")) == sample["i"]


def remove_shards(root: Path, inventory: Inventory) -> None:
    shutil.rmtree(inventory.root)


def cut_an_image(root: Path, inventory: Inventory) -> None:
    raw = bytearray(inventory.shard_path(0).read_bytes())
    raw[int(inventory.offset[1]) + 50] ^= 1
    inventory.shard_path(0).write_bytes(raw)


def break_units(root: Path, inventory: Inventory) -> None:
    next(root.glob("units/b00000/v0000.envelope.*")).write_bytes(b"no zip")
    next(root.glob("units/b00001/v0001.envelope.*")).unlink()
    (root / "commits" / "b00001" / "v0000.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "samples", "pictures"),
    [(remove_shards, 10, "none"), (cut_an_image, 10, "some"), (break_units, 5, "all")],
)
def test_a_damaged_cache_is_shown_as_far_as_it_goes(
    damage: Callable[[Path, Inventory], None], samples: int, pictures: str, tmp_path: Path
) -> None:
    cache = make_tiny_cache(tmp_path, views=2)
    damage(cache.root, cache.inventory)
    found = inspect(cache.root, html=tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    views = [view for sample in data["samples"] for view in sample["views"]]
    assert len(data["samples"]) == samples and all(len(view["n"]) == 9 for view in views)
    without = [view for view in views if view["src"] is None]
    assert found.html and found.html.without_picture == len(without)
    assert {"none": len(without) == len(views), "some": 2 <= len(without) <= 4, "all": not without}[pictures]
    assert all(view["error"] and "image" in view["error"] for view in without)
    assert len({*data["facts"]["errors"], *data["errors"]}) == (3 if damage is break_units else 0)


def test_a_cache_without_a_unit_has_no_page(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, views=1, skip=[(0, 0), (1, 0)])
    with pytest.raises(CacheError, match="no unit to show"):
        inspect(cache.root, html=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_replaces_pages_only(
    cache: Cache, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.html").write_text("<!doctype html>\n<p>precious")
    with pytest.raises(PathError, match="is no page of"):
        inspect(cache.root, html=tmp_path / "mine.html")
    line = f"inspect {cache.root} --html {tmp_path / 'page.html'} --samples 2 --seed 1"
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["cskd", *line.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code and re.search(r"page\.html: 2 samples, \d views, 0\.\d MB", capsys.readouterr().out)
    assert (tmp_path / "page.html").read_bytes().startswith(PAGE_START)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
