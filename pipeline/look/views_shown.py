"""The views that `cskd inspect` shows: which, what each holds, and one colour and letter for a class wherever it is drawn.

draw      samples named, or a function of a seed
look_at   a view's targets as classes of cells, and what the teacher saw, replayed
facts     the same as JSON

Shapes: h w teacher grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cskd.codecs.base import BLEND_ONE
from cskd.codecs.winners import Winners, winners
from cskd.errors import CskdError
from cskd.pipeline.draw.pictures import UNUSED, ClassKey, class_key
from cskd.pipeline.draw.wordnet import readable
from cskd.pipeline.look.inspect_sample import CachedView, read_units, refuse_view, replay, view_of
from cskd.pipeline.look.inspection import ClassFacts, MixingFacts, SampleFacts, StudentCells
from cskd.seeds import hash64, permutation
from cskd.store.cache import Cache
from cskd.views.digest import Recorded

BLOCKS = 12  # that samples are drawn from, where these have enough: each unit of them is read as a whole
KEY_BLENDS = tuple(BLEND_ONE * step // 8 for step in range(9))  # at which classes are counted for a colour of their own


@dataclass(frozen=True)
class Said:
    """What a student says of a view: the class of its largest patch logit, int64 [h, w], and its softmax probability."""

    classes: NDArray[np.int64]
    probability: NDArray[np.float64]


@dataclass(frozen=True)
class Look:
    """One view. cells: uint16 [h, w], the targets at `blend` / 65536; pixels: float32 [S, S, 3], RGB in 0..255, None where it
    can't be replayed, which `lost` says."""

    cached: CachedView
    labels: tuple[int, ...]  # the sample's, and its partner's where it is mixed
    won: Winners
    blend: int
    cells: NDArray[np.uint16]
    pixels: NDArray[np.float32] | None
    lost: CskdError | None
    said: Said | None = None
    of_image: bool = False  # there are no targets of cells: each shows the image's

    @property
    def image_class(self) -> int:
        return int(self.won.first[0])

    @property
    def key(self) -> ClassKey:
        """Its colours and letters, see `view_key`."""
        return view_key(self.won, self.labels, None if self.said is None else self.said.classes)

    @property
    def mixed(self) -> NDArray[np.float32]:
        """What the teacher saw, float32 [S, S, 3]. Raises what it can't be replayed for."""
        if self.pixels is None:
            raise self.lost or AssertionError
        return self.pixels

    @property
    def seen(self) -> NDArray[np.uint8]:
        """The same as an image, uint8. Raises as `mixed`."""
        return self.mixed.round().astype(np.uint8)

    @property
    def agreement(self) -> float:
        """Share of the cells of which the student says the class that is shown of the teacher."""
        assert self.said is not None
        return float((self.said.classes == self.cells).mean())


def view_key(won: Winners, labels: Sequence[int], said_hw: NDArray[np.int64] | None = None) -> ClassKey:
    """The key of one view, the same whatever blend of it is shown; a student's classes count as much as the teacher's.

    The first three colours mean the same in all views: the teacher's class of the image, the label where it is another, the
    label of the mix partner where it is a third.
    """
    slots = [int(won.first[0])]
    for label in (*labels, *[UNUSED] * (2 - len(labels))):
        slots.append(UNUSED if label in slots else label)
    maps: list[NDArray[np.integer]] = [won.at(blend) for blend in KEY_BLENDS]
    return class_key(maps if said_hw is None else [*maps, *[said_hw] * len(maps)], first=slots)


