"""Distillation tokens by name: the last register tokens of a plain ViT of timm, each with a linear head like that of the classes.

The heads lie in the backbone as `token_heads`, so that they are trained, averaged and resumed as it is. An export takes them apart:
the ViT with its tokens is one that timm makes by `reg_tokens`, and the heads are a file beside it, `NAME.weight` and `NAME.bias`.

Source: one token a teacher, heads averaged, from Co-advise (CivT), arXiv 2106.12378; register tokens are those of arXiv 2309.16588.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cskd.errors import StudentError, counted
from cskd.files.weights import first_not_finite, misfit, read_weights
from cskd.near import absent

_KEY = "token_heads."


def refuse_tokens(name: str, model: nn.Module, plain: bool) -> None:
    """StudentError for a model that can't have tokens by name. plain: whether it is a ViT that is read by its parts."""
    why = "is no plain ViT" if not plain else "has a distillation token of its own"
    if not plain or isinstance(model, VisionTransformerDistilled):
        other = name.replace("_distilled", "") if plain else "deit_tiny_patch16_224"
        raise StudentError(
            f"student.tokens: {name} {why}, expected a ViT of timm's VisionTransformer with a class token's head; set "
            f"student.model to one such as {other}, or leave student.tokens out"
        )


def add_heads(vit: VisionTransformer, count: int) -> None:
    """Give a ViT a head for each of its last `count` register tokens, drawn as timm draws that of the classes."""
    weight = cast(nn.Linear, vit.head).weight
    heads = [nn.Linear(vit.embed_dim, vit.num_classes, device=weight.device) for _ in range(count)]
    for head in heads:
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    vit.token_heads = nn.ModuleList(heads)


def token_logits(vit: VisionTransformer, names: Sequence[str], features: Tensor) -> dict[str, Tensor]:
    """float32 [B, K] by name, of the ViT's features [B, prefix + N, C]."""
    first, heads = vit.num_prefix_tokens - len(names), cast(nn.ModuleList, vit.token_heads)
    return {
        name: head(vit.head_drop(vit.fc_norm(features[:, first + i]))).float()
        for i, (name, head) in enumerate(zip(names, heads, strict=True))
    }


