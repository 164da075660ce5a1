"""Start a student from a checkpoint, which may be of another resolution, patch size or number of classes."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from cskd.errors import StudentError, counted, one_line
from cskd.files.checkpoint import given_file
from cskd.files.not_weights import one_part
from cskd.files.read import parse_json, read_file
from cskd.files.weights import first_not_finite, read_weights
from cskd.storage.fetch import fetched
from cskd.student.heads import multiplied, recorded_factors, recorded_heads
from cskd.student.tokens import fit_tokens, put_together, read_token_heads, recorded_tokens

PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
CLASSIFIERS = ("head", "head_dist")
PRETEXT = ("decoder_", "mask_token")  # what masked autoencoders are trained with in addition


def start_from(model: nn.Module, path: Path, tokens: Sequence[str] = ()) -> list[str]:
    """Load a checkpoint into `model`, all of it but a classifier of other classes.

    A distillation token is kept where both have one. Where only the checkpoint has one, it is left out with its position and
    head. Where only the student has one, they are as first drawn. The same of each token by name, `tokens`, whose heads lie in a
    file beside the checkpoint. Position embeddings are resized as timm does it.

    Args:    path as `cskd.files.weights.read_weights` takes it. A config.json next to the weights says the resolution
             they were trained at; without one the patches form a square.
    Returns: what was taken and what was changed on the way, a line each.
    Raises:  StudentError when the file is missing, is no checkpoint, or is one of another model.
    """
    path = checkpoint_file(path)
    own = model.state_dict()
    try:
        weights = read_weights(path, own)
    except ValueError as e:
        raise StudentError(f"student.init {path} {e}; give a ViT's state dict, .safetensors or of torch.save") from None
    path, state, notes = weights.path, weights.tensors, list(weights.notes)
    if pretext := [name for name in state if name.startswith(PRETEXT) and name not in own]:
        notes.append(f"{len(pretext)} tensors of {path.name} were left out: a decoder of MAE or a mask token")
        state = {name: t for name, t in state.items() if name not in pretext}
    state, theirs = _as_trained(path, state, notes)
    drawn = set[str]()
    if isinstance(model, VisionTransformer):
        drawn, said = fit_tokens(path, state, theirs, model, tokens)
        notes += said
        drawn |= _fit_distillation_token(path, state, own, notes)
    for token in PREFIX_TOKENS:
        if token not in drawn and _shape(state, token) != _shape(own, token):
            raise StudentError(
                f"{path} has {_shape(state, token) or 'no'} {token}, the student {_shape(own, token) or 'none'}; "
                "start from a checkpoint of the same kind of ViT"
            )
    try:
        state = _adapted(model, path, state, notes)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, ArithmeticError) as e:
        raise StudentError(f"{path} is no checkpoint of this model ({one_line(e)}); choose another student.init") from e
    named = vars(model).get("pretrained_cfg", {}).get("classifier") or CLASSIFIERS
    heads = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    fresh = {k for k in own if k.startswith(heads) and k.rpartition(".")[2] in ("weight", "bias")}
    fresh = {
        k for k in fresh if model.num_classes == len(own[k])
    }  # of a head with a norm only the layer of the classes
    if any(k not in drawn and _shape(state, k) != _shape(own, k) for k in fresh):
        found = next((len(state[k]) for k in sorted(fresh) if k in state), "no")
        notes.append(f"the classifier of {path} ({found} classes) was dropped: the student has {model.num_classes}")
        state = {k: v for k, v in state.items() if k not in fresh}
    else:
        fresh = set()
    _check(path, state, {k: v for k, v in own.items() if k not in fresh | drawn})
    model.load_state_dict(state, strict=False)
    return notes


def _adapted(model: nn.Module, path: Path, state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """A checkpoint of a ViT as this student takes it; of another model as its module of timm converts one, where it does."""
    if not isinstance(model, VisionTransformer):
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's interpolation warns of its own tensors
            converted: dict[str, Tensor] = state if convert is None else convert(state, model)
        resized = [k for k, t in converted.items() if k in state and t.shape != state[k].shape]
        if resized:
            notes.append(f"{counted(len(resized), 'tensor')} of {path}, {resized[0]} the first, were resized by timm")
        return converted
    own_kernel, kernel = model.patch_embed.state_dict().get("proj.weight"), state.get("patch_embed.proj.weight")
    position = state.pop("pos_embed", None)  # timm's filter would guess its grid from the model's default image size
    if position is not None and model.pos_embed is not None:
        position = _resample(model, position, _grid_of(model, path, state, position), path, notes)
    state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
    if kernel is not None and own_kernel is not None and kernel.ndim == 4 and kernel.shape[2:] != own_kernel.shape[2:]:
        sizes = " to ".join(f"{k.shape[2]} x {k.shape[3]}" for k in (kernel, own_kernel))
        notes.append(f"the patch embedding of {path} was resampled from {sizes} pixels")
    return state if position is None else state | {"pos_embed": position}


def _fit_distillation_token(path: Path, state: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> set[str]:
    """Leave out a checkpoint's distillation token that the student lacks; see `start_from`. `state` is changed.

    Returns: the student's tensors that the checkpoint need not have, for they stay as first drawn.
    """
    theirs, ours = "dist_token" in state, "dist_token" in own
    position, class_token = state.get("pos_embed"), "cls_token" in state
    damaged = not theirs and "head_dist.weight" in state
    if theirs == ours or damaged or not class_token or position is None or position.ndim != 3:
        return set()
    if theirs:
        for name in ("dist_token", "head_dist.weight", "head_dist.bias"):
            state.pop(name, None)
        state["pos_embed"] = torch.cat([position[:, :1], position[:, 2:]], 1)
        notes.append(f"the distillation token of {path} was left out, with its position and head: the student has none")
        return set()
    if position.shape[2] == own["pos_embed"].shape[2]:
        state["pos_embed"] = torch.cat([position[:, :1], own["pos_embed"][:, 1:2], position[:, 1:]], 1)
    notes.append(f"{path} has no distillation token: the student's, its position and its head are as first drawn")
    return {"dist_token", "head_dist.weight", "head_dist.bias"}


def checkpoint_file(path: Path) -> Path:
    """The file that `student.init` names, itself or as the folder of a run. StudentError where there is none."""
    try:
        return given_file(fetched(path, "student.init"))
    except ValueError as e:
        raise StudentError(f"student.init: {e}; give a .safetensors, a .pt or a run's folder") from None


def _as_trained(path: Path, state: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that a run of ours exported with factors, without them; see `cskd.student.heads`. With the heads of its tokens, and
    their names."""
    beside = path.with_name("config.json")
    if not beside.is_file():
        return state, []
    try:
        facts = parse_json(read_file(beside))
        undo = recorded_factors(facts)
        if undo:
            notes.append(f"of {path} only the heads {' and '.join(recorded_heads(facts, distilled=True))} were trained")
        tokens = recorded_tokens(facts)
        if tokens and "head.weight" in state:
            parts = {"weight": state["head.weight"], "bias": state["head.bias"]}
            own = {f"{name}.{part}": t for name in tokens for part, t in parts.items()}
            state = state | put_together(read_token_heads(path, own), tokens)
        return multiplied(state, undo), tokens
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise StudentError(f"{beside} is not a timm config ({one_line(e)}); mend it or move it away") from e


