"""What a `ReplayDataset` gives: one view or a batch of them, with the teacher's targets at any blend.

Shapes: B batch, K classes, h w teacher grid (7 7), S side of a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from cskd.codecs import Arrays, Codec
from cskd.codecs.base import BLEND_ONE, hard_rank, quantise_blend
from cskd.codecs.envelope import EnvelopeCodec
from cskd.errors import CodecError
from cskd.machine.arithmetic import full_precision
from cskd.method.ckf import ckf_blend
from cskd.method.losses import HardTargets, MixedLabels, SoftTargets
from cskd.views.recipe import ViewParams, describe

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Targets:
    """The teacher's targets of one view, or of a batch of B: then every shape below begins with B.

    A blend is a share in [0, 1]: 1 = each cell's own output, 0 = the whole image's. Results lie on `device`. What a cache
    holds decides what can be asked: hard targets always, exact ones from `envelope`; logits from any other; cells from any but `global`.
    """

    codecs: Mapping[str, Codec]
    arrays: Mapping[str, Mapping[str, Tensor]]  # of each codec, as stored; a batch, also for one view
    single: bool = False  # one view
    device: torch.device = CPU

    @property
    def image_class(self) -> Tensor:
        """The class of the teacher's ordinary output: int64 []."""
        return self._given(self._hard.global_class(self._numpy(self._hard)))

    @property
    def image_logits(self) -> Tensor:
        """The teacher's ordinary output: float32 [K]. Raises CodecError where the cache holds no logits."""
        return self._one(self._logits()[1])

    def at(self, blend: float) -> Tensor:
        """The class that each cell is taught, the CKF target: int64 [h, w]. Raises CodecError outside of [0, 1]."""
        return self._given(self._hard.hard(self._numpy(self._hard), _with_cells(self._hard, quantise_blend(blend))))

    def logits_at(self, blend: float) -> Tensor:
        """Logits that each cell is taught: float32 [K, h, w]. Raises CodecError as `at` and as `image_logits`."""
        share = _with_cells(self._soft, quantise_blend(blend)) / BLEND_ONE
        dense_BKhw, global_BK = self._logits()
        return self._one(ckf_blend(dense_BKhw, global_BK, share))

    def hard(self, blend: float) -> HardTargets:
        """What `DistillationLoss` reads for a '-hard' method."""
        return HardTargets(self.image_class, self.at(blend))

    def soft(self, blend: float) -> SoftTargets:
        """What `DistillationLoss` reads for a '-soft' method. Raises CodecError as `logits_at`."""
        quantised = _with_cells(self._soft, quantise_blend(blend))
        dense_BKhw, global_BK = self._logits()
        return SoftTargets(self._one(global_BK), self._one(dense_BKhw), quantised)

    def segments(self, row: int, col: int) -> list[tuple[int, float]]:
        """The upper envelope of one cell of one view: (class, blend from which it wins), the first from 0, blends rising.

        Raises:  CodecError for a batch, a cell outside the grid, and a cache without `envelope`.
        """
        codec = self._hard
        h, w = codec.grid
        if not isinstance(codec, EnvelopeCodec) or not self.single or not (0 <= row < h and 0 <= col < w):
            raise CodecError(
                f"segments of cell ({row}, {col}) of {'one view' if self.single else 'a batch'} in codec '{codec.name}', "
                f"expected a cell of {h} x {w}, one view (batch[i]) and codec 'envelope'"
            )
        found = codec.segments(self._numpy(codec), 0, row, col)
        return [(cls, start / BLEND_ONE) for cls, start in found]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same, answering on a device. Arrays stay on the CPU until they are asked for: they are small."""
        return replace(self, device=torch.device(device))

    def pin_memory(self) -> Targets:
        pinned = {name: {k: t.pin_memory() for k, t in arrays.items()} for name, arrays in self.arrays.items()}
        return replace(self, arrays=pinned)

    def take(self, index: Sequence[int], single: bool = False) -> Targets:
        """Views of a batch, in the order of `index`."""
        at = np.asarray(index, np.int64)
        parts = {name: self.codecs[name].take(self._numpy(self.codecs[name]), at) for name in self.arrays}
        return replace(self, arrays=_tensors(parts), single=single)

    @classmethod
    def of(cls, codecs: Mapping[str, Codec], arrays: Mapping[str, Arrays], single: bool = False) -> Targets:
        """Targets out of the arrays of each codec."""
        return cls(codecs, _tensors(arrays), single)

    @classmethod
    def joined(cls, parts: Sequence[Targets]) -> Targets:
        """One batch of them all, in order."""
        first = parts[0]
        joined = {name: codec.concat([p._numpy(codec) for p in parts]) for name, codec in first.codecs.items()}
        return replace(first, arrays=_tensors(joined), single=False)

    @property
    def _hard(self) -> Codec:
        """The codec that hard targets are read from: an exact one where there is one, else one that has cells."""
        return min(self.codecs.values(), key=hard_rank)

    @property
    def _soft(self) -> Codec:
        """The codec that logits are read from: one that has cells where there is one."""
        return min(self.codecs.values(), key=lambda codec: (not codec.soft, not codec.cells))  # without any it refuses

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Dense [B, K, h, w] and global [B, K] logits, float32, on the device."""
        codec = self._soft
        wide = {k: t.long() if t.dtype == torch.uint16 else t for k, t in self.arrays[codec.name].items()}
        with full_precision(self.device):  # the codec states an error that TF32 would exceed
            return codec.logits_torch({k: t.to(self.device, non_blocking=True) for k, t in wide.items()})

    def _numpy(self, codec: Codec) -> Arrays:
        return {name: tensor.numpy() for name, tensor in self.arrays[codec.name].items()}

    def _given(self, classes: NDArray[Any]) -> Tensor:
        return self._one(torch.from_numpy(classes.astype(np.int64)).to(self.device, non_blocking=True))

    def _one(self, result: Tensor) -> Tensor:
        return result[0] if self.single else result


