"""Accuracy of every head of a student: class, distillation, patches, and their averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cskd.augment.device import InputMaker
from cskd.config import RecipeConfig
from cskd.devices import autocast, pick_device
from cskd.errors import DataError
from cskd.inventory import open_inventory
from cskd.loading.stage2 import UNREADABLE, Batch, BatchMaker, eval_tasks
from cskd.loading.stream import Stream
from cskd.loading.views import ViewMaker
from cskd.ranks import Ranks
from cskd.student import eval_heads
from cskd.student.checkpoint import load_student
from pipeline.progress import Progress


@dataclass(frozen=True)
class HeadScores:
    """Accuracy of one head, or of an average of heads, in per cent of all images, unreadable ones included."""

    top1: float
    top5: float


@dataclass(frozen=True)
class EvalReport:
    """`cskd eval`: images of the data set and the scores of every head."""

    checkpoint: str
    images: int
    unreadable: int  # of them; wrong for every head
    heads: dict[str, HeadScores]


@torch.no_grad()  # not inference_mode: a batch that is read ahead here may be a training one, which needs gradients
def score_heads(
    models: Mapping[str, nn.Module],
    batches: Iterator[Batch],
    count: int,
    inputs: InputMaker,
    autocast_setting: str,
    ranks: Ranks,
) -> tuple[dict[str, HeadScores], int]:
    """Evaluate students on the next `count` batches of this rank; results are summed over all ranks.

    Args:    models: prefix -> student, '' for the live weights and 'ema.' for their average; each is left in training mode.
    Returns: prefix + head -> scores, and how many of the images could not be decoded.
    """
    hits: dict[str, Tensor] = {}
    seen = torch.zeros(2, dtype=torch.float64, device=inputs.device)  # images, and those that are unreadable
    for model in models.values():
        model.eval()
    for _ in range(count):
        batch = next(batches)
        label = batch["label"].to(inputs.device)
        pixels = inputs.clean(batch)
        for prefix, model in models.items():
            with autocast(autocast_setting, inputs.device):
                out = model(pixels, (1, 1))
            for head, logits in eval_heads(out).items():
                top = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
                both = torch.stack([top[:, 0].sum(), top.any(1).sum()]).double()
                hits[prefix + head] = hits.get(prefix + head, torch.zeros_like(both)) + both
        seen += torch.stack([seen.new_tensor(len(label)), (label == UNREADABLE).sum().double()])
    for model in models.values():
        model.train()
    images, unreadable = ranks.sum(seen).tolist()
    return {name: HeadScores(*(100 * ranks.sum(both) / images).tolist()) for name, both in hits.items()}, int(
        unreadable
    )


def evaluate_checkpoint(
    checkpoint: Path, data: Path, batch: int, workers: int, crop_pct: float | None, device_name: str, quiet: bool
) -> EvalReport:
    """Scores of a result folder of `cskd train` on a packed data set."""
    device = pick_device(device_name)
    val = open_inventory(data)
    val.check_shards()
    student, facts = load_student(checkpoint)
    if facts["label_names"] != val.classes:
        raise DataError(
            f"{checkpoint} was trained on other classes than {data} has; pack it with --classes and the same list"
        )
    student.to(device)
    maker = ViewMaker(val, RecipeConfig(size=student.image_size[0]))
    tasks = eval_tasks(len(val), batch)
    crop_pct = crop_pct or facts["pretrained_cfg"]["crop_pct"]
    stream = iter(Stream(BatchMaker(maker, maker, crop_pct), tasks, workers))
    with Progress("eval", total=len(val), unit="images", quiet=quiet) as progress:
        heads, unreadable = score_heads(
            {"": student},
            _counted(stream, progress),
            len(tasks),
            InputMaker(student.mean, student.std, device),
            "auto",
            Ranks(),
        )
    return EvalReport(str(checkpoint), len(val), unreadable, heads)


def render(report: EvalReport, console: Console) -> None:
    """The scores as a table."""
    unreadable = f", {report.unreadable:,} of them unreadable: wrong for every head" if report.unreadable else ""
    table = Table(title=f"{report.images:,} images{unreadable}")
    for column in ("head", "top-1 %", "top-5 %"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for name, s in report.heads.items():
        table.add_row(name, f"{s.top1:.2f}", f"{s.top5:.2f}")
    console.print(table)


def _counted(batches: Iterator[Batch], progress: Progress) -> Iterator[Any]:
    done = 0
    for batch in batches:
        done += len(batch["label"])
        progress.update(done)
        yield batch
