"""Where the features of a timm model keep the cells of the image, found by measuring its output; no list of names.

`measure` runs the model on a few images of noise. What it finds is a `Layout`: which axis holds the channels, how many tokens
stand before those of the grid (class, distillation, registers), and the rows and columns of the grid. A patch of the image that
is changed must change its own cell most: so tokens in another order than that of the rows are found, too.

Shapes: B batch, C channels, h w grid, N tokens, M single cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cskd.errors import StudentError, one_line
from cskd.method.cell_order import displaced, grid_of
from cskd.views.fit import Grid

Axes = Literal["NCHW", "NHWC", "NLC"]
ANOTHER = "take another model, docs/STUDENTS.md lists some"
LINEAR = 1e-3  # relative deviation of the cells' mean logits from the image's, from which on a head is not linear


@dataclass(frozen=True)
class Layout:
    """How `forward_features` gives the cells: its axes, the grid, and the tokens before it (NLC only)."""

    axes: Axes
    grid: Grid
    prefix: int = 0

    def cells(self, features: Tensor) -> Tensor:
        """Features of a batch as [B, h, w, C]."""
        if self.axes == "NLC":
            batch, _, channels = features.shape
            return features[:, self.prefix :].reshape(batch, *self.grid, channels)
        return features.permute(0, 2, 3, 1) if self.axes == "NCHW" else features

    def as_images(self, cells_MC: Tensor) -> Tensor:
        """Each cell as the features of an image of its own, which the model's head takes: of one cell, with copies of it where
        prefix tokens would stand. So it is the cell that the head reads, whether it pools or takes the first token."""
        if self.axes == "NLC":
            return cells_MC[:, None].expand(-1, self.prefix + 1, -1)
        return cells_MC[:, :, None, None] if self.axes == "NCHW" else cells_MC[:, None, None]


def cell_logits(model: nn.Module, layout: Layout, cells_BhwC: Tensor) -> Tensor:
    """The model's own head on every cell: [B, h, w, K]."""
    head = cast(Any, model).forward_head
    logits: Tensor = head(layout.as_images(cells_BhwC.flatten(0, 2)))
    return logits.reshape(*cells_BhwC.shape[:3], -1)


@torch.no_grad()
def measure(name: str, model: nn.Module, size: Grid) -> tuple[Layout, list[str]]:
    """The layout of a model's features for images of (height, width), and what a user should know of its head.

    The model is left in the mode it was in, and torch's generators as they were. On the meta device, where there are no values,
    neither the order of the cells nor the head can be looked at.

    Raises:  StudentError, with the reason, for a model whose last features are no grid of cells that its head can classify.
    """
    training = model.training
    model.eval()
    try:
        return _measure(name, model, size)
    finally:
        model.train(training)


def _measure(name: str, model: nn.Module, size: Grid) -> tuple[Layout, list[str]]:
    on_meta = next(model.parameters()).is_meta
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    images = image.to("meta" if on_meta else "cpu").repeat(2, 1, 1, 1)
    features = _features(name, model, images)
    layout = _layout(name, model, features, size)
    if on_meta:
        return layout, []
    if layout.grid != (1, 1):
        _refuse_other_order(name, model, layout, images[:1], features[:1])
    return layout, _head_notes(name, model, layout, features)


def _features(name: str, model: nn.Module, images: Tensor) -> Tensor:
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise StudentError(
            f"student.model {name} has no forward_features and forward_head, as timm's models have; {ANOTHER}"
        )
    try:
        features = cast(Any, model).forward_features(images)
    except Exception as e:  # whatever a size that the model does not take leads to
        height, width = images.shape[2:]
        raise StudentError(
            f"student.model {name} can't take views of {height} x {width} pixels ({one_line(e)}); mend student.kwargs or "
            "recipe.size"
        ) from e
    if not isinstance(features, Tensor):
        raise StudentError(
            f"student.model {name} gives {type(features).__name__} of {len(features)} features, expected one tensor with "
            f"the cells of the image; {ANOTHER}"
        )
    if features.ndim not in (3, 4) or len(features) != len(images):
        raise StudentError(
            f"student.model {name} gives features of shape {list(features.shape)}, which have no grid of cells; {ANOTHER}"
        )
    return features


def _layout(name: str, model: nn.Module, features: Tensor, size: Grid) -> Layout:
    """The one layout with which the head takes a single cell."""
    if features.ndim == 4:
        _, a, b, c = features.shape
        tried = [Layout("NCHW", (b, c)), Layout("NHWC", (a, b))]
    else:
        tried = [_tokens(name, model, features.shape[1], size)]
    reason = ""
    for layout in tried:
        try:
            logits = cell_logits(model, layout, layout.cells(features)[:, :1, :1])
            found = tuple(logits.shape)
        except Exception as e:  # a head that takes no single cell raises whatever its layers do
            reason = reason or one_line(e)
            continue
        if found == (len(features), 1, 1, int(cast(Any, model).num_classes)):
            return layout
        reason = reason or f"it gives {list(found)}"
    raise StudentError(
        f"student.model {name}: its head can't classify a single cell of features of shape {list(features.shape)} "
        f"({reason[:90]}); {ANOTHER}"
    )


def _tokens(name: str, model: nn.Module, tokens: int, size: Grid) -> Layout:
    """Prefix and grid of N tokens: the rows and columns are to each other as height and width are."""
    stated = getattr(model, "num_prefix_tokens", None)
    if (found := grid_of(tokens, stated, size)) is not None:
        return Layout("NLC", found[1], found[0])
    before = f" after {stated} others" if stated else ""
    raise StudentError(
        f"student.model {name} gives {tokens} tokens for {size[0]} x {size[1]} pixels, which are no grid of rows and "
        f"columns{before}; {ANOTHER}"
    )


def _refuse_other_order(name: str, model: nn.Module, layout: Layout, image: Tensor, features: Tensor) -> None:
    """StudentError where parts of the image that are changed, three corners and the middle, clearly change other cells than
    their own. Attention that looks everywhere alike, as that of LeViT's first weights, shows no order and is taken as it is."""
    found = displaced(lambda changed: layout.cells(_features(name, model, changed)), image, layout.cells(features))
    if found is not None:
        (row, column), cell = found
        raise StudentError(
            f"student.model {name} keeps its {layout.grid[0]} x {layout.grid[1]} cells in another order: what changes in row {row}, "
            f"column {column} of the image is in row {cell[0]}, column {cell[1]} of its features; {ANOTHER}"
        )


def _head_notes(name: str, model: nn.Module, layout: Layout, features: Tensor) -> list[str]:
    """What of a head makes a cell's logits other than a share of the image's."""
    notes = []
    image = cast(Any, model).forward_head(features)
    mean = cell_logits(model, layout, layout.cells(features)).mean((1, 2))
    scale = float(image.abs().max())
    if not layout.prefix and float((image - mean).abs().max()) > LINEAR * max(scale, 1e-9):
        notes.append(
            f"the head of {name} is not linear: cells are pooled, then go through it as images of one cell do, which is not "
            "the mean of the single cells' logits"
        )
    seen: list[str] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, _: seen.append(type(m).__name__))
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        cast(Any, model).forward_head(features)
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        notes.append(f"the head of {name} has a batch norm, whose statistics are those of images and of cells in turn")
    return notes
