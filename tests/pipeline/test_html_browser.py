"""The page of `cskd inspect --html` in a real Chromium: skipped where there is none, or no playwright (`.[browser]`).

Chromium is the first that is found as a program; playwright's own where it was installed (`playwright install chromium`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd.method.ckf import blend_at
from cskd.pipeline.look.html_data import STEPS
from cskd.pipeline.look.html_page import page_of
from cskd.pipeline.look.inspect_cache import inspect
from cskd.pipeline.look.inspect_sample import cached_view
from cskd.store.cache import Cache
from tests.caches import make_tiny_cache
from tests.pipeline.test_html_page import HOSTILE, data_of

pytestmark = pytest.mark.slow
COLOURS = {"teacher": (0, 114, 178)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium")
        chromium = playwright.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """70 samples in 7x7 cells of five classes, four views."""
    return make_tiny_cache(tmp_path_factory.mktemp("browser"), views=4, n=70, grid=(7, 7))


@pytest.fixture(scope="module")
def page(cache: Cache) -> Path:
    inspect(cache.root, html=cache.root.parent / "page.html")
    return cache.root.parent / "page.html"


class Tab:
    """An open page, what it complained of, and what it asked for from outside."""

    def __init__(self, browser: Any, path: Path, at: str = "", **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self._said(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._asked_something)
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.goto(f"file://{path}{at}")

    def _asked_something(self, dialog: Any) -> None:
        self.complaints.append("dialog")
        dialog.dismiss()

    def _said(self, text: str) -> None:
        if not text.startswith("Canvas2D: Multiple readback"):  # by a test, which reads pixels
            self.complaints.append(text)

    def _asked(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.complaints.append(url)

    def js(self, code: str) -> Any:
        return self.page.evaluate(code)

    def until(self, code: str) -> None:
        """Wait for a condition; playwright's own way would have the page evaluate text, which its policy refuses."""
        for _ in range(100):
            if self.js(code):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(code)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.js("({ ...state })")
        return found

    def cells(self) -> list[int]:
        return [int(c) for c in self.js("[...document.querySelectorAll('.cell')].map((c) => c.dataset.class)")]


@pytest.fixture
def tab(browser: Any, page: Path) -> Iterator[Tab]:
    one = Tab(browser, page)
    yield one
    assert one.complaints == []
    one.context.close()


def test_64_samples_are_drawn_in_less_than_a_second_in_less_than_5_mb(tab: Tab, page: Path) -> None:
    assert page.stat().st_size < 5e6
    assert tab.js("document.documentElement.dataset.ready") == "yes" and tab.page.locator(".card").count() == 64
    assert (
        min(
            tab.js("(() => { const t = performance.now(); fromHash(); return performance.now() - t; })()")
            for _ in range(3)
        )
        < 1000
    )
    assert tab.js("[...document.images].every((i) => i.complete && i.naturalWidth)")


@pytest.mark.parametrize("decay", ["linear", "quadratic", "cosine"])
def test_the_slider_gives_each_cell_what_stage_2_reads(tab: Tab, cache: Cache, decay: str) -> None:
    tab.page.select_option("#decay", decay)
    for step in (0, 1, 40, 101, 150, 199):
        tab.js(f"(() => {{ const p = $('progress'); p.value = {step}; p.dispatchEvent(new Event('input')); }})()")
        sample, view = (int(tab.js(f"current().{what}")) for what in ("sample.i", "view.v"))
        targets = cached_view(cache, sample, view).targets["envelope"]
        hard = cache.codecs["envelope"].hard(targets, blend_at(step, STEPS, decay))[0]  # type: ignore[arg-type]
        assert tab.cells() == hard.reshape(-1).tolist()
        # The card of the same sample has the image's class in its colour, and no other class.
        raw = tab.js(
            "Array.from((([c]) => c.getContext('2d').getImageData(0, 0, 7, 7).data)"
            "([document.querySelector('.card.on canvas')]))"
        )
        blue = np.abs(np.array(raw).reshape(-1, 4)[:, :3] - COLOURS["teacher"]).max(1) < 4
        assert np.array_equal(blue, (hard == targets["global_class"][0]).reshape(-1))
    tab.page.focus("#progress")
    tab.page.keyboard.press("End")
    assert set(tab.cells()) == {int(targets["global_class"][0])}
    assert "blend 0.000" in (tab.page.get_attribute("#progress", "aria-valuetext") or "")


