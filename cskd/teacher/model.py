"""The teacher: a CNN whose dense and global logits are cached, or taken online. Sections 3 and 4 of arXiv 2307.08500.

Only the backbone may run in less than float32, or compiled. Pooling and classifier run in float32, or in float64 throughout: bf16
logits give ties in 1.3 % of the cells (measured on 2 CPU cores with MobileNetV2 and 224 pixel images).
"""

# Shapes: B batch, K classes, h w the teacher's grid, H W pixels

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cskd.codecs.base import Outputs
from cskd.config import TeacherConfig
from cskd.errors import TeacherError, one_line
from cskd.machine.arithmetic import HALF, computing_in, full_precision, precision_here
from cskd.teacher.build import build, weights_sha256
from cskd.teacher.class_map import class_map
from cskd.teacher.fingerprint import Fingerprint, probe_images, project
from cskd.teacher.fold import fold_norms
from cskd.teacher.fuse import fuse_activations
from cskd.teacher.heads import Head, check_input, find_head, keep_classes
from cskd.teacher.lanes import threads_of_a_lane
from cskd.teacher.map_alone import find_map
from cskd.teacher.pooling import WatchedBackbone
from cskd.teacher.stages import Stages, joined, taken
from cskd.views.fit import teacher_notes

_images = 0
_images_lock = threading.Lock()  # forwards run in several threads

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def teacher_images() -> int:
    """Images that went through any teacher of this process so far: in training from a cache there must be none."""
    return _images


def _count(images: int) -> None:
    global _images
    with _images_lock:
        _images += images


@dataclass(frozen=True)
class Preprocess:
    """What the teacher wants done to an image."""

    size: int  # pixels of the square input
    mean: tuple[float, ...]  # of RGB in [0, 1]
    std: tuple[float, ...]
    interpolation: str  # bicubic or bilinear
    crop_pct: float  # of the clean-image check: share of the resized short side that is kept


