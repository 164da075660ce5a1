"""Stage 2's batches: replayed views, each checked against its digest, with the cached targets of the epoch table.

Evaluation batches come out of the same workers, so that one pool serves the whole run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cskd.augment.mixing import NONE, own_share
from cskd.epoch_table import EpochTable, open_table
from cskd.errors import ImageError
from cskd.loading.views import ViewMaker, clean_view
from cskd.replay import Recorded, check_view, pixel_crc

Batch = dict[str, Tensor]

UNREADABLE = -1  # label of an evaluation image that can't be decoded: no head gets it right, and it is counted


@dataclass(frozen=True)
class TrainTask:
    """Rows start .. stop-1 of the epoch table in folder `table`: one rank's share of one step."""

    table: Path
    start: int
    stop: int


@dataclass(frozen=True)
class EvalTask:
    """Samples start .. stop-1 of the validation inventory, as clean views."""

    start: int
    stop: int


class BatchMaker:
    """The worker of stage 2. `recorded`: recompute every sample's digest, compare it with the cache's; None: don't."""

    def __init__(
        self, train: ViewMaker, val: ViewMaker | None, crop_pct: float, recorded: Recorded | None = None
    ) -> None:
        self.train, self.val, self.crop_pct, self.recorded = train, val, crop_pct, recorded
        self._table: tuple[Path, EpochTable] | None = None

    def __call__(self, task: TrainTask | EvalTask) -> Batch:
        return self._train_batch(task) if isinstance(task, TrainTask) else self._eval_batch(task)

    def _train_batch(self, task: TrainTask) -> Batch:
        if self._table is None or self._table[0] != task.table:
            self._table = (task.table, open_table(task.table))
        rows = {name: column[task.start : task.stop] for name, column in self._table[1].columns.items()}
        n, size = task.stop - task.start, self.train.recipe.size
        mate = np.arange(n) ^ 1
        mate[mate >= n] = n - 1
        pixels = np.empty((n, size, size, 3), np.uint8)
        images: dict[int, NDArray[np.uint8]] = {}  # an image is decoded once for its views in this batch
        decoding, begun = 0.0, time.perf_counter()
        for i, (sample, seed) in enumerate(zip(rows["sample"].tolist(), rows["seed"].tolist(), strict=True)):
            if sample not in images:
                clock = time.perf_counter()
                images[sample] = self.train.image(sample)
                decoding += time.perf_counter() - clock
            pixels[i] = self.train.view(images[sample], seed)
        if self.recorded is not None:
            for i, sample in enumerate(rows["sample"].tolist()):
                fields = {name: rows[name][i] for name in ("seed", "mode", "lam", "box", "digest")}
                partner, crc = int(rows["sample"][mate[i]]), pixel_crc(pixels[i])
                check_view(
                    self.train.inventory,
                    self.train.recipe,
                    self.recorded,
                    sample,
                    int(rows["view"][i]),
                    fields,
                    partner,
                    crc,
                )
        label = self.train.inventory.label[rows["sample"]].astype(np.int64)
        mixed = rows["mode"] != NONE
        batch = {
            "pixels": pixels,
            "label": label,
            "partner_label": np.where(mixed, label[mate], label),
            "partner": np.where(mixed, mate, np.arange(n)),
            "share": own_share(rows["mode"], rows["lam"]),
            "mode": rows["mode"],
            "lam": rows["lam"].astype(np.int64),
            "box": rows["box"].astype(np.int64),
            "sample": rows["sample"],
            "view": rows["view"],
            "seconds": np.array([decoding, time.perf_counter() - begun - decoding]),  # decode; augment and check
        }
        for name in self._table[1].targets:
            column = rows[name]
            batch[name] = column.astype(np.int64) if column.dtype == np.uint16 else np.array(column)
        return {name: torch.from_numpy(np.require(a, requirements=["C", "W"])) for name, a in batch.items()}

    def _eval_batch(self, task: EvalTask) -> Batch:
        assert self.val is not None
        n, size = task.stop - task.start, self.val.recipe.size
        pixels = np.zeros((n, size, size, 3), np.uint8)
        label = self.val.inventory.label[task.start : task.stop].astype(np.int64)
        for row in range(n):
            try:
                pixels[row] = clean_view(self.val.image(task.start + row), size, self.crop_pct)
            except ImageError:
                label[row] = UNREADABLE
        return {"pixels": torch.from_numpy(pixels), "label": torch.from_numpy(label)}


def eval_tasks(n: int, batch: int, rank: int = 0, ranks: int = 1) -> list[EvalTask]:
    """This rank's share of an evaluation over n samples; every sample is counted once over all ranks."""
    tasks = [EvalTask(i, min(i + batch, n)) for i in range(0, n, batch)]
    return tasks[rank::ranks]
