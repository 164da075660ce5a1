"""Tars of ours: members in one form of header, so that the same members give the same bytes, and one that was changed shows.

A key is what webdataset takes for one: the name up to its first dot. Members of one key that follow one another are one sample.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 1000  # of a tar that is read whole: a unit's has about fifteen
_SIZE = slice(124, 136)


def write_tar(file: BinaryIO, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) one after the other as a tar; dates, owners and modes are fixed.

    A name that does not fit into a plain header gets a PAX header before it, as everywhere.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = _info(name, len(content))
            file.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8"))
            file.write(content + bytes(-len(content) % BLOCK))
            tar.offset = file.tell()


def read_tar(data: bytes) -> Iterator[tuple[str, memoryview]]:
    """(name, content) of each member of a whole tar, whose every byte outside of the contents is as `write_tar` writes it.

    Raises:  ValueError with what is not: a header, a name that needs more than a plain one, padding, the end.
    """
    place, whole = 0, memoryview(data)
    for _ in range(MAX_MEMBERS):
        header = bytes(whole[place : place + BLOCK])
        if header == bytes(BLOCK):
            if any(data[place:]) or len(data) % tarfile.RECORDSIZE:
                raise ValueError("its end is not that of a tar of cskd")
            return
        try:
            name = header[:100].rstrip(b"\0").decode("ascii")
            size = int(header[_SIZE].rstrip(b"\0 "), 8)
        except ValueError:
            raise ValueError(f"no member begins at byte {place}") from None
        if header != _info(name, size).tobuf(tarfile.USTAR_FORMAT, "ascii"):
            raise ValueError(f"the header at byte {place} is not as cskd writes it")
        begin, end = place + BLOCK, place + BLOCK + size
        place = end + -size % BLOCK
        if place > len(data) or any(whole[end:place]):
            raise ValueError(f"{name} is cut short, or padded with other bytes than zeros")
        yield name, whole[begin:end]
    raise ValueError(f"more than {MAX_MEMBERS} members")


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info
