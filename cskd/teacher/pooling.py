"""Where a network pools its last feature map, seen by running it: for networks that do not say what their features and head are.

Every function of torch that the network calls is watched, so that the pooling is found however it is written: as a module, by
F.adaptive_avg_pool2d, as x.mean((2, 3)). The map is the last tensor [B, C, h, w] that a function takes whose mean over the cells is
what the head's first layer gets, or the network's output. The head is the chain of layers from there to the output.
"""

# Shapes: B batch, C channels, K classes, h w the feature map's cells, H W pixels

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cskd.errors import TeacherError

_VECTOR = 1 << 16  # numbers of an image: what is larger is no input of a head's layer
_SILENT = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)  # nothing in eval mode


@dataclass(frozen=True)
class Pooling:
    """A network in two parts."""

    backbone: Callable[[Tensor], Tensor]  # input [B, 3, H, W] -> map [B, C, h, w]
    head: Callable[[Tensor], Tensor]  # map -> logits [B, K]
    mean: Tensor  # [B, C], of the map, for the images that the network was looked at with


@dataclass(frozen=True)
class _Map:
    taken_by: str  # name of the function
    cells: tuple[int, int]
    mean: Tensor  # [B, C]
    max: Tensor


@dataclass(frozen=True)
class _Layer:
    name: str
    module: nn.Module
    into: Tensor  # [B, ...], copies
    out: Tensor


def find_pooling(model: nn.Module, x: Tensor, logits_BK: Tensor) -> Pooling:
    """Divide a network at its pooling.

    Args:    model in eval mode; x float32 [B, 3, H, W], images that differ; logits_BK what the model gives for them.
    Raises:  TeacherError with the reason where its output is not made from the mean of a map by layers one after the other.
    """
    maps, layers = _watched(model, x)
    if (at := _last(maps, logits_BK)) is not None and max(
        maps[at].cells
    ) > 1:  # the cells are classified before the pooling
        return Pooling(WatchedBackbone(model, len(maps) - at), lambda f: f.mean((2, 3)), logits_BK)
    chain: list[_Layer] = []
    wanted = logits_BK
    for layer in reversed(layers):
        if _alike(layer.out, wanted):
            chain.insert(0, layer)
            wanted = layer.into
    if not chain:
        raise TeacherError(_ending(logits_BK))
    vector_BC = wanted.flatten(1)
    at = _last(maps, vector_BC)
    if at is None:
        raise TeacherError(_unpooled(chain, layers, maps, vector_BC))
    modules = [(layer.module, layer.into.ndim) for layer in chain if not isinstance(layer.module, _SILENT)]

    def head(features: Tensor) -> Tensor:
        z = features.mean((2, 3))
        for module, ndim in modules:
            z = module(z.reshape(*z.shape[:2], *[1] * (ndim - 2)))
        return z.flatten(1)

    return Pooling(WatchedBackbone(model, len(maps) - at), head, vector_BC)


_OFFER = "offer forward_features(x) -> [B, C, h, w] and forward_head(features) -> [B, K]"


def _ending(logits_BK: Tensor) -> str:
    """Why the output is not that of a layer."""
    one = torch.ones(len(logits_BK), device=logits_BK.device)
    if float(logits_BK.min()) >= 0 and torch.allclose(logits_BK.sum(1), one, atol=1e-4):
        return "the teacher's output sums to one: it ends in a softmax; return the logits before it"
    if torch.allclose(logits_BK.exp().sum(1), one, atol=1e-4):
        return "the teacher's output is that of a log_softmax; return the logits before it"
    return f"the teacher's output is not that of a layer: forward does something to it; {_OFFER}"


