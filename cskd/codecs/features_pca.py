"""The `features:pcaR` codec: what the logits of every cell depend on, in a tenth of the bytes of `features:8` and less.

Two layers. The first is the feature map in R directions that were fitted once for the cache, weighted by what an error in them
does to the softmax (Fisher's information, summed over blends), after a cosine transform over the cells, in equal steps
with a dead zone. It is coarse. The second puts right what matters: in each cell the decoder ranks the classes by the logits that
the first layer gives, and the residuals of those ranked first follow in that order, so that no class is ever named. The
first eight have finer steps. So have the classes that the image's logits rank first.

    global_class   uint16 [N]                 exact
    coefficient    int8 [N, R, h, w]          the first layer; feature = mean + decode @ (inverse transform of step * it)
    residual       int8 [N, m, h, w]          by rank, in steps of the logits
    global_residual  int8 [N, G]              the same of the image's logits

Of a teacher without logits of cells the first layer is all there is: directions of the largest variance, whose errors all count
alike, in steps of a share of the features' own spread.

(int8 becomes int16 where a number needs it.) Logits are given up to a constant for each vector, which no softmax sees: they
are centred over the classes. In a unit's file these arrays are streams of pcodec, whose entropy coder takes what
zstd leaves: numbers of the same distribution share a stream,

    stream         uint8 [bytes]              64 groups of coefficients, by falling variance; m of residuals; one of the image's
    stream_bytes   uint32 [65 + m]            of each stream

The ranking is computed in float64, in which two classes never come so close that another device could swap them, ties
going to the lower class.

Shapes: N samples, B batch, C channels, R directions, K classes, h w teacher grid, n its cells (h * w), f frequencies, as many.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cskd.codecs.base import Arrays, Field, Outputs
from cskd.codecs.features import FeaturesCodec
from cskd.codecs.streams import NUMBERS, StreamedCodec, cosine_axes, narrow, rounded
from cskd.codecs.tabled import exact
from cskd.errors import CodecError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_BITS, MIN_BITS, MAX_BITS = 4, 2, 8
STEP = 0.2  # of the first layer with 4 bits, in units in which an error of 1 costs 0.5 nats; each bit more halves all steps
AC = 1.2  # times it, of all but the mean over the cells, which is in the targets of every blend
DEAD, RESIDUAL_DEAD = 0.33, 0.42  # added before rounding down: 0.5 would be plain rounding
FINE, MOST = 8, 40  # ranks of a cell with fine steps, and in all
FINE_STEP, COARSE_STEP, GLOBAL_STEP = 0.5, 1.3, 0.3
GLOBAL = 64  # ranks of the image
LOCAL = 0.8  # share of a cell's own logits in what ranks its classes
GROUPS = 64
FISHER_BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLAIN = 0.1  # weight of the plain logits in the metric: errors are not small where the Fisher information says so
ROWS = 64  # samples decoded at a time: float64 maps of 1,000 classes take 400 KB each


class FeaturesPcaCodec(StreamedCodec, FeaturesCodec):
    """Soft targets close to the teacher's in few bytes; next to it an `envelope` gives the hard ones exactly."""

    fitted_on = 512  # 25,088 cells of a 7 x 7 grid
    error = "logits are off by about half a step where they rank first, more elsewhere; its units record the divergence"

    def __init__(self, rank: int, bits: int, classes: int, grid: tuple[int, int]) -> None:
        if not MIN_BITS <= bits <= MAX_BITS:
            raise CodecError(f"codec 'features:pca{rank}:{bits}' has {bits} bits, expected {MIN_BITS}..{MAX_BITS}")
        super().__init__(f"featurespca{rank}" + (f"b{bits}" if bits != DEFAULT_BITS else ""), classes, grid)
        self.rank, self.scale = rank, 2.0 ** (DEFAULT_BITS - bits)
        self.most, self.image_most = min(MOST, classes), min(GLOBAL, classes)
        self.fields = {
            "global_class": Field(("uint16",), ("sample",)),
            "coefficient": Field(NUMBERS, ("sample", "direction", "row", "col")),
            "residual": Field(NUMBERS, ("sample", "rank", "row", "col")),
            "global_residual": Field(NUMBERS, ("sample", "image_rank")),
        }

    def of_map_alone(self, classified: bool) -> None:
        super().of_map_alone(classified)
        self.fields = {name: self.fields[name] for name in ("global_class", "coefficient")}
        self.error = (
            "each cell's features are off by a few per cent of their spread, and by the directions that are left out"
        )

    def fit(self, classifier: tuple[Tensor, Tensor] | None, features: Iterable[Tensor]) -> Arrays:
        """Directions by falling weight: those in which features vary and an error changes the softmax."""
        maps = [x.cpu() for x in features]
        plain = super().fit(classifier, maps)
        if classifier is None:
            return plain | _fit(None, maps, self.rank, self.grid)
        weight, bias = (x.cpu().double() for x in classifier)
        return plain | _fit((weight, bias), maps, self.rank, self.grid)

    def encode_outputs(self, outputs: Outputs) -> Arrays:
        """A batch as arrays. Raises CodecError for what is not finite float32 of the codec's shapes."""
        import torch

        x = self._validated(outputs).flatten(2)
        t, parts = self.tables(x.device), []
        for i in range(0, len(x), ROWS):
            part = (t["encode"], x[i : i + ROWS] - t["mean"][:, None], t["cosine"])
            y = torch.einsum("rc,bcn,fn->brf", *map(exact, part)).float()
            q = rounded(y / t["steps"], DEAD)
            if not self.soft:
                parts.append([q.short().cpu()])
                continue
            dense_BKn, image_BK, rank, image_rank = self._first_layer(q)
            true, whole = (z[i : i + ROWS].detach().double() for z in (outputs.dense.flatten(2), outputs.image))
            true, whole = true - true.mean(1, keepdim=True), whole - whole.mean(1, keepdim=True)
            residual = (true - dense_BKn).gather(1, rank) / t["rank_steps"]
            of_image = (whole - image_BK).gather(1, image_rank) / (GLOBAL_STEP * self.scale)
            numbers = (q, rounded(residual, RESIDUAL_DEAD), rounded(of_image, 0.5))
            parts.append([z.short().cpu() for z in numbers])
        if not self.soft:
            empty = torch.zeros(0, self.directions * x.shape[2], dtype=torch.int16)
            whole_q = torch.cat([part[0] for part in parts]) if parts else empty
            return {
                "global_class": outputs.image.argmax(1).cpu().numpy().astype(np.uint16),
                "coefficient": narrow(whole_q.numpy().reshape(len(x), self.directions, *self.grid)),
            }
        coefficient, residual, of_image = (
            (torch.cat(z) for z in zip(*parts, strict=True))
            if parts
            else (
                torch.zeros(0, n, dtype=torch.int16) for n in (self.directions * x.shape[2], self.most * x.shape[2], 0)
            )
        )
        return {
            "global_class": outputs.image.argmax(1).cpu().numpy().astype(np.uint16),
            "coefficient": narrow(coefficient.numpy().reshape(len(x), self.directions, *self.grid)),
            "residual": narrow(residual.numpy().reshape(len(x), self.most, *self.grid)),
            "global_residual": narrow(of_image.numpy().reshape(len(x), self.image_most)),
        }

    def logits_torch(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode a batch on its device: float32 dense [B, K, h, w] and global [B, K], centred over the classes."""
        import torch

        self._refuse_logits()
        t, parts = self.tables(tensors["coefficient"].device), []
        for i in range(0, len(tensors["coefficient"]), ROWS):
            q, residual, of_image = (
                tensors[name][i : i + ROWS].flatten(2) if tensors[name].ndim > 2 else tensors[name][i : i + ROWS]
                for name in ("coefficient", "residual", "global_residual")
            )
            dense_BKn, image_BK, rank, image_rank = self._first_layer(q)
            dense_BKn = dense_BKn.scatter_add(1, rank, residual * t["rank_steps"])
            image_BK = image_BK.scatter_add(1, image_rank, of_image.double() * (GLOBAL_STEP * self.scale))
            parts.append((dense_BKn.float(), image_BK.float()))
        if not parts:
            parts = [(torch.zeros(0, self.classes, self.grid[0] * self.grid[1]), torch.zeros(0, self.classes))]
        dense, image = (torch.cat(z) for z in zip(*parts, strict=True))
        return dense.reshape(*dense.shape[:2], *self.grid), image

    def features_torch(self, tensors: dict[str, Tensor]) -> Tensor:
        """The feature maps of the first layer: float32 [B, C, h, w]."""
        t = self.tables(tensors["coefficient"].device)
        y = (tensors["coefficient"].flatten(2) * t["steps"]).float() @ t["cosine"]
        x: Tensor = t["decode"] @ y + t["mean"][:, None]
        return x.reshape(*x.shape[:2], *self.grid)

    @property
    def directions(self) -> int:
        """R, or as many as there are."""
        return int(self.tables()["encode"].shape[0])

    def _first_layer(self, q_BRf: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Float64 logits [B, K, n] and [B, K], and the classes that have a residual, int64 [B, m, n] and [B, G]."""
        t = self.tables(q_BRf.device)
        y = (q_BRf * t["steps"]).double() @ t["cosine"].double()
        dense_BKn = t["logits"] @ y + t["logits_mean"][:, None]
        image_BK = dense_BKn.mean(2)
        score = LOCAL * dense_BKn + (1 - LOCAL) * image_BK[:, :, None] - t["tie"][:, None]
        return (
            dense_BKn,
            image_BK,
            score.topk(self.most, dim=1).indices,
            (image_BK - t["tie"]).topk(self.image_most, dim=1).indices,
        )

    def _derived(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        import torch

        cosine = cosines(self.grid)
        steps = torch.full((len(cosine),), STEP * AC * self.scale)
        steps[0] = STEP * self.scale
        if not self.soft:
            return tables | {"cosine": cosine, "steps": steps}
        weight, bias = tables["weight"].double(), tables["bias"].double()
        weight, bias = weight - weight.mean(0), bias - bias.mean()
        rank_steps = torch.full((self.most, 1), COARSE_STEP * self.scale, dtype=torch.float64)
        rank_steps[:FINE] = FINE_STEP * self.scale
        return tables | {
            "cosine": cosine,
            "steps": steps,
            "rank_steps": rank_steps,
            "logits": weight @ tables["decode"].double(),
            "logits_mean": weight @ tables["mean"].double() + bias,
            "tie": torch.arange(self.classes, dtype=torch.float64) * 1e-9,
        }

    def _check_tables(self, arrays: Arrays) -> None:
        super()._check_tables(arrays)
        C = int(arrays["weight"].shape[1] if self.soft else arrays["channels"][0])
        n = self.grid[0] * self.grid[1]
        R = arrays["encode"].shape[0] if "encode" in arrays else 0
        shapes = {"encode": (R, C), "decode": (C, R), "mean": (C,), "order": (R * n,)}
        for name, shape in shapes.items():
            if name not in arrays or arrays[name].shape != shape:
                raise CodecError(f"codec '{self.name}': its tables lack {name} of shape {shape}; run cskd verify")
        if not np.array_equal(np.sort(arrays["order"]), np.arange(R * n)):
            raise CodecError(f"codec '{self.name}': its order is not one of {R * n} numbers; run cskd verify")

    def _length(self, dim: str, n: int) -> int | None:
        sizes = {"rank": self.most, "image_rank": self.image_most}
        return self.directions if dim == "direction" else sizes.get(dim) or super()._length(dim, n)

    def _columns(self) -> Iterable[tuple[str, NDArray[np.int64]]]:
        """Array and columns of each stream; an array has its axes but the first flattened."""
        order, n = self.tables()["order"].cpu().numpy(), self.grid[0] * self.grid[1]
        yield from (("coefficient", part) for part in np.array_split(order, GROUPS))
        if not self.soft:
            return
        yield from (("residual", np.arange(rank * n, (rank + 1) * n)) for rank in range(self.most))
        yield "global_residual", np.arange(self.image_most)


def cosines(grid: tuple[int, int]) -> Tensor:
    """The orthonormal cosine transform (DCT-II) over the cells: float32 [f, n], the mean first."""
    import torch

    return torch.kron(*cosine_axes(grid)).float()


def _fit(classifier: tuple[Tensor, Tensor] | None, maps: list[Tensor], rank: int, grid: tuple[int, int]) -> Arrays:
    """Encoding and decoding matrices, mean, and the order of the coefficients by falling variance.

    With S the covariance of the features and G a metric, the directions are the eigenvectors of L^T G L, S = L L^T: of all with so
    many directions they lose least of trace(G S). G is W^T F W, F the mean Fisher information of the softmax; without a
    classifier the unit matrix divided by the mean variance of a channel.
    """
    import torch

    C = maps[0].shape[1]
    total, square, cells = torch.zeros(C).double(), torch.zeros(C, C).double(), 0
    for x in maps:
        flat = x.flatten(2).permute(0, 2, 1).double().flatten(0, 1)
        total, square, cells = total + flat.sum(0), square + flat.T @ flat, cells + len(flat)
    mean = total / cells
    covariance = square / cells - mean[:, None] * mean
    if classifier is None:
        metric = torch.eye(C).double() / (covariance.trace() / C).clamp_min(1e-30)
    else:
        metric = _metric(*classifier, maps)
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(1e-30) * 1e-7
    root = vectors[:, kept] * values[kept].sqrt()
    value, vector = torch.linalg.eigh(root.T @ metric @ root)
    chosen = value.argsort(descending=True)[:rank]
    chosen = chosen[value[chosen] > 1e-12 + value[-1:].sum() * 1e-9]  # none where all is constant
    value, vector = value[chosen], vector[:, chosen]
    vector = vector * torch.where(vector.sum(0) < 0, -1.0, 1.0)  # else the sign is the library's
    encode = value.sqrt()[:, None] * (vector.T @ (vectors[:, kept] / values[kept].sqrt()).T)
    decode = root @ vector / value.sqrt()
    variance = torch.zeros(len(encode), grid[0] * grid[1]).double()
    for x in maps:
        y = encode @ (x.flatten(2).double() - mean[:, None]) @ cosines(grid).double().T
        variance += y.square().sum(0)
    order = variance.flatten().argsort(descending=True, stable=True)
    tables = {"encode": encode.float(), "decode": decode.float(), "mean": mean.float(), "order": order.int()}
    return {name: np.ascontiguousarray(t.numpy()) for name, t in tables.items()}


def _metric(weight: Tensor, bias: Tensor, maps: list[Tensor]) -> Tensor:
    """What an error of the features does to the softmax of the cells, summed over blends: float64 [C, C]."""
    import torch

    weight, bias = weight - weight.mean(0), bias - bias.mean()
    C = weight.shape[1]
    metric, chance = torch.zeros(C, C).double(), torch.zeros(len(weight)).double()
    spread, seen = 0.0, 0
    for x in maps:
        rows = x.flatten(2).permute(0, 2, 1).double()
        some = rows[:, :: max(1, rows.shape[1] // 7)]  # a seventh of the cells: their softmax takes longest
        local, image = some @ weight.T + bias, (rows.mean(1) @ weight.T + bias)[:, None]
        for a in FISHER_BLENDS:
            p = (a * local + (1 - a) * image).softmax(2).flatten(0, 1)
            through = p @ weight
            metric -= through.T @ through
            chance, spread, seen = chance + p.sum(0), spread + float((p - p * p).sum()), seen + len(p)
    metric = (metric + (weight.T * chance) @ weight) / seen
    whole: Tensor = metric + PLAIN * spread / seen / len(weight) * (weight.T @ weight)
    return whole
