"""Single views of a cache, by sample and view: their rows of its units, and their pixels, replayed and checked.

Stage 2 reads whole epochs, in tables (`cskd.loading.epoch_table`). This is for whoever asks for one view, or a batch of any.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cskd.codecs import Arrays
from cskd.errors import CacheError, DataError
from cskd.store.cache import Cache
from cskd.store.format import Unit
from cskd.views import Image
from cskd.views.digest import Recorded, check_view, pixel_crc
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import InputMaker
from cskd.views.mixing import NONE
from cskd.views.recipe import ViewParams

UNIT_BYTES = 1 << 30  # of units that a process keeps
PIXELS = ((0.0,) * 3, (1 / 255,) * 3)  # mean and std that leave RGB in 0..255 as it is, to the last bit


@dataclass(frozen=True, eq=False)
class Rows:
    """What the units hold of n views that were asked for, and of the partners that they are mixed with; F rows in all.

    row int64 [n]: of each view asked for; sample, view int64 [F]; partner int64 [F], row of the partner, its own where unmixed;
    fields, of F rows each (see `cskd.store.format.UNIT_FIELDS`); targets: codec -> its arrays of the n views, in their order.
    """

    row: NDArray[np.int64]
    sample: NDArray[np.int64]
    view: NDArray[np.int64]
    partner: NDArray[np.int64]
    fields: dict[str, NDArray[Any]]
    targets: dict[str, Arrays]


@dataclass(frozen=True, eq=False)
class Replayed:
    """images float32 [n, 3, S, S], normalised, of the n views asked for; params, of all rows."""

    images: Tensor
    params: list[ViewParams]


def find_sample(cache: Cache, sample: str | int) -> int:
    """The index of a sample given by its key, or by its number. Raises DataError when there is none."""
    n = cache.inventory.n
    if isinstance(sample, str):
        try:
            return cache.inventory.find(sample)
        except DataError:
            if not sample.isdecimal():
                raise
    if not 0 <= int(sample) < n:
        raise DataError(f"no sample number {sample}, expected a key or a number in 0..{n - 1}")
    return int(sample)


class CachedViews:
    """Reads views of an open cache, with the targets of these codecs, by default all of them.

    Units that were read are kept, up to `unit_bytes`, the one used last at least: of ImageNet one takes 5 MB with
    `envelope` and 380 MB with `int8`.
    """

    def __init__(self, cache: Cache, codecs: Sequence[str] | None = None, unit_bytes: int = UNIT_BYTES) -> None:
        self.cache, self.codecs, self.unit_bytes = cache, tuple(dict.fromkeys(codecs or cache.codecs)), unit_bytes
        for name in self.codecs:
            if name not in cache.codecs:
                raise CacheError(
                    f"{cache.location} holds the codecs {list(cache.codecs)}, no {name!r}; ask for one of these"
                )
        self._maker = ViewMaker(cache.inventory, cache.recipe)
        self._units: OrderedDict[tuple[int, int], dict[str, Unit]] = OrderedDict()
        self._recorded: Recorded | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_units": OrderedDict()}  # a worker reads its own

    def rows(self, sample: Sequence[int], view: Sequence[int]) -> Rows:
        """What the cache holds of views, and of their partners.

        Args:    sample, index in the inventory; view, 0..V-1; n of each, in any order, and more than once where you like.
        Raises:  CacheError for a view that the cache does not have, a unit that is missing or damaged, and a quarantined sample.
        """
        number: dict[tuple[int, int], int] = {}
        row = np.array([number.setdefault(pair, len(number)) for pair in zip(sample, view, strict=True)], np.int64)
        asked = len(number)
        parts: list[dict[str, NDArray[Any]]] = []
        order: list[int] = []
        targets: dict[str, list[Arrays]] = {name: [] for name in self.codecs}
        for (block, of_view), members in self._by_unit(list(number)):
            units, first = self._unit(block, of_view), self.cache.inventory.block_range(block)[0]
            unit = next(iter(units.values()))
            found = self._found(unit, np.array(members) - first, block, of_view)
            for name, codec_unit in units.items():
                targets[name].append(self.cache.codecs[name].take(codec_unit.targets, found))
            mixed = unit.fields["mode"][found] != NONE
            for mate in (first + unit.fields["partner"][found][mixed]).tolist():
                if (mate, of_view) not in number:
                    number[mate, of_view] = len(number)
                    members.append(mate)
            every = self._found(unit, np.array(members) - first, block, of_view)
            parts.append(
                {name: array[every] for name, array in unit.fields.items()} | {"first": np.full(len(every), first)}
            )
            order += [number[member, of_view] for member in members]
        place = np.argsort(order)
        fields = {name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]}
        pairs = list(number)
        mates = np.where(fields["mode"] != NONE, fields.pop("first") + fields["partner"], -1).tolist()
        partner = [i if mate < 0 else number[mate, pairs[i][1]] for i, mate in enumerate(mates)]
        of_asked = np.argsort([i for i in order if i < asked])[row]
        columns = np.array(pairs, np.int64).T
        joined = {name: self._joined(name, arrays, of_asked) for name, arrays in targets.items()}
        return Rows(row, columns[0], columns[1], np.array(partner, np.int64), fields, joined)

    def replay(self, rows: Rows, inputs: InputMaker | None = None, verify: bool = True) -> Replayed:
        """The images that the teacher saw, each mixed with its partner's.

        Args:    inputs, says mean and std; None: RGB in 0..255. verify: compare each view's digest with the cache's.
        Raises:  ReplayError when a digest differs; DataError where shards are missing or were changed.
        """
        inputs = inputs or InputMaker(*PIXELS, torch.device("cpu"))
        count, size = len(rows.sample), self.cache.recipe.size
        pixels = np.empty((count, size, size, 3), np.uint8)
        params: dict[int, ViewParams] = {}
        image, last = np.empty((0, 0, 3), np.uint8), -1
        for i in np.argsort(rows.sample, kind="stable").tolist():  # one decoding for all views of an image
            if rows.sample[i] != last:
                last = int(rows.sample[i])
                image = self._maker.image(last)
            params[i], pixels[i] = self._maker.made(image, int(rows.fields["seed"][i]))
        if verify:
            self._check(rows, pixels)
        asked = np.isin(np.arange(count), rows.row)
        fields = {name: torch.from_numpy(rows.fields[name].astype(np.int64)) for name in ("mode", "lam", "box")}
        fields["mode"][torch.from_numpy(~asked)] = NONE  # a partner that nobody asked for stays as it is
        images = inputs.mixed({"pixels": torch.from_numpy(pixels), "partner": torch.from_numpy(rows.partner), **fields})
        return Replayed(images[torch.from_numpy(rows.row)], [params[i] for i in range(count)])

    def _check(self, rows: Rows, pixels: Image) -> None:
        """ReplayError for the first row whose pixels or mixing are not those of the cache."""
        if self._recorded is None:
            self._recorded = self.cache.recorded()
        inventory, recipe = self.cache.inventory, self.cache.recipe
        for i, view in enumerate(pixels):
            fields = {name: array[i] for name, array in rows.fields.items()}
            sample, mate = int(rows.sample[i]), int(rows.sample[rows.partner[i]])
            check_view(inventory, recipe, self._recorded, sample, int(rows.view[i]), fields, mate, pixel_crc(view))

    def _by_unit(self, pairs: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """(block, view) of each unit that the (sample, view) pairs are in, and their samples."""
        members: dict[tuple[int, int], list[int]] = {}
        for sample, view in pairs:
            if not 0 <= view < self.cache.views:
                raise CacheError(f"view {view} is outside this cache's 0..{self.cache.views - 1}; give one of these")
            members.setdefault((self.cache.inventory.block_of(sample), view), []).append(sample)
        yield from members.items()

    def _unit(self, block: int, view: int) -> dict[str, Unit]:
        """One unit, by codec: from memory, or from the disk, where the ones used longest ago make room for it."""
        units = self._units.pop((block, view), None)
        if units is None:
            units = {name: self.cache.read(block, view, name) for name in self.codecs}
            room = self.unit_bytes - _bytes(units)
            while self._units and sum(map(_bytes, self._units.values())) > room:
                self._units.popitem(last=False)
        self._units[block, view] = units
        return units

    def _found(self, unit: Unit, position: NDArray[np.int64], block: int, view: int) -> NDArray[np.int64]:
        """Rows of a unit that hold these positions of its block. Raises CacheError for one that is quarantined."""
        row = np.searchsorted(unit.position, position)
        lost = np.flatnonzero(unit.position.take(row, mode="clip") != position)
        if len(lost):
            at = int(position[lost[0]])
            commit = self.cache.commit_of(block, view)
            key = self.cache.inventory.key(self.cache.inventory.block_range(block)[0] + at)
            reason = commit.quarantine.get(str(at), "unknown") if commit else "unknown"
            raise CacheError(f"sample '{key}' has no targets: it is quarantined ({reason})")
        return row

    def _joined(self, codec: str, parts: list[Arrays], order: NDArray[np.int64]) -> Arrays:
        of = self.cache.codecs[codec]
        return of.take(parts[0] if len(parts) == 1 else of.concat(parts), order)


def _bytes(units: dict[str, Unit]) -> int:
    """Memory of one unit, in all codecs."""
    return sum(a.nbytes for unit in units.values() for a in (*unit.fields.values(), *unit.targets.values()))