def taken_apart(state: Mapping[str, Tensor], names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A backbone's tensors as timm's ViT has them, and those of the heads by the tokens' names."""
    vit = {k: t for k, t in state.items() if not k.startswith(_KEY)}
    parts = {k: t for name, t in state.items() if (k := name.removeprefix(_KEY)) != name}
    return vit, {f"{names[int(k.partition('.')[0])]}.{k.partition('.')[2]}": t for k, t in parts.items()}


def put_together(heads: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of heads by a backbone's names; the opposite of `taken_apart`."""
    return {f"{_KEY}{i}.{part}": heads[f"{name}.{part}"] for i, name in enumerate(names) for part in ("weight", "bias")}


def heads_file(weights: Path) -> Path:
    """Where the heads of the tokens lie that belong to exported weights: heads_ema.safetensors beside model_ema.safetensors."""
    own = weights.name.startswith("model")
    return weights.with_name(weights.name.replace("model", "heads", 1) if own else f"heads_{weights.name}")


def read_token_heads(weights: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors beside exported weights, by the tokens' names.

    Args:    own: names and shapes that are expected.
    Raises:  StudentError where they are missing, damaged, of another student, or not finite.
    """
    path = heads_file(weights)
    if not path.is_file():
        raise StudentError(f"no file {absent(path)}: {weights.name} has tokens whose heads lie there; restore it")
    try:
        found = read_weights(path, own).tensors
        if problem := misfit(found, own):
            raise ValueError(problem)
        if odd := first_not_finite(found):
            raise ValueError(f"its {odd} is not finite")
    except ValueError as e:
        raise StudentError(f"{path}, the heads of the tokens of {weights.name}: {e}; restore it") from None
    return found


def recorded_tokens(facts: Mapping[str, Any]) -> list[str]:
    """Names of the tokens of a run's config.json; none of that of others. Raises ValueError for what `cskd` did not write."""
    names = facts.get("cskd", {}).get("tokens", {}).get("names", [])
    registers = facts["model_args"].get("reg_tokens", 0) if names else 0
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(names) > registers:
        raise ValueError(f"cskd.tokens.names is {str(names)[:80]}, expected a text for each of its {registers} tokens")
    return names


def fit_tokens(
    path: Path, state: dict[str, Tensor], theirs: Sequence[str], vit: VisionTransformer, ours: Sequence[str]
) -> tuple[set[str], list[str]]:
    """Bring the named tokens of a checkpoint to those of a student, by name, with their positions and heads. `state` is changed.

    What only the student has stays as first drawn; what only the checkpoint has is left out.

    Args:    theirs, ours: names of the checkpoint's last register tokens, and of the student's.
    Returns: the student's tensors that stay as first drawn, and a note where there is something to say.
    """
    if not theirs and not ours:
        return set(), []
    own, registers = vit.state_dict(), state.pop("reg_token", None)
    heads = {k: state.pop(k) for k in [*state] if k.startswith(_KEY)}
    count = 0 if registers is None else registers.shape[1]
    plain, drawn = count - len(theirs), own.get("reg_token", torch.empty(1, 0, vit.embed_dim))
    before = drawn.shape[1] - len(ours)
    rows = [theirs.index(name) if name in theirs else None for name in ours]
    width = drawn.shape[2] if registers is None else registers.shape[2]
    if plain != before or width != drawn.shape[2]:
        if registers is not None:
            state["reg_token"] = registers  # refused as it is, with both shapes
        return set(), []

    def chosen(old: Tensor | None, new: Tensor) -> Tensor:
        """Rows [1, registers, C] of the student: the plain ones and those of names that both have from the checkpoint."""
        parts = [] if old is None else [old[:, :plain]]
        for i, row in enumerate(rows):
            at = before + i
            parts.append(new[:, at : at + 1] if row is None or old is None else old[:, plain + row : plain + row + 1])
        return torch.cat(parts, 1) if parts else new

    if drawn.shape[1]:
        state["reg_token"] = chosen(registers, drawn)
    position = state.get("pos_embed")
    if position is not None and position.ndim == 3 and not vit.no_embed_class and position.shape[2] == drawn.shape[2]:
        head = sum(name in state for name in ("cls_token", "dist_token"))
        ends = [position[:, :head], position[:, head + count :]]
        new = own["pos_embed"][:, vit.num_prefix_tokens - drawn.shape[1] :][:, : drawn.shape[1]]
        middle = [chosen(position[:, head : head + count], new)] if drawn.shape[1] else []
        state["pos_embed"] = torch.cat([ends[0], *middle, ends[1]], 1)
    fresh = set[str]()
    for i, row in enumerate(rows):
        for part in ("weight", "bias"):
            name, old = f"{_KEY}{i}.{part}", None if row is None else heads.get(f"{_KEY}{row}.{part}")
            if old is not None and old.shape == own[name].shape:
                state[name] = old
            else:
                fresh.add(name)
    return fresh, _said(path, theirs, ours, fresh)


def _said(path: Path, theirs: Sequence[str], ours: Sequence[str], fresh: set[str]) -> list[str]:
    """What `fit_tokens` did, a line for each kind of token."""
    new, left = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    headless = [n for i, n in enumerate(ours) if n in theirs and f"{_KEY}{i}.weight" in fresh]
    return [
        f"{path} {text} {counted(len(names), 'token')} {', '.join(names)}: {then}"
        for names, text, then in (
            (new, "has no", "as first drawn, with position and head"),
            (left, "has", "left out, with position and head"),
            (headless, "has no heads for the classes of", "the heads are as first drawn"),
        )
        if names
    ]
