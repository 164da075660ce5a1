"""What a config may say: each section a frozen dataclass, each field with type, bounds, unit, default and meaning.

A field's type is what YAML must give; `load.py` checks it. Its bounds are checked wherever a section is made, by `bounds.py`.
Conditions over two fields stand in `__post_init__`. The text below a field is its meaning: docs/CONFIG.md is generated from
this file by `python -m cskd.config.document`.

Upper bounds that no run comes near are there because beyond them a value is a slip or an attack: it would fill the memory, or
never end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt, MultipleOf, Predicate, Unit

from cskd.config.bounds import check
from cskd.config.every import interval
from cskd.config.predicates import (
    KINDS,
    OF_MAPS,
    distinct,
    folders,
    is_head,
    is_target,
    once,
    rising,
    span,
    tokens_named,
)
from cskd.config.rand_string import parse_rand_string
from cskd.errors import ConfigError

Method = Literal["none", "deit-hard", "deit-soft", "cskd-hard", "cskd-soft", "terms"]
Decay = Literal["linear", "quadratic", "cosine", "local", "global"]
Autocast = Literal["auto", "none", "bf16", "fp16"]
Precision = Literal["auto", "float32", "tf32", "bf16", "fp16", "float64"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]

Probability = Annotated[float, Ge(0), Le(1), Unit("probability")]
Share = Annotated[float, Ge(0), Le(1), Unit("share")]
Range = Annotated[list[Annotated[float, Gt(0)]], Len(2, 2), Predicate(rising)]
Noise = Annotated[list[Annotated[float, Ge(1e-6), Le(1)]], Len(3, 3), Unit("R, G, B in [0, 1]")]
Colour = Annotated[list[Annotated[float, Ge(0), Le(1)]], Len(3, 3), Unit("R, G, B in [0, 1]")]
Rgb = Annotated[list[float] | None, Len(3, 3), Unit("R, G, B in [0, 1]")]
Spread = Annotated[list[Annotated[float, Gt(0)]] | None, Len(3, 3), Unit("R, G, B in [0, 1]")]


@dataclass(frozen=True)
class Section:
    """The fields of one section. ConfigError for a value outside its bounds."""

    def __post_init__(self) -> None:
        check(self.key_of(), self)

    @classmethod
    def key_of(cls) -> str:
        """By which messages name it."""
        return cls.__name__.removesuffix("Config").lower()


@dataclass(frozen=True)
class DataConfig(Section):
    """Folders made by `cskd pack` or `cskd index`, or their addresses on an object store, see STORAGE.md."""

    train: Annotated[str, Unit("folder")] = ""
    """Images of the cache and of training."""
    val: Annotated[str, Unit("folder")] = ""
    """Images of evaluation, and of the clean-image check of the teacher."""
    node_cache: Annotated[str | None, Unit("folder")] = None
    """Copies of what is read from object stores, one per machine; null = a folder in that of temporary files. On a local disk."""
    node_cache_gb: Annotated[float | None, Gt(0), Unit("GB")] = None
    """Size of those copies, beyond which the least recently used go; null = half of what the disk has for them."""


@dataclass(frozen=True)
class TeacherConfig(Section):
    """The CNN whose outputs are cached."""

    model: str = ""
    """A timm name, `torchvision:NAME`, `path/to/file.py:build`, `package.module:build`, the name of an entry point of
    `cskd.teachers`, or the `hf://` address of a timm model."""
    weights: str | None = None
    """A file of weights, `FILE:KEY` for those under a key of it, or an `hf://` address; `hub` = timm's or torchvision's own;
    null = as built."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for timm's or torchvision's constructor, or for `build()`."""
    input_size: Annotated[int | None, Ge(1), Le(8192), Unit("pixels")] = None
    """Side of the square input; null = the model's own."""
    mean: Rgb = None
    """Subtracted from the pixels; null = the model's own."""
    std: Spread = None
    """The pixels are divided by it; null = the model's own."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """How the clean-image check resizes; null = the model's own."""
    crop_pct: Annotated[float | None, Gt(0), Le(1), Unit("share of the short side")] = None
    """What the clean-image check sees of an image; null = the model's own."""
    classes: str | list[int] | None = None
    """From label to teacher output: a list of indices; a file of the teacher's class names; `shift:N` (output k + N for label
    k); or how the names were sorted to number the outputs: `timm` (its folder reader), `sorted` (torchvision, Keras),
    `caseless`."""
    dense: Literal["exact", "per_cell", "none"] = "exact"
    """`per_cell`: apply a head that is not linear to every cell all the same. `none`: no logits of cells, for a ViT, or a network
    without a classifier (`kwargs: {num_classes: 0}`): its features and the image's logits alone, so codecs `features:*` and `global:*`."""
    grid: Annotated[list[Annotated[int, Ge(1), Le(1024)]] | None, Len(2, 2), Unit("cells")] = None
    """[h, w]: pool the teacher's map to this; null = the teacher's own."""
    precision: Precision = "float32"
    """Arithmetic of the backbone; pooling, classifier and codecs run in float32 (in float64 with `float64`). `float32` is
    IEEE's on every device; `tf32`: CUDA devices only; `auto`: bf16 where the device gains by it. Part of the fingerprint."""
    fold: bool = False
    """Put batch norms into the convolutions before them, and on a CPU activations, too: the same up to rounding."""
    channels_last: bool = True
    """Memory layout of the teacher's tensors."""
    compile: bool = False
    """Run the teacher through torch.compile."""
    batch: Annotated[int, Ge(4), Le(1 << 16), MultipleOf(4), Unit("images")] = 64
    """Images of one forward, whole quads of 4. Part of the fingerprint."""
    check_images: Annotated[int, Ge(1), Le(1 << 20), Unit("images")] = 512
    """Clean images for the top-1 check before the first unit."""
    min_top1: Annotated[float | None, Ge(0), Le(1), Unit("share")] = None
    """Refuse a teacher below this top-1; null = clearly above chance, about twice."""
    check: Literal["refuse", "note"] = "refuse"
    """Whether what that check finds against the teacher stops stage 1, or is noted."""


