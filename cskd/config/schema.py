"""What a config may say: each section a frozen dataclass, each field with its default, unit and reason.

A field's type is what YAML must give; `load.py` checks it. Fields that only make sense together are checked in
`__post_init__`, where the offending value is printed beside what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cskd.config.rand_string import parse_rand_string
from cskd.errors import ConfigError

Method = Literal["none", "deit-hard", "deit-soft", "cskd-hard", "cskd-soft"]
Decay = Literal["linear", "quadratic", "cosine", "local", "global"]
Autocast = Literal["auto", "none", "bf16"]


# Beyond these a value is a slip or an attack: it would fill the memory, or never end.
MOST = {
    "teacher.batch": 1 << 16,
    "teacher.check_images": 1 << 20,
    "teacher.input_size": 8192,
    "teacher.grid": 1024,
    "recipe.size": 8192,
    "recipe.padding": 8192,
    "recipe.erase_count": 1000,
    "recipe.mixup": 1e6,
    "recipe.cutmix": 1e6,
    "cache.views": 100_000,
    "cache.workers": 1024,
    "cache.threads": 1024,
    "train.epochs": 1_000_000,
    "train.global_batch": 1 << 24,
    "train.workers": 1024,
    "train.threads": 1024,
    "train.prefetch": 1024,
    "train.keep": 1_000_000,
    "train.window": 1_000_000,
    "train.repeats": 1000,
}


def _at_most(section: str, config: object) -> None:
    """ConfigError for the first value of a section that is above its MOST."""
    for key, most in MOST.items():
        if key.startswith(f"{section}."):
            value = getattr(config, key.partition(".")[2])
            largest = max(value, default=0) if isinstance(value, list) else value
            _need(largest is None or largest <= most, key, value, f"at most {most:g}")


def _need(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{key} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class DataConfig:
    """Folders made by `cskd pack` or `cskd index`."""

    train: str = ""
    val: str = ""


@dataclass(frozen=True)
class TeacherConfig:
    """The CNN whose outputs are cached."""

    model: str = ""  # a timm name, or path/to/file.py:build
    weights: str | None = None  # path of .safetensors / .pt / .pth; 'hub' = timm's pretrained weights; null = as built
    kwargs: dict[str, Any] = field(default_factory=dict)  # for timm.create_model or build()
    input_size: int | None = None  # pixels; null = the model's own
    mean: list[float] | None = None  # of RGB in [0, 1]; null = the model's own
    std: list[float] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None  # of the clean-image check; null = the model's own
    crop_pct: float | None = None  # of the clean-image check; null = the model's own
    # label -> teacher output: a list of indices, a file of the teacher's class names, shift:N (output k + N for label k), or
    # how the names were sorted to number the outputs: timm (its folder reader), sorted (torchvision, Keras), caseless
    classes: str | list[int] | None = None
    dense: Literal["exact", "per_cell"] = (
        "exact"  # per_cell: apply a head that is not linear to every cell all the same
    )
    grid: list[int] | None = None  # [h, w]: pool the teacher's map to this; null = the teacher's own
    autocast: Autocast = "none"  # of the backbone only; classifier and codecs always run in float32
    fold: bool = (
        False  # batch norms into the convolutions before them, on a CPU activations, too: the same up to rounding
    )
    dtype: Literal["float32", "float64"] = "float32"  # of weights and arithmetic; logits are float32 always
    channels_last: bool = True
    compile: bool = False
    batch: int = 64  # images a forward; part of the fingerprint
    check_images: int = 512  # clean images for the top-1 check before the first unit
    min_top1: float | None = None  # refuse below this; null = clearly above chance, about twice
    check: Literal["refuse", "note"] = "refuse"  # what that check finds against the teacher stops stage 1, or is noted

    def __post_init__(self) -> None:
        _at_most("teacher", self)
        _need(self.batch > 0 and self.batch % 4 == 0, "teacher.batch", self.batch, "a positive multiple of 4 (quads)")
        _need(
            self.dtype == "float32" or self.autocast == "none", "teacher.dtype", self.dtype, "float32 with an autocast"
        )
        _need(self.check_images > 0, "teacher.check_images", self.check_images, "at least 1")
        for name in ("mean", "std"):
            value = getattr(self, name)
            _need(value is None or len(value) == 3, f"teacher.{name}", value, "three numbers, one a channel")
        _need(self.grid is None or (len(self.grid) == 2 and min(self.grid) > 0), "teacher.grid", self.grid, "[h, w]")


@dataclass(frozen=True)
class RecipeConfig:
    """Everything random about a view. Part of the cache: the student replays it."""

    size: int = 224  # pixels of the square view
    seed: int = 0
    crop: Literal["resized", "padded", "center"] = "resized"
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # share of the area, crop: resized
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # width / height, crop: resized
    padding: int = 4  # pixels a side, crop: padded
    flip: float = 0.5  # probability of a left-right flip
    randaugment: str | None = None  # as timm writes it, DeiT's is rand-m9-mstd0.5-inc1; null = off
    color_jitter: float = 0.0  # strength; used only where randaugment is off, as in timm
    erase: float = 0.0  # probability that rectangles are overwritten with noise; DeiT's is 0.25
    erase_count: int = 1  # most rectangles a view
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of RGB: colour outside, and of the noise
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # of the noise
    mixup: float = 0.8  # alpha of the Beta distribution of lambda; 0 = off
    cutmix: float = 1.0
    mix_prob: float = 1.0  # share of pairs that are mixed at all
    mix_switch: float = 0.5  # share of cutmix where both are on
    mix_group: int = 3  # views in which a sample meets each other member of its quad once

    def __post_init__(self) -> None:
        _at_most("recipe", self)
        _need(self.size > 0, "recipe.size", self.size, "a positive number of pixels")
        _need(self.padding >= 0, "recipe.padding", self.padding, "0 or more pixels")
        for name in ("flip", "erase", "mix_prob", "mix_switch"):
            _need(0.0 <= getattr(self, name) <= 1.0, f"recipe.{name}", getattr(self, name), "a probability in [0, 1]")
        for name in ("mixup", "cutmix"):
            _need(getattr(self, name) >= 0.0, f"recipe.{name}", getattr(self, name), "an alpha >= 0")
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            _need(len(value) == 2 and 0 < value[0] <= value[1], f"recipe.{name}", value, "[low, high], 0 < low <= high")
        for name, low in (("mean", 0.0), ("std", 1e-6)):
            value = getattr(self, name)
            expected = f"three numbers in [{low:g}, 1], one a channel of RGB in [0, 1]"
            _need(len(value) == 3 and low <= min(value) and max(value) <= 1.0, f"recipe.{name}", value, expected)
        _need(0.0 <= self.color_jitter <= 1.0, "recipe.color_jitter", self.color_jitter, "a strength in [0, 1]")
        _need(self.erase_count >= 1, "recipe.erase_count", self.erase_count, "at least 1")
        if self.randaugment is not None:
            parse_rand_string(self.randaugment)
        _need(1 <= self.mix_group <= 3, "recipe.mix_group", self.mix_group, "1, 2 or 3: a quad has three matchings")

    @property
    def mixes(self) -> bool:
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class CacheConfig:
    """Where the cache lies and what it holds."""

    path: str = ""  # empty: loss.method none trains from data.train alone, with no cache and no teacher
    views: int = 6
    codecs: list[str] = field(default_factory=lambda: ["envelope"])  # envelope, int8, topk10, topk:K
    max_quarantine: float = 0.001  # share of unreadable images that stops stage 1
    workers: int = 2  # processes that decode and augment
    threads: int | None = None  # of arithmetic, here lanes of the teacher on a CPU; null = chosen from the cores
    device: str = "auto"

    def __post_init__(self) -> None:
        _at_most("cache", self)
        _need(self.views > 0, "cache.views", self.views, "at least 1")
        _need(len(self.codecs) > 0, "cache.codecs", self.codecs, "at least one of envelope, int8, topk:K")
        distinct = {name.replace(":", "") for name in self.codecs}  # topk10 is topk:10
        _need(len(distinct) == len(self.codecs), "cache.codecs", self.codecs, "each codec once")
        _need(self.workers >= 0, "cache.workers", self.workers, "0 or more processes")
        _need(self.threads is None or self.threads > 0, "cache.threads", self.threads, "at least 1, or null")
        _need(0.0 <= self.max_quarantine <= 1.0, "cache.max_quarantine", self.max_quarantine, "a share in [0, 1]")


@dataclass(frozen=True)
class StudentConfig:
    """The ViT."""

    model: str = ""  # a timm name
    kwargs: dict[str, Any] = field(default_factory=dict)
    init: str | None = None  # checkpoint to start from; position embeddings are resized to this student's grid
    mean: list[float] | None = None  # null = the model's own
    std: list[float] | None = None
    drop_path: float = 0.0  # CSKD's; DeiT's is 0.1

    def __post_init__(self) -> None:
        _need(0.0 <= self.drop_path < 1.0, "student.drop_path", self.drop_path, "a probability in [0, 1)")
        for name in ("mean", "std"):
            value = getattr(self, name)
            _need(value is None or len(value) == 3, f"student.{name}", value, "three numbers, one a channel")


@dataclass(frozen=True)
class LossConfig:
    """The method: what the student is taught. Section 3 of the paper."""

    method: Method = "cskd-hard"
    # What method none trains of a student with a distillation token: class, the class head alone, as DeiT's and the CSKD
    # authors' baselines; mean, the mean of the logits of both heads, as timm outside distilled training.
    baseline_head: Literal["class", "mean"] = "class"
    decay: Decay = "linear"  # of the blend of local and global teacher outputs
    alpha: float = 0.5  # share of the distillation token's term; 1 - alpha is the label's
    patch_weight: float = 1.0  # weight of the patch tokens' term
    tau: float = 1.0  # temperature of the soft terms; the paper's configs have 1
    smoothing: float = 0.1  # of the label term only
    soft_reduction: Literal["consistent", "paper"] = (
        "consistent"  # what the soft terms are divided by; see cskd/method/losses.py
    )

    def __post_init__(self) -> None:
        _need(0.0 <= self.alpha <= 1.0, "loss.alpha", self.alpha, "a share in [0, 1]")
        _need(self.patch_weight >= 0.0, "loss.patch_weight", self.patch_weight, "a weight >= 0")
        if self.method != "none" and self.baseline_head != "class":
            raise ConfigError(
                f"loss.baseline_head is {self.baseline_head!r} and loss.method {self.method}, which does not read it; "
                "leave it out, or set loss.method=none"
            )
        _need(self.tau > 0, "loss.tau", self.tau, "a temperature above 0")
        _need(0.0 <= self.smoothing < 1.0, "loss.smoothing", self.smoothing, "a share in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """Stage 2: DeiT's optimiser recipe."""

    output: str = ""
    epochs: int = 300
    global_batch: int = 1024  # over all ranks; even per rank
    # Use the first so many views of the cache; 0 = all, which must be finished. Without a cache 0 = as many as the run
    # needs, so that no view is used twice.
    views: int = 0
    repeats: int = 1  # views of an image in one epoch (repeated augmentation); divides mix_group and views
    seed: int = 0
    opt: str = "adamw"  # any name of timm's optimiser factory
    lr: float = 1e-3
    lr_batch: int | None = None  # lr holds for this batch and is scaled linearly; null = lr is used as it is
    weight_decay: float = 0.05
    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    clip_grad: float | None = None  # largest gradient norm
    ema: float | None = None  # decay of the averaged weights, evaluated beside the live ones
    ema_warmup: bool = True  # let the decay rise to `ema`; false: as DeiT, the first weights stay in for long
    export: Literal["auto", "live", "ema", "best"] = "auto"  # what model.safetensors holds; auto: ema where it is set
    best: str | None = (
        None  # score by which the best weights are kept, such as top1.class; null = only for export: best
    )
    autocast: Autocast = "auto"  # auto: bf16 where the device gains by it
    compile: bool = False
    workers: int = 2
    threads: int | None = None  # of arithmetic in the main process; null = chosen from the cores
    device: str = "auto"
    eval_every: int = 1  # epochs
    eval_crop_pct: float = 0.875  # share of the short side that evaluation sees
    keep: int = 2  # newest resume states kept
    save_every: int = 0  # steps between resume states inside an epoch; 0 = only at its end
    window: int = 8  # blocks within which quads are shuffled
    max_steps: int = 0  # stop after this many steps; 0 = train to the end
    tensorboard: bool = False
    prefetch: int = 4  # batches a worker keeps ready

    def __post_init__(self) -> None:
        _at_most("train", self)
        for name in ("epochs", "global_batch", "repeats", "eval_every", "keep", "window", "prefetch"):
            _need(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("workers", "save_every", "max_steps", "views"):
            _need(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        for name in ("lr", "warmup_epochs", "warmup_lr", "min_lr", "weight_decay"):
            _need(getattr(self, name) >= 0.0, f"train.{name}", getattr(self, name), "a number >= 0")
        _need(self.threads is None or self.threads > 0, "train.threads", self.threads, "at least 1, or null")
        _need(0.0 < self.eval_crop_pct <= 1.0, "train.eval_crop_pct", self.eval_crop_pct, "a share in (0, 1]")
        _need(self.ema is None or 0.0 <= self.ema < 1.0, "train.ema", self.ema, "a decay in [0, 1), or null")
        _need(
            self.export != "ema" or self.ema is not None, "train.export", self.export, "live or best without train.ema"
        )
        _need(self.clip_grad is None or self.clip_grad > 0.0, "train.clip_grad", self.clip_grad, "a norm > 0, or null")
