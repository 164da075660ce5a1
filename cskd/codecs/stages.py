"""The `stage` codecs: the map that an earlier stage of the teacher gives, on a grid of its own. They hold no targets of classes.

`stage:NAME:BITS` holds each number of the map in 2 to 16 bits, as `features:BITS` does (`cskd.codecs.tabled`). `stage:NAME:pcaR`
and `stage:NAME:pcaR:BITS` hold R directions over the channels, those in which maps vary most, after a cosine transform over the
cells, in equal steps with a dead zone,

    coefficient   int8 [N, R, h, w]    map = mean + basis @ (inverse transform of step * it)

(int16 where a number needs it) which are 64 streams of a file by falling variance (`cskd.codecs.streams`). Each bit more halves
the steps; with 4 bits they are a quarter of the root mean square by which a channel varies, which with all directions kept loses about 0.5 %
of the variance (ResNet-56 on CIFAR-10: 0.53 to 0.57 %).

What all units share is a file of the cache: `shape` int32 [3], C, h and w of the stage; of `pcaR` also float32 `basis` [C, R] of
orthonormal columns, `mean` [C], `step` [1], and `order` int32 [R * h * w], of the coefficients by falling variance.

NAME is a module of the teacher by its path, such as `layer2` or `s3`, or the number of a stage that timm names
(`cskd.teacher.stages`). In a cache the codec of `stage:layer2:pca16:6` is named `stage-layer2-pca16b6`.

Shapes: N samples, B batch, C channels, R directions, h w the stage's grid, n its cells (h * w).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cskd.codecs.base import Arrays, Codec, Field, Outputs
from cskd.codecs.bits import MAX_BITS, MIN_BITS, packed_length
from cskd.codecs.streams import NUMBERS, StreamedCodec, cosine_axes, narrow, rounded
from cskd.codecs.tabled import MAP_FIELDS, TabledCodec, checked_map, exact, finite, pack_map, unpack_map
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.]{0,63}"
STORED = rf"stage-{NAME}-[a-z0-9]{{1,16}}"  # in a cache
_SPEC = re.compile(rf"(?:stage:({NAME}):|stage-({NAME})-)(?:pca([1-9]\d{{0,4}})(?:[:b]([1-9]\d?))?|([1-9]\d{{0,5}}))")
DEFAULT_BITS, MIN_PCA_BITS, MAX_PCA_BITS = 4, 2, 8
STEP = 0.25  # with 4 bits, of the root mean square over channels, cells and views
DEAD = 0.4  # added before rounding down: 0.5 would be plain rounding
GROUPS = 64


def stage_codec(name: str, classes: int, grid: tuple[int, int]) -> StageCodec | None:
    """A codec of a stage by its name in a config or a cache; None for a name of another kind. CodecError as `get_codec`."""
    if (match := _SPEC.fullmatch(name)) is None:
        return None
    stage, bits = match[1] or match[2], int(match[4] or match[5] or DEFAULT_BITS)
    if match[3]:
        return StagePcaCodec(stage, int(match[3]), bits, classes, grid)
    return StageBitsCodec(stage, bits, classes, grid)


def stages_of(codecs: Mapping[str, Codec]) -> tuple[str, ...]:
    """The stages that codecs store, each once."""
    return tuple(dict.fromkeys(codec.stage for codec in codecs.values() if isinstance(codec, StageCodec)))


class StageCodec(TabledCodec):
    """The map of one stage. `grid` is that of the teacher's cells, `map_grid` the stage's own."""

    exact_hard, soft, cells, has_classes = False, False, False, False
    fitted_on = 128

    def __init__(self, stage: str, spec: str, classes: int, grid: tuple[int, int]) -> None:
        super().__init__(f"stage-{stage}-{spec}", classes, grid)
        self.stage = stage

    @property
    def keeps(self) -> tuple[int, int]:
        """By which codecs of one stage are sorted, the one that keeps most last."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        return int(self.tables()["shape"][0])

    @property
    def map_grid(self) -> tuple[int, int]:
        _, h, w = self.tables()["shape"].tolist()
        return h, w

    def fit(self, maps: Sequence[Tensor]) -> Arrays:
        """The tables of a new cache. maps: float32 batches [B, C, h, w] of the views that come first."""
        return {"shape": np.array(maps[0].shape[1:], np.int32)}

    def encode(self, dense_BKhw: Tensor, global_BK: Tensor) -> Arrays:
        """Raises CodecError: see `encode_outputs`."""
        raise CodecError(f"codec '{self.name}' stores maps of a stage, not logits; encode by encode_outputs")

    def map_torch(self, tensors: dict[str, Tensor]) -> Tensor:
        """The maps of a batch, on its device: float32 [B, C, h, w]."""
        raise NotImplementedError

    def _check_tables(self, arrays: Arrays) -> None:
        shape = arrays.get("shape", np.zeros(0))
        if shape.shape != (3,) or shape.dtype.kind != "i" or int(shape.min()) < 1 or int(shape.max()) > 1 << 16:
            raise CodecError(f"codec '{self.name}': its tables hold no shape of a map; run cskd verify")
        finite(self, arrays)

    def _validated(self, outputs: Outputs) -> Tensor:
        x = outputs.stages.get(self.stage)
        shape = (len(outputs.image), self.channels, *self.map_grid)
        return checked_map(self, x, shape, f"maps of stage {self.stage} are")

    def _length(self, dim: str, n: int) -> int | None:
        own = dict(zip(("row", "col"), self.map_grid, strict=True))
        return own.get(dim) or super()._length(dim, n)


