"""What stage 2 asks of where its views and targets come from: a cache and a live teacher, and images alone, answer alike.

No module here opens a cache or a teacher, so that workers can import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cskd.codecs import Codec
from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory
from cskd.method.features import MapShape
from cskd.method.losses import AnyTargets
from cskd.store.format import Unit
from cskd.views.digest import Recorded
from cskd.views.mixing import drawn_fields

Batch = dict[str, Tensor]  # see `cskd.loading.stage2`


@dataclass(frozen=True)
class TargetSpec:
    """Which targets the loss reads: 'none', 'global' (argmax g), 'cells' (and the CKF target of each cell at `blend`,
    in 1/65536), or 'soft' (the codec's arrays).

    also: a codec whose arrays are read beside classes. blends: of cells at further decays, by their names. maps: codecs of stages
    whose arrays are read, too. others: the same of further caches, by name.
    """

    kind: str
    codec: str
    blend: int
    also: str = ""
    blends: tuple[tuple[str, int], ...] = ()
    maps: tuple[str, ...] = ()
    others: tuple[tuple[str, TargetSpec], ...] = ()

    @property
    def soft_codec(self) -> str:
        """Of the arrays that are read; '' where none are."""
        return self.codec if self.kind == "soft" else self.also

    @property
    def arrays(self) -> tuple[str, ...]:
        """Codecs whose arrays are read as they are stored."""
        return (*((self.soft_codec,) if self.soft_codec else ()), *self.maps)

    @property
    def by_cache(self) -> dict[str, TargetSpec]:
        """That of each cache by its name, '' of the first."""
        return {"": self, **dict(self.others)}


class ViewSource(Protocol):
    """The views of a data set: `cskd.store.cache.Cache` has them with targets, `LiveViews` without."""

    @property
    def inventory(self) -> Inventory: ...
    @property
    def recipe(self) -> RecipeConfig: ...
    @property
    def views(self) -> int:
        """How many there are of each image."""

    @property
    def grid(self) -> tuple[int, int]:
        """h, w of the teacher's cells."""

    @property
    def fingerprint(self) -> str:
        """What tells these views and targets from others."""

    @property
    def codecs(self) -> Mapping[str, Codec]:
        """What targets are stored in; empty where there are none."""

    def quarantined(self) -> NDArray[np.bool_]:
        """bool [n]: samples that are never fed."""

    def read(self, block: int, view: int, codec: str) -> Unit:
        """One view of one block, with the targets of one codec where there are any."""

    def recorded(self) -> Recorded | None:
        """What replayed views are checked against; None: nothing was recorded."""


@dataclass(frozen=True, eq=False)
class LiveViews:
    """Views without a cache: the seeds and mixing that one would hold, computed on the spot; no targets, no digests.

    For a teacher that runs live, and for a baseline that has none.
    """

    inventory: Inventory
    recipe: RecipeConfig
    views: int
    grid: tuple[int, int]
    bad: NDArray[np.bool_]  # [n], samples of the inventory that can't be decoded
    fingerprint: str  # of the cache that stage 1 would make; without a teacher, what tells these views from others

    @property
    def codecs(self) -> dict[str, Codec]:
        return {}

    def quarantined(self) -> NDArray[np.bool_]:
        return self.bad

    def read(self, block: int, view: int, codec: str) -> Unit:
        """The unit stage 1 would make, without targets; its digests are 0."""
        first, stop = self.inventory.block_range(block)
        bad = self.bad[first:stop]
        kept = np.flatnonzero(~bad)
        fields = {name: a[kept] for name, a in drawn_fields(self.inventory, self.recipe, block, view, bad).items()}
        fields["digest"] = np.zeros(len(kept), np.uint32)
        return Unit(kept, fields, {})

    def recorded(self) -> None:
        """Nothing to check views against."""


class TargetSource(Protocol):
    """The targets of a batch: see `cskd.loading.targets`."""

    @property
    def runs_teacher(self) -> bool:
        """Whether a teacher runs at every step."""

    @property
    def maps(self) -> Mapping[str, MapShape]:
        """Of the teacher's maps that the loss reads, by `map_name` of its terms."""

    def spec(self, epoch: int) -> TargetSpec:
        """What the epoch table holds."""

    def of(self, batch: Batch, epoch: int, device: torch.device) -> AnyTargets:
        """The targets of a batch, on the device; None: only labels are taught."""
