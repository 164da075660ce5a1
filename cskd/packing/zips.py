"""Reading zips by their central directory, also ZIP64: listed in one pass, a member's bytes read and checked when it is its turn.

Python's zipfile is not used: it keeps half a kilobyte per member in memory, and takes members that share their bytes.

    end record     0 PK56    4 disks, 2 + 2    8 members, 2 + 2    12 size, 4    16 start, 4    20 comment, 2
    member         0 PK12    8 flags, 2    10 method, 2    16 crc-32, 4    20 stored, 4    24 size, 4    28 lengths, 2 + 2 + 2
                   34 disk, 2    38 attributes, 4    42 local header, 4    46 name, extra, comment
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from cskd.errors import DataError
from cskd.files.read import open_regular, pread
from cskd.packing.spool import FREE_BYTES, MAX_RATIO
from cskd.packing.tars import Member

STORED, DEFLATED = 0, 8
_OTHERS = {1: "shrink", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd", 99: "AES encryption"}
_CENTRAL = struct.Struct("<4s4xHH4xLLLHHHH2xLL")
_LOCAL = struct.Struct("<4s22xHH")
_END, _END64, _LOCATOR = struct.Struct("<4sHHHHLLH"), struct.Struct("<4sQ4xLLQQQQ"), struct.Struct("<4sLQL")
_HOST_UNIX, _HOST_DOS = 3, 0
_AGAIN = "copy or download it again"
_UNPACK = "unpack it, and give the folder"


class _Entry(NamedTuple):
    """A member by the central directory; `length`: bytes of its record there."""

    name: bytes
    host: int
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    attributes: int
    local: int
    length: int


def is_zip(path: Path) -> bool:
    """Whether a file has a zip's name, or begins as one does."""
    if path.suffix.lower() == ".zip":
        return True
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")


def zip_members(path: Path, folders: set[str] | None = None) -> Iterator[Member]:
    """The regular files of a zip, in the order of its directory. `offset` is that of the member's record there, for `read_zipped`.

    Names of folders go to `folders`.
    Raises:  DataError for a damaged or cut zip, one of several parts, a member that is encrypted, a link, or compressed in a way
             that is not read, a name that is absolute or has '..', members that share their bytes, and bombs.
    """
    with os.fdopen(open_regular(path), "rb", buffering=1 << 17) as file:
        length = os.fstat(file.fileno()).st_size
        start, end, count = _directory(file, length, path)
        at, found, taken, made = start, 0, 0, 0
        file.seek(start)
        while at < end:
            entry = _entry(file.read(_CENTRAL.size), file.read, path)
            found, taken, made = found + 1, taken + entry.stored, made + entry.size
            if taken > length or entry.local + _LOCAL.size + entry.stored > start:
                raise DataError(f"{path} has members that share bytes or lie outside of it: it is damaged; {_AGAIN}")
            if made > FREE_BYTES + MAX_RATIO * length:
                raise DataError(
                    f"{path} decompresses to more than {made} bytes from {length}, expected at most {MAX_RATIO} from one: "
                    "images do not; if it is what you want, unpack it and give the folder"
                )
            if member := _member(entry, at, path, folders):
                yield member
            at += entry.length
        if at != end or found & 0xFFFF != count & 0xFFFF:  # some programs write the count modulo 65536
            raise DataError(f"{path} has {found} members, and its end record says {count}: it is damaged; {_AGAIN}")


def read_zipped(fd: int, offset: int, size: int, path: str) -> bytes:
    """The `size` bytes of the member whose record is at `offset`. Raises DataError where they are not what the record says."""
    record = pread(fd, offset, _CENTRAL.size)
    entry = _entry(record, lambda n: pread(fd, offset + len(record), n), path)
    shown = f"{entry.name.decode('utf-8', 'replace')} in {path}"
    head = pread(fd, entry.local, _LOCAL.size)
    if len(head) < _LOCAL.size or not head.startswith(b"PK\x03\x04"):
        raise DataError(f"{shown} is not where the zip's directory says: it is damaged; {_AGAIN}")
    _, name, extra = _LOCAL.unpack(head)
    data = pread(fd, entry.local + _LOCAL.size + name + extra, entry.stored)
    whole = len(data) == entry.stored
    if entry.method == DEFLATED:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = unpacker.decompress(data, size + 1)
        except zlib.error:
            whole = False
        whole = whole and unpacker.eof
    if not whole or len(data) != size or zlib.crc32(data) != entry.crc:
        raise DataError(f"{shown} is damaged: its bytes are not those of its checksum (crc-32); {_AGAIN}")
    return data


