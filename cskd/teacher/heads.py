"""Dense teacher logits: a classifier head applied to every cell of the feature map, and the proof that it may be.

The head of any network that splits into `forward_features` and `forward_head`, or that `cskd.teacher.pooling` splits, is applied to each cell as if the cell
were a feature map of its own. Where the head is linear in the mean of the cells (mean pooling, then a linear layer) the
cells' logits then average to the global logits. That is measured, not guessed from class names: on feature maps with
large differences between cells, a norm or hidden layer after the pooling, or another pooling, shows at once.
"""

# Shapes: B batch, C channels, K classes, h w the feature map's cells, H W pixels

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cskd.errors import TeacherError, one_line
from cskd.seeds import mix64_array, uniform_array
from cskd.teacher.pooling import find_pooling

# Of the spread. Linear heads show 3e-6 and less, all others 0.3 and more (benchmarks/teacher_families.py).
HEAD_TOLERANCE = 1e-4

Kind = Literal["linear", "per_cell", "forward_dense", "image", "no_classes"]


@dataclass(frozen=True)
class Head:
    """The part of a teacher that always runs in float32."""

    # forward_dense: the model's own method, which takes the input instead of a feature map; image, no_classes: no logits of cells,
    # or none at all, see `cskd.teacher.map_alone`
    kind: Kind
    gap: float  # largest |mean of dense - global|, as a share of the spread of dense over the cells
    layers: str  # the head's layers in the order they run, for people
    backbone: Callable[[Tensor], Tensor]  # network input [B, 3, H, W] -> map; for kind forward_dense the identity
    apply: Callable[[Tensor], Any]  # map -> global [B, K]; for kind forward_dense: input -> (dense, global)
    nhwc: bool = False  # the map is [B, h, w, C]
    classifier: nn.Linear | nn.Conv2d | None = None  # all that `apply` does to a cell, where that was seen to be so

    def dense(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Dense logits [B, K, h, w] (K innermost in memory) and global logits [B, K] of a float32 feature map."""
        if self.kind == "forward_dense":
            dense_BKhw, global_BK = self.apply(features)
            return dense_BKhw, global_BK
        on_cpu = features.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if self.classifier is not None and on_cpu and features.dtype == torch.float32:
            return convolved(self.classifier, features), self.apply(features)
        return dense_of(self.apply, features, self.nhwc), self.apply(features)

    def outputs(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dense and global logits, and the map [B, C, h, w] that codecs of features store."""
        return *self.dense(features), features

    def pooled(self, features: Tensor) -> Tensor:
        """The global logits of `dense` alone."""
        logits: Tensor = self.apply(features)[1] if self.kind == "forward_dense" else self.apply(features)
        return logits


def dense_of(apply: Callable[[Tensor], Tensor], features: Tensor, nhwc: bool) -> Tensor:
    """Apply a head to every cell of a map as if it were a 1x1 map of its own: [B, K, h, w]."""
    features_BhwC = features if nhwc else features.permute(0, 2, 3, 1)
    B, h, w, C = features_BhwC.shape
    cells = features_BhwC.reshape(B * h * w, *((1, 1, C) if nhwc else (C, 1, 1)))
    return apply(cells).reshape(B, h, w, -1).permute(0, 3, 1, 2)


def convolved(layer: nn.Linear | nn.Conv2d, features: Tensor) -> Tensor:
    """A classifier as a 1x1 convolution over the map [B, C, h, w]: [B, K, h, w].

    On a CPU oneDNN convolves float32 in less than half of the time that MKL takes for the same product (a core of an AMD EPYC).
    """
    weight_KC11 = layer.weight.reshape(*layer.weight.shape[:2], 1, 1)
    return F.conv2d(features.contiguous(memory_format=torch.channels_last), weight_KC11, layer.bias)


def check_input(model: nn.Module, x: Tensor) -> None:
    """TeacherError where the network can't take such an input."""
    _run(model, x, "the model")


def find_head(model: Any, x: Tensor, mode: Literal["exact", "per_cell"]) -> Head:
    """Work out how `model` makes logits from cells, and verify it.

    Args:    model a torch.nn.Module in eval mode; x float32 [B, 3, H, W], normalised images that differ from
             place to place; mode 'exact' demands a head that is linear in the mean of the cells, 'per_cell' takes any
             that runs on a cell.
    Raises:  TeacherError with the reason where the logits of a cell have no verified meaning.
    """
    logits_BK = _run(model, x, "the model")
    if not isinstance(logits_BK, Tensor) or logits_BK.ndim != 2 or len(logits_BK) != len(x):
        raise TeacherError(
            f"the teacher's output is {_describe(logits_BK)}, expected logits [{len(x)}, classes]; let forward return them alone"
        )
    if not bool(torch.isfinite(logits_BK).all()):
        raise TeacherError("the teacher's logits of synthetic images are not finite; check teacher.weights")
    if callable(getattr(model, "forward_dense", None)):
        return _own_dense(model, x, logits_BK, mode)
    own = callable(getattr(model, "forward_features", None))
    pooling = None if own and callable(getattr(model, "forward_head", None)) else find_pooling(model, x, logits_BK)
    backbone = model.forward_features if own or pooling is None else pooling.backbone
    features = _run(backbone, x, "forward_features")
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise TeacherError(
            f"the teacher's forward_features gives {_describe(features)}, expected one feature map of 4 dimensions: "
            "only networks that end in a map of cells have dense logits; give a CNN such as resnet50, or take its features alone: "
            "teacher.dense: none"
        )
    if pooling is None:
        channels = getattr(model, "num_features", None)
        apply, nhwc = model.forward_head, features.shape[1] != channels and features.shape[3] == channels
    else:
        apply, nhwc = pooling.head, False
        if features.shape[:2] != pooling.mean.shape or not _close(features.mean((2, 3)), pooling.mean):
            raise TeacherError(
                "the teacher's head does not take the mean over the cells of forward_features; add a method "
                "forward_head(features) -> [B, K] that does what the model does after its features"
            )
    global_BK = _run(apply, features, "the head")
    if global_BK.shape != logits_BK.shape or not torch.allclose(global_BK, logits_BK, rtol=1e-4, atol=1e-4):
        raise TeacherError(
            f"the teacher's head on its feature map gives {_differ(global_BK, logits_BK)} the model's own output; "
            "forward must be forward_head(forward_features(x))"
        )
    layers = _layers(model, apply, features)
    gap = _gap(apply, features, nhwc, layers)
    if gap <= HEAD_TOLERANCE:
        return Head("linear", gap, layers, backbone, apply, nhwc, _sole_classifier(model, apply, features, nhwc))
    if mode == "exact":
        raise TeacherError(
            f"the teacher's head is not linear in the mean of the cells ({_why(model)}: {_cut(layers)}; gap {gap:.2g}, at most "
            f"{HEAD_TOLERANCE:g}): take another teacher, or set teacher.dense: per_cell, the whole head on every cell"
        )
    return Head("per_cell", gap, layers, backbone, apply, nhwc)


def keep_classes(model: Any, head: Head, features: Tensor, rows: Tensor) -> bool:
    """Drop from the classifier's weights all outputs but `rows`, int64 [K], in that order.

    Returns: whether the head gives the chosen outputs now; where it is of another form it is left as it was.
    """
    layer = _classifier(model, None)
    if head.kind == "forward_dense" or layer is None or "weight" not in layer._parameters:  # a weight that is computed
        return False
    logits_BK = head.apply(features)
    if len(layer.weight) != logits_BK.shape[1]:
        return False
    expected = logits_BK[:, rows]
    weight, bias = layer.weight, layer.bias
    layer.weight = nn.Parameter(weight[rows].clone(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias[rows].clone(), requires_grad=False)
    with contextlib.suppress(RuntimeError, TypeError, ValueError):
        kept = head.apply(features)
        if kept.shape == expected.shape and torch.allclose(kept, expected, rtol=1e-4, atol=1e-4):
            return True
    layer.weight, layer.bias = weight, bias
    return False


def _own_dense(model: Any, x: Tensor, logits_BK: Tensor, mode: str) -> Head:
    """The model's own `forward_dense`, held to what it must return."""
    out = _run(model.forward_dense, x, "forward_dense")
    if not (isinstance(out, tuple | list) and len(out) == 2 and all(isinstance(t, Tensor) for t in out)):
        raise TeacherError(f"forward_dense returns {_describe(out)}, expected (dense [B, K, h, w], global [B, K])")
    dense_BKhw, global_BK = out
    if dense_BKhw.ndim != 4 or global_BK.shape != logits_BK.shape or dense_BKhw.shape[:2] != logits_BK.shape:
        raise TeacherError(
            f"forward_dense returns shapes {list(dense_BKhw.shape)} and {list(global_BK.shape)}, expected "
            f"{[*logits_BK.shape, 'h', 'w']} and {list(logits_BK.shape)}"
        )
    if not torch.allclose(global_BK, logits_BK, rtol=1e-4, atol=1e-4):
        raise TeacherError(f"forward_dense's global logits are {_differ(global_BK, logits_BK)} the model's own output")
    gap = _relative_gap(dense_BKhw, global_BK)
    if mode == "exact" and gap > 1e-3:
        raise TeacherError(
            f"forward_dense's cells do not average to its global logits (gap {gap:.2g} of their spread, at most "
            "0.001); mend it, or set teacher.dense: per_cell if that is meant"
        )
    return Head("forward_dense", gap, "forward_dense", nn.Identity(), model.forward_dense)


def _classifier(model: nn.Module, channels: int | None) -> nn.Linear | nn.Conv2d | None:
    """The last linear layer: what timm says it is, else by its usual names, else the last one that takes `channels`."""
    usual = [getattr(model, name, None) for name in ("fc", "linear", "classifier", "head")]
    get_classifier: Any = getattr(model, "get_classifier", None)
    timm_says = [get_classifier()] if callable(get_classifier) else []
    others = [m for m in model.modules() if isinstance(m, nn.Linear)][::-1]
    for layer in [*timm_says, *usual, *others]:
        if isinstance(layer, nn.Linear) and channels in (None, layer.in_features):
            return layer
        plain = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
        if isinstance(layer, nn.Conv2d) and plain and channels in (None, layer.in_channels):
            return layer
    return None


def _sole_classifier(
    model: nn.Module, apply: Callable[[Tensor], Tensor], features: Tensor, nhwc: bool
) -> nn.Linear | nn.Conv2d | None:
    """The classifier, where it is the whole of the head but for the pooling; None where the cells' logits say otherwise."""
    layer = None if nhwc else _classifier(model, features.shape[1])
    if layer is None:
        return None
    for maps in (features, _made_up_maps(features, nhwc)):
        expected_BKhw = dense_of(apply, maps, nhwc)
        if layer.weight.shape[0] != expected_BKhw.shape[1] or not _close(convolved(layer, maps), expected_BKhw):
            return None
    return layer


def _gap(apply: Callable[[Tensor], Tensor], features: Tensor, nhwc: bool, layers: str) -> float:
    """How far the cells' logits are from averaging to the global ones, on made-up maps."""
    maps = _made_up_maps(features, nhwc)
    try:
        dense_BKhw, global_BK = dense_of(apply, maps, nhwc), apply(maps)
    except Exception as e:  # a head may raise anything on a map of another size
        raise TeacherError(f"the teacher's head can't be applied to single cells ({layers}): {one_line(e)}") from None
    if dense_BKhw.shape[:2] != global_BK.shape:
        raise TeacherError(f"the head gives {_describe(dense_BKhw)} for cells, {_describe(global_BK)} for the map")
    return _relative_gap(dense_BKhw, global_BK)


def _made_up_maps(features: Tensor, nhwc: bool) -> Tensor:
    """Four maps of growing amplitude in the form of `features`.

    Real features won't do: those of a freshly built network hardly differ between cells, and any head seems linear.
    """
    h, w = features.shape[1:3] if nhwc else features.shape[2:]
    C = features.shape[3] if nhwc else features.shape[1]
    h, w = (max(h, 2), max(w, 2)) if h * w == 1 else (h, w)
    cells = np.arange(4 * h * w * C, dtype=np.uint64)
    noise = uniform_array(mix64_array(cells), "teacher head") * 4 - 1  # [-1, 3): mostly positive, as after a ReLU
    amplitude = max(float(features.square().mean().sqrt()), 1.0) * 2.0 ** np.arange(4).reshape(4, 1, 1, 1)
    maps_BhwC = torch.from_numpy((noise.reshape(4, h, w, C) * amplitude).astype(np.float32)).to(features.device)
    return maps_BhwC if nhwc else maps_BhwC.permute(0, 3, 1, 2).contiguous()


def _relative_gap(dense_BKhw: Tensor, global_BK: Tensor) -> float:
    mean_BK = dense_BKhw.mean((2, 3))
    spread_B = (dense_BKhw - mean_BK[..., None, None]).square().mean((1, 2, 3)).sqrt()
    rounding_B = 1e-3 * global_BK.square().mean(1).sqrt()  # all there is to divide by where cells are alike, or one
    gap = float(((mean_BK - global_BK).abs().amax(1) / (spread_B + rounding_B)).max())
    return gap if gap == gap else float("inf")


def _layers(model: Any, apply: Callable[[Tensor], Tensor], features: Tensor) -> str:
    """Names and types of the layers that run in the head, in order."""
    ran: list[str] = []
    silent = (nn.Identity, nn.Flatten, nn.Dropout)
    hooks = [
        module.register_forward_hook(lambda m, _, __, name=name: ran.append(f"{name} {type(m).__name__}"))
        for name, module in model.named_modules()
        if not any(module.children()) and not isinstance(module, silent)
    ]
    try:
        apply(features)
    finally:
        for hook in hooks:
            hook.remove()
    return " > ".join(ran)


def _why(model: Any) -> str:
    pools = [m.pool_type for m in model.modules() if isinstance(getattr(m, "pool_type", None), str)]
    other = [p for p in pools if p not in ("", "avg", "fast", "fastavg")]
    return f"it pools with {other[-1]!r}" if other else "it has a norm, activation or hidden layer"


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-4 * float(b.square().mean().sqrt())


def _run(function: Callable[[Tensor], Any], x: Tensor, what: str) -> Any:
    try:
        return function(x)
    except Exception as e:
        first = (
            next((m for m in function.modules() if isinstance(m, nn.Conv2d)), None)
            if isinstance(function, nn.Module)
            else None
        )
        if first is not None and first.in_channels != x.shape[1]:
            grey = (
                ", or let build() return one that begins with x.mean(1, keepdim=True)" if first.in_channels == 1 else ""
            )
            raise TeacherError(
                f"the teacher takes {first.in_channels} channel{'s' if first.in_channels > 1 else ''} and views have 3, R, G and B (grey "
                f"images have three alike); build it for 3 (timm's in_chans){grey}"
            ) from None
        raise TeacherError(
            f"{what} of the teacher fails on an input of shape {list(x.shape)} ({one_line(e)}); check "
            "teacher.input_size and teacher.kwargs"
        ) from None


def _differ(a: Any, b: Tensor) -> str:
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return f"{_describe(a)}, unlike {list(b.shape)} of"
    return f"values up to {float((a - b).abs().max()):.2g} away from"


def _cut(layers: str) -> str:
    return layers if len(layers) <= 90 else f"{layers[:66]} ... {layers[-19:]}"


def _describe(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