def test_every_view_is_taught_what_the_codec_says(tab: Tab, cache: Cache) -> None:
    for sample in data_of(Path(tab.page.url.removeprefix("file://")))["samples"][::9]:
        for view in sample["views"]:
            targets = cached_view(cache, sample["i"], view["v"]).targets["envelope"]
            blends = sorted({0, 1, 30_000, 65_536, *(s + d for s in view["s"][:30] for d in (0, 1))})
            found = tab.js(
                f"(() => {{ const v = DATA.samples.find((s) => s.i === {sample['i']}).views.find((v) => v.v === {view['v']});"
                f" return {json.dumps(blends)}.map((b) => classesAt(v, b)); }})()"
            )
            for blend, classes in zip(blends, found, strict=True):
                assert classes == cache.codecs["envelope"].hard(targets, blend).reshape(-1).tolist()


def test_filters_filter_and_stand_in_the_address(tab: Tab, browser: Any, page: Path) -> None:
    samples = data_of(page)["samples"]
    wrong = [s for s in samples if any(v["meant"] != v["teacher"] and v["mode"] == "cutmix" for v in s["views"])]
    tab.page.select_option("#f-right", "wrong")
    tab.page.select_option("#f-mix", "cutmix")
    assert 0 < len(wrong) < 64 and tab.page.locator(".card").count() == len(wrong)
    assert f"{len(wrong)} samples of 64" in tab.page.inner_text("#count")
    tab.page.select_option("#f-order", "uncertain")
    margins = tab.js("cards.map((c) => c.view.margin)")
    assert margins == sorted(margins) and tab.js(
        "cards.every((c) => c.view.mode === 'cutmix' && c.view.meant !== c.view.teacher)"
    )
    tab.page.fill("#f-text", "n01440764")
    fewer = tab.page.locator(".card").count()
    assert 0 < fewer < len(wrong)
    tab.until("location.hash.includes('text=n01440764')")
    again = Tab(browser, page, "#" + tab.page.url.split("#")[1])
    assert again.page.locator(".card").count() == fewer and again.page.input_value("#f-order") == "uncertain"
    again.context.close()
    tab.page.fill("#f-text", "no such thing")
    assert "No sample matches" in tab.page.inner_text("#gallery") and tab.page.locator(".card").count() == 0
    tab.page.click("#f-clear")
    assert tab.page.locator(".card").count() == 64


def test_a_cell_of_the_matrix_shows_its_views(tab: Tab) -> None:
    pair = tab.js("document.querySelector('.matrix td.bad [data-pair]').dataset.pair")
    tab.page.click(f".matrix [data-pair='{pair}']")
    label, found = map(int, pair.split(":"))
    shown = tab.js("cards.map((c) => [c.view.meant, c.view.teacher])")
    assert shown and all(one == [label, found] for one in shown)
    assert tab.page.get_attribute(f".matrix [data-pair='{pair}']", "aria-pressed") == "true"
    assert tab.js("passes(current().sample, current().view)")
    tab.page.click("#f-pair")
    assert tab.page.locator(".card").count() == 64


