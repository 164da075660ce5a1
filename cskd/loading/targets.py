"""What the loss reads: targets of a batch out of the cache, or from the teacher itself, by the same rule.

Shapes: B batch, K classes, h w teacher grid (7 7).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cskd.codecs import Codec
from cskd.config import LossConfig
from cskd.config.schema import Decay
from cskd.errors import ConfigError, TeacherError
from cskd.loading.sources import Batch, TargetSpec
from cskd.method.ckf import blend_at, hard_targets
from cskd.method.losses import AnyTargets, BothTargets, HardTargets, MixedLabels, SoftTargets, needs
from cskd.store.cache import Cache
from cskd.teacher.model import Teacher
from cskd.views.mix_pixels import mixed_pixels


def codec_for(loss: LossConfig, codecs: Mapping[str, Codec], where: str) -> tuple[str, str]:
    """The codecs that a loss reads classes and logits from: those that are exact for it where there are any.

    Returns: (for classes, for logits); the second is '' where no logits are read, the first may be any where no classes are.
    Raises:  ConfigError when soft terms find hard targets only; `where` names what holds the codecs.
    """
    exact = next((name for name, codec in codecs.items() if codec.exact_hard), next(iter(codecs)))
    if not needs(loss).soft:
        return exact, ""
    soft = next((name for name, codec in codecs.items() if codec.soft), None)
    if soft is None:
        raise ConfigError(
            f"loss.method {loss.method} needs the teacher's logits and {where} holds only {list(codecs)}; cache with "
            "cache.codecs: [envelope, int8], or use a '-hard' method"
        )
    return exact, soft


class _Targets:
    """What a loss needs, epoch by epoch."""

    def __init__(self, config: LossConfig, epochs: int) -> None:
        self._config, self._epochs, self.needs = config, epochs, needs(config)

    def blend(self, epoch: int, decay: Decay | None = None) -> int:
        return blend_at(epoch, self._epochs, decay or self._config.decay)

    def blends(self, epoch: int, decays: tuple[Decay, ...]) -> dict[str, int]:
        return {decay: self.blend(epoch, decay) for decay in decays}

    def soft(self, global_BK: Tensor, dense_BKhw: Tensor, epoch: int) -> SoftTargets:
        return SoftTargets(global_BK, dense_BKhw, self.blend(epoch), self.blends(epoch, self.needs.soft_decays))


class CachedTargets(_Targets):
    """Targets of a loss from a cache. Raises ConfigError when the cache holds no codec that the loss can read."""

    runs_teacher = False

    def __init__(self, cache: Cache, config: LossConfig, epochs: int) -> None:
        super().__init__(config, epochs)
        self._codecs = cache.codecs
        self.codec, self.soft_codec = codec_for(config, cache.codecs, str(cache.root))

    def spec(self, epoch: int) -> TargetSpec:
        if self.needs.hard == "none" and self.soft_codec:
            return TargetSpec("soft", self.soft_codec, self.blend(epoch))
        blends = tuple(self.blends(epoch, self.needs.decays).items())
        return TargetSpec(self.needs.hard, self.codec, self.blend(epoch), self.soft_codec, blends)

    def of(self, batch: Batch, epoch: int, device: torch.device) -> AnyTargets:
        hard = soft = None
        if self.needs.hard != "none":
            names = {f"cell_class.{decay}": str(decay) for decay in self.needs.decays}
            cells, more = batch.get("cell_class"), {key: batch[name] for name, key in names.items()}
            hard = HardTargets(
                batch["global_class"].to(device, non_blocking=True),
                None if cells is None else cells.to(device, non_blocking=True),
                {key: t.to(device, non_blocking=True) for key, t in more.items()},
            )
        if self.needs.soft:
            stored = {
                name.removeprefix("target."): t.to(device, non_blocking=True)
                for name, t in batch.items()
                if name.startswith("target.")
            }
            dense_BKhw, global_BK = self._codecs[self.soft_codec].logits_torch(stored)
            soft = self.soft(global_BK, dense_BKhw, epoch)
        return _both(hard, soft)


class LiveTargets(_Targets):
    """Targets of a loss from the teacher, run on the very images the student sees, in batches of the size stage 1 uses."""

    runs_teacher = True

    def __init__(self, teacher: Teacher, config: LossConfig, epochs: int) -> None:
        super().__init__(config, epochs)
        self._teacher = teacher

    def spec(self, epoch: int) -> TargetSpec:
        return TargetSpec("none", "", self.blend(epoch))

    def of(self, batch: Batch, epoch: int, device: torch.device) -> AnyTargets:
        if self.needs.hard == "none" and not self.needs.soft:
            return None
        dense_BKhw, global_BK = self._teacher.in_batches(mixed_pixels(batch, device))
        if not bool(dense_BKhw.isfinite().all() & global_BK.isfinite().all()):  # codecs refuse the same in stage 1
            raise TeacherError("the teacher's logits hold NaN or an infinity; check its weights and teacher.precision")
        hard = None
        if self.needs.hard != "none":
            global_class = hard_targets(global_BK[:, :, None, None], global_BK, 0)[:, 0, 0]
            of_cells = self.needs.hard == "cells"
            cells = hard_targets(dense_BKhw, global_BK, self.blend(epoch)) if of_cells else None
            blends = self.blends(epoch, self.needs.decays)
            more = {decay: hard_targets(dense_BKhw, global_BK, blend) for decay, blend in blends.items()}
            hard = HardTargets(global_class, cells, more)
        return _both(hard, self.soft(global_BK, dense_BKhw, epoch) if self.needs.soft else None)


def _both(hard: HardTargets | None, soft: SoftTargets | None) -> AnyTargets:
    return BothTargets(hard, soft) if hard is not None and soft is not None else hard or soft


class NoTargets:
    """Of a run that is taught nothing but labels: neither cache nor teacher is asked."""

    runs_teacher = False

    def spec(self, epoch: int) -> TargetSpec:
        return TargetSpec("none", "", 0)

    def of(self, batch: Batch, epoch: int, device: torch.device) -> None:
        return None


def mixed_labels(batch: Batch, device: torch.device) -> MixedLabels:
    """Labels of the mixed images of a batch, on the device."""
    return MixedLabels(*(batch[name].to(device, non_blocking=True) for name in ("label", "partner_label", "share")))