def _directory(file: IO[bytes], length: int, path: Path) -> tuple[int, int, int]:
    """Where the central directory begins and ends, and how many members it should have."""
    tail_at = max(0, length - _END.size - 0xFFFF)
    file.seek(tail_at)
    tail = file.read()
    at = len(tail)
    while (at := tail.rfind(b"PK\x05\x06", 0, at)) >= 0:
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail):
            break
    if at < 0:
        raise DataError(f"{path} has no end record of a zip: it was cut off; {_AGAIN}")
    _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if count == 0xFFFF or 0xFFFFFFFF in (size, start):
        file.seek(max(0, end - _LOCATOR.size - _END64.size))
        near = file.read(_END64.size + _LOCATOR.size)
        if near[:4] == b"PK\x06\x06" and near[_END64.size :][:4] == b"PK\x06\x07":
            end -= _LOCATOR.size + _END64.size
            _, _, disk, first_disk, here, count, size, start = _END64.unpack_from(near)
    if disk or first_disk or here != count:
        raise DataError(f"{path} is one part of a zip of several; join them (zip -s 0 IN.zip --out OUT.zip)")
    if start + size != end:
        raise DataError(f"{path}: its directory is not where its end record says (cut off, or joined?); {_UNPACK}")
    return start, end, count


def _entry(head: bytes, read: Callable[[int], bytes], path: str | Path) -> _Entry:
    damaged = DataError(f"{path} has a damaged directory; {_AGAIN}")
    if len(head) < _CENTRAL.size or not head.startswith(b"PK\x01\x02"):
        raise damaged
    _, flags, method, crc, stored, size, name, extra, comment, disk, attributes, local = _CENTRAL.unpack(head)
    data = read(name + extra + comment)
    if len(data) < name + extra + comment or disk not in (0, 0xFFFF):
        raise damaged
    at, stop = name, name + extra
    while at + 4 <= stop:
        kind, n = struct.unpack_from("<HH", data, at)
        if kind == 1:  # ZIP64: those of the three that did not fit into four bytes, in this order
            wide = [i for i, value in enumerate((size, stored, local)) if value == 0xFFFFFFFF]
            if at + 4 + n > stop or n < 8 * len(wide):
                raise damaged
            values = [size, stored, local]
            for i, value in zip(wide, struct.unpack_from(f"<{len(wide)}Q", data, at + 4), strict=True):
                values[i] = value
            size, stored, local = values
        at += 4 + n
    return _Entry(data[:name], head[5], flags, method, crc, stored, size, attributes, local, _CENTRAL.size + len(data))


def _member(entry: _Entry, at: int, path: Path, folders: set[str] | None) -> Member | None:
    """None for a folder."""
    try:
        name = entry.name.decode()
    except UnicodeDecodeError:
        name = entry.name.decode("cp437")
    if entry.host == _HOST_DOS:
        name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or not parts:
        raise DataError(f"{path} has a member {name[:80]!r}, expected a name below the zip's folder; make it again")
    clean = "/".join(parts)
    if name.endswith("/"):
        if folders is not None:
            folders.add(clean)
        return None
    if entry.host == _HOST_UNIX and stat.S_IFMT(entry.attributes >> 16) not in (0, stat.S_IFREG):
        raise DataError(f"'{clean[:80]}' in {path} is a link or no regular file; make the zip without --symlinks")
    if entry.flags & 1:
        raise DataError(f"'{clean[:80]}' in {path} is encrypted; {_UNPACK}")
    if entry.method not in (STORED, DEFLATED):
        how = _OTHERS.get(entry.method, f"method {entry.method}")
        raise DataError(f"'{clean[:80]}' in {path} is compressed by {how}, which is not read; {_UNPACK}")
    return Member(clean, at, entry.size)
