"""Accuracy of every head of a student: class, distillation, patches, and their averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cskd.config import RecipeConfig
from cskd.dataset.inventory import open_inventory
from cskd.errors import DataError, NotFiniteError, PathError
from cskd.files.paths import location_text
from cskd.loading.feed import fed
from cskd.loading.shards_ahead import ahead, all_needs
from cskd.loading.sources import Batch
from cskd.loading.stage2 import UNREADABLE_LABEL, BatchMaker, eval_tasks
from cskd.machine.arithmetic import arithmetic, autocast, float32_products, half
from cskd.machine.devices import pick_device
from cskd.machine.ranks import Ranks
from cskd.machine.threads import choose_threads, computing_with
from cskd.pipeline.draw.confusion import Confusion, draw_confusion, to_csv
from cskd.pipeline.draw.pictures import png
from cskd.pipeline.draw.wordnet import readable
from cskd.pipeline.out_of_memory import Probe, explained, nothing_to_lower
from cskd.pipeline.outputs import TABLE, refuse_file, save_file
from cskd.pipeline.show.progress import Progress
from cskd.student import Student, eval_heads
from cskd.student.checkpoint import load_student
from cskd.student.heads import UNTRAINED, score_head
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import InputMaker


@dataclass(frozen=True)
class HeadScores:
    """Accuracy of one head, or of an average of heads, in per cent of all images, unreadable ones included."""

    top1: float
    top5: float


@dataclass(frozen=True, eq=False)
class Found:
    """Labels of images, `UNREADABLE_LABEL` of those that could not be decoded, and what a head takes them for: int64 [N] each."""

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]


@dataclass(frozen=True)
class EvalReport:
    """`cskd eval`: images of the data set and the scores of every head; all that the figures depend on."""

    checkpoint: str
    images: int
    unreadable: int  # of them; wrong for every head
    heads: dict[str, HeadScores]  # NAME.untrained: of a head that the run did not train
    score: str  # which of them is the student's: what timm computes from these weights
    arithmetic: str  # of the student's forward: float32, bf16 or fp16
    device: str
    size: list[int]  # height, width of what the student sees, pixels
    crop_pct: float  # share of the short side


@torch.no_grad()  # not inference_mode: a batch that is read ahead here may be a training one, which needs gradients
def score_heads(
    models: Mapping[str, Student],
    batches: Iterator[Batch],
    count: int,
    inputs: InputMaker,
    autocast_setting: str,
    ranks: Ranks,
    found: dict[str, Found] | None = None,
) -> tuple[dict[str, HeadScores], int]:
    """Evaluate students on the next `count` batches of this rank; results are summed over all ranks.

    Args:    models: prefix -> student, '' for the live weights and 'ema.' for their average; each is left in training mode.
             found: where given, gets by prefix what the score's head says of each image of all ranks.
    Returns: prefix + head -> scores, and how many of the images could not be decoded.
    Raises:  NotFiniteError on every rank for logits with NaN or an infinity.
    """
    hits: dict[str, Tensor] = {}
    said: dict[str, list[Tensor]] = {prefix: [] for prefix in models}
    seen = torch.zeros(2, dtype=torch.int64, device=inputs.device)  # images, and those that are unreadable
    for model in models.values():
        model.eval()
    for _ in range(count):
        batch = next(batches)
        label = batch["label"].to(inputs.device, non_blocking=True)
        pixels = inputs.clean(batch)
        for prefix, model in models.items():
            with autocast(autocast_setting, inputs.device):
                out = model(pixels, (1, 1))
            for head, logits in eval_heads(out, model.trained).items():
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices
                if found is not None and head == score_head(model.trained):
                    said[prefix].append(torch.stack([label, best[:, 0]], 1))
                top = best == label[:, None]
                odd = (~logits.isfinite().all(1)).sum()
                both = torch.stack([top[:, 0].sum(), top.any(1).sum(), odd])
                hits[prefix + head] = hits.get(prefix + head, torch.zeros_like(both)) + both
        seen[0] += len(label)
        seen[1] += (label == UNREADABLE_LABEL).sum()
    for model in models.values():
        model.train()
    images, unreadable = ranks.sum(seen).tolist()
    scores = {}
    for name, sums in hits.items():
        first, five, odd = ranks.sum(sums).tolist()
        if odd:
            raise NotFiniteError(
                f"{odd} of {images} images get logits from '{name}' that are not finite",
                "the weights have diverged; evaluate earlier ones",
            )
        scores[name] = HeadScores(100 * first / images, 100 * five / images)
    if found is not None:
        for prefix, parts in said.items():
            rows = ranks.joined(torch.cat(parts)).cpu().numpy()
            found[prefix] = Found(rows[:, 0], rows[:, 1])
    return scores, unreadable


def evaluate_checkpoint(
    checkpoint: Path,
    data: Path,
    batch: int,
    workers: int,
    crop_pct: float | None,
    device_name: str,
    quiet: bool,
    autocast_setting: str = "none",
    confusion: Path | None = None,
) -> EvalReport:
    """Scores of a result folder of `cskd train` on a packed data set.

    autocast_setting: as in `train.autocast`; 'none' is float32, on CUDA without tf32. confusion: a PNG that is written, with
    a CSV of its name next to it, of what the score takes each class for.
    """
    if confusion is not None and confusion.suffix.lower() == ".csv":
        raise PathError(f"--confusion is {confusion}, expected the path of a PNG; the table is written next to it")
    files = {} if confusion is None else {"--confusion": confusion, TABLE: confusion.with_suffix(".csv")}
    for option, path in files.items():
        refuse_file(path, option)
    device = pick_device(device_name)
    val = open_inventory(data)
    val.check_shards()
    given = location_text(str(checkpoint), "CHECKPOINT", hub=True)
    student, facts = load_student(checkpoint)
    if facts["label_names"] != val.classes:
        raise DataError(f"{given} was trained on other classes than the images have; pack them with the same --classes")
    with explained(device, nothing_to_lower("--device")):
        student.to(device)
    if device.type == "cpu" and half(autocast_setting, device) == "bf16":
        student.unfuse_attention()
    maker = ViewMaker(val, RecipeConfig(size=student.image_size[0]), whole=True)
    tasks = eval_tasks(len(val), batch)
    crop_pct = crop_pct or facts["pretrained_cfg"]["crop_pct"]
    stream = fed(BatchMaker(maker, maker, crop_pct), ahead(tasks, all_needs(val, len(tasks))), device, workers)
    threads = choose_threads(workers=workers)
    # tf32 rounds the inputs of a product to 10 bits, which float32 should not mean here
    exact = float32_products(False, device)
    progress_bar = Progress("eval", total=len(val), unit="images", quiet=quiet)

    found: dict[str, Found] = {}

    def advise(probe: Probe) -> str:
        fits = probe([batch >> i for i in range(1, batch.bit_length())], lambda rows: _forward(student, rows, device))
        return f" with {batch:,} images at once; set --batch {f'{fits}, which fit' if fits else 'to less'}"

    with computing_with(threads.count), exact, explained(device, advise), progress_bar as progress:
        heads, unreadable = score_heads(
            {"": student},
            _counted(stream, progress),
            len(tasks),
            InputMaker(student.mean, student.std, device),
            autocast_setting,
            Ranks(),
            found,
        )
        computed = arithmetic(autocast_setting, device)
    if confusion is not None:
        step = int(facts.get("cskd", {}).get("step", 0))
        drawn = [Confusion.of("evaluated", step, found[""].label, found[""].predicted)]
        save_file(confusion, "--confusion", png(draw_confusion(drawn, readable(val.classes))))
        save_file(files[TABLE], TABLE, to_csv(drawn, val.classes))
    return EvalReport(
        checkpoint=given,
        images=len(val),
        unreadable=unreadable,
        heads=heads,
        score=score_head(student.trained),
        arithmetic=computed,
        device=str(device),
        size=list(student.image_size),
        crop_pct=crop_pct,
    )


@torch.no_grad()
def _forward(student: Student, rows: int, device: torch.device) -> None:
    student.eval()(torch.zeros(rows, 3, *student.image_size, device=device), (1, 1))


def render(report: EvalReport, console: Console) -> None:
    """The scores as a table."""
    unreadable = f", {report.unreadable:,} of them unreadable: wrong for every head" if report.unreadable else ""
    size = " x ".join(map(str, report.size))
    how = f"{size} pixels, crop {report.crop_pct:g}, {report.arithmetic} on {report.device}"
    table = Table(title=f"{report.images:,} images{unreadable}\n{how}", min_width=len(how))
    for column in ("head", "top-1 %", "top-5 %"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for name, s in report.heads.items():
        mark = " (the score)" if name == report.score else ""
        table.add_row(name + mark, f"{s.top1:.2f}", f"{s.top5:.2f}")
    console.print(table)
    if any(name.endswith(UNTRAINED) for name in report.heads):
        console.print(f"NAME{UNTRAINED}: a head that the run did not train; part of no average", soft_wrap=True)


def _counted(batches: Iterator[Batch], progress: Progress) -> Iterator[Any]:
    done = 0
    for batch in batches:
        done += len(batch["label"])
        progress.update(done)
        yield batch
