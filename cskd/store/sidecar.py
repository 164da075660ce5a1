"""Targets next to image shards: for each shard and view a tar with the same keys in the same order, for stock webdataset.

    NAME.view003.tar        view 3 of the samples of NAME.tar
        KEY.paug.json       what was done to the image: crop, flip, operations, erasing, mixing, seed; in numbers and in words
        KEY.cells.npy       uint16 [blends, h, w], the class of each cell at the chosen blends, or
        KEY.env.zst         the whole envelope: the class of each cell at every blend (`packed_envelope`)
        KEY.global.json     the image's class, and its logits where a codec of the cache keeps them

A sample without targets has KEY.paug.json alone, which says why under `quarantined`. Docs: docs/FORMAT.md.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numcodecs import zstd

from cskd.codecs import Arrays
from cskd.codecs.base import quantise_blend
from cskd.codecs.winners import Winners, winners
from cskd.dataset.inventory import Inventory
from cskd.store.cache import Cache
from cskd.store.commit import Commit
from cskd.store.format import ZSTD_LEVEL, Unit
from cskd.views.mixing import MODES, own_share
from cskd.views.recipe import described, sample_params

AT_ONCE = 16  # samples whose logits are decoded at a time


@dataclass(frozen=True)
class ShardKeys:
    """What the image shards say of samples first .. stop-1 of the inventory: their keys as webdataset reads them, and height and
    width of their images, None of one that can't be decoded."""

    first: int
    keys: Sequence[str]
    sizes: Sequence[tuple[int, int] | None]


def sidecar_name(shard: str, view: int) -> str:
    """The name of a shard's tar of one view, inside of the folder of all."""
    return f"{shard.removesuffix('.tar')}.view{view:03d}.tar"


