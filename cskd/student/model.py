"""The student: a timm model that also gives logits of its patch tokens, or of the cells of its last map, on the teacher's grid.

A plain ViT is read by its parts, so that a distillation token has its own head. Of any other model the output is measured
(`cskd.student.cells`), and its own head is applied to each cell: Swin, PVT, MaxViT, ConvNeXt, ViTs of other modules, and so on.

Shapes: B batch, K classes, N patch tokens, C features, h w teacher grid (7 7).
Source: arXiv 2307.08500, section 3; models/vision_transformer.py of the authors' code.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cskd.config.schema import LossConfig, StudentConfig
from cskd.errors import StudentError
from cskd.files.folders import called
from cskd.files.weights import READ_BY_TIMM
from cskd.method.losses import StudentOutput
from cskd.method.terms import HEADS, TOKEN, read_heads, refuse_other_tokens, trained_heads
from cskd.near import did_you_mean
from cskd.student.blocks import depth_of, of_blocks
from cskd.student.cells import Layout, cell_logits, measure
from cskd.student.heads import UNTRAINED, heads_of, shared_head_note, untrained_note
from cskd.student.tokens import add_heads, refuse_tokens, token_logits
from cskd.student.warm_start import start_from
from cskd.views.fit import Grid, multiples, patch_notes, unseen

_SET_ELSEWHERE = dict.fromkeys(READ_BY_TIMM, "set student.init") | {
    "num_classes": "it is the number of classes of the cache",
    "drop_path_rate": "set student.drop_path",
    "in_chans": "views are RGB",
    "features_only": "the student needs its head",
}


class Student(nn.Module):
    """A ViT and its patch logits. `backbone` is the timm model as it is: its state dict is what gets exported; with
    `student.tokens` it has their heads, too, see `cskd.student.tokens`.

    Patch tokens go through the head of the distillation token, or through the one head of a plain ViT. They are pooled
    to the teacher grid first: before a linear head that is the same as pooling logits, at a fraction of the cost. Where
    a norm stands before the head it is not, and `notes` says so.
    """

    cells = "patches"  # as messages call what the teacher's cells are compared with

    def __init__(self, backbone: VisionTransformer, config: StudentConfig, image_size: Grid) -> None:
        super().__init__()
        self.backbone = backbone
        self.arguments: dict[str, Any] = {}  # that timm.create_model was called with, next to those of the config
        self.config = config
        self.image_size = image_size  # (height, width) in pixels
        self.patch_grid = self._grid_at(image_size)
        self.num_classes = int(backbone.num_classes)
        self.distilled = isinstance(backbone, VisionTransformerDistilled)
        self.tokens = tuple(config.tokens)
        if self.tokens:
            add_heads(backbone, len(self.tokens))
        own = cast("dict[str, Any]", backbone.pretrained_cfg)
        self.mean = [float(v) for v in config.mean or own["mean"]]  # of RGB in [0, 1]
        self.std = [float(v) for v in config.std or own["std"]]
        self.misfit = self._misfit()  # why it does not see all of an image; '' where it does
        self.notes = [note for note in (self._norm(), self.misfit, self._padding()) if note]
        self.trained = heads_of(self.distilled, self.tokens)  # by the loss, see `taught_by`

    def taught_by(self, loss: LossConfig) -> None:
        """Have `trained` say which heads this loss trains, and `notes` which it does not. ConfigError for tokens that it lacks."""
        name, distilled = self.config.model, self.distilled
        refuse_other_tokens(loss, name, self.tokens)
        self.trained = trained_heads(loss, distilled, self.tokens)
        notes = (untrained_note(loss, name, distilled, self.tokens), shared_head_note(loss, name, distilled))
        self.notes = [*self.notes, *filter(None, notes)]

    def freeze_unused(self, loss: LossConfig) -> None:
        """Ask for no gradient of a head that the loss does not read: DistributedDataParallel waits for each one asked for."""
        if self.distilled and not {"distillation", "patches"} & set(read_heads(loss, self.distilled)):
            cast(nn.Module, self.backbone.head_dist).requires_grad_(False)
        for token, head in zip(
            self.tokens, cast(nn.ModuleList, self.backbone.token_heads) if self.tokens else [], strict=True
        ):
            head.requires_grad_(TOKEN + token in read_heads(loss, False, self.tokens))

    def forward(
        self, images: Tensor, teacher_grid: Grid | None = None, tokens: bool = False, blocks: Sequence[int] = ()
    ) -> StudentOutput:
        """Logits of every head.

        Args:    images float32 [B, 3, H, W], normalised; teacher_grid (h, w), None = no patch logits, (1, 1) = their
                 mean over the image, which is all that evaluation needs; tokens: give the patch tokens, too; blocks: give those of
                 these blocks, -1 the last, see `refuse_blocks`.
        Returns: float32 logits whatever the autocast: a loss in bf16 would be too coarse.
        Raises:  StudentError for a teacher grid finer than the patch grid.
        """
        vit = self.backbone
        features, found = self._features(images, blocks)  # [B, prefix + N, C], after the final norm
        pooled = dist = patches = None
        own, grid = features[:, vit.num_prefix_tokens :], self._grid_at((images.shape[-2], images.shape[-1]))
        if teacher_grid is not None:
            self.check_grid(teacher_grid)
            pooled = pool_tokens(own, grid, teacher_grid)  # [B, h, w, C]
        if isinstance(vit, VisionTransformerDistilled):
            cls = vit.head(vit.head_drop(features[:, 0]))
            dist = vit.head_dist(vit.head_drop(features[:, 1])).float()
            if pooled is not None:
                patches = vit.head_dist(vit.head_drop(pooled))
        else:
            cls = vit.forward_head(features)
            if pooled is not None:
                patches = vit.head(vit.head_drop(vit.fc_norm(pooled)))
        return StudentOutput(
            cls.float(),
            dist,
            None if patches is None else patches.permute(0, 3, 1, 2).float(),
            own.reshape(len(own), *grid, -1) if tokens else None,
            token_logits=token_logits(vit, self.tokens, features) if self.tokens else None,
            blocks=found,
        )

    def _features(self, images: Tensor, blocks: Sequence[int]) -> tuple[Tensor, dict[int, Tensor] | None]:
        """The last features, and [B, H, W, C] of blocks."""
        if not blocks:
            return self.backbone.forward_features(images), None
        features, maps = of_blocks(self.backbone, images, sorted({n % self.depth for n in blocks}))
        return features, {n: maps[n % self.depth].permute(0, 2, 3, 1) for n in blocks}

    @cached_property
    def depth(self) -> int:
        """How many blocks, or stages, timm's forward_intermediates gives; 0 where the model has no such method."""
        return depth_of(self.backbone, self.image_size)

    def refuse_blocks(self, blocks: Sequence[int]) -> None:
        """StudentError for a block that there is not."""
        if not blocks:
            return
        if not self.depth:
            raise StudentError(
                f"loss.terms: student {self.config.model} does not give the tokens of its blocks (timm's forward_intermediates); "
                "teach head: tokens, or take another model"
            )
        if max(blocks) >= self.depth:
            raise StudentError(
                f"loss.terms: head block:{max(blocks)}, and student {self.config.model} has blocks 0 to {self.depth - 1}; name one of "
                "these, or block:last"
            )

    def check_grid(self, teacher_grid: Grid) -> None:
        """StudentError when the teacher's grid is finer than the student's: a token can't be split."""
        (h, w), (rows, cols) = teacher_grid, self.patch_grid
        if h > rows or w > cols:
            more = "take smaller patches" if self.cells == "patches" else "a recipe.size that gives more cells"
            raise StudentError(
                f"student {self.config.model} has {rows} x {cols} {self.cells}, too few for the teacher's grid of {h} x {w}; "
                f"set teacher.grid: [{min(h, rows)}, {min(w, cols)}], for which a cache is made again, or {more}"
            )

    def grid_notes(self, teacher_grid: Grid) -> list[str]:
        """What a user should know of this teacher's grid. StudentError where it is finer than the patches."""
        self.check_grid(teacher_grid)
        return patch_notes(self.patch_grid, teacher_grid)

    def _norm(self) -> str:
        """Of a norm between the pooled tokens and the head."""
        if self.distilled or isinstance(self.backbone.fc_norm, nn.Identity):
            return ""
        return (
            f"{self.config.model} has a norm before its head: patch tokens are pooled, then normed, then classified, "
            "which is not the mean of the single patches' logits"
        )

    def _misfit(self) -> str:
        """Of patches that don't cover the image. What stands before a hybrid's patches pads for itself."""
        embed, (height, width) = getattr(self.backbone, "patch_embed", None), self.image_size
        left = unseen(self.image_size, self._patch) if type(embed) is PatchEmbed else None
        if (
            embed is None
            or left is None
            or (embed.dynamic_img_pad and getattr(self.backbone, "dynamic_img_size", False))
        ):
            return ""
        sides = [multiples(height, self._patch[0]), multiples(width, self._patch[1])]
        return (
            f"student {self.config.model} does not see {left}: views are {height} x {width}, its patches "
            f"{self._patch[0]} x {self._patch[1]}; set recipe.size to {' and '.join(dict.fromkeys(sides))}, another "
            "patch_size, or student.kwargs: {dynamic_img_size: true, dynamic_img_pad: true}"
        )

    def _padding(self) -> str:
        """Of patches that reach beyond the image."""
        if self.misfit or unseen(self.image_size, self._patch) is None:
            return ""
        (height, width), (rows, columns) = self.image_size, self.patch_grid
        return (
            f"student {self.config.model} pads views of {height} x {width} pixels to {rows} x {columns} patches of "
            f"{self._patch[0]} x {self._patch[1]}: the last ones are padding in part, and do not lie where the teacher's cells do"
        )

    @property
    def _patch(self) -> Grid:
        """(height, width) of a patch in pixels of the image."""
        height, width = cast("Grid", self.backbone.patch_embed.feat_ratio(as_scalar=False))
        return int(height), int(width)

    def unfuse_attention(self) -> None:
        """Attention as two matrix products with a softmax between: on a CPU in bf16 torch's fused kernel takes six times as
        long, most of it backward (deit_tiny, 2 cores of an AMD EPYC)."""
        for module in self.backbone.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]  # timm declares it

    def checkpoint_gradients(self) -> None:
        """Keep only the inputs of the blocks for the backward pass, which computes the rest again with the same random draws.
        StudentError where timm's model does not offer it."""
        try:
            self.backbone.set_grad_checkpointing()
        except (AttributeError, AssertionError, NotImplementedError) as e:
            raise StudentError(
                f"train.grad_checkpointing is on, and {self.config.model} does not offer it ({str(e)[:120] or type(e).__name__}); "
                "set it to false, or take another model"
            ) from None

    def _grid_at(self, image_size: Grid) -> Grid:
        embed = self.backbone.patch_embed
        rows, cols = embed.dynamic_feat_size(image_size) if self.backbone.dynamic_img_size else embed.grid_size
        return int(rows), int(cols)


