"""A teacher whose cells have no logits: its last map, and the image's logits where it has a classifier. `teacher.dense: none`.

For a ViT the map is its patch tokens after the last norm, in rows and columns; class, distillation and register tokens are left out.
Where the network's own last norm comes after its pooling (timm's `fc_norm`), it is applied to each token. For a network that
ends in a map of cells that map is taken as its head gets it. Rows and columns are not believed but seen: a patch of an image that is changed
must change its own cell most.

Shapes: B batch, N tokens, C channels, K classes, h w the map's cells, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cskd.errors import TeacherError, counted, one_line
from cskd.method.cell_order import displaced, grid_of
from cskd.teacher.heads import Head
from cskd.teacher.pooling import find_pooling


@dataclass(frozen=True)
class MapHead(Head):
    """`backbone` gives what `apply` makes the image's logits of, and `to_map` the map."""

    classes: int = 0  # K of the zeros that stand for logits where kind is 'no_classes'
    to_map: Callable[[Tensor], Tensor] | None = None  # -> [B, C, h, w]; None: it is the map

    def outputs(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of `Head`; every cell shows the image's logits."""
        maps, global_BK = features if self.to_map is None else self.to_map(features), self.pooled(features)
        return global_BK[:, :, None, None].expand(-1, -1, *maps.shape[2:]), global_BK, maps

    def pooled(self, features: Tensor) -> Tensor:
        """The image's logits, or zeros."""
        if self.kind == "no_classes":
            return features.new_zeros(len(features), self.classes)
        logits: Tensor = self.apply(features)
        return logits


@torch.no_grad()
def find_map(model: Any, x: Tensor, classes: int) -> MapHead:
    """Work out where `model` keeps its cells.

    Args:    model a torch.nn.Module in eval mode; x float32 [B, 3, H, W], normalised; classes K of the data set.
    Raises:  TeacherError with the reason where there is no map of cells, or none in rows and columns.
    """
    logits_BK = _run(model, x, "the model")
    if not callable(getattr(model, "forward_features", None)):
        try:
            pooling = find_pooling(model, x, logits_BK)
        except TeacherError:
            raise TeacherError(
                "teacher.dense: none needs a network that says what its features are: add a method forward_features(x) -> its last "
                "map [B, C, h, w] or tokens [B, N, C], as timm's models have"
            ) from None
        return MapHead("image", 0.0, "map", pooling.backbone, pooling.head, classes=classes)
    features = _run(model.forward_features, x, "forward_features")
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise TeacherError(
            f"the teacher's forward_features gives {shape}, expected a map [B, C, h, w] or tokens [B, N, C]"
        )
    to_map = _tokens(model, features, x) if features.ndim == 3 else _map(model, features)
    _refuse_other_order(model, to_map, x[:1])
    has_classifier = getattr(model, "num_classes", None) != 0
    kind: Literal["image", "no_classes"] = "image" if has_classifier else "no_classes"
    head = MapHead(
        kind, 0.0, _form(model, features), model.forward_features, _head(model), classes=classes, to_map=to_map
    )
    if not has_classifier:
        return head
    given = _run(head.apply, features, "forward_head")
    if not isinstance(logits_BK, Tensor) or logits_BK.ndim != 2 or len(logits_BK) != len(x):
        raise TeacherError("the teacher's output is not one vector of logits per image; let forward return them alone")
    if given.shape != logits_BK.shape or not torch.allclose(given, logits_BK, rtol=1e-4, atol=1e-4):
        raise TeacherError(
            "the teacher's forward_head on its features does not give the model's own output; forward must be "
            "forward_head(forward_features(x)), or set num_classes = 0 where it has no classifier"
        )
    return head


def _head(model: Any) -> Callable[[Tensor], Tensor]:
    if not callable(getattr(model, "forward_head", None)):
        if getattr(model, "num_classes", None) != 0:
            raise TeacherError(
                "teacher.dense: none needs forward_head(features) -> logits [B, K] next to forward_features; add it, or set the "
                "attribute num_classes = 0 where the network has no classifier"
            )
        return nn.Identity()
    apply: Callable[[Tensor], Tensor] = model.forward_head
    return apply


def _map(model: Any, features: Tensor) -> Callable[[Tensor], Tensor]:
    """Of four axes: the channels are the second or, where the model states so many and they are not, the last."""
    channels = getattr(model, "num_features", None)
    nhwc = features.shape[1] != channels and features.shape[3] == channels
    return (lambda y: y.permute(0, 3, 1, 2)) if nhwc else nn.Identity()


def _tokens(model: Any, features: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    prefix, (h, w) = _layout(model, features.shape[1], x)
    norm = _late_norm(model)

    def to_map(y: Tensor) -> Tensor:
        cells: Tensor = norm(y[:, prefix:])
        return cells.transpose(1, 2).reshape(len(y), -1, h, w)

    return to_map


def _late_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """timm's `fc_norm`, where it stands in the place of the last norm."""
    norm, late = getattr(model, "norm", None), getattr(model, "fc_norm", None)
    return late if isinstance(late, nn.LayerNorm) and isinstance(norm, nn.Identity) else nn.Identity()


def _layout(model: Any, tokens: int, x: Tensor) -> tuple[int, tuple[int, int]]:
    """How many tokens stand before the cells, and the cells' rows and columns, which are to each other as H and W are. One token alone
    is no cell: it stands for the image, as the class tokens that are all PiT's features."""
    stated, (H, W) = getattr(model, "num_prefix_tokens", None), x.shape[2:]
    if (found := grid_of(tokens, stated, (H, W), least=2)) is not None:
        return found
    raise TeacherError(
        f"the teacher gives {counted(tokens, 'token')} for {H} x {W} pixels: no grid of rows and columns"
        f"{f' after {stated} others' if stated else ''}; take another teacher, docs/TEACHERS.md lists some"
    )


def _refuse_other_order(model: Any, to_map: Callable[[Tensor], Tensor], image: Tensor) -> None:
    """TeacherError where corners and middle of the image, changed, clearly change other cells than their own."""

    def maps(images: Tensor) -> Tensor:
        return to_map(model.forward_features(images)).permute(0, 2, 3, 1)

    before = maps(image)
    h, w = before.shape[1:3]
    if h * w > 1 and (found := displaced(maps, image, before)) is not None:
        (row, column), cell = found
        raise TeacherError(
            f"the teacher keeps its {h} x {w} cells in another order: what changes in row {row}, column {column} of the image "
            f"is in row {cell[0]}, column {cell[1]} of its features; take another teacher, docs/TEACHERS.md lists some"
        )


def _form(model: Any, features: Tensor) -> str:
    """What the map is made of, for people."""
    if features.ndim == 4:
        return "map"
    late = not isinstance(_late_norm(model), nn.Identity)
    return f"tokens{', fc_norm on each' if late else ''}"


def _run(function: Callable[[Tensor], Any], x: Tensor, what: str) -> Any:
    try:
        return function(x)
    except Exception as e:  # a network may refuse an input in whatever way it likes
        raise TeacherError(
            f"{what} of the teacher fails on an input of shape {list(x.shape)} ({one_line(e)}); check teacher.input_size and "
            "teacher.kwargs"
        ) from None
