"""Collects the rows of units as the teacher's batches come in, and puts them in block order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.codecs import Arrays, Codec
from cskd.codecs.measured import AnyMeasured
from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory
from cskd.seeds import view_seeds
from cskd.store.draft import Rows, errors_of
from cskd.views.digest import view_digest
from cskd.views.mixing import NONE, Mixing, mixing


class UnitBuilder:
    """One view of the block of samples first .. stop-1. `order`, from `mixing.quads`, is the order rows arrive in."""

    def __init__(
        self,
        inventory: Inventory,
        recipe: RecipeConfig,
        codecs: dict[str, Codec],
        view: int,
        first: int,
        order: NDArray[np.int64],
    ) -> None:
        n = len(order)
        self._labels = inventory.label[first : first + n]
        self._hashes = inventory.key_hash[first : first + n]
        self._codecs = codecs
        self._seeds = view_seeds(recipe.seed, inventory.id, self._hashes, view)
        self._bad = np.zeros(n, bool)
        self.mixing: Mixing = mixing(self._seeds, order, self._bad, recipe, view)
        self._crc = np.zeros(n, np.int64)
        self._parts: dict[int, Rows] = {}  # by the place of their first batch
        self._saved: set[int] = set()  # of them, those that a draft has

    def drop(self, bad: NDArray[np.int64]) -> None:
        """Quarantine block positions: they get no row, and their partners in this view stay unmixed."""
        self._bad[bad] = True
        fields = self.mixing
        for i in bad.tolist():
            for j in (i, int(fields.partner[i])):
                if j >= 0:
                    fields.partner[j], fields.mode[j], fields.lam[j], fields.box[j] = -1, NONE, 0, 0

    def mixing_rows(self, position: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """The mixing of a batch of whole quads at these positions, for `mix_pixels`: partner (a row of the batch; its own
        row where unmixed), mode, lambda and box."""
        m, rows = self.mixing, np.arange(len(position))
        row_of = np.zeros(len(m.mode), np.int64)
        row_of[position] = rows
        mode = m.mode[position]
        partner = np.where(mode == NONE, rows, row_of[m.partner[position]])
        return partner, mode, m.lam[position].astype(np.int64), m.box[position].astype(np.int64)

    def label_rows(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The labels of the samples at these positions, and of those that they are mixed with (their own where unmixed):
        int64 [n, 2]."""
        partner = self.mixing.partner[position]
        both: NDArray[np.int64] = np.stack([position, np.where(partner < 0, position, partner)], 1)
        return np.asarray(self._labels[both], np.int64)

    def add(
        self,
        position: NDArray[np.int64],
        crc: NDArray[np.int64],
        encoded: dict[str, Arrays],
        place: int | None = None,
        errors: dict[str, AnyMeasured] | None = None,
    ) -> None:
        """Targets and pixel digests of some good samples, by their positions in the block. place: where in the order their batch
        begins; a batch that comes twice, since an interrupt came in between, counts once."""
        place = len(self._parts) if place is None else place
        self._parts[place] = Rows((place,), position, crc, encoded, errors or {})

    def restore(self, drafts: list[Rows]) -> set[int]:
        """Go on from what drafts hold. Returns: the places of their batches."""
        self._parts |= {rows.places[0]: rows for rows in drafts}
        self._saved |= self._parts.keys()
        return {place for rows in drafts for place in rows.places}

    def unsaved(self) -> list[Rows]:
        """What no draft has; each only once."""
        new = self._parts.keys() - self._saved
        self._saved |= new
        return [self._parts[place] for place in sorted(new)]

    @property
    def nbytes(self) -> int:
        """Of the targets that are in."""
        return sum(
            a.nbytes for part in self._parts.values() for arrays in part.targets.values() for a in arrays.values()
        )

    @property
    def errors(self) -> dict[str, AnyMeasured]:
        """What the codecs' errors were, over all rows."""
        return errors_of([self._parts[place] for place in sorted(self._parts)])

    def finish(self) -> tuple[dict[str, NDArray[Any]], dict[str, Arrays]]:
        """View fields and targets of every codec, rows in block order."""
        parts = list(self._parts.values())
        came = np.concatenate([part.position for part in parts])
        self._crc[came] = np.concatenate([part.crc for part in parts])
        order = np.argsort(came)
        kept, m = came[order], self.mixing
        partner_hash = np.where(m.partner >= 0, self._hashes[m.partner], np.uint64(0))
        fields: dict[str, NDArray[Any]] = {
            "key_hash": self._hashes[kept],
            "seed": self._seeds[kept],
            "label": self._labels[kept],
            "partner": m.partner[kept],
            "mode": m.mode[kept],
            "lam": m.lam[kept],
            "box": m.box[kept],
        }
        fields["digest"] = np.array(
            [
                view_digest(int(self._crc[i]), int(m.mode[i]), int(m.lam[i]), m.box[i], int(partner_hash[i]))
                for i in kept
            ],
            np.uint32,
        )
        targets = {
            name: codec.take(codec.concat([part.targets[name] for part in parts]), order)
            for name, codec in self._codecs.items()
        }
        return fields, targets