class MapStudent(Student):
    """Any other timm model, read by the layout of its features. Its one head serves all terms, as that of a plain ViT.

    Cells are pooled to the teacher grid first, then each goes through the model's head as an image of one cell. Before a linear
    head that is the mean of the cells' logits; where a head is not linear `notes` says so.
    """

    cells = "cells"

    def __init__(
        self, backbone: nn.Module, config: StudentConfig, image_size: Grid, layout: Layout | None = None
    ) -> None:
        self.layout, about = (layout, []) if layout else measure(config.model, backbone, image_size)
        super().__init__(cast(VisionTransformer, backbone), config, image_size)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()):
            about.append(
                f"{config.model} has batch norms: their statistics are of the views that one rank feeds at once, so "
                "train.micro_batch and the number of ranks change the result"
            )
        self.notes = [*about, *self.notes]

    def forward(
        self, images: Tensor, teacher_grid: Grid | None = None, tokens: bool = False, blocks: Sequence[int] = ()
    ) -> StudentOutput:
        """As `Student.forward`, of images of the size that the layout was measured with."""
        features, found = self._features(images, blocks)
        cls, patches = self.backbone.forward_head(features), None
        cells = self.layout.cells(features) if tokens or teacher_grid is not None else None
        if teacher_grid is not None and cells is not None:
            self.check_grid(teacher_grid)
            pooled = pool_tokens(cells.flatten(1, 2), (cells.shape[1], cells.shape[2]), teacher_grid)
            patches = cell_logits(self.backbone, self.layout, pooled).permute(0, 3, 1, 2).float()
        return StudentOutput(cls.float(), None, patches, cells if tokens else None, blocks=found)

    def _norm(self) -> str:
        return ""  # what `measure` found of the head is said already

    def _padding(self) -> str:
        return ""

    def _grid_at(self, image_size: Grid) -> Grid:
        return self.layout.grid