@dataclass(frozen=True)
class RecipeConfig(Section):
    """Everything random about a view. Part of the cache: the student replays it."""

    size: Annotated[int, Ge(1), Le(8192), Unit("pixels")] = 224
    """Side of the square view."""
    seed: int = 0
    """Every draw of every view follows from it."""
    crop: Literal["resized", "padded", "center"] = "resized"
    """How a view is cut out of its image."""
    scale: Annotated[Range, Unit("share of the area")] = field(default_factory=lambda: [0.08, 1.0])
    """Area of the cut, for `crop: resized`."""
    ratio: Annotated[Range, Unit("width / height")] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Shape of the cut, for `crop: resized`."""
    padding: Annotated[int, Ge(0), Le(8192), Unit("pixels")] = 4
    """Border on each side, for `crop: padded`."""
    flip: Probability = 0.5
    """Probability of a left-right flip."""
    randaugment: str | None = None
    """As timm writes it; DeiT's is `rand-m9-mstd0.5-inc1`; null = off."""
    color_jitter: Annotated[float, Ge(0), Le(1), Unit("strength")] = 0.0
    """Strength of the change of colours; used only where randaugment is off, as in timm."""
    erase: Probability = 0.0
    """Probability that rectangles are overwritten with noise; DeiT's is 0.25."""
    erase_count: Annotated[int, Ge(1), Le(1000), Unit("rectangles")] = 1
    """Most rectangles per view."""
    mean: Colour = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Colour outside of the image, and mean of the noise."""
    std: Noise = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of the noise."""
    mixup: Annotated[float, Ge(0), Le(1_000_000), Unit("alpha of a Beta distribution")] = 0.8
    """Distribution of the share lambda with which two images are blended; 0 = off."""
    cutmix: Annotated[float, Ge(0), Le(1_000_000), Unit("alpha of a Beta distribution")] = 1.0
    """Distribution of the share of an image that another one keeps visible; 0 = off."""
    mix_prob: Share = 1.0
    """Share of pairs that are mixed at all."""
    mix_switch: Share = 0.5
    """Share of cutmix where both are on."""
    mix_group: Annotated[int, Ge(1), Le(3), Unit("views")] = 3
    """Views in which a sample meets each other member of its quad once; a quad has three matchings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.randaugment is not None:
            parse_rand_string(self.randaugment)

    @property
    def mixes(self) -> bool:
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class CacheConfig(Section):
    """Where the cache lies and what it holds."""

    path: Annotated[str, Unit("folder")] = ""
    """Folder of the cache; one that is only read may be an `hf://` address. Empty, or nothing there yet: `loss.method: none` trains
    from `data.train` alone, with no cache and no teacher."""
    views: Annotated[int, Ge(1), Le(100_000), Unit("views per image")] = 6
    """Views that stage 1 makes."""
    codecs: Annotated[list[str], Len(1), Predicate(distinct)] = field(default_factory=lambda: ["envelope"])
    """How the teacher's outputs are kept: `envelope` (hard targets, exact), `int8`, `topk:K` (soft ones of each cell),
    `features:BITS`, `features:pcaR`, `features:pcaR:BITS` (soft ones from the feature map; BITS 4 unless given), `global:BITS`,
    `global:topK` (of the image alone), or a codec of your own as `path/to/file.py:Class`, `package.module:Class`, or the name
    of an entry point of `cskd.codecs`; see docs/LIBRARY.md. Several in one cache: `[envelope, features:pca384]`."""
    container: Literal["zarr", "webdataset"] = "zarr"
    """Files of the units: `zarr`, zipped, or `webdataset`, tars of arrays, each read as a whole. The content is the same;
    `cskd export --container` copies a cache into the other one."""
    max_quarantine: Share = 0.001
    """Unreadable images beyond this share stop stage 1."""
    save_seconds: Annotated[float, Ge(0), Le(86_400), Unit("seconds")] = 30.0
    """How often stage 1 saves what it has of a pass that takes longer: a kill loses that much work, and the teacher's batches
    under way."""
    workers: Annotated[int | None, Ge(0), Le(1024), Unit("processes")] = None
    """Processes that decode and augment; 0 = the main process does; null = chosen from the cores."""
    threads: Annotated[int | None, Ge(1), Le(1024), Unit("threads")] = None
    """Threads of arithmetic, here lanes of the teacher on a CPU; null = chosen from the cores."""
    device: str = "auto"
    """Where the teacher runs: auto, cpu, cuda, cuda:3, ..."""


@dataclass(frozen=True)
class StudentConfig(Section):
    """The student, a model of timm."""

    model: str = ""
    """A timm name: a ViT, or another model whose last features have a grid of cells (docs/STUDENTS.md)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for `timm.create_model`."""
    tokens: Annotated[list[str], Len(0, 16), Predicate(tokens_named)] = field(default_factory=list[str])
    """Names of distillation tokens for a plain ViT, one for each teacher: register tokens, each with a head of its own that terms of
    the loss call `token:NAME` (docs/STUDENTS.md)."""
    init: str | None = None
    """Checkpoint to start from, `FILE:KEY`, or an `hf://` address; position embeddings are resized to this student's grid."""
    mean: Rgb = None
    """Subtracted from the pixels; null = the model's own."""
    std: Spread = None
    """The pixels are divided by it; null = the model's own."""
    drop_path: Annotated[float, Ge(0), Lt(1), Unit("probability")] = 0.0
    """Probability that a residual branch is left out; CSKD's is 0, DeiT's 0.1."""