def _grid_of(vit: VisionTransformer, path: Path, state: dict[str, Tensor], position: Tensor) -> tuple[int, int]:
    """The patch grid a checkpoint was trained at: its config.json's, else a square, else the student's own."""
    patches = position.shape[1] - (0 if vit.no_embed_class else vit.num_prefix_tokens)
    beside, kernel = path.with_name("config.json"), state.get("patch_embed.proj.weight")
    if beside.is_file() and kernel is not None and kernel.ndim == 4:
        try:
            config = parse_json(read_file(beside))
            size = config.get("model_args", {}).get("img_size") or config["pretrained_cfg"]["input_size"][-2:]
            rows, cols = (size, size) if isinstance(size, int) else size
            grid = (rows // kernel.shape[2], cols // kernel.shape[3])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
            raise StudentError(f"{beside} is not a timm config ({one_line(e)}); mend it or move it away") from e
        if grid[0] * grid[1] == patches:
            return grid
    side = math.isqrt(max(0, patches))
    if side * side == patches and side:
        return side, side
    rows, cols = vit.patch_embed.grid_size
    if rows * cols == patches:
        return rows, cols
    raise StudentError(f"{path} has {patches} position embeddings, which are no square; put its config.json next to it")


def _resample(vit: VisionTransformer, position: Tensor, old: tuple[int, int], path: Path, notes: list[str]) -> Tensor:
    new = (int(vit.patch_embed.grid_size[0]), int(vit.patch_embed.grid_size[1]))
    if old == new:
        return position
    notes.append(f"position embeddings of {path} were resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches")
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    resized: Tensor = resample_abs_pos_embed(position, list(new), list(old), num_prefix_tokens=prefix)
    return resized


def _check(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """StudentError unless `state` has the names and shapes of `expected`, and finite values."""
    problems = [f"lacks {k}" for k in expected if k not in state]
    problems += [f"has {k}, which the student has not" for k in state if k not in expected]
    problems += [
        f"has {k} {list(v.shape)}, the student {list(expected[k].shape)}"
        for k, v in state.items()
        if k in expected and v.shape != expected[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        next_step = one_part(path) or "choose another student.init"
        raise StudentError(f"{path} is of another model: {', '.join(problems[:3])}{more}; {next_step}")
    if odd := first_not_finite(state):
        raise StudentError(f"{path} has values in {odd} that are not finite; choose another student.init")


def _shape(state: dict[str, Tensor], name: str) -> list[int] | None:
    return list(state[name].shape) if name in state else None
