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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import cskd
from cskd.config import Config, StudentConfig
from cskd.errors import StudentError
from cskd.student.model import Student, build_student
from cskd.student.optim import Optimisation
from cskd.student.resume import ResumeStates, TrainState, put_file

__all__ = ["MODEL", "MODEL_LAST", "ResumeStates", "TrainState", "export", "load_student"]

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
    weights = path / MODEL if path.is_dir() else path
    beside = weights.with_name("config.json")
    for file in (weights, beside):
        if not file.is_file():
            raise StudentError(f"{file} does not exist; give the folder of a run, or a weight file in it")
    try:
        facts: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        how = facts["pretrained_cfg"]
        config = StudentConfig(facts["architecture"], facts["model_args"], mean=how["mean"], std=how["std"])
        classes, (_, height, width) = int(facts["num_classes"]), how["input_size"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StudentError(
            f"{beside} is not a run's config ({type(e).__name__}: {e}); restore it, or train into another folder"
        ) from e
    student = build_student(config, classes, (height, width))
    try:
        student.backbone.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as e:
        raise StudentError(
            f"{weights} does not fit {beside} ({str(e).splitlines()[0]}); restore it, or train into another folder"
        ) from e
    return student.eval(), facts


def _put_weights(path: Path, vit: nn.Module) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in vit.state_dict().items()}
    put_file(path, lambda temp: save_file(tensors, temp, {"format": "pt"}))
