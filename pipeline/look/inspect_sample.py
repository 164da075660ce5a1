"""One sample of a cache: find it, replay what the teacher saw, show its targets as names and as pictures.

find      the row of the unit that holds this view of it
replay    the same pixels from the seed, digest checked, mixed with the partner's
show      class names in a grid; image, top-1, margin or entropy, and CKF targets as panels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cskd.codecs import Arrays, Codec
from cskd.codecs.base import BLEND_ONE, quantise_blend
from cskd.errors import CacheError, CskdError
from cskd.pipeline.draw.pictures import (
    GAP,
    class_key,
    class_map,
    grid,
    heading,
    legend,
    panel,
    photo,
    scalar_map,
    scale_bar,
    stack,
)
from cskd.pipeline.draw.wordnet import readable
from cskd.pipeline.look.inspection import MixingFacts, SampleFacts
from cskd.store.cache import Cache
from cskd.store.format import Unit
from cskd.teacher.arithmetic import BLENDS
from cskd.views.digest import Recorded, check_view, pixel_crc
from cskd.views.maker import ViewMaker
from cskd.views.mixing import MODES, NONE, own_share


@dataclass(frozen=True)
class CachedView:
    """One view of one sample, as its unit holds it. `fields` are its row of the unit; `partner` is a sample or None."""

    sample: int
    key: str
    view: int
    fields: dict[str, Any]
    targets: dict[str, Arrays]  # of every codec, one sample each
    partner: int | None
    partner_fields: dict[str, Any]

    @property
    def label(self) -> int:
        return int(self.fields["label"])

    @property
    def mode(self) -> str:
        return MODES[int(self.fields["mode"])]

    @property
    def share(self) -> float:
        """The sample's own share of pixels and label."""
        return float(own_share(self.fields["mode"], self.fields["lam"]))


def cached_view(cache: Cache, sample: int, view: int) -> CachedView:
    """One view of one sample with the targets of every codec.

    Raises:  CacheError when the unit is missing or damaged, or the sample is quarantined.
    """
    if not 0 <= view < cache.views:
        raise CacheError(f"view {view} is outside this cache's 0..{cache.views - 1}; give one of these with --view")
    return view_of(cache, read_units(cache, cache.inventory.block_of(sample), view), sample, view)


def read_units(cache: Cache, block: int, view: int) -> dict[str, Unit]:
    """One view of one block by every codec. Raises CacheError when the unit is missing or damaged."""
    return {name: cache.read(block, view, name) for name in cache.codecs}


def view_of(cache: Cache, units: Mapping[str, Unit], sample: int, view: int) -> CachedView:
    """The view of a sample out of the units of its block. Raises CacheError when the sample is quarantined."""
    block = cache.inventory.block_of(sample)
    first = cache.inventory.block_range(block)[0]
    key = cache.inventory.key(sample)
    unit = next(iter(units.values()))
    row = int(np.searchsorted(unit.position, sample - first))
    if row == len(unit.position) or unit.position[row] != sample - first:
        commit = cache.commit_of(block, view)
        reason = commit.quarantine[str(sample - first)] if commit else "unknown"
        raise CacheError(f"sample '{key}' has no targets: it is quarantined ({reason})")
    targets = {name: cache.codecs[name].take(one.targets, np.array([row])) for name, one in units.items()}
    fields = {name: array[row] for name, array in unit.fields.items()}
    partner, partner_fields = None, {}
    if fields["mode"] != NONE:
        partner = first + int(fields["partner"])
        partner_row = int(np.searchsorted(unit.position, fields["partner"]))
        partner_fields = {name: array[partner_row] for name, array in unit.fields.items()}
    return CachedView(sample, key, view, fields, targets, partner, partner_fields)


