"""Which heads of a student were trained, and how the untrained ones are kept out of what people read from it.

An evaluation names an untrained head so, and averages only trained ones. timm's forward of a distilled ViT always returns
the mean of two heads. Where one of them was not trained, the exported weights of the other are doubled and its own are
multiplied by 2^-64: timm's mean then is the trained head's logits, exactly, and powers of two can be undone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from cskd.config.schema import LossConfig
from cskd.method.terms import TOKEN, all_heads, expanded, trained_heads

UNTRAINED = ".untrained"  # after the name of a head that the loss did not train
_LAYER = {"class": "head", "distillation": "head_dist"}  # of timm's distilled ViTs
DOUBLED, SILENCED = 2.0, 2.0**-64  # factors of the exported layers


def heads_of(distilled: bool, tokens: Sequence[str] = ()) -> tuple[str, ...]:
    """The heads a student has; tokens: its tokens by name."""
    return tuple(name for name in all_heads(tokens) if distilled or name != "distillation")


def score_head(trained: Collection[str]) -> str:
    """The head, or the average of heads, that is a student's score: what timm computes from the exported weights."""
    return "+".join(name for name in ("class", "distillation") if name in trained)


def untrained_note(loss: LossConfig, name: str, distilled: bool, tokens: Sequence[str] = ()) -> str:
    """Which heads of student `name` the loss does not train, and what follows from it, in one line; '' where it trains all."""
    trained = trained_heads(loss, distilled, tokens)
    idle = [head for head in heads_of(distilled, tokens) if head not in trained]
    if not idle:
        return ""
    why = f"loss.method {loss.method}"
    if loss.method not in ("none", "terms") and loss.alpha in (0.0, 1.0):
        why += f" with loss.alpha {loss.alpha:g}"
    if loss.method.startswith("cskd") and loss.patch_weight == 0:
        why += " with loss.patch_weight 0"
    return (
        f"{why} trains {' and '.join(trained)} of {name}, not {' and '.join(idle)}: evaluated as NAME{UNTRAINED}, part of "
        f"no average; the score, and what timm computes from the exported weights, is {score_head(trained)}"
    )


def shared_head_note(loss: LossConfig, name: str, distilled: bool) -> str:
    """What a distilling method means for a student without a distillation token, in one line; '' where there is one."""
    terms = [term for term in expanded(loss) if term.weight > 0 and not (term.own or term.head.startswith(TOKEN))]
    taught = {term.target for term in terms if not term.of_features}
    if distilled or len(taught) < 2:
        return ""
    words = {"label": "the label", "global": "the teacher's class", "cells": "the cells"}
    targets = {word: target in taught for target, word in words.items()}
    return (
        f"{name} has no distillation token: its one head is taught {' and '.join(t for t, on in targets.items() if on)}"
    )


def export_factors(trained: Collection[str], distilled: bool) -> dict[str, float]:
    """Layer of a timm ViT -> what its exported weights are multiplied by; empty where timm's forward needs no help."""
    idle = [head for head in _LAYER if head not in trained]
    if not distilled or len(idle) != 1:
        return {}
    return {layer: SILENCED if head in idle else DOUBLED for head, layer in _LAYER.items()}


def multiplied(state: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """A ViT's tensors with those of the named layers times their factors."""
    return {
        name: t * factors[layer] if (layer := name.partition(".")[0]) in factors else t for name, t in state.items()
    }


def recorded_factors(facts: Mapping[str, Any]) -> dict[str, float]:
    """The factors that undo those of a run's config.json. Raises ValueError and others for what `cskd` did not write."""
    factors = facts.get("cskd", {}).get("heads", {}).get("times", {})
    if not all(layer in _LAYER.values() and factor in (DOUBLED, SILENCED) for layer, factor in factors.items()):
        raise ValueError(
            f"cskd.heads.times is {str(factors)[:80]}, expected {DOUBLED:g} or {SILENCED:g} of head, head_dist"
        )
    return {layer: 1 / factor for layer, factor in factors.items()}


def recorded_heads(facts: Mapping[str, Any], distilled: bool, tokens: Sequence[str] = ()) -> tuple[str, ...]:
    """The trained heads a run's config.json names. Raises ValueError and others for what `cskd` did not write.

    One of an earlier version names only the method, which for 'none' trained both heads; one of somebody else nothing: then
    all count as trained.
    """
    about = facts.get("cskd", {})
    if "heads" not in about:
        method = about.get("method")
        loss = LossConfig(method, baseline_head="mean" if method == "none" else "class")
        return trained_heads(loss, distilled) if method is not None else heads_of(distilled)
    trained = about["heads"]["trained"]
    known = heads_of(distilled, tokens)
    if not isinstance(trained, list) or not score_head(trained) or not set(trained) <= set(known):
        raise ValueError(f"cskd.heads.trained is {str(trained)[:80]}, expected some of {', '.join(known)}")
    return tuple(trained)
