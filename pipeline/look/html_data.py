"""What the page of `cskd inspect --html` shows, as JSON: samples with their views and targets, and the figures of their units.

draw      some blocks, and samples and views of each: a function of the seed
read      each unit once: the figures of all its rows, and the views of the samples that were drawn
replay    each view as stage 2 makes it, its digest checked; where that fails, the reason stands in its place
targets   the class of each cell from which blend on (`cskd.codecs.winners`), so that a browser compares whole numbers only:
          a cell has class k iff start_k < blend <= start_k+1, and ties were settled when the starts were made

Shapes: h w teacher grid.
"""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cskd.codecs.base import BLEND_ONE
from cskd.codecs.winners import winners
from cskd.dataset.inventory import evenly
from cskd.errors import CacheError, CskdError
from cskd.method.ckf import blend_at
from cskd.pipeline.draw.pictures import CLASS_COLOURS, OTHER
from cskd.pipeline.draw.wordnet import readable
from cskd.pipeline.look.html_figures import Figures, meant_labels
from cskd.pipeline.look.inspect_sample import CachedView, entropy, read_units, replay, view_of
from cskd.pipeline.look.views_shown import Said, draw_samples, view_key
from cskd.store.cache import Cache
from cskd.store.commit import Commit
from cskd.store.format import Unit
from cskd.views.digest import Recorded
from cskd.views.maker import ViewMaker
from cskd.views.mixing import CUTMIX, NONE
from cskd.views.recipe import described, sample_params

VIEWS = 4  # of each sample
STEPS = 200  # of the slider over training
DECAYS = ("linear", "quadratic", "cosine", "local", "global")
SIDE = 224  # pixels of a picture; larger ones are brought to it
PARTNER_SIDE = 72
EXACT_SIDE = 64  # up to which a picture is kept as it is
SAMPLE_BYTES = 64_000  # that the pictures of a sample may take as text; 64 samples and the rest stay under 5 MB
QUALITIES = (72, 55, 38, 22)  # of WebP, the best one first that keeps to it

Unit2 = tuple[int, int]  # block, view
Say = Callable[[Sequence[NDArray[np.float32]]], list[Said]]  # a student, see `student_look.Compared.say`


@dataclass
class _Page:
    """What is gathered on the way."""

    cache: Cache
    recorded: Recorded
    maker: ViewMaker
    figures: Figures
    say: Say | None = None
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    shown: list[tuple[int, int]] = field(default_factory=list)
    classes: set[int] = field(default_factory=set)
    errors: dict[Unit2, str] = field(default_factory=dict)
    images: dict[int, NDArray[np.uint8] | str] = field(
        default_factory=dict
    )  # decoded, or why not; of one block at a time


def page_data(
    cache: Cache,
    commits: Mapping[Unit2, Commit],
    count: int,
    seed: int,
    samples: Sequence[int] = (),
    view: int = 0,
    say: Say | None = None,
) -> dict[str, Any]:
    """Samples, figures and blends of a page.

    Args:    commits, by (block, view), of the units that may be read; count of samples; seed of their choice; samples, that the
             page opens with, and the view of them that it has in any case; say, what a student says of views.
    Raises:  CacheError where no unit can be read.
    """
    bad = np.zeros(cache.inventory.n, bool)
    for (block, _), commit in commits.items():
        bad[[cache.inventory.block_range(block)[0] + int(i) for i in commit.quarantine]] = True
    recorded = Recorded(bad, dict(cache.manifest.versions or {}))
    page = _Page(cache, recorded, ViewMaker(cache.inventory, cache.recipe), Figures(len(cache.classes)), say)
    views = _views_of(list(commits), view if samples else None)
    drawn = draw_samples(cache, bad, list(views), count, seed, samples)
    for block, chosen in drawn.items():
        page.images.clear()
        for view in views[block]:
            try:
                _read(page, block, view, chosen)
            except CskdError as e:
                page.errors[block, view] = str(e)
    order = [i for chosen in drawn.values() for i in chosen if i in page.samples]
    if not order:
        raise CacheError(f"{cache.location} has no unit to show; `cskd verify {cache.location}` says what is wrong")
    figures = page.figures.facts(page.shown)
    page.classes |= set(figures["matrix"]["classes"]) | {row["c"] for row in figures["agreement"]}
    page.classes |= {c for *pair, _ in figures["mistakes"] for c in pair}
    words = readable(cache.classes)
    return {
        "grid": list(cache.grid),
        "one": BLEND_ONE,
        "steps": STEPS,
        "blends": {decay: blends(decay) for decay in DECAYS},
        "names": {str(c): [words[c], cache.classes[c]] for c in sorted(page.classes)},
        "samples": [_finished(page.samples[i]) for i in order],
        "figures": figures,
        "codec": cache.hard_codec,
        "exact": cache.codecs[cache.hard_codec].exact_hard,
        "soft": _soft_codec(cache),
        "cells": cache.codecs[cache.hard_codec].cells,
        "classes": len(cache.classes),
        "colours": [*CLASS_COLOURS, OTHER],
        "drawn": {"seed": seed, "blocks": len(drawn), "of_blocks": cache.blocks, "of_samples": cache.inventory.n},
        "errors": [f"block {b}, view {v}: {why}" for (b, v), why in sorted(page.errors.items())],
    }