def replay(
    cache: Cache, cached: CachedView, recorded: Recorded | None = None, maker: ViewMaker | None = None
) -> NDArray[np.float32]:
    """The mixed image that the teacher saw, to the last bit: float32 [size, size, 3], RGB in 0..255.

    A MixUp is no whole numbers: rounded, it gives a teacher other targets. recorded, maker: for many views of one cache,
    its `recorded()` and a maker of its views.

    Raises:  ReplayError when a digest differs; DataError when the image shards are missing or were changed.
    """
    import torch

    from cskd.views.mix_pixels import mix_pixels

    maker, recorded = maker or ViewMaker(cache.inventory, cache.recipe), recorded or cache.recorded()
    rows = [(cached.sample, cached.fields)]
    if cached.partner is not None:
        rows.append((cached.partner, cached.partner_fields))
    pixels = []
    for i, (sample, fields) in enumerate(rows):
        pixels.append(maker.view(maker.image(sample), int(fields["seed"])))
        partner = rows[-1 - i][0]
        check_view(cache.inventory, cache.recipe, recorded, sample, cached.view, fields, partner, pixel_crc(pixels[i]))
    tensors = (np.array([f[name] for _, f in rows], np.int64) for name in ("mode", "lam", "box"))
    mode, lam, box = (torch.from_numpy(t) for t in tensors)
    mate = torch.arange(len(rows)).flip(0)
    mixed = mix_pixels(torch.from_numpy(np.stack(pixels)), mate, mode, lam, box)[0]
    return mixed.permute(1, 2, 0).contiguous().numpy()


def cell_classes(cache: Cache, cached: CachedView, blend: float) -> NDArray[np.uint16]:
    """CKF targets of one view from the best codec of the cache: uint16 [h, w]. CodecError outside [0, 1]."""
    name = cache.hard_codec
    return np.asarray(cache.codecs[name].hard(cached.targets[name], quantise_blend(blend))[0])


def margin(codec: Codec, arrays: Arrays) -> NDArray[np.float64]:
    """Blend up to which each cell's target is the image's class: float64 [h, w] of the first sample, 1 = at every one.

    As the blend rises a cell leaves the image's class once and for good (it is the first piece of an upper envelope),
    so the blend is found by bisection, whatever the codec.
    """
    low = np.zeros(codec.grid, np.int64)
    high = np.full(codec.grid, BLEND_ONE + 1)
    image_class = codec.hard(arrays, 0)[0]
    while (high - low).max() > 1:
        middle = (low + high) // 2
        stays = np.zeros(codec.grid, bool)
        for blend in np.unique(middle):
            stays |= (middle == blend) & (codec.hard(arrays, int(blend))[0] == image_class)
        low, high = np.where(stays, middle, low), np.where(stays, high, middle)
    return low / BLEND_ONE


def entropy(codec: Codec, arrays: Arrays) -> NDArray[np.float64]:
    """Entropy of each cell's softmax, nats: float64 [h, w] of the first sample."""
    dense_Khw = codec.logits(arrays)[0][0].astype(np.float64)
    logs = dense_Khw - dense_Khw.max(0)
    logs -= np.log(np.exp(logs).sum(0))
    return np.asarray(-(np.exp(logs) * logs).sum(0))


def describe_sample(cache: Cache, sample: int, view: int, blend: float) -> SampleFacts:
    """One sample as facts: what it is, how it was mixed, whether it replays, and its grid of class names."""
    cached = cached_view(cache, sample, view)
    cells = cell_classes(cache, cached, blend)
    try:
        replay(cache, cached)
        replayed = "equal"
    except CskdError as e:
        replayed = f"no: {e}"
    names = cache.classes
    shown = {names[c] for c in [*np.unique(cells), cached.label]}
    mixing = MixingFacts(cached.mode, cached.share)
    if cached.partner is not None:
        partner_label = names[int(cached.partner_fields["label"])]
        box = [int(v) for v in cached.fields["box"]] if cached.mode == "cutmix" else None
        mixing = MixingFacts(cached.mode, cached.share, cache.inventory.key(cached.partner), partner_label, box)
        shown.add(partner_label)
    words = readable(sorted(shown))
    return SampleFacts(
        sample=sample,
        key=cached.key,
        view=view,
        seed=f"{int(cached.fields['seed']):016x}",
        label=names[cached.label],
        mixing=mixing,
        replay=replayed,
        codec=cache.hard_codec,
        blend=blend,
        image_class=names[int(cell_classes(cache, cached, 0.0)[0, 0])],
        cells=[[names[int(c)] for c in row] for row in cells],
        names=dict(zip(sorted(shown), words, strict=True)),
    )


