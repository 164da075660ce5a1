"""What the loss reads: targets of a batch out of the cache, or from the teacher itself, by the same rule.

Shapes: B batch, K classes, h w teacher grid (7 7).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cskd.codecs import Codec
from cskd.config import LossConfig
from cskd.errors import ConfigError, TeacherError
from cskd.loading.sources import Batch, TargetSpec
from cskd.method.ckf import blend_at, hard_targets
from cskd.method.losses import HardTargets, MixedLabels, SoftTargets
from cskd.store.cache import Cache
from cskd.teacher.model import Teacher
from cskd.views.mix_pixels import mixed_pixels

_KINDS = {"none": "none", "deit-hard": "global", "cskd-hard": "cells"}  # of loss.method; the others are soft


def codec_for(loss: LossConfig, codecs: Mapping[str, Codec], where: str) -> str:
    """The codec that a method reads: one that is exact for it where there is one, and holds no more than is asked.

    Raises:  ConfigError when a soft method finds hard targets only, or one that teaches cells the image's targets only;
             `where` names what holds the codecs.
    """
    method, kind, cells = loss.method, _KINDS.get(loss.method, "soft"), reads_cells(loss)
    fitting = {name: codec for name, codec in codecs.items() if codec.soft or kind != "soft"}
    if not fitting:
        raise ConfigError(
            f"loss.method {method} needs the teacher's logits and {where} holds only {list(codecs)}; cache with "
            f"cache.codecs: [envelope, {'int8' if cells else 'global:8'}], or use a '-hard' method"
        )
    if cells and not any(codec.cells for codec in fitting.values()):
        raise ConfigError(
            f"loss.method {method} teaches cells and {where} holds only {list(codecs)}, of which {next(iter(fitting))} has "
            f"the image's targets alone; cache with cache.codecs: [{'int8' if kind == 'soft' else 'envelope'}], or set "
            "loss.method: deit-soft, deit-hard, or loss.decay: global"
        )
    return min(fitting, key=lambda name: _unfit(fitting[name], kind, cells))


def reads_cells(loss: LossConfig) -> bool:
    """Whether a method asks for targets that differ from cell to cell."""
    return loss.method.startswith("cskd") and loss.decay != "global"


def _unfit(codec: Codec, kind: str, cells: bool) -> tuple[bool, bool]:
    """What speaks against a codec that could be read; the first of those with the least is."""
    return codec.cells != cells, kind != "soft" and not codec.exact_hard


class CachedTargets:
    """Targets of a method from a cache. Raises ConfigError when the cache holds no codec that the method can read."""

    runs_teacher = False

    def __init__(self, cache: Cache, config: LossConfig, epochs: int) -> None:
        self._config, self._epochs, self._codecs, self._grid = config, epochs, cache.codecs, cache.grid
        self._kind = _KINDS.get(config.method, "soft")
        self.codec = codec_for(config, cache.codecs, str(cache.root))

    def spec(self, epoch: int) -> TargetSpec:
        return TargetSpec(self._kind, self.codec, blend_at(epoch, self._epochs, self._config.decay))

    def of(self, batch: Batch, epoch: int, device: torch.device) -> HardTargets | SoftTargets | None:
        if self._kind == "none":
            return None
        if self._kind == "soft":
            stored = {
                name.removeprefix("target."): t.to(device, non_blocking=True)
                for name, t in batch.items()
                if name.startswith("target.")
            }
            codec = self._codecs[self.codec]
            if codec.cells:
                dense_BKhw, global_BK = codec.logits_torch(stored)
            else:
                global_BK = codec.global_logits_torch(stored)
                dense_BKhw = global_BK[:, :, None, None].expand(-1, -1, *self._grid)
            return SoftTargets(global_BK, dense_BKhw, self.spec(epoch).blend)
        cells = batch.get("cell_class")
        return HardTargets(
            batch["global_class"].to(device, non_blocking=True),
            None if cells is None else cells.to(device, non_blocking=True),
        )


class LiveTargets:
    """Targets of a method from the teacher, run on the very images the student sees, in batches of the size stage 1 uses."""

    runs_teacher = True

    def __init__(self, teacher: Teacher, config: LossConfig, epochs: int) -> None:
        self._teacher, self._config, self._epochs = teacher, config, epochs
        self._kind = _KINDS.get(config.method, "soft")

    def spec(self, epoch: int) -> TargetSpec:
        return TargetSpec("none", "", blend_at(epoch, self._epochs, self._config.decay))

    def of(self, batch: Batch, epoch: int, device: torch.device) -> HardTargets | SoftTargets | None:
        if self._kind == "none":
            return None
        dense_BKhw, global_BK = self._teacher.in_batches(mixed_pixels(batch, device))
        if not bool(dense_BKhw.isfinite().all() & global_BK.isfinite().all()):  # codecs refuse the same in stage 1
            raise TeacherError("the teacher's logits hold NaN or an infinity; check its weights and teacher.precision")
        blend = self.spec(epoch).blend
        if self._kind == "soft":
            return SoftTargets(global_BK, dense_BKhw, blend)
        global_class = hard_targets(global_BK[:, :, None, None], global_BK, 0)[:, 0, 0]
        return HardTargets(global_class, hard_targets(dense_BKhw, global_BK, blend) if self._kind == "cells" else None)


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