def blends(decay: str) -> list[int]:
    """The blend, in 1/65536, at each of STEPS steps of training as stage 2 computes it, and at its end."""
    end = BLEND_ONE if decay == "local" else 0
    return [*(blend_at(step, STEPS, decay) for step in range(STEPS)), end]  # type: ignore[arg-type]


def command(cache: str, data: Path | None, key: str, sample: int) -> str:
    """The command that shows one sample; a key that no shell can be given stands as its number."""
    shown = f"--sample={shlex.quote(key if key.isprintable() else str(sample))}"
    moved = "" if data is None else f" --data {shlex.quote(str(data))}"
    return f"cskd inspect {shlex.quote(cache)}{moved} {shown}"


def _views_of(usable: Sequence[Unit2], wanted: int | None) -> dict[int, list[int]]:
    """The views shown of each block that has any, `wanted` among them."""
    by_block: dict[int, list[int]] = {}
    for block, view in sorted(usable):
        by_block.setdefault(block, []).append(view)
    return {
        block: sorted({*(views[i] for i in evenly(len(views), VIEWS)), *(v for v in views if v == wanted)})
        for block, views in by_block.items()
    }


def _read(page: _Page, block: int, view: int, chosen: Sequence[int]) -> None:
    """One unit: its rows to the figures, the views of the chosen samples to the page."""
    cache, name = page.cache, page.cache.hard_codec
    units = read_units(cache, block, view)
    codec, unit, low = cache.codecs[name], units[name], cache.inventory.block_range(block)[0]
    # Of a codec that holds whole maps only the rows that are shown: 8,192 maps of 1,000 classes take gigabytes.
    rows = np.arange(len(unit.position))
    if name != "envelope":
        rows = np.flatnonzero(np.isin(unit.position, np.array(chosen) - low))
    fields = {key: array[rows] for key, array in unit.fields.items()}
    label, partner = _labels(cache, low, fields)
    page.figures.add(winners(codec, codec.take(unit.targets, rows)), label, partner, fields)
    for sample in chosen:
        if sample not in page.samples:
            page.samples[sample] = _sample(page, sample)
        page.samples[sample]["views"].append(_view(page, units, sample, view))