def sample_picture(cache: Cache, sample: int, view: int, side: int = 320) -> Image.Image:
    """One sample in six panels, two rows of three, `side` pixels each, with a legend.

    Raises:  as `cached_view` and `replay`.
    """
    title, panels, below = _panels(cache, sample, view, side, 3)
    return grid([[title], panels[:3], panels[3:], [below]])


def sheet(cache: Cache, samples: Sequence[int], view: int, side: int = 224) -> Image.Image:
    """Several samples, one a row of six panels, `side` pixels each, with their legends. Raises as `sample_picture`."""
    if not samples:
        raise CacheError("no samples to draw, expected at least one")
    rows = []
    for sample in samples:
        title, panels, below = _panels(cache, sample, view, side, 6)
        rows += [[title], panels, [below]]
    return grid(rows)


def _panels(
    cache: Cache, sample: int, view: int, side: int, columns: int
) -> tuple[Image.Image, list[Image.Image], Image.Image]:
    """Heading, six panels and legend of one sample; heading and legend are as wide as `columns` panels."""
    cached = cached_view(cache, sample, view)
    seen = photo(replay(cache, cached).round().astype(np.uint8), side)
    maps = [cell_classes(cache, cached, blend) for blend in BLENDS]
    image_class = int(maps[-1][0, 0])
    labels = [cached.label]
    mixed = cached.mode
    words = readable(cache.classes)
    if cached.partner is not None:
        labels.append(int(cached.partner_fields["label"]))
        mixed = f"{cached.mode} with {words[labels[1]]}, own share {cached.share:.2f}"
    key = class_key(maps, first=[image_class, *labels])
    values, bar, title, note, top = _values(cache, cached, side)
    panels = [
        panel(seen, "What the teacher saw", mixed),
        panel(class_map(maps[0], key, side, over=seen), "Top-1 of each cell", "local logits, over the image"),
        stack([panel(scalar_map(values, 0.0, top, side), title, note), bar], gap=2),
        panel(class_map(maps[0], key, side), "CKF target, blend 1", "local: each cell for itself"),
        panel(class_map(maps[1], key, side), "CKF target, blend 0.5", "half local, half global"),
        panel(class_map(maps[2], key, side), "CKF target, blend 0", "global: the image's top-1"),
    ]
    marks = {image_class: ["image's top-1"]}
    for label, mark in zip(labels, ("label", "partner's label"), strict=False):
        marks.setdefault(label, []).append(mark)
    names = {c: f"{words[c]} ({', '.join(marks[c])})" if c in marks else words[c] for c in key.classes}
    width = columns * side + (columns - 1) * GAP
    others = len(np.unique(np.stack(maps))) - len(key.classes)
    head = heading(f"{words[cached.label]}:  {cached.key}, view {view}  (replay: equal)", width)
    return head, panels, legend(key, names, others, width)


def _values(cache: Cache, cached: CachedView, side: int) -> tuple[NDArray[np.float64], Image.Image, str, str, float]:
    """The panel of numbers: entropy where a codec holds logits, else the margin. Map, scale, title, note, upper end."""
    soft = [name for name, codec in cache.codecs.items() if codec.soft and codec.cells]
    if soft:
        values = entropy(cache.codecs[soft[0]], cached.targets[soft[0]])
        top = float(np.log(len(cache.classes)))
        bar = scale_bar("0 sure", f"{top:.1f} knows nothing", side)
        return values, bar, "Entropy of each cell", f"nats, from {soft[0]}", top
    name = cache.hard_codec
    values = margin(cache.codecs[name], cached.targets[name])
    bar = scale_bar("0 leaves", "1 agrees", side)
    return values, bar, "Margin of the image's top-1", "blend up to which a cell keeps it", 1.0