@dataclass(frozen=True)
class LossTerm(Section):
    """One term of the loss: which head of the student is taught what, how, and when. Items of `loss.terms`."""

    head: Annotated[str, Predicate(is_head)] = "class"
    """Whose logits: those of the class token, of the distillation token, of the token NAME of `student.tokens` (`token:NAME`), the
    mean of all these, or of the patch tokens. A ViT without a distillation token has one head, which stands for it. `tokens`: no
    logits, the last patch tokens themselves, before any head; `block:N`: the patch tokens that block N gives, from 0, `block:last`
    the last one before the final norm. Of a student without a row of equal blocks N counts the stages that timm's
    forward_intermediates gives."""
    target: Annotated[str, Predicate(is_target)] = "label"
    """What they are taught: the mixed label; the teacher's output for the image; or for each cell, blended by `decay`, which is for
    the patches. For the tokens: `features`, the teacher's last feature map, cell by cell; `pooled`, its mean over the cells; `stage:NAME`, the
    map of an earlier stage, a module of the teacher by its path or the number of a stage of timm, from a codec of that stage."""
    kind: Literal["ce", "kl", "dkd", "mse", "smooth_l1", "cosine"] = "ce"
    """`ce`: cross entropy with the label, or with the teacher's class. `kl`: tau^2 KL of the teacher's distribution. `dkd`: decoupled KD,
    the KL of target and other classes apart (CVPR 2022), of global outputs. Of features: `mse`, the mean squared difference; `smooth_l1`,
    half of it below a difference of 1, absolute above; `cosine`, 1 - cosine over the channels."""
    projection: Literal["linear", "orthogonal"] = "linear"
    """From the student's width to the teacher's, for features: a linear layer, or one whose matrix is orthogonal (VkD, CVPR 2024). It is
    trained with the student and not exported."""
    resize: Literal["teacher", "finer"] = "teacher"
    """How tokens are brought to a map of another grid. `teacher`: to the map's, by means where it is coarser, else bilinear.
    `finer`: tokens and map both to the finer grid of both, bilinear (Locality Guidance, ECCV 2022)."""
    weight: Annotated[float, Ge(0), Unit("weight")] = 1.0
    """What the term is multiplied by."""
    tau: Annotated[float, Gt(0), Unit("temperature")] = 1.0
    """Temperature of `kl` and `dkd`."""
    standardise: bool = False
    """`kl` and `dkd`: bring the logits of each row, teacher's and student's, to mean 0 and standard deviation 1 first (CVPR 2024). Of
    features: bring the teacher's to mean 0 and variance 1 over the channels, as a layer norm without weights (VkD)."""
    smoothing: Annotated[float, Ge(0), Lt(1), Unit("share")] = 0.0
    """Label smoothing of `ce` with labels."""
    divisor: Literal["rows", "paper"] = "rows"
    """What a sum over rows is divided by: their number, or what the CSKD authors' code divides by; see `loss.soft_reduction`."""
    dkd_alpha: Annotated[float, Ge(0), Unit("weight")] = 1.0
    """`dkd`: weight of the KL of target against all others."""
    dkd_beta: Annotated[float, Ge(0), Unit("weight")] = 8.0
    """`dkd`: weight of the KL among the other classes."""
    cache: str = ""
    """Whose teacher, by a name in `train.caches`; empty = that of `cache.path`."""
    live: bool = False
    """Of a stage: its map is not in the cache; the first layers of the cache's teacher, no others, run at every step."""
    decay: Decay | None = None
    """How the blend of `cells` goes from local to global; null = as `loss.decay`."""
    epochs: Annotated[list[float | None] | None, Len(2, 2), Predicate(span), Unit("epochs")] = None
    """[first, end]: the term counts in epochs first .. end - 1 of the run, from 0; end null = to the last. null = in all. With it a
    loss has stages."""
    own: str = ""
    """A term of your own in place of all that: `path/to/file.py:function`, `package.module:function`, or the name of an entry point
    of `cskd.losses`; see docs/LIBRARY.md."""
    name: str = ""
    """In logs; empty = made of the keys above."""

    def refuse_misfit(self, key: str) -> None:
        """ConfigError, by this key, for values that do not fit together."""
        if self.own:
            read = {"own", "weight", "epochs", "name"}
            other = [
                f for f, d in LossTerm.__dataclass_fields__.items() if f not in read and getattr(self, f) != d.default
            ]
            if other:
                raise ConfigError(
                    f"{key}: a term with own: {self.own!r} does not read {', '.join(other)}; leave them out"
                )
            return
        kinds = OF_MAPS if self.stage else KINDS[self.target]
        if self.kind not in kinds:
            raise ConfigError(
                f"{key}: a term with target {self.target} has kind {self.kind}, expected {', '.join(kinds)}; set kind: {kinds[0]}"
            )
        if (self.head == "tokens" or self.block is not None) != self.of_features:
            raise ConfigError(
                f"{key}: a term teaches {self.head} by {self.target}; set head: tokens or block:N with target: features, pooled or "
                "stage:NAME, which are for tokens alone, and a head that has logits with any other"
            )
        if self.live and self.stage and self.cache:
            raise ConfigError(
                f"{key}: live runs the teacher of the first cache alone, not that of cache: {self.cache}; leave cache out, or have "
                f"that cache keep the map (cache.codecs: stage:{self.stage}:8) and leave live out"
            )
        read = self._read()
        other = [f for f, d in LossTerm.__dataclass_fields__.items() if f not in read and getattr(self, f) != d.default]
        if other:
            raise ConfigError(
                f"{key}: a term with target {self.target} and kind {self.kind} does not read {', '.join(other)}; leave "
                f"{'it' if len(other) == 1 else 'them'} out"
            )
        if self.cache and self.target == "label":
            raise ConfigError(f"{key}: a term with target label reads no cache; leave cache: {self.cache} out")
        if (self.head == "patches") != (self.target == "cells"):
            raise ConfigError(
                f"{key}: a term teaches {self.head} by {self.target}; cells are for patches, and patches are taught by cells: to teach "
                "them the image's output, set target: cells, decay: global"
            )

    @classmethod
    def key_of(cls) -> str:
        return "loss.terms[]"

    def _read(self) -> set[str]:
        """The keys that a term of its target and kind reads."""
        read = {"head", "target", "kind", "weight", "cache", "epochs", "name"}
        read |= {"projection", "standardise"} if self.of_features else set()
        read |= {"live"} if self.stage and not self.cache else set()
        read |= {"resize"} if self.of_features and self.target != "pooled" else set()
        read |= {"tau", "standardise"} if self.kind in ("kl", "dkd") else set()
        read |= {"divisor"} if self.kind == "kl" else {"dkd_alpha", "dkd_beta"} if self.kind == "dkd" else set()
        return read | {"label": {"smoothing"}, "cells": {"decay"}}.get(self.target, set())

    @property
    def of_features(self) -> bool:
        """Whether it reads a map of the teacher: its last one, or that of a stage."""
        return not self.own and (self.target in ("features", "pooled") or bool(self.stage))

    @property
    def stage(self) -> str:
        """The stage of the teacher that it reads; '' where it reads none."""
        return self.target.removeprefix("stage:") if self.target.startswith("stage:") and not self.own else ""

    @property
    def block(self) -> int | None:
        """The student's block whose tokens it teaches, -1 for the last; None for the outputs."""
        if self.own or not self.head.startswith("block:"):
            return None
        number = self.head.removeprefix("block:")
        return -1 if number == "last" else int(number)

    @property
    def map_name(self) -> str:
        """Of the map that a term of features reads, among those of all caches: 'CACHE' the last map, 'CACHE:STAGE'."""
        return f"{self.cache}:{self.stage}" if self.stage else self.cache

    @property
    def title(self) -> str:
        """Its name in logs."""
        of = f"{self.cache}_" if self.cache else ""
        return (
            self.name
            or self.own.rpartition(":")[2]
            or re.sub("[:.]", "_", f"{self.head}_{of}{self.target}_{self.kind}")
        )


