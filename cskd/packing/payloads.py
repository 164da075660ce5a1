"""The bytes that go into the shards, in order, read ahead by threads, or re-encoded by processes."""

from __future__ import annotations

import io
import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cskd.dataset.images import decode, image_size
from cskd.errors import DataError, ImageError
from cskd.packing.places import Place, place_size, read_place
from cskd.packing.sources import Listing

CHUNK = 16  # images per task: of 110 kB (ImageNet), 2 MB
TASK_BYTES = 1 << 25  # of a task's images that are held; what is beyond is read when its turn comes


class Payload(NamedTuple):
    """An encoded image; `resized`: it is a new JPEG; `bad`: it should have been, but can't be decoded."""

    data: bytes
    resized: bool = False
    bad: bool = False


def payloads(
    listing: Listing, order: NDArray[np.int64], short_side: int | None, quality: int, workers: int
) -> Generator[tuple[int, Payload], None, None]:
    """(i, payload of image i) for each i of `order`, in that order, whatever the number of workers.

    Args:    short_side: images whose short side is larger (pixels) are re-encoded; None: all stay as they are.
    Raises:  DataError for a file that can't be read.
    """
    job = partial(_read_all, short_side=short_side, quality=quality)
    waiting: deque[tuple[list[int], Future[list[Payload]]]] = deque()

    def finished(chunk: list[int], result: Future[list[Payload]]) -> Iterator[tuple[int, Payload]]:
        ready = result.result()
        yield from zip(chunk, ready, strict=False)
        for i in chunk[len(ready) :]:
            yield i, _payload(listing.place(i), short_side, quality)

    pool = _pool(workers, processes=short_side is not None)
    try:
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK].tolist()
            waiting.append((chunk, pool.submit(job, [listing.place(i) for i in chunk])))
            if len(waiting) > 2 * workers:
                yield from finished(*waiting.popleft())
        while waiting:
            yield from finished(*waiting.popleft())
    except BrokenProcessPool:
        raise DataError("a process that re-encodes images died (out of memory?); run with fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def shrink(data: bytes, short_side: int, quality: int) -> Payload:
    """Re-encode an image to that short side if its own is larger: bicubic with antialiasing, RGB JPEG with chroma at half
    the resolution (4:2:0, which decodes in three quarters of the time of 4:4:4), no metadata. Pixels are those of `cskd.dataset.images.decode`. What can't be decoded stays as it is."""
    try:
        if min(image_size(data)) <= short_side:
            return Payload(data)
        pixels = Image.fromarray(decode(data))
    except ImageError:
        return Payload(data, bad=True)
    scale = short_side / min(pixels.size)
    width, height = (max(short_side, round(side * scale)) for side in pixels.size)
    out = io.BytesIO()
    pixels.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality, subsampling=2)
    return Payload(out.getvalue(), resized=True)


def _read_all(places: list[Place], short_side: int | None, quality: int) -> list[Payload]:
    """Payloads of the first of these images, up to TASK_BYTES: a task of 256 MB images would fill the memory."""
    done: list[Payload] = []
    for place in places:
        if sum(len(payload.data) for payload in done) + place_size(place) > TASK_BYTES:
            break
        done.append(_payload(place, short_side, quality))
    return done


def _payload(place: Place, short_side: int | None, quality: int) -> Payload:
    data = read_place(place)
    return Payload(data) if short_side is None else shrink(data, short_side, quality)


def _pool(workers: int, processes: bool) -> Executor:
    if processes:
        return ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"))
    return ThreadPoolExecutor(workers, "pack-read")
