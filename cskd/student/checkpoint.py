"""The folder a run leaves: plain timm checkpoints with the config.json that rebuilds them.

model.safetensors       the weights to use, as `train.export` says: the live ones, the averaged ones (ema) or the best
                        ones; `auto`: the averaged ones where `train.ema` is set, else the live ones. `cskd.weights` in
                        config.json says which these are
model_last.safetensors  the live weights, where model.safetensors holds others
model_ema.safetensors   the averaged weights, where there are some and model.safetensors holds others
model_best.safetensors  the best weights, where `train.best` keeps some and model.safetensors holds others
heads*.safetensors      with `student.tokens`: beside each of these files the heads of its tokens, see cskd.student.tokens
config.json             architecture, arguments, class names, preprocessing; timm.create_model("local-dir:RUN",
                        pretrained=True) reads it, and so does `load_student`
resume/                 see cskd.student.resume
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import cskd
from cskd.config import Config, StudentConfig
from cskd.errors import ConfigError, NotFiniteError, StudentError
from cskd.files.read import parse_json, read_file
from cskd.files.weights import first_not_finite, read_weights
from cskd.near import absent
from cskd.storage.fetch import fetched
from cskd.student.best import Best, BestWeights
from cskd.student.heads import export_factors, multiplied, recorded_factors, recorded_heads, score_head
from cskd.student.model import Student, build_student
from cskd.student.optim import Optimisation
from cskd.student.resume import ResumeStates, TrainState, put_file, put_weights
from cskd.student.tokens import heads_file, put_together, read_token_heads, recorded_tokens, taken_apart

__all__ = ["MODEL", "MODEL_BEST", "MODEL_EMA", "MODEL_LAST", "ResumeStates", "TrainState", "export", "load_student"]

MAX_ARGUMENT, MAX_BLOCKS_OF_VIT = 65_536, 256  # of a ViT's constructor; the largest have 6,144 features and 64 blocks
MAX_TABLES = 1 << 30  # bytes of buffers that no file holds, such as attention masks
_COUNTS = ("depth", "layer", "block")  # parts of names of arguments that say how many modules there are
MODEL = "model.safetensors"
MODEL_LAST = "model_last.safetensors"
MODEL_EMA = "model_ema.safetensors"
MODEL_BEST = "model_best.safetensors"


def export(
    folder: Path,
    student: Student,
    optimisation: Optimisation,
    config: Config,
    classes: Sequence[str],
    step: int = 0,
    best: Best | None = None,
    changed: Sequence[str] = (),
) -> str:
    """Write the weights and config.json of a run, each file durably and whole; existing ones are replaced.

    Args:    classes names by label; step updates done, noted in config.json; best that of folder/resume, with its file;
             changed: what changed when the run was resumed, noted as well.
    Returns: what model.safetensors holds, in words, as in config.json.
    Raises:  StudentError when the disk refuses; NotFiniteError for weights with NaN or an infinity. Then nothing was written.
    """
    averaged, folder_best = optimisation.averaged, BestWeights(folder / "resume")
    weights: dict[str, dict[str, Tensor]] = {}
    for name, model in {"live": student, "ema": averaged}.items():
        if model is not None:
            if odd := first_not_finite(model.backbone.state_dict()):
                raise NotFiniteError(
                    f"{odd} of the {name} weights is not finite after step {step}", "nothing is exported"
                )
            weights[name] = model.backbone.state_dict()
    if best is not None:
        weights["best"] = load_file(folder_best.path(best))
    chosen, text = _chosen(config, best)
    factors = export_factors(student.trained, student.distilled)
    for name, other in (("live", MODEL_LAST), ("ema", MODEL_EMA), ("best", MODEL_BEST)):
        if name in weights:
            path = folder / (MODEL if name == chosen else other)
            vit, heads = taken_apart(weights[name], student.tokens)
            if heads:
                put_weights(heads_file(path), heads)
            put_weights(path, multiplied(vit, factors))
        if name not in weights or name == chosen:
            (folder / other).unlink(missing_ok=True)
            heads_file(folder / other).unlink(missing_ok=True)
    facts = timm_config(student, classes, crop_pct=config.train.eval_crop_pct)
    facts["cskd"] = {
        "version": cskd.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "method": config.loss.method,
        # times: what exported layers were multiplied by, so that timm's forward gives the score alone; see heads.py
        "heads": {"trained": list(student.trained), "score": score_head(student.trained), "times": factors},
        "weights": text,
        "step": step,
        "image_size": list(student.image_size),
        "patch_grid": list(student.patch_grid),
    }
    if student.tokens:  # those at `first` and after it of what timm's forward_features gives
        first = int(student.backbone.num_prefix_tokens) - len(student.tokens)
        facts["cskd"]["tokens"] = {"names": list(student.tokens), "first": first, "heads": heads_file(Path(MODEL)).name}
    if best is not None:
        facts["cskd"]["best"] = best.record()
    if changed:
        facts["cskd"]["changed"] = list(changed)
    put_file(folder / "config.json", (json.dumps(facts, indent=2) + "\n").encode())
    return text


def _chosen(config: Config, best: Best | None) -> tuple[str, str]:
    """Which weights are the model: 'live', 'ema' or 'best', and the same in words."""
    train = config.train
    average = "" if train.ema is None else f"ema: decay {train.ema}{' with warm-up' if train.ema_warmup else ''}"
    if train.export == "best" and best is not None:
        return "best", f"best: {best.name} {best.score:.2f} at step {best.step}"
    yet = " (best: nothing scored yet)" if train.export == "best" else ""
    if train.export == "live" or train.ema is None:
        return "live", "live" + yet
    return "ema", average + yet


def exported_prefix(config: Config, best: Best | None) -> str:
    """Whose scores are those of model.safetensors: 'ema.' for the averaged weights, '' for the live ones."""
    chosen, _ = _chosen(config, best)
    return best.prefix if chosen == "best" and best is not None else "ema." if chosen == "ema" else ""


def timm_config(student: Student, classes: Sequence[str], crop_pct: float) -> dict[str, Any]:
    """config.json as timm reads it: the model, and how to prepare an image for it. Drop path is left at timm's 0."""
    model, (height, width) = student.backbone, student.image_size
    own: dict[str, Any] = vars(model)["pretrained_cfg"]
    arguments = {k: v for k, v in student.config.kwargs.items() if v is not None}
    if "img_size" in student.arguments:
        arguments.setdefault("img_size", height if height == width else [height, width])
    else:
        arguments.pop("img_size", None)
    if "reg_tokens" in student.arguments:
        arguments["reg_tokens"] = student.arguments["reg_tokens"]
    pooling, dynamic = getattr(model, "global_pool", None), getattr(model, "dynamic_img_size", None)
    fixed = own.get("fixed_input_size", False) if dynamic is None else not dynamic
    return {
        "architecture": student.config.model.partition(".")[0],  # without the tag of pretrained weights
        "num_classes": student.num_classes,
        "num_features": model.num_features,
        **({"global_pool": pooling} if isinstance(pooling, str) else {}),
        "label_names": list(classes),
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": student.num_classes,
            "input_size": [3, height, width],
            "fixed_input_size": fixed,
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": student.mean,
            "std": student.std,
            "pool_size": None,
            "first_conv": own["first_conv"],
            "classifier": own["classifier"],
        },
    }


