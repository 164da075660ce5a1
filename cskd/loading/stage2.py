"""Stage 2's batches: replayed views, each checked against its digest, with the cached targets of the epoch table.

Evaluation batches come out of the same workers, so that one pool serves the whole run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.errors import ImageError
from cskd.loading.epoch_table import EpochTable, open_table
from cskd.loading.shared import SharedBatch
from cskd.views.digest import Recorded, check_view, pixel_crc, view_digests
from cskd.views.maker import ViewMaker, clean_view
from cskd.views.mixing import NONE, own_share

UNREADABLE_LABEL = -1  # label of an evaluation image that can't be decoded: no head gets it right, and it is counted


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

    def __call__(self, task: TrainTask | EvalTask) -> SharedBatch:
        return self._train_batch(task) if isinstance(task, TrainTask) else self._eval_batch(task)

    def _train_batch(self, task: TrainTask) -> SharedBatch:
        if self._table is None or self._table[0] != task.table:
            self._table = (task.table, open_table(task.table))
        table = self._table[1]
        # Plain arrays: an element of a memory-mapped one takes ten times as long.
        rows = {name: np.asarray(column[task.start : task.stop]) for name, column in table.columns.items()}
        return self._with_views(rows, self._columns(rows, table.targets))

    def _with_views(self, rows: dict[str, NDArray[Any]], columns: dict[str, NDArray[Any]]) -> SharedBatch:
        """The batch of these rows: its pixels and its other columns."""
        size = self.train.recipe.size
        batch = filled({"pixels": (np.uint8, (len(rows["sample"]), size, size, 3))}, columns)
        begun = time.perf_counter()
        decoding = self._views(rows["sample"], rows["seed"], batch["pixels"].numpy())
        if self.recorded is not None:
            crcs = [pixel_crc(view) for view in batch["pixels"].numpy()]
            check_rows(self.train, self.recorded, rows, crcs)
        batch["seconds"].numpy()[...] = decoding, time.perf_counter() - begun - decoding
        return batch

    def _views(self, sample: NDArray[np.int64], seed: NDArray[np.uint64], pixels: NDArray[np.uint8]) -> float:
        """The views, into `pixels` [n, H, W, 3]; an image is decoded once for all its views in this batch.

        Returns: seconds of reading and decoding.
        """
        order = np.argsort(sample, kind="stable")  # its views one after the other: one decoded image at a time is kept
        last, image, decoding = -1, np.empty((0, 0, 3), np.uint8), 0.0
        for row, i, s in zip(order.tolist(), sample[order].tolist(), seed[order].tolist(), strict=True):
            if i != last:
                clock = time.perf_counter()
                last, image = i, self.train.image(i)
                decoding += time.perf_counter() - clock
            pixels[row] = self.train.view(image, s)
        return decoding

    def _columns(self, rows: dict[str, NDArray[Any]], targets: list[str]) -> dict[str, NDArray[Any]]:
        """All of a batch but its pixels, in the dtypes the training step reads."""
        n = len(rows["sample"])
        label = self.train.inventory.label[rows["sample"]].astype(np.int64)
        mate, mixed = _mates(n), rows["mode"] != NONE
        columns = {
            "label": label,
            "partner_label": np.where(mixed, label[mate], label),
            "partner": np.where(mixed, mate, np.arange(n)),
            "share": own_share(rows["mode"], rows["lam"]),
            "mode": rows["mode"],
            "lam": rows["lam"].astype(np.int64),
            "box": rows["box"].astype(np.int64),
            "sample": rows["sample"],
            "view": rows["view"],
            "seconds": np.zeros(2),  # of decoding; of augmenting and checking
        }
        wanted = {name: rows[name] for name in targets}
        return columns | {name: a.astype(np.int64) if a.dtype == np.uint16 else a for name, a in wanted.items()}

    def _eval_batch(self, task: EvalTask) -> SharedBatch:
        assert self.val is not None
        n, size = task.stop - task.start, self.val.recipe.size
        batch = SharedBatch.empty({"pixels": (np.uint8, (n, size, size, 3)), "label": (np.int64, (n,))})
        pixels, label = batch["pixels"].numpy(), batch["label"].numpy()
        label[:] = self.val.inventory.label[task.start : task.stop]
        for row in range(n):
            try:
                pixels[row] = clean_view(self.val.image(task.start + row), size, self.crop_pct)
            except ImageError:
                pixels[row], label[row] = 0, UNREADABLE_LABEL
        return batch


def filled(specs: dict[str, tuple[Any, tuple[int, ...]]], columns: dict[str, NDArray[Any]], **more: Any) -> SharedBatch:
    """A batch of the tensors of `specs`, not initialised, and of the columns. more: for `SharedBatch.empty`."""
    batch = SharedBatch.empty(specs | {name: (a.dtype, a.shape) for name, a in columns.items()}, **more)
    for name, array in columns.items():
        batch[name].numpy()[...] = array
    return batch


def check_rows(
    maker: ViewMaker, recorded: Recorded, rows: dict[str, NDArray[Any]], crcs: Sequence[int] | NDArray[np.int64]
) -> None:
    """Refuse views that are not those of the cache.

    Args:    rows 'sample', 'view', 'seed', 'mode', 'lam', 'box' and 'digest' of an epoch table, N of each; crcs, the
             `pixel_crc` found for each.
    Raises:  ReplayError for the first one that differs.
    """
    partner = rows["sample"][_mates(len(crcs))]
    partner_hash = np.where(rows["mode"] != NONE, maker.inventory.key_hash[partner], np.uint64(0))
    found = view_digests(crcs, rows["mode"], rows["lam"], rows["box"], partner_hash)
    for i in np.flatnonzero(found != rows["digest"]).tolist():
        fields = {name: rows[name][i] for name in ("seed", "mode", "lam", "box", "digest")}
        sample, view = int(rows["sample"][i]), int(rows["view"][i])
        check_view(maker.inventory, maker.recipe, recorded, sample, view, fields, int(partner[i]), int(crcs[i]))


def _mates(n: int) -> NDArray[np.int64]:
    """Row of each row's neighbour in the plan, its partner where it is mixed: int64 [n]."""
    mates: NDArray[np.int64] = np.minimum(np.arange(n) ^ 1, n - 1)
    return mates


def eval_tasks(n: int, batch: int, rank: int = 0, ranks: int = 1) -> list[EvalTask]:
    """This rank's share of an evaluation over n samples; every sample is counted once over all ranks."""
    tasks = [EvalTask(i, min(i + batch, n)) for i in range(0, n, batch)]
    return tasks[rank::ranks]