class Prepare:
    """Pixels at the recipe's size to the network's input: resize where the sizes differ, normalise, lay out."""

    def __init__(self, preprocess: Preprocess, device: torch.device, channels_last: bool) -> None:
        self.size, self.mode, self.device = preprocess.size, preprocess.interpolation, device
        self.memory = torch.channels_last if channels_last else torch.contiguous_format
        self.mean, self.std = (
            (torch.tensor(v, device=device) * 255.0).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std)
        )
        self.mean_L, self.std_L = (t.flatten().repeat(self.size) for t in (self.mean, self.std))  # of a line of pixels

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] RGB in 0..255 -> float32 [B, 3, size, size], normalised, on the device."""
        if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] != 3:
            raise ValueError(f"pixels are {list(pixels_BCHW.shape)}, expected [B, 3, H, W]")
        x = pixels_BCHW.to(self.device, torch.float32)
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode=self.mode, antialias=True).clamp_(0.0, 255.0)
        if not x.is_contiguous(memory_format=torch.channels_last):
            return ((x - self.mean) / self.std).contiguous(memory_format=self.memory)
        # A whole line of pixels at a time: a loop over three channels, which lie innermost, takes nearly four times as long.
        lines_BHL = x.permute(0, 2, 3, 1).flatten(2)
        x = lines_BHL.sub(self.mean_L).div_(self.std_L).view(len(x), self.size, self.size, 3).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=self.memory)


@dataclass
class Teacher:
    """A network with verified dense logits; made by `load_teacher`."""

    classes: int  # K, after the class map
    grid: tuple[int, int]  # h, w of the dense logits
    own_grid: tuple[int, int]  # of the network's last feature map
    preprocess: Preprocess
    device: torch.device
    image_size: int  # pixels of the recipe's views
    batch: int  # images of a forward of `in_batches`; part of the fingerprint
    precision: str  # of the backbone: float32 (IEEE's), tf32, bf16, fp16, float64
    head: Head
    backbone: Callable[[Tensor], Tensor]  # network input -> feature map; compiled where asked for, for whole batches
    prepare: Prepare
    rows: Tensor | None  # int64 [K], the outputs to keep; None: all of them
    chosen: tuple[int, ...]  # [K], which of the network's outputs each logit is
    outputs: int  # of the network
    pools: bool  # dense logits are pooled to `grid`
    fingerprint: Fingerprint
    notes: list[str]  # what a user should know, one line each
    reentrant: bool  # forwards may run in several threads at once: not those of the user's own code, nor compiled ones
    stages: Stages  # of its network

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and input."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def has_cells(self) -> bool:
        """Whether its cells have logits; without, each shows the image's."""
        return self.head.kind not in ("image", "no_classes")

    @property
    def has_classes(self) -> bool:
        """Whether it has logits at all; without, zeros stand for them."""
        return self.head.kind != "no_classes"

    @property
    def head_precision(self) -> str:
        """Of pooling and classifier. The model's own `forward_dense` is all of one arithmetic."""
        whole = self.precision == "float64" or self.head.kind == "forward_dense"
        return self.precision if whole else "float32"

    # no_grad, not inference_mode: online distillation saves these outputs for the student's backward pass, which
    # inference tensors refuse.
    @torch.no_grad()
    def forward_dense(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Dense and global logits of mixed views.

        In one forward, or `in_batches` where the network is compiled: a program is made for one number of rows.

        Args:    float32 [B, 3, H, W], RGB in 0..255, at the recipe's size; resized to the teacher's where that differs.
        Returns: dense float32 [B, K, h, w] (K innermost in memory), global float32 [B, K].
        """
        return self.in_batches(pixels_BCHW) if self.fingerprint.compile else self._forward(pixels_BCHW)[:2]

    @torch.no_grad()
    def in_batches(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """`forward_dense` in forwards of exactly `batch` rows, the last one padded with copies of an image.

        A logit's last bits depend on how many rows one forward has: stage 1 and a live teacher keep to this number.
        """
        return self.with_features(pixels_BCHW)[:2]

    @torch.no_grad()
    def with_features(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`in_batches`, and the feature map that the head is applied to: float32 [B, C, h, w], pooled to the grid.

        The map means something only where the teacher has a `classifier`, or no logits of cells.
        """
        outputs = self.outputs_of(pixels_BCHW)
        assert outputs.features is not None
        return outputs.dense, outputs.image, outputs.features

    @torch.no_grad()
    def outputs_of(self, pixels_BCHW: Tensor, stages: Sequence[str] = ()) -> Outputs:
        """`with_features`, and in the same pass the maps of earlier stages by their names, as `cskd.teacher.stages` knows them.

        Raises:  TeacherError for a stage that can't be read.
        """
        return joined([self._padded(part, stages) for part in torch.split(pixels_BCHW, self.batch)])

    @torch.no_grad()
    def stages_of(self, pixels_BCHW: Tensor, stages: Sequence[str]) -> dict[str, Tensor]:
        """The maps of `outputs_of` alone, by forwards of the same size that end where the last of them is there."""
        parts = []
        for part in torch.split(pixels_BCHW, self.batch):
            with self.stages.seen(stages, alone=True) as maps:
                self._forward(self._whole(part))
            parts.append({name: x[: len(part)] for name, x in maps.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in stages}

    def classifier(self, codec: str) -> tuple[Tensor, Tensor]:
        """Weight [K, C] and bias [K] of the one layer that makes a cell's logits of its features, float32.

        Raises:  TeacherError, naming the codec that asks, where the head is of another form.
        """
        cure = "set cache.codecs: [envelope, int8], or teacher.dense: none for features without logits of cells"
        layer = self._linear_head(f"codec '{codec}' needs", cure)
        weight_KC = layer.weight.detach().flatten(1)
        bias_K = torch.zeros_like(weight_KC[:, 0]) if layer.bias is None else layer.bias.detach()
        if self.rows is not None:
            weight_KC, bias_K = weight_KC[self.rows], bias_K[self.rows]
        return weight_KC.float(), bias_K.float()

    def feature_channels(self, what: str) -> int:
        """C of the feature map. TeacherError as `classifier`; what: asks for it."""
        if not self.has_cells:
            with threads_of_a_lane(self.device, self.reentrant):
                return int(self.with_features(_probe_pixels(self.image_size)[:1])[2].shape[1])
        return int(
            self._linear_head(
                f"{what} need", "take such a teacher, terms of its logits, or teacher.dense: none"
            ).weight.shape[1]
        )

    def _linear_head(self, needs: str, mend: str) -> Any:
        layer, pools = self.head.classifier, any(n % m for n, m in zip(self.own_grid, self.grid, strict=True))
        if layer is None or pools:
            what = (
                f"pools {self.own_grid} unevenly to teacher.grid {self.grid}"
                if pools
                else f"is {self.head.layers[-80:]}"
            )
            raise TeacherError(
                f"{needs} a teacher whose head is a mean over the cells and one linear layer; this one's {what}; {mend}"
            )
        return layer

    def _whole(self, part_BCHW: Tensor) -> Tensor:
        more = self.batch - len(part_BCHW)
        return torch.cat([part_BCHW, part_BCHW[:1].expand(more, -1, -1, -1)]) if more else part_BCHW

    def _padded(self, part_BCHW: Tensor, stages: Sequence[str]) -> Outputs:
        rows = len(part_BCHW)
        with self.stages.seen(stages) as maps:
            dense_BKhw, global_BK, features_BChw = self._forward(self._whole(part_BCHW))
        whole = Outputs(dense_BKhw, global_BK, None, features_BChw, maps)
        return whole if rows == self.batch else taken(whole, slice(rows))

    def _forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self._features(self.backbone, pixels_BCHW)
        with computing_in(self.head_precision, self.device):
            dense_BKhw, global_BK, features = self.head.outputs(features)
            if self.rows is not None:
                dense_BKhw, global_BK = dense_BKhw[:, self.rows], global_BK[:, self.rows]
            if self.pools:
                if self.has_cells:
                    dense_BKhw = F.adaptive_avg_pool2d(dense_BKhw, self.grid)
                else:
                    dense_BKhw = global_BK[:, :, None, None].expand(-1, -1, *self.grid)
                if self.head.classifier is not None or not self.has_cells:
                    features = F.adaptive_avg_pool2d(features, self.grid)
        return dense_BKhw.float(), global_BK.float(), features.float()

    @torch.no_grad()
    def forward_global(self, pixels_BCHW: Tensor) -> Tensor:
        """The global logits of `forward_dense` alone, never compiled: float32 [B, K]."""
        features = self._features(self.head.backbone, pixels_BCHW)
        with computing_in(self.head_precision, self.device):
            global_BK = self.head.pooled(features)
        return (global_BK if self.rows is None else global_BK[:, self.rows]).float()

    def probe(self) -> dict[str, Any]:
        """JSON-able outputs on eight synthetic images: random projections of the logits. See `compare_probe`."""
        with threads_of_a_lane(self.device, self.reentrant):
            pixels = _probe_pixels(self.image_size)
            if self.has_cells:
                dense_BKhw, global_BK = self.forward_dense(pixels)
            else:  # of features there is the mean and each cell
                _, global_BK, dense_BKhw = self.with_features(pixels)
                global_BK = global_BK if self.has_classes else dense_BKhw.mean((2, 3))
        return {
            "autocast": self.fingerprint.facts["autocast"],
            "global": project(global_BK, "probe global"),
            "dense": project(dense_BKhw, "probe dense"),
        }

    def _features(self, backbone: Callable[[Tensor], Tensor], pixels_BCHW: Tensor) -> Tensor:
        _count(len(pixels_BCHW))
        x = self.prepare(pixels_BCHW).to(self.dtype)
        with computing_in(self.precision, self.device):
            return backbone(x).to(self.dtype)


def load_teacher(config: TeacherConfig, class_names: Sequence[str], device: torch.device, image_size: int) -> Teacher:
    """Build the teacher, verify how its dense logits are made, and find out its grid by running it once.

    Args:    class_names the data set's, in label order; image_size pixels of the recipe's square views.
    Raises:  TeacherError, one line with the reason, for anything that can't be built, read or verified.
    """
    built = build(config)
    model, notes = built.model, built.notes
    weights = weights_sha256(model)
    preprocess = _preprocess(config, built.stated, image_size, notes)
    prepare = Prepare(preprocess, device, config.channels_last)
    precision = precision_here(config.precision, device, "teacher.precision")
    layout: dict[str, Any] = {"memory_format": torch.channels_last} if config.channels_last else {}
    model = model.to(device, **layout)
    images = _probe_pixels(image_size)[:2]
    _count(len(images))
    with torch.no_grad(), full_precision(device):
        x = prepare(images)
        if config.fold:
            check_input(model, x)
            notes.append(f"{fold_norms(model, x)} batch norms are folded into convolutions")
        head = find_map(model, x, len(class_names)) if config.dense == "none" else find_head(model, x, config.dense)
        backbone = head.backbone
        features = backbone(x)
        dense_BKhw, global_BK, _ = head.outputs(features)
        outputs = global_BK.shape[1]
        indices = class_map(config.classes, class_names, outputs)
        rows = None if indices is None else torch.from_numpy(indices).to(device)
        if rows is not None and head.kind != "image" and keep_classes(model, head, features, rows):
            rows = None
    if head.kind == "forward_dense" and precision in HALF:
        raise TeacherError(
            f"the teacher's own forward_dense would run its classifier in {precision}; set teacher.precision: float32, or "
            "offer forward_features and forward_head instead"
        )
    if config.compile and isinstance(head.backbone, WatchedBackbone):
        raise TeacherError(
            "teacher.compile: true needs a teacher that says what its features are: offer forward_features and forward_head, or "
            "set teacher.compile: false"
        )
    if precision == "float64":
        model.double()  # verified in float32 first; a head's closures see the same modules
    if config.fold and device.type == "cpu" and _fusable(config, precision, head):
        with torch.no_grad(), full_precision(device):
            fused = fuse_activations(model, head, x, HALF.get(precision, torch.float32))
        if fused:
            notes.append(f"{fused} convolutions run in oneDNN, with the activations after them")

    def run() -> None:
        with torch.no_grad(), computing_in(precision, device):
            wide = x.double() if precision == "float64" else x
            head.dense(head.backbone(wide).to(wide.dtype))

    def as_built() -> tuple[torch.nn.Module, Tensor]:
        return build(config).model.to(device), x

    own_grid = (dense_BKhw.shape[2], dense_BKhw.shape[3])
    grid = _grid(config, own_grid)
    if grid == (1, 1):
        notes.append("the teacher's grid is 1x1: every cell's logits are the image's; teacher.input_size sets its size")
    notes += teacher_notes(image_size, preprocess.size, own_grid, grid, _stated_stride(model))
    if head.kind == "per_cell":
        notes.append(
            f"teacher.dense: per_cell: the head is not linear, cells don't average to the image's logits (gap {head.gap:.2g})"
        )
    fingerprint = Fingerprint(
        source=built.source,
        weights_sha256=weights,
        mean=preprocess.mean,
        std=preprocess.std,
        interpolation=preprocess.interpolation,
        input_size=preprocess.size,
        image_size=image_size,
        precision=precision,
        device=device.type,
        channels_last=config.channels_last,
        compile=config.compile,
        batch=config.batch,
        dense=config.dense,
        head=head.kind,
        grid=grid,
        classes=len(class_names),
        class_map=None if indices is None else hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest(),
        fold=config.fold,
    )
    return Teacher(
        classes=len(class_names),
        grid=grid,
        own_grid=own_grid,
        preprocess=preprocess,
        device=device,
        image_size=image_size,
        batch=config.batch,
        precision=precision,
        head=head,
        backbone=_compiled(backbone) if config.compile else backbone,
        prepare=prepare,
        rows=rows,
        chosen=tuple(range(outputs) if indices is None else indices.tolist()),
        outputs=outputs,
        pools=grid != own_grid,
        fingerprint=fingerprint,
        notes=notes,
        reentrant="file_sha256" not in built.source and not config.compile,
        stages=Stages(model, run, as_built if config.fold and config.weights is not None else None, config.compile),
    )


def _fusable(config: TeacherConfig, precision: str, head: Head) -> bool:
    """Whether the backbone runs as it is, in float32 or bf16, and channels_last."""
    return (
        precision in ("float32", "bf16")
        and config.channels_last
        and not config.compile
        and head.kind != "forward_dense"
    )


def _compiled(backbone: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The backbone as one program, made at its first batch. Raises TeacherError where it can't be."""
    from torch._dynamo.exc import TorchDynamoException

    program = torch.compile(backbone, dynamic=False)

    def run(x: Tensor) -> Tensor:
        try:
            return program(x)
        except TorchDynamoException as e:
            raise TeacherError(
                f"teacher.compile: true, and torch.compile fails: {one_line(e)}; set teacher.compile: false"
            ) from None

    return run


def _probe_pixels(size: int) -> Tensor:
    return torch.from_numpy(probe_images(size)).permute(0, 3, 1, 2).float()


def _grid(config: TeacherConfig, own: tuple[int, int]) -> tuple[int, int]:
    if config.grid is None:
        return own
    wanted = (config.grid[0], config.grid[1])
    if wanted[0] > own[0] or wanted[1] > own[1]:
        raise TeacherError(
            f"teacher.grid is {list(wanted)}, finer than the teacher's own {list(own)}; take a coarser one, or a "
            "larger teacher.input_size"
        )
    return wanted


def _preprocess(config: TeacherConfig, stated: dict[str, Any], image_size: int, notes: list[str]) -> Preprocess:
    """The config's word, else the model's, else ImageNet's, with a note where the last was a guess."""
    guessed = [name for name in ("mean", "std") if getattr(config, name) is None and stated.get(name) is None]
    if guessed:
        notes.append(
            f"the teacher does not state its {' and '.join(guessed)}: ImageNet's are used; teacher.mean and std set them"
        )

    def first(name: str, default: Any) -> Any:
        return next(v for v in (getattr(config, name), stated.get(name), default) if v is not None)

    interpolation = first("interpolation", "bicubic")
    if interpolation not in ("bicubic", "bilinear"):
        notes.append(
            f"the teacher states the interpolation {str(interpolation)[:40]!r}: bicubic is used; teacher.interpolation sets it"
        )
    p = Preprocess(
        size=int(first("input_size", image_size)),
        mean=tuple(map(float, first("mean", IMAGENET_MEAN))),
        std=tuple(map(float, first("std", IMAGENET_STD))),
        interpolation=interpolation if interpolation in ("bicubic", "bilinear") else "bicubic",
        crop_pct=float(first("crop_pct", 1.0)),
    )
    for name, value, ok, expected in (
        ("input_size", p.size, p.size > 0, "a positive number of pixels"),
        ("mean", p.mean, len(p.mean) == 3, "three numbers, one a channel"),
        ("std", p.std, len(p.std) == 3 and min(p.std) > 0, "three numbers above 0"),
        ("crop_pct", p.crop_pct, 0 < p.crop_pct <= 1, "a share above 0 and up to 1"),
    ):
        if not ok:
            raise TeacherError(f"teacher.{name} is {value!r}, expected {expected}")
    return p


def _stated_stride(model: Any) -> int | None:
    """Pixels between two cells of the last map, as timm's models state it; None for others."""
    try:
        return int(model.feature_info[-1]["reduction"])
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
