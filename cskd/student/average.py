"""How much of the weights that a run starts with an exponential average of them still holds."""

from __future__ import annotations

NOTED = 0.01  # share of the first weights that a user is told of


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
