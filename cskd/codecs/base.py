"""What every codec of teacher outputs promises, and the exact meaning of a hard target.

Shapes: N samples of a unit, B batch, K classes, h w teacher grid (7 7).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cskd.dataset.classes import MAX_CLASSES
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor

Arrays = dict[str, NDArray[Any]]
U16 = NDArray[np.uint16]
F32 = NDArray[np.float32]

BLEND_ONE = 1 << 16  # blends are whole numbers of 2^-16, from the cache and online alike
HARD_CHUNK = 16  # samples whose logits are decoded at a time where hard targets need them


def quantise_blend(a: float) -> int:
    """The blend as a whole number of 2^-16: round(a * 65536), 0..65536. Raises CodecError outside [0, 1]."""
    if not 0.0 <= a <= 1.0:  # false for NaN too
        raise CodecError(f"blend {a} is outside [0, 1]; a decay must fall from 1 (local) towards 0 (global)")
    return round(a * BLEND_ONE)


def check_blend(blend: int) -> None:
    """Raises CodecError unless `blend` is what `quantise_blend` gives."""
    if isinstance(blend, float) or not 0 <= blend <= BLEND_ONE:
        raise CodecError(f"blend {blend!r} is not a whole number in 0..{BLEND_ONE}; pass quantise_blend(a)")


def direct_hard(dense_BKhw: Tensor, global_BK: Tensor, blend: int) -> Tensor:
    """The hard CKF target, computed directly: the class of the largest a * D_c + (1 - a) * g_c, the lowest on ties.

    With a = blend / 65536 both products of a float32 are exact in float64; their sum is compared together with its
    rounding error (Knuth's TwoSum), so the result is that of exact arithmetic on any device, fused or not. A plain
    float64 argmax differs only where two classes agree to 53 bits without being equal.

    Args:    dense_BKhw, global_BK float32 logits; blend 0..65536 (see `quantise_blend`), 65536 = local only.
    Returns: int64 [B, h, w].
    Raises:  CodecError for a blend outside 0..65536.
    Source:  arXiv 2307.08500, section on CKF.
    """
    check_blend(blend)
    if dense_BKhw.device.type == "mps":  # has no float64
        return direct_hard(dense_BKhw.cpu(), global_BK.cpu(), blend).to(dense_BKhw.device)
    local = dense_BKhw.double() * blend
    whole = (global_BK.double() * (BLEND_ONE - blend))[:, :, None, None]
    total = local + whole
    top, winner = total.max(1, keepdim=True)
    tied = total == top
    cells = tied.sum(1) > 1
    if bool(cells.any()):
        x, y, s = (t.expand_as(total).movedim(1, -1)[cells] for t in (local, whole, total))  # [tied cells, K]
        v = s - x
        error = (x - (s - v)) + (y - v)
        winner[:, 0][cells] = error.masked_fill(~tied.movedim(1, -1)[cells], -math.inf).argmax(1)
    return winner[:, 0]


class Outputs(NamedTuple):
    """What stage 1 knows of a batch. A codec that stores logits alone reads the first two, by `encode`."""

    dense: Tensor  # float32 [B, K, h, w], logits of each cell
    image: Tensor  # float32 [B, K], logits of the image
    labels: Tensor | None = None  # int64 [B, 2]: of the sample, and of the one it is mixed with (its own where unmixed)
    features: Tensor | None = (
        None  # float32 [B, C, h, w], the map that the classifier is applied to, for codecs that store it
    )
    stages: Mapping[str, Tensor] = MappingProxyType({})  # float32 maps of earlier stages by name, each of its own shape


def shortest(values: NDArray[Any]) -> list[float]:
    """Floats of any width as numbers that JSON writes with as few digits as give them back."""
    return [float(str(value)) for value in values]


class Field(NamedTuple):
    """One stored array: its dtypes (the first is the usual one) and the names of its dimensions."""

    dtypes: tuple[DTypeLike, ...]
    dims: tuple[str, ...]


def hard_rank(codec: Codec) -> tuple[bool, bool, bool]:
    """By which codecs are sorted for hard targets: exact ones first, then those that have cells, those without classes last."""
    return not codec.has_classes, not codec.exact_hard, not codec.cells


class Codec(ABC):
    """Teacher outputs of a unit as arrays, and back. One entry along axis 0 a sample, unless a codec says else."""

    exact_hard: bool  # are hard CKF targets those of `direct_hard`, at every blend
    soft: bool  # can it give logits, for soft targets
    cells: bool = True  # are they of each cell; False: of the image, which every cell then shows
    has_classes: bool = True  # does it hold targets of classes at all; False: a map of an earlier stage, or of a teacher without a classifier
    fine_image: bool = False  # are the image's logits kept in 16 bits, whatever the cells' are
    reads_features: ClassVar[bool] = False  # does it store the feature map, see `cskd.codecs.features`
    error: str  # it makes, in words
    name: str
    fields: dict[str, Field]

    def __init__(self, name: str, classes: int, grid: tuple[int, int]) -> None:
        if not 1 <= classes <= MAX_CLASSES:
            raise CodecError(f"{classes} classes, expected 1..{MAX_CLASSES}: class ids are stored as uint16")
        if len(grid) != 2 or min(grid) < 1:
            raise CodecError(f"teacher grid {grid}, expected (h, w) of at least one cell")
        self.name, self.classes, self.grid = name, classes, (int(grid[0]), int(grid[1]))

    @property
    def dimensions(self) -> dict[str, tuple[str, ...]]:
        """Array name -> names of its dimensions, for zarr and xarray."""
        return {name: field.dims for name, field in self.fields.items()}

    @abstractmethod
    def encode(self, dense_BKhw: Tensor, global_BK: Tensor) -> Arrays:
        """Float32 logits of a batch, on any device, as arrays. Raises CodecError as `validate_logits`."""

    def encode_outputs(self, outputs: Outputs) -> Arrays:
        """`encode` of all that stage 1 knows of a batch, for a codec that stores more than logits."""
        return self.encode(outputs.dense, outputs.image)

    def hard(self, arrays: Arrays, blend: int) -> U16:
        """Hard CKF targets at blend / 65536, here of the decoded logits: uint16 [N, h, w]."""
        import torch

        check_blend(blend)
        out: U16 = np.empty((len(arrays["global_class"]), *self.grid), np.uint16)
        if blend == 0:
            out[:] = self.global_class(arrays)[:, None, None]
            return out
        for i in range(0, len(out), HARD_CHUNK):
            dense_NKhw, global_NK = self.logits({k: a[i : i + HARD_CHUNK] for k, a in arrays.items()})
            chosen = direct_hard(torch.from_numpy(dense_NKhw), torch.from_numpy(global_NK), blend)
            out[i : i + HARD_CHUNK] = chosen.numpy()
        return out

    def hard_at(self, arrays: Arrays, index: NDArray[np.integer[Any]], blend: int) -> U16:
        """`hard` of the samples at `index`, in its order: uint16 [len(index), h, w]."""
        return self.hard(self.take(arrays, index), blend)

    def logits(self, arrays: Arrays) -> tuple[F32, F32]:
        """Dense float32 [N, K, h, w] and global float32 [N, K] logits. Raises CodecError where the codec holds none."""
        import torch

        # torch warns of arrays that are read-only, as stored ones are
        tensors = {k: torch.from_numpy(a if a.flags.writeable else a.copy()) for k, a in arrays.items()}
        dense_NKhw, global_NK = self.logits_torch(tensors)
        return dense_NKhw.numpy(), global_NK.numpy()

    def logits_torch(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`logits` of a batch on the tensors' device: float32 [B, K, h, w] and [B, K]."""
        raise CodecError(f"codec '{self.name}' holds no logits for soft targets; cache 'int8' or 'topk:10' as well")

    def global_logits_torch(self, tensors: dict[str, Tensor]) -> Tensor:
        """The global logits of `logits_torch` alone: float32 [B, K]."""
        return self.logits_torch(tensors)[1]

    def global_class(self, arrays: Arrays) -> U16:
        """The argmax of the teacher's ordinary output, exact, the lowest class on ties: uint16 [N]."""
        return arrays["global_class"]

    def global_facts(self, arrays: Arrays, row: int) -> dict[str, list[float] | list[int] | float]:
        """The teacher's ordinary output for one sample as JSON, as far as it is kept: `logits` of all classes, or what a codec has
        in their place; empty where only its class is."""
        import torch

        if not self.soft:
            return {}
        one = self.take(arrays, np.array([row]))
        return {
            "logits": shortest(self.global_logits_torch({k: torch.from_numpy(a) for k, a in one.items()})[0].numpy())
        }

    def concat(self, parts: Sequence[Arrays]) -> Arrays:
        """The samples of all parts, in order."""
        return {name: np.concatenate([part[name] for part in parts]) for name in self.fields}

    def take(self, arrays: Arrays, index: NDArray[np.integer[Any]]) -> Arrays:
        """The samples at `index`, in its order; a sample may be taken more than once."""
        return {name: arrays[name][index] for name in self.fields}

    def check(self, arrays: Arrays, n: int, classes: int) -> None:
        """Raises CodecError unless `arrays` are n samples of this codec: names, dtypes, shapes, class ids."""
        if classes != self.classes:
            raise CodecError(f"codec '{self.name}' was made for {self.classes} classes, the arrays are for {classes}")
        if set(arrays) != set(self.fields):
            raise CodecError(f"codec '{self.name}' has the arrays {sorted(self.fields)}, found {sorted(arrays)}")
        for name, (dtypes, dims) in self.fields.items():
            a, shape = arrays[name], [self._length(dim, n) for dim in dims]
            if a.dtype not in [np.dtype(d) for d in dtypes]:
                expected = " or ".join(str(np.dtype(d)) for d in dtypes)
                raise CodecError(f"{self.name}/{name} is {a.dtype}, expected {expected}; run cskd verify")
            if a.ndim != len(shape) or any(e not in (None, s) for s, e in zip(a.shape, shape, strict=True)):
                sizes = ", ".join(dim if s is None else str(s) for dim, s in zip(dims, shape, strict=True))
                raise CodecError(f"{self.name}/{name} has shape {a.shape}, expected ({sizes}); run cskd verify")
            if name.endswith("class") and a.size and int(a.max()) >= classes:
                raise CodecError(f"{self.name}/{name} names class {a.max()} of {classes}; run cskd verify")

    def _length(self, dim: str, n: int) -> int | None:
        """Length of a named dimension; None where it differs from unit to unit."""
        return {"sample": n, "row": self.grid[0], "col": self.grid[1], "class": self.classes}.get(dim)

    @property
    def packed_dimensions(self) -> dict[str, tuple[str, ...]]:
        """`dimensions` of what `pack` gives."""
        return self.dimensions

    def pack(self, arrays: Arrays) -> Arrays:
        """The arrays of a whole unit as they are written to its file, where zstd compresses them."""
        return arrays

    def unpack(self, packed: Arrays, n: int) -> Arrays:
        """The arrays of n samples that `pack` was given. Raises CodecError for what it can't have given."""
        return packed

    def validate_logits(self, dense_BKhw: Tensor, global_BK: Tensor) -> None:
        """Raises CodecError unless both are finite float32 logits of the codec's classes and grid."""
        shape = (len(dense_BKhw), self.classes)
        for what, x, expected in (("dense", dense_BKhw, (*shape, *self.grid)), ("global", global_BK, shape)):
            if tuple(x.shape) != expected:
                raise CodecError(f"{what} logits have shape {tuple(x.shape)}, codec '{self.name}' expected {expected}")
            if str(x.dtype) != "torch.float32":
                raise CodecError(f"{what} logits are {x.dtype}, expected float32: run the classifier without autocast")
            # A sum is a tenth of isfinite().all(), and finite unless a term is not, or the logits are absurdly large.
            if not math.isfinite(float(x.sum())) and not bool(x.isfinite().all()):
                i = int((~x.isfinite().flatten(1).all(1)).nonzero()[0])
                bad = x[i][~x[i].isfinite()][0].item()
                raise CodecError(f"{what} logits of sample {i} of the batch hold {bad}; check image and teacher")
