"""Batches whose views are made on the device (`train.augment: device`): a worker sends decoded images and what to make of them.

    worker   RawBatchMaker: reads, decodes each image of a batch once, draws and plans its views
    device   DeviceViews, on the feed's stream: makes the views, and the checksum of each
    host     a step later: compares the digests, before the batch is trained on

The views are those of the host, byte for byte, so where one is made is free: what would take too much memory as a decoded
image, the worker makes into its views. A batch of decoded images takes at most 4 times the bytes of its views, or 64 MiB
where that is more, and none has more than 4 million pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cskd.dataset.images import decode, decode_into, decoded_size
from cskd.dataset.inventory import evenly
from cskd.errors import ReplayError
from cskd.loading.feed import DeviceBatch
from cskd.loading.shared import SharedBatch
from cskd.loading.sources import ViewSource
from cskd.loading.stage2 import BatchMaker, check_rows, filled
from cskd.machine.side_stream import Mark, SideStream
from cskd.seeds import view_seeds
from cskd.views import Image
from cskd.views.digest import Recorded, pixel_crc
from cskd.views.maker import ViewMaker
from cskd.views.on_device import Bucket, Plan, Step, make_views, pixel_crcs, plan_views
from cskd.views.on_device.agreement import refuse_difference, refuse_recipe
from cskd.views.recipe import Box, ViewParams, sample_params

_MOST_PIXELS = 1 << 22  # of a decoded image
_TIMES, _LEAST = 4, 1 << 26  # times the views' bytes that a batch's decoded images may take, and what they always may
_SPARE = 0.125  # of a buffer: the sum of the sizes of some hundred images of ImageNet differs by less
_PLAN = 12_000  # bytes of the plan of a view, at most: counted on DeiT's recipe
_CHECKED = ("sample", "view", "seed", "mode", "lam", "box", "digest")  # what `check_rows` reads
_AGREEING, _SIDE = 16, 2048  # views that are made both ways before a run, and the most pixels of an image's side there


@dataclass(frozen=True)
class Making:
    """What travels with a batch: its `Plan` without the words, which are one of the batch's tensors, and the rows by which
    the views are checked."""

    shape: tuple[int, int]
    buckets: tuple[Bucket, ...]
    steps: tuple[Step, ...]
    rows: dict[str, NDArray[Any]]


class RawBatchMaker(BatchMaker):
    """The worker of stage 2 where the device makes the views: 'images' uint8 [P, 3], pixels of one image after the other, and
    'words' int64 [n], the plan's, in place of 'pixels'."""

    def _with_views(self, rows: dict[str, NDArray[Any]], columns: dict[str, NDArray[Any]]) -> SharedBatch:
        begun = time.perf_counter()
        samples, image = np.unique(rows["sample"], return_inverse=True)
        encoded = [self.train.encoded(sample) for sample in samples.tolist()]
        shapes = [decoded_size(data) for data in encoded]
        sent = self._sent(shapes, len(image))
        read = time.perf_counter() - begun
        places, params, made = self._planned(rows["seed"].tolist(), image.tolist(), shapes, sent, encoded)
        sizes = [shapes[i] for i in sent] + [view.shape[:2] for view in made]
        plan = plan_views(params, sizes, places)
        first = np.cumsum([0, *(height * width for height, width in sizes)]).tolist()
        specs = {"images": (np.uint8, (first[-1], 3)), "words": (np.int64, tuple(plan.words.shape))}
        batch = filled(specs, columns, spare=_SPARE)
        batch["words"].copy_(plan.words)
        clock, images = time.perf_counter(), batch["images"].numpy()
        parts = [images[a:b].reshape(*size, 3) for a, b, size in zip(first, first[1:], sizes, strict=False)]
        for i, part in zip(sent, parts, strict=False):
            decode_into(encoded[i], part)
        decoding = read + time.perf_counter() - clock
        for view, part in zip(made, parts[len(sent) :], strict=True):
            part[...] = view
        batch["seconds"].numpy()[...] = decoding, time.perf_counter() - begun - decoding
        batch.about = Making(plan.shape, plan.buckets, plan.steps, {name: rows[name].copy() for name in _CHECKED})
        return batch

    def _sent(self, shapes: list[tuple[int, int]], views: int) -> list[int]:
        """Which images are sent as they are: the small ones, as many as there is room for."""
        room = _room(views, self.train.recipe.size)
        by_size = sorted(range(len(shapes)), key=lambda i: (shapes[i][0] * shapes[i][1], i))
        pixels = [shapes[i][0] * shapes[i][1] for i in by_size]
        fitting = (np.cumsum(pixels) * 3 <= room) & (np.array(pixels) <= _MOST_PIXELS)
        return sorted(by_size[: int(fitting.sum())])

    def _planned(
        self,
        seeds: list[int],
        image: list[int],
        shapes: list[tuple[int, int]],
        sent: list[int],
        encoded: list[bytes],
    ) -> tuple[list[int], list[ViewParams], list[Image]]:
        """Of each view: the number of its image among those that are sent, after which the views that are made here
        are counted; and its parameters. Then those views."""
        size, place = self.train.recipe.size, {i: n for n, i in enumerate(sent)}
        whole = ViewParams(size, Box(0, 0, size, size), 0, False)
        places, params, made = [0] * len(image), [whole] * len(image), list[Image]()
        last, pixels = -1, np.empty((0, 0, 3), np.uint8)
        for row in sorted(range(len(image)), key=lambda row: image[row]):
            i = image[row]
            if i in place:
                places[row], params[row] = place[i], sample_params(seeds[row], *shapes[i], self.train.recipe)
                continue
            if i != last:
                last, pixels = i, decode(encoded[i])
            places[row] = len(sent) + len(made)
            made.append(self.train.view(pixels, seeds[row]))
        return places, params, made


