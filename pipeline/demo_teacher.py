"""The demo's teacher: a thin timm ResNet, trained in seconds on the few scans that its students learn from too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_model
from torch import Tensor

from cskd.files.durable import put
from cskd.pipeline.demo_data import CLASSES, Scans, enlarged
from cskd.pipeline.show.progress import Progress
from cskd.seeds import hash64, permutation, uniform_array, view_seeds
from cskd.teacher.build import build_model
from cskd.views.mix_pixels import normalise

TEACHER: dict[str, Any] = {
    "model": "resnet18",
    "kwargs": {"channels": [16, 32, 64, 64], "output_stride": 8, "num_classes": CLASSES},
}  # 4x4 cells at 32 pixels
MEAN_STD = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def train_teacher(path: Path, scans: Scans, epochs: int, quiet: bool) -> None:
    """Plain supervised training on scans that are turned, scaled and shifted at random; weights to `path`."""
    x = torch.from_numpy(np.stack([np.asarray(enlarged(scan)) for scan in scans.images]))
    x, y = normalise(x.permute(0, 3, 1, 2).float(), **MEAN_STD), torch.from_numpy(scans.labels)
    torch.manual_seed(0)
    model = build_model(TEACHER["model"], TEACHER["kwargs"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    batch = min(50, len(x))
    each = len(x) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=epochs * each)
    with Progress("train the teacher", total=epochs * each * batch, quiet=quiet) as progress:
        for step in range(epochs * each):
            epoch, at = divmod(step, each)
            rows = permutation(len(x), epoch)[at * batch : (at + 1) * batch]
            loss = F.cross_entropy(model(_moved(x[rows], rows, epoch)), y[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            progress.update((step + 1) * batch, loss=f"{loss.item():.3f}")
    put(path, lambda temp: save_model(model, str(temp)))


def _moved(x: Tensor, rows: NDArray[np.int64], epoch: int) -> Tensor:
    """Images [B, C, H, W] turned by up to 15 degrees, scaled by up to 15 % and shifted by up to a tenth; black outside."""
    seeds = view_seeds(hash64("demo", "teacher"), "", rows.astype(np.uint64), epoch)
    most = {"turn": math.radians(15), "scale": 0.15, "right": 0.2, "down": 0.2}
    turn, scale, right, down = (
        torch.from_numpy((2 * uniform_array(seeds, name) - 1) * amount).float() for name, amount in most.items()
    )
    cos, sin = turn.cos() * (1 + scale), turn.sin() * (1 + scale)
    theta = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1