def load_student(path: Path) -> tuple[Student, dict[str, Any]]:
    """A trained student, in evaluation mode on the CPU, and its config.json.

    Args:    path of a run's folder (its model.safetensors is taken), or of one of the weight files in it; or the address of
             either on the hub.
    Raises:  StudentError when something is missing, damaged or does not fit together.
    """
    path = fetched(path, "the checkpoint")
    weights = path / MODEL if path.is_dir() else path
    beside = weights.with_name("config.json")
    if not weights.is_file():
        raise StudentError(f"no file {absent(weights)}; give the folder of a run, or a weight file in it")
    if not beside.is_file():
        raise StudentError(
            f"{weights} has no {beside.name} next to it, which says of what model it is; give the folder of a run, or a weight "
            "file in it"
        )
    try:
        facts: dict[str, Any] = parse_json(read_file(beside))
        config, classes, size = _described(facts)
        undo = recorded_factors(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as e:
        raise StudentError(
            f"{beside} is not a run's config ({type(e).__name__}: {e}); restore it, or train into another folder"
        ) from e
    try:
        with torch.device("meta"):  # costs no memory: a few words in config.json can ask for any amount of it
            described = build_student(config, classes, size, trained=True)
            own, own_heads = taken_apart(described.backbone.state_dict(), described.tokens)
        expected = sum(t.nbytes for t in own.values())
        if expected > 4 * weights.stat().st_size:  # float32 from 8 bits
            raise ValueError(f"the model it describes has {expected} bytes")
        if (tables := sum(t.nbytes for t in described.buffers())) > MAX_TABLES:
            raise ValueError(f"the model it describes makes tables of {tables} bytes")
        tensors = read_weights(weights, own).tensors
        student = build_student(config, classes, size, trained=True, layout=getattr(described, "layout", None))
        if odd := first_not_finite(tensors):
            raise ValueError(f"its {odd} is not finite")
        student.trained = recorded_heads(facts, student.distilled, student.tokens)
        if own_heads:
            tensors = tensors | put_together(read_token_heads(weights, own_heads), student.tokens)
        student.backbone.load_state_dict(multiplied(tensors, undo))
    except StudentError:
        raise
    except Exception as e:  # whatever a damaged file makes the reader raise
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise StudentError(f"{weights} does not fit {beside} ({reason}); restore it, or train elsewhere") from e
    return student.eval(), facts


def _described(facts: dict[str, Any]) -> tuple[StudentConfig, int, tuple[int, int]]:
    """Student, number of classes and image size that a config.json describes. Raises ValueError and others for one that
    can't be: it may be somebody else's."""
    how, arguments = facts["pretrained_cfg"], facts["model_args"]
    classes, (_, height, width) = facts["num_classes"], how["input_size"]
    for name, value in arguments.items():
        most = MAX_BLOCKS_OF_VIT if any(word in name for word in _COUNTS) else MAX_ARGUMENT
        if any(not 0 <= n <= most for n in _numbers(value)):
            raise ValueError(f"model_args {str(arguments)[:200]} are beyond any ViT's")
    if not all(type(n) is int and 1 <= n <= MAX_ARGUMENT for n in (classes, height, width)):
        raise ValueError(f"num_classes {str(classes)[:40]} or input_size {str(how['input_size'])[:40]} can't be")
    names = facts["label_names"]
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f"label_names are not {classes} texts")
    for name in ("mean", "std"):
        if not isinstance(how[name], list | tuple) or not all(0.0 <= float(v) <= 1.0 for v in how[name]):
            raise ValueError(f"{name} is {str(how[name])[:80]}, expected three numbers in [0, 1]")
    if not 0.0 < float(how["crop_pct"]) <= 1.0 or min(how["std"]) <= 0:
        raise ValueError(f"crop_pct is {str(how['crop_pct'])[:40]}, expected a share in (0, 1], and std above 0")
    if tokens := recorded_tokens(facts):
        arguments = arguments | {"reg_tokens": arguments["reg_tokens"] - len(tokens)}
    return (
        StudentConfig(str(facts["architecture"]), arguments, tokens=tokens, mean=how["mean"], std=how["std"]),
        classes,
        (height, width),
    )


def _numbers(value: Any) -> list[float]:
    """The numbers of an argument, those in lists and dicts, too."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v)]
    return [value] if isinstance(value, int | float) else []