class DeviceViews:
    """Makes the views of a `RawBatchMaker`'s batch on its device; other batches stay as they are. recorded: what each view's
    digest is compared with; None: don't."""

    def __init__(self, maker: ViewMaker, recorded: Recorded | None) -> None:
        self._maker, self._recorded = maker, recorded

    def __call__(self, batch: DeviceBatch, side: SideStream) -> DeviceBatch:
        """Launched on the current stream, where nothing waits. Takes 1 GB of the device's memory in addition, more for
        the largest images."""
        making = batch.about
        if not isinstance(making, Making):
            return batch
        plan = Plan(making.shape, making.buckets, making.steps, batch.pop("words"))
        pixels = make_views(batch.pop("images"), plan)
        # Copies, so that the memory of the images is free at once.
        made = DeviceBatch({"pixels": pixels} | {name: tensor.clone() for name, tensor in batch.items()})
        if self._recorded is not None:
            crcs = pixel_crcs(pixels)
            there = torch.empty(crcs.shape, dtype=crcs.dtype, pin_memory=crcs.is_cuda).copy_(crcs, non_blocking=True)
            mark = side.mark()
            made.check = lambda: self._check(making.rows, there, mark)
        return made

    def _check(self, rows: dict[str, NDArray[Any]], crcs: Tensor, mark: Mark) -> None:
        assert self._recorded is not None
        mark.synchronize()
        try:
            check_rows(self._maker, self._recorded, rows, crcs.numpy())
        except ReplayError as e:
            each = zip(rows["sample"].tolist(), rows["seed"].tolist(), strict=True)
            own = [pixel_crc(self._maker.view(self._maker.image(i), s)) for i, s in each]
            check_rows(self._maker, self._recorded, rows, own)  # which says the same where the device is not to blame
            raise ReplayError(f"made on the device, not on the host: set train.augment: host ({e})") from None


def _room(views: int, size: int) -> int:
    """Bytes that the decoded images of a batch may take."""
    return max(_LEAST, _TIMES * views * 3 * size**2)


def batch_bytes(views: int, repeats: int, size: int, pixels: int) -> int:
    """Bytes of a batch of so many views. pixels: of an image, in the mean, where the device makes the views, and then about;
    0: the host makes them."""
    if not pixels:
        return views * 3 * size**2
    return int((1 + _SPARE) * (min(views // repeats * 3 * pixels, _room(views, size)) + views * _PLAN))


def refuse_device_views(source: ViewSource, device: torch.device) -> int:
    """ConfigError where `device` does not make some of the source's views as the host does, or can't. Returns: pixels of an
    image, the mean of those that were looked at."""
    refuse_recipe(source.recipe, device)
    maker, good = ViewMaker(source.inventory, source.recipe), np.flatnonzero(~source.quarantined())
    samples = good[evenly(len(good), _AGREEING)]
    hashes = source.inventory.key_hash[samples]
    seeds = view_seeds(source.recipe.seed, source.inventory.id, hashes, 0).tolist()
    images, pixels = list[Image](), 0
    for sample in samples.tolist():
        image = maker.image(sample)
        pixels += image.shape[0] * image.shape[1]
        images.append(np.ascontiguousarray(image[:_SIDE, :_SIDE]))
    refuse_difference(images, seeds, source.recipe, device)
    return pixels // len(images)