def draw_samples(
    cache: Cache, bad: NDArray[np.bool_], blocks: Sequence[int], count: int, seed: int, first: Sequence[int] = ()
) -> dict[int, list[int]]:
    """`count` samples by block, in the order in which they were drawn: those of `first`, then a function of the seed.

    Args:    bad, bool [n], samples without targets; blocks, those to draw from.
    """
    named: dict[int, list[int]] = {}
    for sample in first:
        named.setdefault(cache.inventory.block_of(sample), []).append(sample)
    order = [blocks[i] for i in permutation(len(blocks), hash64("page", seed)).tolist()]
    order = [*(b for b in named if b in order), *(b for b in order if b not in named)]
    drawn: dict[int, list[int]] = {}
    for place, block in enumerate(order):
        own = named.get(block, [])
        left = count - sum(map(len, drawn.values()))
        if left <= 0 and not own:
            continue
        low, stop = cache.inventory.block_range(block)
        good = low + np.flatnonzero(~bad[low:stop])
        good = good[permutation(len(good), hash64("page", seed, block))]
        share = max(len(own), -(-left // max(1, min(BLOCKS, len(order)) - place)))
        chosen = [*own, *good[~np.isin(good, own)].tolist()][:share]
        if chosen:
            drawn[block] = [int(i) for i in chosen]
    return drawn


def look_at(cache: Cache, samples: Sequence[int], view: int, blend: int) -> list[Look]:
    """Views of samples in their order; each unit is read once. Raises CacheError for one that is missing or quarantined."""
    refuse_view(cache, view)
    recorded = Recorded(np.zeros(cache.inventory.n, bool), dict(cache.manifest.versions or {}))
    found: dict[int, Look] = {}
    for block in dict.fromkeys(map(cache.inventory.block_of, samples)):
        units = read_units(cache, block, view)
        if (commit := cache.commit_of(block, view)) is not None:
            recorded.bad[[cache.inventory.block_range(block)[0] + int(i) for i in commit.quarantine]] = True
        for sample in samples:
            if cache.inventory.block_of(sample) == block and sample not in found:
                found[sample] = _look(cache, view_of(cache, units, sample, view), blend, recorded)
    return [found[sample] for sample in samples]


def _look(cache: Cache, cached: CachedView, blend: int, recorded: Recorded) -> Look:
    codec = cache.codecs[cache.hard_codec]
    won = winners(codec, cached.targets[cache.hard_codec])
    labels = [cached.label]
    if cached.partner is not None:
        labels.append(int(cached.partner_fields["label"]))
    pixels, lost = None, None
    try:
        pixels = replay(cache, cached, recorded)
    except CskdError as e:
        lost = e
    return Look(cached, tuple(labels), won, blend, won.at(blend)[0], pixels, lost, of_image=not codec.cells)


def sample_facts(cache: Cache, look: Look) -> SampleFacts:
    """One view as facts, for the terminal and for JSON."""
    cached, names = look.cached, cache.classes
    mixing = MixingFacts(cached.mode, cached.share)
    if cached.partner is not None:
        box = [int(v) for v in cached.fields["box"]] if cached.mode == "cutmix" else None
        partner = cache.inventory.key(cached.partner)
        mixing = MixingFacts(cached.mode, cached.share, partner, names[look.labels[1]], box)
    return SampleFacts(
        sample=cached.sample,
        key=cached.key,
        view=cached.view,
        seed=f"{int(cached.fields['seed']):016x}",
        label=names[cached.label],
        mixing=mixing,
        replay="equal" if look.lost is None else f"no: {look.lost}",
        codec=cache.hard_codec,
        blend=look.blend / BLEND_ONE,
        image_class=names[look.image_class],
        cells=[[names[int(c)] for c in row] for row in look.cells],
        margin=look.won.margin[0].round(4).tolist(),
        classes=class_facts(look, names),
        student=None if look.said is None else _student_cells(look, names),
        of_image=look.of_image,
    )


def class_facts(look: Look, names: Sequence[str]) -> list[ClassFacts]:
    """The classes of one view in the order of their letters, then the others by their cells."""
    key, words = look.key, readable(names)
    said = None if look.said is None else look.said.classes
    maps: list[NDArray[np.integer]] = [look.cells] if said is None else [look.cells, said]
    found, counts = np.unique(np.concatenate([m.ravel() for m in maps]), return_counts=True)
    others = [int(c) for c in found[np.argsort(-counts, kind="stable")] if c not in key.classes]
    roles = {look.image_class: ["image"]}
    for label, role in zip(look.labels, ("label", "partner"), strict=False):
        roles.setdefault(label, []).append(role)
    return [
        ClassFacts(
            name=names[c],
            words=words[c],
            letter=key.letter(c),
            colour="#{:02x}{:02x}{:02x}".format(*key.colour(c)),
            roles=roles.get(c, []),
            share=float((look.cells == c).mean()),
            student_share=None if said is None else float((said == c).mean()),
        )
        for c in [*key.classes, *others]
        if c in roles or any((m == c).any() for m in maps)
    ]


def _student_cells(look: Look, names: Sequence[str]) -> StudentCells:
    assert look.said is not None
    return StudentCells(
        cells=[[names[int(c)] for c in row] for row in look.said.classes],
        probability=look.said.probability.round(4).tolist(),
        agreement=look.agreement,
    )
