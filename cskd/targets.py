"""From the cache to what the loss reads: which targets an epoch needs, and those of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from cskd.ckf import blend_at
from cskd.config import LossConfig
from cskd.epoch_table import TargetSpec
from cskd.errors import ConfigError
from cskd.losses import HardTargets, MixedLabels, SoftTargets
from cskd.store.cache import Cache

Batch = dict[str, Tensor]


class CachedTargets:
    """Targets of a method from a cache. Raises ConfigError when the cache holds no codec that the method can read."""

    def __init__(self, cache: Cache, config: LossConfig, epochs: int) -> None:
        self._config, self._epochs, self._codecs = config, epochs, cache.codecs
        self._kind = {"none": "none", "deit-hard": "global", "cskd-hard": "cells"}.get(config.method, "soft")
        fitting = [c.name for c in cache.codecs.values() if (c.soft if self._kind == "soft" else c.exact_hard)]
        if self._kind == "soft" and not fitting:
            raise ConfigError(
                f"loss.method {config.method} needs the teacher's logits and {cache.root} holds only "
                f"{list(cache.codecs)}; cache with cache.codecs: [envelope, int8], or use a '-hard' method"
            )
        self.codec = next(iter(fitting), next(iter(cache.codecs)))

    def spec(self, epoch: int) -> TargetSpec:
        """What the epoch table holds."""
        return TargetSpec(self._kind, self.codec, blend_at(epoch, self._epochs, self._config.decay))

    def of(self, batch: Batch, epoch: int, device: torch.device) -> HardTargets | SoftTargets | None:
        """The targets of a batch of `cskd.loading.stage2`, on the device."""
        if self._kind == "none":
            return None
        if self._kind == "soft":
            stored = {
                name.removeprefix("target."): t.to(device, non_blocking=True)
                for name, t in batch.items()
                if name.startswith("target.")
            }
            dense, image = self._codecs[self.codec].logits_torch(stored)
            return SoftTargets(image, dense, self.spec(epoch).blend)
        cells = batch.get("cell_class")
        return HardTargets(
            batch["global_class"].to(device, non_blocking=True),
            None if cells is None else cells.to(device, non_blocking=True),
        )


def mixed_labels(batch: Batch, device: torch.device) -> MixedLabels:
    """Labels of the mixed images of a batch, on the device."""
    return MixedLabels(*(batch[name].to(device, non_blocking=True) for name in ("label", "partner_label", "share")))