def _with_cells(codec: Codec, blend: int) -> int:
    """The blend. CodecError where it asks for cells and the codec has the image's targets alone."""
    if blend and not codec.cells:
        raise CodecError(
            f"codec '{codec.name}' has the image's targets alone, which are those of blend 0; cache a codec with cells as well: "
            "envelope for hard targets, features:pca384 or int8 for soft ones"
        )
    return blend


@dataclass(frozen=True)
class SampleParameters:
    """How a view was made: drawn from its seed before a pixel was read. `partner` is the sample whose view was mixed in."""

    sample: int  # number in the data set
    key: str
    view: int
    seed: int
    augmentation: ViewParams
    mode: str  # unmixed, mixup or cutmix
    share: float  # own share of pixels and label, 1 where unmixed
    box: tuple[int, int, int, int] | None = (
        None  # of a cutmix, where the partner's pixels are: top, bottom, left, right
    )
    partner: int | None = None
    partner_augmentation: ViewParams | None = None

    def __str__(self) -> str:
        mixing = "" if self.partner is None else f"; {self.mode} with sample {self.partner}, own share {self.share:.3f}"
        mixing += f", box {self.box}" if self.box else ""
        return f"view {self.view} of '{self.key}': {describe(self.augmentation)}{mixing}"


@dataclass(frozen=True, eq=False)
class ReplaySample:
    """One view as the teacher saw it, finished: where the recipe mixes views its partner's is mixed in, in both pixels and label.

    image float32 [3, S, S], normalised by the dataset's mean and std; label, partner_label: classes of the two images, the
    label itself twice where unmixed; share: of `label`.
    """

    image: Tensor
    label: int
    partner_label: int
    share: float
    targets: Targets
    parameters: SampleParameters


@dataclass(frozen=True, eq=False)
class ReplayBatch:
    """B views: images float32 [B, 3, S, S], labels, targets, and how each was made. `batch[i]` is one of them."""

    images: Tensor
    labels: MixedLabels
    targets: Targets
    parameters: list[SampleParameters]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> ReplaySample:
        label, partner, share = (t[i].item() for t in _fields(self.labels))
        targets = self.targets.take([range(len(self))[i]], single=True)
        return ReplaySample(self.images[i], int(label), int(partner), float(share), targets, self.parameters[i])

    def __iter__(self) -> Iterator[ReplaySample]:
        return (self[i] for i in range(len(self)))

    def soft_labels(self, smoothing: float = 0.0) -> Tensor:
        """Labels as shares of all classes, as timm's Mixup gives them: float32 [B, K]; for losses of soft targets.

        smoothing: share that is spread over all classes.
        """
        classes = next(iter(self.targets.codecs.values())).classes
        own, partner = (F.one_hot(t, classes).float() for t in (self.labels.label, self.labels.partner))
        return torch.lerp(partner, own, self.labels.lam[:, None]) * (1 - smoothing) + smoothing / classes

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ReplayBatch:
        """The same on a device."""
        images, *labels = (t.to(device, non_blocking=non_blocking) for t in (self.images, *_fields(self.labels)))
        return replace(self, images=images, labels=MixedLabels(*labels), targets=self.targets.to(device))

    def pin_memory(self) -> ReplayBatch:
        """The same in page-locked memory: DataLoader calls it with `pin_memory=True`."""
        images, *labels = (t.pin_memory() for t in (self.images, *_fields(self.labels)))
        return replace(self, images=images, labels=MixedLabels(*labels), targets=self.targets.pin_memory())


def collate(samples: Sequence[ReplaySample] | ReplayBatch) -> ReplayBatch:
    """Samples to a batch: what DataLoader does with them by itself."""
    if isinstance(samples, ReplayBatch):  # of a dataset that was asked for all of them at once
        return samples
    label, partner = (torch.tensor([getattr(s, name) for s in samples]) for name in ("label", "partner_label"))
    return ReplayBatch(
        torch.stack([s.image for s in samples]),
        MixedLabels(label, partner, torch.tensor([s.share for s in samples], dtype=torch.float32)),
        Targets.joined([s.targets for s in samples]),
        [s.parameters for s in samples],
    )


# torch's place for types that `default_collate` does not know, so that a DataLoader needs no collate_fn.
default_collate_fn_map[ReplaySample] = lambda batch, *, collate_fn_map=None: collate(batch)


def _fields(labels: MixedLabels) -> tuple[Tensor, Tensor, Tensor]:
    return labels.label, labels.partner, labels.lam


def _tensors(arrays: Mapping[str, Arrays]) -> dict[str, dict[str, Tensor]]:
    """Tensors travel between processes in shared memory. torch warns of arrays that are read-only."""
    return {
        name: {k: torch.from_numpy(a if a.flags.writeable else a.copy()) for k, a in of.items()}
        for name, of in arrays.items()
    }
