"""Stage 1's batches: a chunk of one block's quads, each image decoded once for all views of the pass."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cskd.errors import ImageError
from cskd.loading.feed import DeviceBatch
from cskd.loading.shared import SharedBatch
from cskd.seeds import view_seeds
from cskd.views.digest import pixel_crc
from cskd.views.maker import ViewMaker


@dataclass(frozen=True)
class Chunk:
    """One task: `position` int64 [n] within the block that starts at sample `first`, in the order of its quads."""

    block: int
    views: tuple[int, ...]
    first: int
    position: NDArray[np.int64]
    place: int = 0  # where in the order of the pass they begin


@dataclass(frozen=True)
class ChunkViews:
    """One result: pixels uint8 [V, n, H, W, 3] (zeros where bad), crc int64 [V, n], bad: row -> reason; seconds it took."""

    task: Chunk
    batch: SharedBatch | DeviceBatch  # of the pixels alone
    crc: NDArray[np.int64]
    bad: dict[int, str]
    decode_seconds: float = 0.0
    augment_seconds: float = 0.0  # digests included

    @property
    def pixels(self) -> torch.Tensor:
        return self.batch["pixels"]


class ChunkMaker:
    """The worker of stage 1."""

    def __init__(self, maker: ViewMaker, inventory_id: str) -> None:
        self.maker, self.inventory_id = maker, inventory_id

    def __call__(self, task: Chunk) -> ChunkViews:
        maker, n, size = self.maker, len(task.position), self.maker.recipe.size
        batch = SharedBatch.empty({"pixels": (np.uint8, (len(task.views), n, size, size, 3))})
        pixels = batch["pixels"].numpy()
        crc = np.zeros((len(task.views), n), np.int64)
        bad: dict[int, str] = {}
        samples = task.first + task.position
        hashes = maker.inventory.key_hash[samples]
        seeds = [view_seeds(maker.recipe.seed, self.inventory_id, hashes, v) for v in task.views]
        decoding, begun = 0.0, time.perf_counter()
        for row, sample in enumerate(samples.tolist()):
            clock = time.perf_counter()
            try:
                image = maker.image(sample)
            except ImageError as e:  # an I/O error is not an ImageError, and stops the stage
                bad[row], pixels[:, row] = str(e), 0
                continue
            finally:
                decoding += time.perf_counter() - clock
            for v in range(len(task.views)):
                pixels[v, row] = maker.view(image, int(seeds[v][row]))
                crc[v, row] = pixel_crc(pixels[v, row])
        augmenting = time.perf_counter() - begun - decoding
        return ChunkViews(task, batch, crc, bad, decoding, augmenting)


def chunks(
    block: int,
    views: tuple[int, ...],
    first: int,
    order: NDArray[np.int64],
    batch: int,
    done: Mapping[int, Container[int]] | None = None,
) -> list[Chunk]:
    """The tasks of one pass over a block: `batch` positions each, in the order of the quads; the last may be short.

    done: view -> places of the batches that it has already; a chunk is of the views that lack it.
    """
    made = []
    for place in range(0, len(order), batch):
        if lacking := tuple(view for view in views if done is None or place not in done[view]):
            made.append(Chunk(block, lacking, first, order[place : place + batch], place))
    return made
