"""The folder a run leaves: plain timm checkpoints with the config.json that rebuilds them.

model.safetensors       the weights to use: the averaged ones where `train.ema` is set, else the live ones
model_last.safetensors  the live weights, only where they differ from the above
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
from safetensors.torch import load_file, save_file
from torch import nn

import cskd
from cskd.config import Config, StudentConfig
from cskd.errors import ConfigError, StudentError
from cskd.files.paths import local_path
from cskd.student.model import Student, build_student
from cskd.student.optim import Optimisation
from cskd.student.resume import ResumeStates, TrainState, put_file
from cskd.untrusted import parse_json, read_file
from cskd.weight_files import check_tensors, check_weight_file

__all__ = ["MODEL", "MODEL_LAST", "ResumeStates", "TrainState", "export", "load_student"]

MAX_ARGUMENT, MAX_DEPTH = 65_536, 256  # of a ViT's constructor; the largest have 6,144 features and 64 blocks
MODEL = "model.safetensors"
MODEL_LAST = "model_last.safetensors"


def export(
    folder: Path, student: Student, optimisation: Optimisation, config: Config, classes: Sequence[str], step: int = 0
) -> None:
    """Write the weights and config.json of a run, each file durably and whole; existing ones are replaced.

    Args:    classes names by label; step updates done, noted in config.json.
    Raises:  StudentError when the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    averaged = optimisation.averaged
    _put_weights(folder / MODEL, (averaged or student).backbone)
    if averaged is None:
        (folder / MODEL_LAST).unlink(missing_ok=True)
    else:
        _put_weights(folder / MODEL_LAST, student.backbone)
    facts = timm_config(student, classes, crop_pct=config.train.eval_crop_pct)
    facts["cskd"] = {
        "version": cskd.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "method": config.loss.method,
        "weights": "live" if averaged is None else f"averaged, decay {config.train.ema}",
        "step": step,
        "image_size": list(student.image_size),
        "patch_grid": list(student.patch_grid),
    }
    text = json.dumps(facts, indent=2)
    put_file(folder / "config.json", lambda temp: temp.write_text(text + "\n", encoding="utf-8"))


def timm_config(student: Student, classes: Sequence[str], crop_pct: float) -> dict[str, Any]:
    """config.json as timm reads it: the model, and how to prepare an image for it. Drop path is left at timm's 0."""
    vit, (height, width) = student.backbone, student.image_size
    own: dict[str, Any] = vars(vit)["pretrained_cfg"]
    arguments = {k: v for k, v in student.config.kwargs.items() if v is not None}
    arguments.setdefault("img_size", height if height == width else [height, width])
    return {
        "architecture": student.config.model.partition(".")[0],  # without the tag of pretrained weights
        "num_classes": student.num_classes,
        "num_features": vit.num_features,
        "global_pool": vit.global_pool,
        "label_names": list(classes),
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": student.num_classes,
            "input_size": [3, height, width],
            "fixed_input_size": not vit.dynamic_img_size,
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

    Args:    path of a run's folder (its model.safetensors is taken), or of one of the weight files in it.
    Raises:  StudentError when something is missing, damaged or does not fit together.
    """
    path = local_path(path, "the checkpoint")
    weights = path / MODEL if path.is_dir() else path
    beside = weights.with_name("config.json")
    for file in (weights, beside):
        if not file.is_file():
            raise StudentError(f"{file} does not exist; give the folder of a run, or a weight file in it")
    try:
        facts: dict[str, Any] = parse_json(read_file(beside))
        config, classes, size = _described(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as e:
        raise StudentError(
            f"{beside} is not a run's config ({type(e).__name__}: {e}); restore it, or train into another folder"
        ) from e
    try:
        with torch.device("meta"):  # costs no memory: a few words in config.json can ask for any amount of it
            expected = sum(t.nbytes for t in build_student(config, classes, size).backbone.state_dict().values())
        if expected > 4 * weights.stat().st_size:  # float32 from 8 bits
            raise ValueError(f"the model it describes has {expected} bytes")
        check_weight_file(weights, expected)
        student = build_student(config, classes, size)
        tensors = load_file(weights)
        check_tensors(tensors.values())
        student.backbone.load_state_dict(tensors)
    except StudentError:
        raise
    except Exception as e:  # whatever a damaged file makes the reader raise
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise StudentError(
            f"{weights} does not fit {beside} ({reason}); restore it, or train into another folder"
        ) from e
    return student.eval(), facts


def _described(facts: dict[str, Any]) -> tuple[StudentConfig, int, tuple[int, int]]:
    """Student, number of classes and image size that a config.json describes. Raises ValueError and others for one that
    can't be: it may be somebody else's."""
    how, arguments = facts["pretrained_cfg"], facts["model_args"]
    classes, (_, height, width) = facts["num_classes"], how["input_size"]
    numbers = [n for v in arguments.values() for n in (v if isinstance(v, list) else [v]) if isinstance(n, int | float)]
    if any(not 0 <= n <= MAX_ARGUMENT for n in numbers) or arguments.get("depth", 0) > MAX_DEPTH:
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
    return (
        StudentConfig(str(facts["architecture"]), arguments, mean=how["mean"], std=how["std"]),
        classes,
        (height, width),
    )


def _put_weights(path: Path, vit: nn.Module) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in vit.state_dict().items()}
    put_file(path, lambda temp: save_file(tensors, temp, {"format": "pt"}))