class StageBitsCodec(StageCodec):
    """Every number of the map in 2 to 16 bits."""

    fitted_on = 1

    def __init__(self, stage: str, bits: int, classes: int, grid: tuple[int, int]) -> None:
        if not MIN_BITS <= bits <= MAX_BITS:
            raise CodecError(
                f"codec 'stage:{stage}:{bits}' has {bits} bits per number, expected {MIN_BITS}..{MAX_BITS}"
            )
        super().__init__(stage, str(bits), classes, grid)
        self.bits, self.fields = bits, dict(MAP_FIELDS)
        self.error = f"a number is off by at most (max - min of its cell) / {2 * (2**bits - 1)}"

    @property
    def keeps(self) -> tuple[int, int]:
        return 1 << 20, self.bits

    def encode_outputs(self, outputs: Outputs) -> Arrays:
        """A batch as arrays. Raises CodecError for what is not finite float32 of the codec's shape."""
        return pack_map(self._validated(outputs), self.bits)

    def map_torch(self, tensors: dict[str, Tensor]) -> Tensor:
        return unpack_map(tensors, self.channels, self.bits)

    def _length(self, dim: str, n: int) -> int | None:
        return packed_length(self.channels, self.bits) if dim == "byte" else super()._length(dim, n)


class StagePcaCodec(StreamedCodec, StageCodec):
    """The directions in which the map varies most."""

    def __init__(self, stage: str, rank: int, bits: int, classes: int, grid: tuple[int, int]) -> None:
        if not MIN_PCA_BITS <= bits <= MAX_PCA_BITS:
            raise CodecError(
                f"codec 'stage:{stage}:pca{rank}:{bits}' has {bits} bits, expected {MIN_PCA_BITS}..{MAX_PCA_BITS}"
            )
        super().__init__(stage, f"pca{rank}" + (f"b{bits}" if bits != DEFAULT_BITS else ""), classes, grid)
        self.rank, self.scale = rank, 2.0 ** (DEFAULT_BITS - bits)
        self.fields = {"coefficient": Field(NUMBERS, ("sample", "direction", "row", "col"))}
        self.error = (
            "what its directions leave out, and half a step; its units record the share of the variance that is lost"
        )

    @property
    def keeps(self) -> tuple[int, int]:
        return self.rank, int(-self.scale * 64)

    def fit(self, maps: Sequence[Tensor]) -> Arrays:
        import torch

        C, (h, w) = maps[0].shape[1], maps[0].shape[2:]
        total, square, cells = torch.zeros(C).double(), torch.zeros(C, C).double(), 0
        for x in maps:
            rows = x.detach().cpu().double().permute(0, 2, 3, 1).reshape(-1, C)
            total, square, cells = total + rows.sum(0), square + rows.T @ rows, cells + len(rows)
        mean = total / max(1, cells)
        covariance = square / max(1, cells) - mean[:, None] * mean
        values, vectors = torch.linalg.eigh(covariance)
        basis = vectors.flip(1)[:, : self.rank]
        basis = basis * torch.where(basis.sum(0) < 0, -1.0, 1.0)  # else the sign is the library's
        step = STEP * self.scale * float(values.clamp_min(0).mean().sqrt().clamp_min(1e-6))
        variance = torch.zeros(basis.shape[1], h, w).double()
        for x in maps:
            variance += _forward(x.detach().cpu().double(), basis, mean, cosine_axes((h, w))).square().sum(0)
        order = variance.flatten().argsort(descending=True, stable=True)
        tables = {"basis": basis.float(), "mean": mean.float(), "step": torch.tensor([step]), "order": order.int()}
        return super().fit(maps) | {name: np.ascontiguousarray(t.numpy()) for name, t in tables.items()}

    def encode_outputs(self, outputs: Outputs) -> Arrays:
        """A batch as arrays. Raises CodecError for what is not finite float32 of the codec's shape."""
        x = self._validated(outputs)
        t = self.tables(x.device)
        basis, mean, *axes = (exact(t[name]) for name in ("basis", "mean", "rows", "cols"))
        y = _forward(exact(x), basis, mean, axes).float() / t["step"]
        return {"coefficient": narrow(rounded(y, DEAD).short().cpu().numpy())}

    def map_torch(self, tensors: dict[str, Tensor]) -> Tensor:
        import torch

        t = self.tables(tensors["coefficient"].device)
        y = torch.einsum("fh,brfg,gw->brhw", t["rows"], tensors["coefficient"] * t["step"], t["cols"])
        x: Tensor = torch.einsum("cr,brhw->bchw", t["basis"], y) + t["mean"][:, None, None]
        return x

    def _derived(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        _, h, w = tables["shape"].tolist()
        rows, cols = cosine_axes((h, w))
        return tables | {"rows": rows.float(), "cols": cols.float()}

    def _check_tables(self, arrays: Arrays) -> None:
        super()._check_tables(arrays)
        C, h, w = arrays["shape"].tolist()
        R = min(self.rank, C)
        for name, shape in {"basis": (C, R), "mean": (C,), "step": (1,), "order": (R * h * w,)}.items():
            if name not in arrays or arrays[name].shape != shape:
                raise CodecError(f"codec '{self.name}': its tables lack {name} of shape {shape}; run cskd verify")
        if not np.array_equal(np.sort(arrays["order"]), np.arange(R * h * w)):
            raise CodecError(f"codec '{self.name}': its order is not one of {R * h * w} numbers; run cskd verify")

    def _columns(self) -> Iterable[tuple[str, NDArray[np.int64]]]:
        for part in np.array_split(self.tables()["order"].cpu().numpy().astype(np.int64), GROUPS):
            yield "coefficient", part

    def _length(self, dim: str, n: int) -> int | None:
        return int(self.tables()["basis"].shape[1]) if dim == "direction" else super()._length(dim, n)


def _forward(x_BChw: Tensor, basis_CR: Tensor, mean_C: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """Coefficients [B, R, h, w]."""
    import torch

    y = torch.einsum("cr,bchw->brhw", basis_CR, x_BChw - mean_C[:, None, None])
    found: Tensor = torch.einsum("fh,brhw,gw->brfg", axes[0], y, axes[1])
    return found
