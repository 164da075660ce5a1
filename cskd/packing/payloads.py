"""The bytes that go into the shards, in order, read ahead by threads, or re-encoded by processes."""

from __future__ import annotations

import io
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cskd.dataset.images import as_ppm, decode, image_size
from cskd.errors import DataError, ImageError
from cskd.packing.listing import Listing
from cskd.packing.places import Place, place_size, read_place

CHUNK = 16  # images per task: of 110 kB (ImageNet), 2 MB
TASK_BYTES = 1 << 25  # of a task's images that are held; what is beyond is read when its turn comes


class Payload(NamedTuple):
    """An encoded image; `extension`: of one that was encoded again, else None; `bad`: it should have been, but can't be decoded."""

    data: bytes
    extension: str | None = None
    bad: bool = False


class Remake(NamedTuple):
    """How images are encoded again: those whose short side is larger (pixels; None: of any size) as JPEGs of this quality, or,
    `raw`, all of them as PPM."""

    short_side: int | None = None
    quality: int = 90
    raw: bool = False

    @property
    def none(self) -> bool:
        """Whether all images stay as they are."""
        return self.short_side is None and not self.raw


def payloads(
    listing: Listing, order: NDArray[np.int64], remake: Remake, workers: int
) -> Generator[tuple[int, Payload], None, None]:
    """(i, payload of image i) for each i of `order`, in that order, whatever the number of workers.

    Raises:  DataError for a file that can't be read.
    """
    job = partial(_read_all, remake=remake)
    waiting: deque[tuple[list[int], Future[list[Payload]]]] = deque()

    def finished(chunk: list[int], result: Future[list[Payload]]) -> Iterator[tuple[int, Payload]]:
        ready = result.result()
        yield from zip(chunk, ready, strict=False)
        for i in chunk[len(ready) :]:
            yield i, _payload(listing.place(i), remake)

    pool = _pool(workers, processes=not remake.none)
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


def encoded_again(data: bytes, remake: Remake) -> Payload:
    """Re-encode an image to a short side if its own is larger: bicubic with antialiasing, no metadata; RGB JPEG with chroma at
    half the resolution (4:2:0, which decodes in three quarters of the time of 4:4:4), or PPM, which has nothing to decode.
    Pixels are those of `cskd.dataset.images.decode`. What can't be decoded stays as it is."""
    side = remake.short_side
    try:
        fits = side is None or min(image_size(data)) <= side
        if fits and not remake.raw:
            return Payload(data)
        pixels = Image.fromarray(decode(data))
    except ImageError:
        return Payload(data, bad=True)
    if side is not None and not fits:
        scale = side / min(pixels.size)
        width, height = (max(side, round(length * scale)) for length in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    if remake.raw:
        return Payload(as_ppm(np.asarray(pixels)), "ppm")
    out = io.BytesIO()
    pixels.save(out, "JPEG", quality=remake.quality, subsampling=2)
    return Payload(out.getvalue(), "jpg")


def _read_all(places: list[Place], remake: Remake) -> list[Payload]:
    """Payloads of the first of these images, up to TASK_BYTES: a task of 256 MB images would fill the memory."""
    done: list[Payload] = []
    for place in places:
        if sum(len(payload.data) for payload in done) + place_size(place) > TASK_BYTES:
            break
        done.append(_payload(place, remake))
    return done


def _payload(place: Place, remake: Remake) -> Payload:
    data = read_place(place)
    return Payload(data) if remake.none else encoded_again(data, remake)


def _pool(workers: int, processes: bool) -> Executor:
    if processes:
        # The fork server may be one that a training started, deaf to SIGTERM, by which a pool ends its processes.
        hears = partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        return ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), hears)
    return ThreadPoolExecutor(workers, "pack-read")