def pool_tokens(tokens_BNC: Tensor, grid: Grid, teacher_grid: Grid) -> Tensor:
    """Patch tokens averaged to the teacher grid: k x k means where it divides the grid, adaptive bins otherwise.

    Returns: [B, h, w, C].
    """
    B, _, C = tokens_BNC.shape
    (rows, cols), (h, w) = grid, teacher_grid
    if rows % h == 0 and cols % w == 0:
        # not adaptive_avg_pool2d: its backward pass on CUDA adds in no fixed order
        return tokens_BNC.reshape(B, h, rows // h, w, cols // w, C).mean((2, 4))
    maps = tokens_BNC.transpose(1, 2).reshape(B, C, rows, cols)
    return F.adaptive_avg_pool2d(maps, (h, w)).permute(0, 2, 3, 1)


def eval_heads(output: StudentOutput, trained: Collection[str] = HEADS) -> dict[str, Tensor]:
    """What inference can predict from, float32 [B, K] each; averages are of logits.

    'class', 'distillation', 'token:NAME' and 'patches' (mean over the cells) are the heads; 'class+distillation' is what timm's
    forward gives, 'class+token:NAME+...' averages those of all tokens, 'all' the patches', too, as the CSKD authors' code does. A
    plain ViT has no distillation head: its 'all' averages two. Without patch logits there is neither 'patches' nor 'all'. A head that is not in `trained` is called
    so ('patches.untrained') and is part of no average: where two of three are left, their average has their names.
    """
    cls, dist, patch = output[:3]
    tokens = {TOKEN + name: head for name, head in (output.token_logits or {}).items()}
    found = {"class": cls, "distillation": dist, **tokens, "patches": None if patch is None else patch.mean((2, 3))}
    logits = {name: head for name, head in found.items() if head is not None}
    heads = {name if name in trained else name + UNTRAINED: head for name, head in logits.items()}
    parts = [name for name in logits if name in trained]
    if len(of_tokens := [part for part in parts if part != "patches"]) > 1:
        heads["+".join(of_tokens)] = _mean([logits[part] for part in of_tokens])
    if "patches" in parts[1:]:
        heads["all" if len(parts) == len(logits) else "+".join(parts)] = _mean([logits[part] for part in parts])
    return heads


def _mean(logits: list[Tensor]) -> Tensor:
    return sum(logits[1:], logits[0]) / len(logits)


def head_names(student: Student) -> list[str]:
    """The heads that `eval_heads` finds in the output of an evaluation."""
    image = torch.zeros(1, 1)
    tokens = dict.fromkeys(student.tokens, image)
    output = StudentOutput(image, image if student.distilled else None, image[..., None, None], token_logits=tokens)
    return list(eval_heads(output, student.trained))


def build_student(
    config: StudentConfig,
    num_classes: int,
    image_size: int | Grid,
    trained: bool = False,
    layout: Layout | None = None,
) -> Student:
    """The ViT of a config, with fresh weights or those of `student.init`.

    Args:    num_classes of the cache; image_size of its views, pixels (of a square) or (height, width); trained: it is one
             that was trained like that, so patches that leave pixels out are noted, not refused; layout: of a `MapStudent` of
             the same config, where it was measured already.
    Returns: a Student on the CPU; its `notes` are what the user should know.
    Raises:  StudentError for a model whose output has no grid of cells, kwargs it doesn't take, patches that leave pixels out, or
             an unusable checkpoint.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    _check_name(config.model)
    kwargs = _model_kwargs(config, size)
    if config.tokens:
        with torch.device("meta"):
            probe, _ = _create(config, num_classes, kwargs)
        refuse_tokens(config.model, probe, _is_plain(config.model, probe))
        kwargs["reg_tokens"] = cast(VisionTransformer, probe).num_reg_tokens + len(config.tokens)
    model, arguments = _create(config, num_classes, kwargs)
    student = (
        Student(cast(VisionTransformer, model), config, size)
        if _is_plain(config.model, model)
        else MapStudent(model, config, size, layout)
    )
    student.arguments = arguments | ({"reg_tokens": kwargs["reg_tokens"]} if config.tokens else {})
    if student.misfit and not trained:
        raise StudentError(student.misfit)
    if config.init:
        student.notes += start_from(model, Path(config.init), config.tokens)
    return student


def _create(config: StudentConfig, num_classes: int, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model, and the arguments that the config does not name but the model takes.

    Not every constructor takes an image size, or a rate of drop path: they are left out where it refuses them by name.
    """
    offered = {"drop_path_rate": config.drop_path, **kwargs}
    while True:
        try:
            model: nn.Module = timm.create_model(config.model, num_classes=num_classes, **offered)
        except Exception as e:  # timm's constructors raise whatever a value that they did not expect leads to
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            refused = next((k for k in ("img_size", "drop_path_rate") if k in offered and repr(k) in reason), None)
            if refused == "drop_path_rate" and config.drop_path:
                raise StudentError(
                    f"student.drop_path is {config.drop_path}, and {config.model} has no drop path; set it to 0"
                ) from e
            if refused is None or not isinstance(e, TypeError):
                shown = {k: v for k, v in offered.items() if k != "drop_path_rate"}
                raise StudentError(f"{config.model} can't be built with {shown} ({reason}); mend student.kwargs") from e
            del offered[refused]
            continue
        return model, {k: v for k, v in offered.items() if k == "img_size"}


def _is_plain(name: str, model: nn.Module) -> bool:
    """Whether a model is a ViT that is read by its parts: its head is linear, and reads the class token or the tokens' mean."""
    if isinstance(model, VisionTransformerDistilled) and model.no_embed_class:
        raise StudentError(f"{name} can't have no_embed_class: timm gives its tokens positions anyway; leave it out")
    return (
        isinstance(model, VisionTransformer)
        and model.global_pool in ("token", "avg")
        and isinstance(model.head, nn.Linear)
    )


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        known = timm.list_models()
        hint = did_you_mean(name.partition(".")[0], known) or "timm.list_models('deit*') lists some"
        if Path(name).exists():
            hint = (
                f"it is {called(name) or 'a path'}: weights are given by student.init, next to the name of their model"
            )
        raise StudentError(f"student.model {name!r} is no model of timm {timm.__version__}; {hint}")


def _model_kwargs(config: StudentConfig, size: Grid) -> dict[str, Any]:
    """`student.kwargs` and the image size, for timm.create_model."""
    kwargs = {k: v for k, v in config.kwargs.items() if v is not None}
    for name in kwargs.keys() & _SET_ELSEWHERE.keys():
        raise StudentError(f"student.kwargs has {name}: {kwargs[name]!r}; leave it out, {_SET_ELSEWHERE[name]}")
    if kwargs.get("patch_drop_rate"):
        raise StudentError(
            f"student.kwargs has patch_drop_rate: {kwargs['patch_drop_rate']}, which removes patch tokens that the "
            "method teaches; set it to 0"
        )
    asked = kwargs.get("img_size", size)
    asked = (asked, asked) if isinstance(asked, int) else tuple(asked) if isinstance(asked, list | tuple) else asked
    if asked != size and not kwargs.get("dynamic_img_size"):
        raise StudentError(
            f"student.kwargs has img_size: {kwargs['img_size']}, the views are {size[0]} x {size[1]} pixels; "
            "leave it out"
        )
    return kwargs | {"img_size": asked}
