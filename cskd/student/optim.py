"""DeiT's optimiser recipe, through timm's factories; what changes from step to step is a function of the step alone.

So a resumed run needs the weights and the optimiser's tensors, but no scheduler's and no random generator's state.
Source: arXiv 2012.12877, table 9; arXiv 2307.08500, section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from cskd.config.schema import TrainConfig
from cskd.errors import ConfigError, one_line
from cskd.machine.arithmetic import half
from cskd.near import did_you_mean
from cskd.seeds import hash64
from cskd.student.model import Student
from cskd.student.projections import Projections

NOTED = 0.01  # share of the weights that a run starts with, of which a user is told
FUSED = ("adam", "adamw", "sgd", "momentum")  # torch's own, which have one kernel for all parameters on CUDA


class Optimisation:
    """Optimiser, learning rate and averaged weights of a student that already is on its device.

    `averaged` is the student with exponentially averaged weights (None where `train.ema` is null): a copy of the live
    ones at the first update, then decay * average + (1 - decay) * live. With `train.ema_warmup` the decay of update n is
    1 - n ** (-2/3) until that reaches `train.ema` (timm's ModelEmaV3); without it is `train.ema` from the second on, as
    in DeiT. `projections` are optimised with the student, and not averaged. Weight decay skips biases, norms, tokens and position embeddings, as timm's models ask for.

    In fp16 gradients below 6e-8 would be 0: `scaler` multiplies the loss, and divides the gradients before they are clipped and
    used. An update whose gradients are not finite is left out and the scale halved; `skipped` says of the latest update
    whether it was, a float32 scalar on the device (None without a scaler).

    Raises: ConfigError for an optimiser timm doesn't know, or a warm-up that is longer than the training.
    """

    def __init__(
        self, student: Student, config: TrainConfig, steps_per_epoch: int, projections: Projections | None = None
    ) -> None:
        refuse_schedule(config)
        self.student, self.projections = student, projections
        self.clip_grad = config.clip_grad
        self.peak_lr = scaled_lr(config)
        device = next(student.parameters()).device
        fused: dict[str, Any] = {"fused": True} if device.type == "cuda" and config.opt in FUSED else {}
        try:
            self.optimizer: torch.optim.Optimizer = create_optimizer_v2(
                student.backbone, config.opt, lr=self.peak_lr, weight_decay=config.weight_decay, **fused
            )
        except (ValueError, AssertionError) as e:
            raise ConfigError(
                f"train.opt is {config.opt!r}, which can't be had ({one_line(e)}); timm.optim.list_optimizers() lists the names"
            ) from e
        for group in projections.groups(config.weight_decay) if projections is not None else ():
            self.optimizer.add_param_group(group)
        warm_up: dict[str, Any] = {"warmup_lr": config.warmup_lr, "warmup_epochs": config.warmup_epochs}
        self._schedule, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=config.epochs,
            min_lr=config.min_lr,
            step_on_epochs=config.lr_every == "epoch",
            updates_per_epoch=steps_per_epoch,
            **warm_up,
        )
        self._epoch_steps = steps_per_epoch if config.lr_every == "epoch" else 0
        fp16 = half(config.autocast, device) == "fp16"
        self.scaler = GradScaler(device.type) if fp16 else None
        self.skipped: Tensor | None = None
        self._ema = None if config.ema is None else ModelEmaV3(student, decay=config.ema, use_warmup=config.ema_warmup)

    @property
    def averaged(self) -> Student | None:
        """The student with averaged weights, in evaluation mode; None without `train.ema`."""
        return None if self._ema is None else self._ema.module

    @property
    def lr(self) -> float:
        """Learning rate of the latest update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, step: int) -> float:
        """Learning rate of global step `step` (from 0): linear warm-up, then a cosine that counts the warm-up too.

        Source of `train.lr_every: epoch`: main.py of DeiT and of the CSKD authors, `lr_scheduler.step(epoch)` after that epoch.
        """
        if self._epoch_steps:
            self._schedule.step(max(0, step // self._epoch_steps - 1))
        else:
            self._schedule.step_update(step)
        return self.lr

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the next update."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def update(self, loss: Tensor, step: int) -> Tensor | None:
        """One update from a loss, and from those that were accumulated since the last one.

        Args:    loss a scalar with its graph; step global, from 0.
        Returns: the gradients' norm before clipping, a scalar on the device; None without `train.clip_grad`.
        """
        self.set_lr(step)
        self.accumulate(loss)
        norm = None
        if self.clip_grad is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            parts = [self.student, *([] if self.projections is None else [self.projections])]
            norm = torch.nn.utils.clip_grad_norm_([p for part in parts for p in part.parameters()], self.clip_grad)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            (self.skipped,) = self.scaler._found_inf_per_device(self.optimizer).values()  # `update` forgets it
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # here: the next forward has the memory
        if self._ema is not None:
            self._ema.update(self.student, step=step + 1)
        return norm


def refuse_schedule(config: TrainConfig) -> None:
    """ConfigError for an optimiser that timm does not know, or a warm-up that is as long as the training."""
    if not 0 <= config.warmup_epochs < config.epochs:
        raise ConfigError(
            f"train.warmup_epochs is {config.warmup_epochs}, expected less than train.epochs, {config.epochs}; "
            "set one of them"
        )
    known, name = [str(one) for one in list_optimizers()], config.opt.lower().removeprefix("lookahead_")
    if name not in known:
        hint = did_you_mean(config.opt, known) or "timm.optim.list_optimizers() lists them"
        raise ConfigError(f"train.opt is {config.opt!r}, expected the name of an optimiser of timm; {hint}")


def schedule_notes(config: TrainConfig) -> list[str]:
    """Of learning rates that go the other way than their names say."""
    peak = scaled_lr(config)
    ends = {"warmup_lr": config.warmup_lr if config.warmup_epochs else 0.0, "min_lr": config.min_lr}
    return [
        f"train.{name} is {end:g} and the highest learning rate {peak:g}: it {way}; set a smaller train.{name}"
        for (name, end), way in zip(ends.items(), ("falls in the warm-up", "rises after it"), strict=True)
        if end > peak
    ]


def scaled_lr(config: TrainConfig) -> float:
    """The peak learning rate: `train.lr`, times global_batch / lr_batch where `train.lr_batch` is set."""
    return config.lr if config.lr_batch is None else config.lr * config.global_batch / config.lr_batch


def reseed_step(seed: int, step: int, part: int) -> None:
    """Seed torch's generators for one micro-batch, so that drop path is a function of (seed, step, part).

    part: its number among the micro-batches of the global batch, those of rank 0 first; without micro-batches the rank.
    """
    torch.manual_seed(hash64("step", seed, step, part))


def share_of_start(decay: float, warmup: bool, updates: int) -> float:
    """Share of the weights after the first update in the average after `updates` of them, in [0, 1].

    The average begins as a copy of the live weights at the first update; each later one keeps `decay` of it. With warm-up
    update n keeps 1 - n ** (-2/3), at most `decay`: `get_decay` of timm's ModelEmaV3.
    """
    if not warmup:
        return decay ** max(0, updates - 1)
    share = 1.0
    for update in range(2, updates + 1):
        share *= min(decay, 1 - update ** (-2 / 3))
        if share < 1e-9:
            return 0.0
    return share


def average_notes(decay: float | None, warmup: bool, updates: int) -> list[str]:
    """What a user should know of `train.ema` before a run of so many updates."""
    if decay is None or warmup or updates < 2:  # with warm-up only a run of a dozen updates keeps more
        return []
    share = share_of_start(decay, warmup, updates)
    if share <= NOTED:
        return []
    fitting = NOTED ** (1 / (updates - 1))
    return [
        f"train.ema {decay:g} without warm-up: after {updates:,} updates the average still holds {share:.0%} of the weights "
        f"that the run starts with; set train.ema_warmup=true, or train.ema={_rounded_down(fitting)} or less"
    ]


def _rounded_down(decay: float) -> str:
    """A decay with two digits of its distance from 1, never above it."""
    digits = len(f"{1 / (1 - decay):.0f}") + 1
    return f"{int(decay * 10**digits) / 10**digits:.{digits}f}"


def numbers_per_weight(config: TrainConfig) -> float:
    """Numbers that the optimiser keeps for each weight, found by one step on a small matrix; 0 of one that takes no step on a CPU."""
    matrix = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(64, 64))})
    weight = matrix["weight"]
    weight.grad = torch.ones_like(weight)
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer: torch.optim.Optimizer = create_optimizer_v2(matrix, config.opt, lr=1e-3)
            optimizer.step()
    except Exception:  # those of other packages, which want CUDA
        return 0.0
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return float(sum(value.numel() for value in kept) / weight.numel())