def _labels(cache: Cache, low: int, fields: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of rows of a unit: each sample's label and its partner's, its own again where it has none."""
    label = fields["label"].astype(np.int64)
    unmixed = fields["mode"] == NONE
    return label, np.where(unmixed, label, cache.inventory.label[low + np.where(unmixed, 0, fields["partner"])])


def _sample(page: _Page, sample: int) -> dict[str, Any]:
    """What does not depend on the view."""
    label = int(page.cache.inventory.label[sample])
    page.classes.add(label)
    image = _image(page, sample)
    missing = isinstance(image, str)
    return {
        "i": sample,
        "key": page.cache.inventory.key(sample),
        "label": label,
        "size": None if isinstance(image, str) else [image.shape[1], image.shape[0]],
        "src": None if isinstance(image, str) else Image.fromarray(image),
        "error": image if missing else None,
        "views": [],
    }


def _image(page: _Page, sample: int) -> NDArray[np.uint8] | str:
    """The decoded image, or why there is none."""
    if sample not in page.images:
        try:
            page.images[sample] = page.maker.image(sample)
        except CskdError as e:
            page.images[sample] = str(e)
    return page.images[sample]


def _view(page: _Page, units: Mapping[str, Unit], sample: int, view: int) -> dict[str, Any]:
    """One view: how it was made, what the teacher saw, what each cell is taught."""
    cache, name = page.cache, page.cache.hard_codec
    cached = view_of(cache, units, sample, view)
    won = winners(cache.codecs[name], cached.targets[name])
    teacher = int(won.first[0])
    low = cache.inventory.block_range(cache.inventory.block_of(sample))[0]
    fields = {key: np.asarray(value)[None] for key, value in cached.fields.items()}
    meant = int(meant_labels(won.first, *_labels(cache, low, fields), fields)[0])
    page.shown.append((meant, teacher))
    local = won.at(BLEND_ONE)[0]
    page.classes.update((meant, teacher, *won.cls.tolist()))
    image = _image(page, sample)
    partner_labels = [] if cached.partner is None else [int(cached.partner_fields["label"])]
    facts = {
        "v": view,
        "seed": f"{int(cached.fields['seed']):016x}",
        "digest": f"{int(cached.fields['digest']):08x}",
        "mode": cached.mode,
        "share": round(cached.share, 5),
        "lam": int(cached.fields["lam"]),
        "box": [int(x) for x in cached.fields["box"]] if cached.fields["mode"] == CUTMIX else None,
        "partner": _partner(page, cached),
        "teacher": teacher,
        "meant": meant,
        "margin": round(float(won.margin.mean()), 4),
        "differ": round(1 - float(np.unique(local, return_counts=True)[1].max()) / local.size, 4),
        "n": won.n_extra.reshape(-1).tolist(),
        "c": won.cls.tolist(),
        "s": won.start.tolist(),
        "said": None,
        "words": None,
        "crop": None,
        "src": None,
        "error": None,
    }
    if (soft := _soft_codec(cache)) is not None:
        facts["entropy"] = entropy(cache.codecs[soft], cached.targets[soft]).round(3).reshape(-1).tolist()
    if not isinstance(image, str):
        height, width = image.shape[:2]
        params = sample_params(int(cached.fields["seed"]), height, width, cache.recipe)
        facts["words"] = described(params)
        facts["crop"] = _crop(params.crop, params.padding, height, width, params.size)
    said = None
    try:
        pixels = replay(cache, cached, page.recorded, page.maker)
    except CskdError as e:
        facts["error"] = str(e)
    else:
        facts["src"] = Image.fromarray(pixels.round().astype(np.uint8))
        if page.say is not None:
            said = page.say([pixels])[0].classes
            page.classes.update(np.unique(said).tolist())
            facts["said"] = said.reshape(-1).tolist()
    facts["slots"] = list(view_key(won, [cached.label, *partner_labels], said).slots)
    return facts


def _partner(page: _Page, cached: CachedView) -> dict[str, Any] | None:
    if cached.partner is None:
        return None
    label = int(cached.partner_fields["label"])
    page.classes.add(label)
    image = _image(page, cached.partner)
    picture = None
    if not isinstance(image, str):
        picture = Image.fromarray(image)
        picture.thumbnail((PARTNER_SIDE, PARTNER_SIDE), Image.Resampling.LANCZOS)
    return {"i": cached.partner, "key": page.cache.inventory.key(cached.partner), "label": label, "src": picture}


def _crop(crop: Any, padding: int, height: int, width: int, size: int) -> list[float]:
    """Top, left, height and width of a crop as shares of the image, which a padded crop may leave; it was resized first."""
    whole = (size, size) if padding else (height, width)
    top, left = crop.top - padding, crop.left - padding
    return [round(x, 5) for x in (top / whole[0], left / whole[1], crop.height / whole[0], crop.width / whole[1])]


def _soft_codec(cache: Cache) -> str | None:
    return next((name for name, codec in cache.codecs.items() if codec.soft and codec.cells), None)


def _finished(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with its pictures as text, in the best quality that keeps to SAMPLE_BYTES."""
    holders = [sample, *sample["views"], *(v["partner"] for v in sample["views"] if v["partner"] is not None)]
    pictures = [(holder, holder["src"]) for holder in holders if holder["src"] is not None]
    for quality in QUALITIES:
        texts = [_data_uri(picture, quality) for _, picture in pictures]
        if sum(map(len, texts)) <= SAMPLE_BYTES:
            break
    for (holder, _), text in zip(pictures, texts, strict=True):
        holder["src"] = text
    return sample


def _data_uri(picture: Image.Image, quality: int) -> str:
    if max(picture.size) > SIDE:
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=quality, method=4, lossless=max(picture.size) <= EXACT_SIDE)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