def _unpooled(chain: list[_Layer], layers: list[_Layer], maps: list[_Map], vector_BC: Tensor) -> str:
    """What the head's first layer takes in place of a mean, and what to do."""
    first = next((layer for layer in chain if not isinstance(layer.module, _SILENT)), chain[-1])
    what = f"the teacher's {first.name or 'last layer'} ({type(first.module).__name__}) takes "
    C = vector_BC.shape[1]
    for m in reversed(maps):
        h, w = m.cells
        if h * w > 1 and m.mean.shape[1] * h * w == C:
            return (
                f"{what}all {h}x{w} cells of a map side by side, not their mean, so that no cell has logits of its own; take "
                "another teacher"
            )
        if h * w > 1 and m.max.shape == vector_BC.shape and _alike(m.max, vector_BC):
            return f"{what}the maximum over the cells, not their mean; take another teacher, or {_OFFER}"
    for layer in layers:
        if layer not in chain and _last(maps, layer.into.flatten(1)) is not None:
            return (
                f"{what}what is no layer's output, after {layer.name} ({type(layer.module).__name__}) had the mean: a hidden layer "
                f"with a function behind it; take another teacher, or {_OFFER}"
            )
    return f"{what}{C} numbers that are not the mean over the cells of any map; take another teacher, or {_OFFER}"


def _watched(model: nn.Module, x: Tensor) -> tuple[list[_Map], list[_Layer]]:
    """All maps that functions take, and all layers between vectors, in the order in which they run."""
    maps: list[_Map] = []
    layers: list[_Layer] = []
    B = len(x)

    def see(function: str, tensor: Tensor) -> None:
        cells = (int(tensor.shape[2]), int(tensor.shape[3]))
        maps.append(_Map(function, cells, tensor.mean((2, 3)), tensor.amax((2, 3))))

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        with _unwatched():
            if inputs and _is_vector(inputs[0], B):
                entered[module] = inputs[0].detach().clone()  # the layer may work in place

    def after(module: nn.Module, _: Any, out: Any) -> None:
        with _unwatched():
            into = entered.pop(module, None)
            if into is not None and _is_vector(out, B):
                layers.append(_Layer(names[module], module, into, out.detach().clone()))

    entered: dict[nn.Module, Tensor] = {}
    names = {m: name for name, m in model.named_modules()}
    leaves = [m for m in names if isinstance(m, nn.Linear | nn.Conv2d) or not any(m.children())]
    hooks = [m.register_forward_pre_hook(before) for m in leaves] + [m.register_forward_hook(after) for m in leaves]
    try:
        with _Watch(see):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return maps, layers


class _Watch(TorchFunctionMode):
    """Calls `see` with each map that a function takes, before it runs."""

    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name != "__get__":  # x.shape, x.device
            with _unwatched():
                for value in (*args, *kwargs.values()):
                    if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point() and value.numel():
                        self.see(name, value)
        return func(*args, **kwargs)


class WatchedBackbone:
    """Runs a network, and gives the map that the `back`-th function from the end took that takes one.

    Counted from the end, as what runs before the pooling may be replaced by something faster.
    """

    def __init__(self, model: nn.Module, back: int) -> None:
        self.model, self.back = model, back

    def __call__(self, x: Tensor) -> Tensor:
        last: deque[Tensor] = deque(maxlen=self.back)
        with torch.no_grad(), _Watch(lambda _, tensor: last.append(tensor)):
            self.model(x)
        return last[0]


def _unwatched() -> Any:
    return torch._C.DisableTorchFunction()


def _is_vector(value: Any, batch: int) -> bool:
    """[B, C], or [B, C, 1, ...]."""
    return (
        isinstance(value, Tensor)
        and value.ndim >= 2
        and len(value) == batch
        and value.is_floating_point()
        and value[0].numel() == value.shape[1] <= _VECTOR
    )


def _last(maps: list[_Map], vector_BC: Tensor) -> int | None:
    """The last map with this mean: one of more than one row and column, else the largest.

    One of a single cell counts where it is a convolution's, and not what a larger map was pooled to in another way.
    """
    found = [i for i, m in enumerate(maps) if m.mean.shape == vector_BC.shape and _alike(m.mean, vector_BC)]
    if whole := [i for i in found if min(maps[i].cells) > 1]:
        return whole[-1]
    if not found:
        return None
    last = max(found, key=lambda i: (maps[i].cells[0] * maps[i].cells[1], i))
    larger = [i for i in range(last) if maps[i].mean.shape == vector_BC.shape and max(maps[i].cells) > 1]
    pooled = max(maps[last].cells) == 1 and larger and not any("conv" in m.taken_by for m in maps[larger[-1] : last])
    return None if pooled else last


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel() or len(a) != len(b):
        return False
    a, b = a.flatten(1), b.flatten(1)
    return float((a - b).abs().max()) <= 1e-4 * float(b.square().mean().sqrt().clamp_min(1e-30))
