"""A small teacher with weights of its own, for tests that only need one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor

from cskd.config import TeacherConfig
from cskd.teacher.fingerprint import probe_images
from cskd.teacher.model import Teacher, load_teacher

NAMES = ["a", "b", "c", "d", "e"]
SIZE = 64  # pixels of a view


def tiny_teacher(folder: Path) -> TeacherConfig:
    """A thin ResNet of five classes on a 4x4 grid; its biases are not zero, as those of a fresh network are."""
    kwargs: dict[str, Any] = {"channels": [16, 16, 24, 32], "num_classes": 5, "output_stride": 16}
    torch.manual_seed(0)
    model: Any = timm.create_model("resnet18", **kwargs)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn(p.shape)
    model.fc.weight.data = torch.randn(5, 32)
    path = folder / "tiny.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return TeacherConfig(model="resnet18", kwargs=kwargs, weights=str(path), input_size=SIZE, crop_pct=1.0)


def load(config: TeacherConfig, names: list[str] = NAMES, size: int = SIZE, **changes: Any) -> Teacher:
    """`config` with `changes`, loaded on the CPU for views of `size` pixels."""
    return load_teacher(dataclasses.replace(config, **changes), names, torch.device("cpu"), size)


def pixels(size: int = SIZE) -> Tensor:
    """Three views, float32 [3, 3, size, size] in 0..255."""
    return torch.from_numpy(probe_images(size)[2:5]).permute(0, 3, 1, 2).float()
