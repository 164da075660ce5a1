"""Reading tars by our own rules: regular files only, no names that lead out, no silence about damage.

Nothing is ever extracted: what is read are headers (`cskd/packing/tar_headers.py`) and the bytes between them.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from cskd.errors import DataError
from cskd.files.read import open_regular
from cskd.packing.spool import MAX_SPOOL, Spool
from cskd.packing.tar_headers import DIRECTORY, LINKS, REGULAR, Header, headers

XZ_MEMORY = 1 << 28  # bytes; xz -9 asks for 65 MB
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError)

_UNPACK = "unpack it, and give the folder that holds the class folders"
_DECOMPRESS = "decompress it first"
_NO_TARS = [
    (b"PK\x03\x04", "a zip", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"\x1f\x8b", "compressed with gzip", f"{_DECOMPRESS} (gunzip)"),
    (b"BZh", "compressed with bzip2", f"{_DECOMPRESS} (bunzip2)"),
    (b"\xfd7zXZ", "compressed with xz", f"{_DECOMPRESS} (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", f"{_DECOMPRESS} (zstd -d)"),
    (b"PAR1", "a parquet file", "give it, or its folder, to 'cskd pack'"),
    (b"\x89HDF", "an HDF5 file", "write its images to class folders or webdataset shards first"),
]


class Member(NamedTuple):
    """A regular file in a tar: its path without a leading './', and where its bytes are in the tar."""

    name: str
    offset: int
    size: int


def members(
    path: Path, shown: Path | str | None = None, folders: set[str] | None = None, part: tuple[int, int] | None = None
) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order; messages call it `shown`. Names of folders go to `folders`.

    `part`: offset and size of a tar in the file, where it is a member of another.

    Raises:  DataError for a damaged or cut tar, a link, device or sparse file, or a name that is absolute or has '..'.
    """
    shown = shown or path
    with os.fdopen(open_regular(path), "rb", buffering=1 << 17) as file:
        try:
            begin, size = part or (0, os.fstat(file.fileno()).st_size)
            for header in headers(file, begin + size, begin):
                member = _member(header, shown)
                if member is not None:
                    yield member
                elif folders is not None:
                    folders.add("/".join(part for part in header.name.split("/") if part not in ("", ".")))
        except ValueError as e:
            file.seek(part[0] if part else 0)
            start = file.read(6)
            for magic, what, cure in _NO_TARS:
                if start.startswith(magic):
                    raise DataError(f"{shown} is {what}, not a tar; {cure}") from None
            raise DataError(f"{shown} {e}; copy or make it again") from None


def decompressed(path: Path, folder: Path, limit: int = MAX_SPOOL) -> Path:
    """`path` itself when it is not compressed; else a decompressed copy in `folder`, which gives random access.

    Raises:  DataError for damaged data, or when the copy would pass `limit` bytes or fill the disk.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        magic = file.read(6)
        if magic.startswith(b"\x28\xb5\x2f\xfd"):
            raise DataError(f"{path} is compressed with zstd; decompress it first (zstd -d)")
        file.seek(0)
        source = _decompressor(magic, file)
        if source is None:
            return path
        spool = Spool(folder / "source.tar", path, limit)
        try:
            while chunk := _piece(source, path):
                spool.add(chunk, file.tell())
        finally:
            spool.close()
    return spool.path


def _decompressor(magic: bytes, file: IO[bytes]) -> Iterator[bytes] | None:
    """The decompressed bytes of a file in pieces of at most 1 MB; None where it is not compressed."""
    if magic.startswith(b"\x1f\x8b"):
        unzipped = gzip.GzipFile(fileobj=file)
        return iter(lambda: unzipped.read(1 << 20), b"")
    if magic.startswith(b"BZh"):
        unpacked = bz2.BZ2File(file)
        return iter(lambda: unpacked.read(1 << 20), b"")
    return _xz(file) if magic == b"\xfd7zXZ\0" else None


def _xz(file: IO[bytes]) -> Iterator[bytes]:
    """The streams of an .xz, one after the other. Its header says how much memory it needs: at most XZ_MEMORY here."""
    rest = b""
    while rest := rest.lstrip(b"\0") or file.read(1 << 16).lstrip(b"\0"):
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
        while not decoder.eof:
            data = rest if decoder.needs_input else b""
            if decoder.needs_input and not data and not (data := file.read(1 << 16)):
                raise EOFError("it ended inside a stream")
            rest = b""
            if piece := decoder.decompress(data, 1 << 20):
                yield piece
        rest = decoder.unused_data


def _piece(source: Iterator[bytes], path: Path) -> bytes:
    """The next piece, b'' after the last. DataError for damaged data."""
    try:
        return next(source, b"")
    except _DAMAGE as e:
        raise DataError(f"{path} can't be decompressed: {e}; copy or make it again") from None


def _member(header: Header, path: Path | str) -> Member | None:
    """None for a folder."""
    parts = [part for part in header.name.split("/") if part not in ("", ".")]
    if header.name.startswith("/") or ".." in parts:
        raise DataError(f"{path} has a member '{header.name}', expected a name below the tar's folder; make it again")
    if header.kind in DIRECTORY:
        return None
    if header.kind not in REGULAR or not parts or header.name.endswith("/"):
        kind = "a link" if header.kind in LINKS else "no regular file"
        raise DataError(f"'{header.name}' in {path} is {kind}; make the tar with --dereference --hard-dereference")
    return Member("/".join(parts), header.offset, header.size)
