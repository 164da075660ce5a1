"""Where an encoded image, or a class file, is, and reading it."""

from __future__ import annotations

import os
from typing import NamedTuple

from cskd.dataset.inventory_checks import MAX_IMAGE_BYTES
from cskd.errors import DataError, why
from cskd.files.read import open_regular, pread
from cskd.packing.zips import read_zipped

WHOLE = -1  # size of a place that is a whole file


class Place(NamedTuple):
    """Where an encoded image is: `size` bytes at `offset` of the file at `path`, or all of it (WHOLE).

    `zipped`: the file is a zip, and `offset` what `read_zipped` takes.
    """

    path: str
    offset: int
    size: int
    zipped: bool = False


def place_size(place: Place) -> int:
    """Bytes at a place; 0 where there is no file, which `read_place` will say."""
    if place.size != WHOLE:
        return place.size
    try:
        return os.stat(place.path).st_size
    except OSError:
        return 0


def read_place(place: Place) -> bytes:
    """The encoded image at a place. Raises DataError when it is cut off, too large or can't be read."""
    try:
        fd = open_regular(place.path)
        try:
            size = os.fstat(fd).st_size if place.size == WHOLE else place.size
            if size > MAX_IMAGE_BYTES:
                raise DataError(f"{place.path} has {size} bytes, expected an image of at most {MAX_IMAGE_BYTES}")
            data = read_zipped(fd, place.offset, size, place.path) if place.zipped else pread(fd, place.offset, size)
        finally:
            os.close(fd)
    except OSError as e:
        raise DataError(f"{place.path} can't be read: {why(e)}") from None
    if len(data) != size:
        raise DataError(
            f"{place.path} ended after {len(data)} of {size} bytes at {place.offset}; was it changed meanwhile?"
        )
    return data