@dataclass(frozen=True)
class LossConfig(Section):
    """The method: what the student is taught. Section 3 of the paper."""

    method: Method = "cskd-hard"
    """`none`: labels only. `deit`: one teacher output per view. `cskd`: one per cell, too. `hard`: the teacher's class;
    `soft`: its distribution. Each stands for a few terms; `terms`: those of `loss.terms` alone."""
    baseline_head: Literal["class", "mean"] = "class"
    """What method `none` trains of a student with a distillation token: `class`, the class head alone, as the baselines of
    DeiT and of the CSKD authors; `mean`, the mean of the logits of both heads, as timm outside of distillation."""
    decay: Decay = "linear"
    """How the blend of local and global teacher outputs goes from local to global over the epochs; `local` and `global` stay."""
    alpha: Share = 0.5
    """Share of the distillation token's term; 1 - alpha is the label's."""
    patch_weight: Annotated[float, Ge(0), Unit("weight")] = 1.0
    """Weight of the patch tokens' term."""
    tau: Annotated[float, Gt(0), Unit("temperature")] = 1.0
    """Temperature of the soft terms; the paper's configs have 1."""
    smoothing: Annotated[float, Ge(0), Lt(1), Unit("share")] = 0.1
    """Label smoothing, of the label term only."""
    soft_reduction: Literal["consistent", "paper"] = "consistent"
    """What the soft terms are divided by; see cskd/method/losses.py."""
    terms: list[LossTerm] = field(default_factory=list)
    """Terms that are added to those of the method; their keys are below, in `loss.terms[]`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, term in enumerate(self.terms):
            term.refuse_misfit(f"loss.terms[{i}]")
        if self.method == "terms" and all(term.of_features for term in self.terms):
            raise ConfigError(
                f"loss.method is terms and loss.terms {'teaches no head' if self.terms else 'is empty'}; list them, as in "
                "loss.terms: [{head: class, target: label}]"
            )
        if self.method != "none" and self.baseline_head != "class":
            raise ConfigError(
                f"loss.baseline_head is {self.baseline_head!r} and loss.method {self.method}, which does not read it; "
                "leave it out, or set loss.method=none"
            )


@dataclass(frozen=True)
class TrainConfig(Section):
    """Stage 2: DeiT's optimiser recipe."""

    output: Annotated[str, Unit("folder")] = ""
    """Folder of the run."""
    scratch: Annotated[str, Unit("folder")] = ""
    """Folder on a local disk, there already, for the tables of the targets of the epochs under way: one for all ranks of a machine;
    empty = that of temporary files."""
    epochs: Annotated[int, Ge(1), Le(1_000_000), Unit("epochs")] = 300
    """Length of the schedule."""
    global_batch: Annotated[int, Ge(1), Le(1 << 24), Unit("views")] = 1024
    """Views of one step over all ranks, an even number."""
    micro_batch: Annotated[int | None, Ge(2), MultipleOf(2), Unit("views")] = None
    """Views of one forward and backward; a step adds up the gradients of as many as its batch has, shared among the ranks. Takes
    less memory and gives the same step up to rounding, with any number of ranks. null = the views of a rank at once, as many as
    when the run was begun."""
    grad_checkpointing: bool = False
    """Keep only the input of each block of the student and compute the rest again in the backward pass: the same gradients, a
    fraction of the memory, about a third more time."""
    caches: Annotated[dict[str, Any], Predicate(folders)] = field(default_factory=dict)
    """Further caches of the same views, name: folder, each made with a teacher of its own from the same images and recipe;
    terms of the loss read them by `cache`."""
    views: Annotated[int, Ge(0), Unit("views per image")] = 0
    """Use the first so many views of the cache; 0 = all, which must be finished. Without a cache 0 = as many as the run needs,
    so that no view is used twice."""
    repeats: Annotated[int, Ge(1), Le(1000), Unit("views per image")] = 1
    """Views of an image in one epoch (repeated augmentation); divides `recipe.mix_group` and `views`."""
    repeats_draw: Literal["cover", "random"] = "cover"
    """Which 1/`repeats` of the images an epoch takes: `cover`, another one in each of `repeats` epochs; `random`, drawn for
    every epoch, so that an image may come again before all have come, as RASampler of DeiT and the CSKD authors does it."""
    seed: int = 0
    """Every draw of training follows from it; those of the views follow from `recipe.seed`."""
    opt: str = "adamw"
    """Any name of timm's optimiser factory."""
    lr: Annotated[float, Ge(0)] = 1e-3
    """Highest learning rate."""
    lr_batch: Annotated[int | None, Ge(1), Unit("views")] = None
    """`lr` holds for this batch and is scaled linearly; null = `lr` is used as it is."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Weight decay of the optimiser."""
    warmup_epochs: Annotated[float, Ge(0), Unit("epochs")] = 5
    """Epochs in which the learning rate rises from `warmup_lr` to `lr`."""
    warmup_lr: Annotated[float, Ge(0)] = 1e-6
    """First learning rate."""
    min_lr: Annotated[float, Ge(0)] = 1e-5
    """Last learning rate."""
    lr_every: Literal["step", "epoch"] = "step"
    """How often the learning rate changes. `epoch`: one value per epoch, that of the epoch before, as DeiT and the CSKD authors
    step timm's scheduler: the first two epochs have `warmup_lr`."""
    clip_grad: Annotated[float | None, Gt(0), Unit("norm")] = None
    """Largest norm of the gradient; null = no limit."""
    ema: Annotated[float | None, Ge(0), Lt(1), Unit("decay per step")] = None
    """Decay of the averaged weights, which are evaluated in addition to the live ones; null = no average."""
    ema_warmup: bool = True
    """Let the decay rise to `ema`; false: as in DeiT, the first weights stay in for long."""
    export: Literal["auto", "live", "ema", "best"] = "auto"
    """What model.safetensors holds; auto: ema where it is set."""
    best: str | None = None
    """Score by which the best weights are kept, such as `top1.class`; null = only for `export: best`."""
    autocast: Autocast = "auto"
    """Arithmetic of the student; `auto`: bf16 where the device gains by it, fp16 on GPUs that have no bf16. With fp16 the loss is
    scaled, and steps whose gradients overflow are skipped."""
    tf32: bool = True
    """Products of float32 numbers on a CUDA device, in convolutions and matrix products, from inputs with 10 bits of mantissa;
    false: float32 as IEEE defines it. Nothing that autocast computes in bf16 or fp16 depends on it."""
    compile: bool = False
    """Run the student through torch.compile."""
    workers: Annotated[int | None, Ge(0), Le(1024), Unit("processes")] = None
    """Processes that decode and augment; 0 = the main process does; null = chosen from the cores."""
    threads: Annotated[int | None, Ge(1), Le(1024), Unit("threads")] = None
    """Threads of arithmetic in the main process; null = chosen from the cores."""
    device: str = "auto"
    """Where the student runs: auto, cpu, cuda, cuda:3, ..."""
    eval_every: Annotated[int, Ge(1), Unit("epochs")] = 1
    """Epochs from one evaluation to the next."""
    eval_crop_pct: Annotated[float, Gt(0), Le(1), Unit("share of the short side")] = 0.875
    """What evaluation sees of an image."""
    keep: Annotated[int, Ge(1), Le(1_000_000), Unit("files")] = 2
    """Newest resume states that are kept."""
    save_every: Annotated[int | str, Predicate(interval)] = "15min"
    """From one resume state to the next inside an epoch; 0 = only at its end."""
    window: Annotated[int, Ge(1), Le(1_000_000), Unit("blocks")] = 8
    """Blocks within which quads are shuffled."""
    max_steps: Annotated[int, Ge(0), Unit("steps")] = 0
    """Stop after this many steps; 0 = train to the end."""
    trackers: Annotated[list[Tracker], Predicate(once)] = field(default_factory=list[Tracker])
    """Where the metrics go in addition: tensorboard, wandb, trackio, mlflow; one that fails never stops a run."""
    prefetch: Annotated[int, Ge(1), Le(1024), Unit("batches")] = 4
    """Batches that each worker keeps ready; where all workers together would have more than 32, fewer, but 2 of each at least."""
    augment: Literal["host", "device"] = "host"
    """Where decoded images become views: in the workers, or on `train.device`, cuda or cpu. The views are the same bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.export == "ema" and self.ema is None:
            raise ConfigError(f"train.export is {self.export!r}, expected live or best without train.ema")


@dataclass(frozen=True)
class Config:
    """One run: what is cached and how the student is trained."""

    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    given: frozenset[str] = frozenset()  # dotted keys that the user wrote; the others are defaults