def test_the_keyboard_goes_from_sample_to_sample_view_to_view_and_cell_to_cell(tab: Tab) -> None:
    tab.js("toSection('samples')")
    tab.until("atSamples()")
    first, second = tab.js("cards.slice(0, 2).map((c) => String(c.sample.i))")
    press = tab.page.keyboard.press
    press("ArrowRight")
    assert tab.state()["sample"] == second
    press("ArrowLeft")
    assert tab.state()["sample"] == first
    views = tab.js("current().sample.views.map((v) => String(v.v))")
    press("ArrowDown")
    assert tab.state()["view"] == views[1]
    press("ArrowUp")
    assert tab.state()["view"] == views[0]
    press("m")
    assert tab.state()["over"] == "margin"
    press("m")
    press(".")
    press(".")
    press(",")
    assert tab.state()["step"] == 1
    tab.page.focus(".cell")
    press("ArrowRight")
    press("ArrowDown")
    label = tab.js("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("row 2, column 2: ") and tab.state()["sample"] == first
    assert "row 2, column 2" in tab.page.inner_text(".readout")
    press("Escape")
    press("Space")
    tab.until("state.step > 5")
    press("Space")
    stopped = tab.state()["step"]
    tab.page.wait_for_timeout(200)
    assert tab.state()["step"] == stopped
    press("/")
    assert tab.js("document.activeElement.id") == "f-text"
    press("Escape")
    press("?")
    assert tab.js("$('help').open")


def test_what_can_be_pressed_has_a_name_and_what_is_drawn_has_words(tab: Tab) -> None:
    unnamed = tab.js("""[...document.querySelectorAll("button, select, input, [role=gridcell], img")].filter((e) => {
        const label = e.closest("label") && e.closest("label").textContent.trim();
        return !e.hidden && !(e.getAttribute("aria-label") || e.textContent.trim() || label || e.getAttribute("alt") !== null);
    }).map((e) => e.outerHTML.slice(0, 80))""")
    assert unnamed == []
    assert tab.js(
        "[...document.querySelectorAll('section[aria-labelledby]')].every((s) => $(s.getAttribute('aria-labelledby')))"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_gets_it_all_in_its_width(browser: Any, page: Path, scheme: str) -> None:
    one = Tab(
        browser, page, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme=scheme
    )
    assert one.js("document.documentElement.scrollWidth") <= 390
    assert not one.page.is_visible("#detail")
    one.page.tap(".card >> nth=3")
    assert one.page.is_visible("#detail") and one.js("$('detail').scrollWidth <= $('detail').clientWidth")
    one.page.tap(".cell >> nth=8")
    assert "row 2, column 2" in one.page.inner_text(".readout")
    one.page.tap(".detail .close")
    assert not one.page.is_visible("#detail")
    background = one.js("getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) < 60) == (scheme == "dark")
    assert one.complaints == []
    one.context.close()


def test_names_of_strangers_run_nothing(browser: Any, tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, ("int8",), views=1, n=5, classes=HOSTILE)
    inspect(cache.root, html=tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    for sample, key in zip(data["samples"], HOSTILE, strict=True):
        sample["key"] = key
        sample["views"][0].update(src=None, error=key)
    data["facts"]["cache"] = data["facts"]["teacher"]["model"] = data["about"]["title"] = HOSTILE[0]
    data["errors"], data["about"]["quarantine"] = HOSTILE, [[key, key] for key in HOSTILE]
    (tmp_path / "hostile.html").write_bytes(page_of(data, HOSTILE[0]))
    one = Tab(
        browser,
        tmp_path / "hostile.html",
        "#text=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&over=__proto__&sample=9e9&step=999&x=1",
    )
    assert one.js("document.documentElement.dataset.ready") == "yes" and one.state()["step"] == 0
    for i in range(3):
        one.js(f"(() => {{ setFilter('text', ''); open(cards[{i}].sample, cards[{i}].view, true); point(0); }})()")
    assert (
        one.js("typeof hacked") == "undefined" and one.js("document.querySelectorAll('img[src=x], script').length") == 2
    )
    assert HOSTILE[0] in one.page.inner_text("#identity") and one.complaints == []
    one.context.close()


def test_a_page_without_pictures_says_so_and_shows_the_targets(browser: Any, tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, views=1, n=5)
    shutil.rmtree(cache.inventory.root)
    inspect(cache.root, html=tmp_path / "page.html")
    one = Tab(browser, tmp_path / "page.html")
    assert "5 of 5 views are shown without a picture" in one.page.inner_text("#banners")
    assert len(one.cells()) == 9 and "there is no such file" in one.page.inner_text("#detail") and one.complaints == []
    one.context.close()