class Sidecars:
    """The members of one view of one block's samples. blends: of `cells.npy`, in [0, 1]; empty: `env.zst` instead. logits: the codec
    that those of the image are from; None: they are left out."""

    def __init__(
        self, cache: Cache, commit: Commit, images: ShardKeys, blends: Sequence[float], logits: str | None
    ) -> None:
        self._cache, self._inventory, self._commit, self._images = cache, cache.inventory, commit, images
        self._units: Mapping[str, Unit] = {name: cache.unit_of(commit, name) for name in cache.codecs}
        self._hard = self._units[cache.hard_codec]
        self._row = {int(p): row for row, p in enumerate(self._hard.position)}
        codec, targets = cache.codecs[cache.hard_codec], self._hard.targets
        self._global_class = codec.global_class(targets)
        # uint16 [blends, N, h, w]
        self._cells = np.array([codec.hard(targets, quantise_blend(a)) for a in blends], np.uint16)
        self._npy = _npy_header((len(blends), *cache.grid))
        self._envelopes = [] if blends else list(_envelopes(cache, targets))
        self._soft = logits

    def members(self, first: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Name and content of each member of samples first .. stop-1 of the inventory, in order."""
        begin = self._inventory.block_range(self._commit.block)[0]
        for sample in range(first, stop):
            key = self._images.keys[sample - self._images.first]
            row = self._row.get(sample - begin)
            if row is None:
                reason = self._commit.quarantine[str(sample - begin)]
                about = {"quarantined": reason, **self._named(sample)}
                yield f"{key}.paug.json", _json(about)
                continue
            yield f"{key}.paug.json", _json(self._augmentation(sample, row, begin))
            if self._envelopes:
                yield f"{key}.env.zst", self._envelopes[row]
            else:
                yield f"{key}.cells.npy", self._npy + self._cells[:, row].astype("<u2").tobytes()
            yield f"{key}.global.json", _json(self._image_target(row))

    def _named(self, sample: int) -> dict[str, Any]:
        label = int(self._inventory.label[sample])
        names = {"sample": self._inventory.key(sample), "view": self._commit.view}
        return {**names, "label": label, "class": self._inventory.classes[label]}

    def _augmentation(self, sample: int, row: int, begin: int) -> dict[str, Any]:
        fields = {name: array[row] for name, array in self._hard.fields.items()}
        seed, size = int(fields["seed"]), self._images.sizes[sample - self._images.first]
        assert size is not None
        params = sample_params(seed, *size, self._cache.recipe)
        mixing, words = _mixing(self._inventory, self._cache, fields, begin)
        erasing = [{**asdict(e), "noise": f"{e.noise:016x}"} for e in params.erasures]
        return {
            **self._named(sample),
            "seed": f"{seed:016x}",
            "digest": f"{int(fields['digest']):08x}",
            "image": {"height": size[0], "width": size[1]},
            "crop": asdict(params.crop),
            "padding": params.padding,
            "size": params.size,
            "flip": params.flip,
            "ops": [op._asdict() for op in params.ops],
            "erasing": erasing,
            "mixing": mixing,
            "words": "; ".join([", ".join(described(params)), words]),
        }

    def _image_target(self, row: int) -> dict[str, Any]:
        cls = int(self._global_class[row])
        facts: dict[str, Any] = {"class": cls, "name": self._inventory.classes[cls]}
        if self._soft is not None:
            facts |= self._cache.codecs[self._soft].global_facts(self._units[self._soft].targets, row)
        return facts


def _mixing(inventory: Inventory, cache: Cache, fields: Mapping[str, Any], begin: int) -> tuple[dict[str, Any], str]:
    """The mixing of one view as facts and in words."""
    mode, share = MODES[int(fields["mode"])], float(own_share(fields["mode"], fields["lam"]))
    if mode == "unmixed":
        return {"mode": mode, "own_share": share}, mode
    partner = begin + int(fields["partner"])
    key, label = inventory.key(partner), int(inventory.label[partner])
    facts = {"mode": mode, "own_share": share, "partner": key, "partner_label": label}
    if mode == "cutmix":
        facts["box"] = dict(zip(("top", "bottom", "left", "right"), map(int, fields["box"]), strict=True))
    return facts, f"{mode} with {key}, own share {share:.3f}"


def _envelopes(cache: Cache, targets: Arrays) -> Iterator[bytes]:
    """`packed_envelope` of every sample of a unit."""
    codec = cache.codecs[cache.hard_codec]
    n = len(codec.global_class(targets))
    step = n if codec.exact_hard else AT_ONCE
    for first in range(0, n, max(1, step)):
        rows = np.arange(first, min(first + step, n))
        found = winners(codec, codec.take(targets, rows))
        bounds = np.append(0, np.cumsum(found.n_extra.sum((1, 2))))
        for row in range(len(rows)):
            segments = slice(bounds[row], bounds[row + 1])
            yield packed_envelope(
                Winners(
                    found.first[row : row + 1], found.n_extra[row : row + 1], found.cls[segments], found.start[segments]
                )
            )


def packed_envelope(one: Winners) -> bytes:
    """The envelope of one sample: a zstd frame of little-endian uint16. After the header (h, w, class at blend 0) comes, cell by
    cell, how many classes follow in it, and for each of these its start and its class. It counts at blends above start / 65536."""
    count = one.n_extra.reshape(-1)
    out = np.zeros(3 + len(count) + 2 * len(one.cls), "<u2")
    out[:3] = [*one.n_extra.shape[1:], one.first[0]]
    before = np.cumsum(count) - count
    out[3 + np.arange(len(count)) + 2 * before] = count
    cell = np.repeat(np.arange(len(count)), count)
    at = 3 + cell + 1 + 2 * np.arange(len(one.cls))
    out[at], out[at + 1] = one.start, one.cls
    return bytes(zstd.compress(out.tobytes(), ZSTD_LEVEL, True))


def _npy_header(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return out.getvalue()


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, ensure_ascii=False).encode()
