"""Reading tars by our own rules: regular files only, no names that lead out, no silence about damage.

Python's tarfile parses the headers; nothing is ever extracted. A header that it can't read is the end of the archive to
it, as is the end of the file; here only the end-of-archive mark is.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from cskd.errors import DataError

MAX_SPOOL = 1 << 40  # bytes a compressed tar may decompress to
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class Member(NamedTuple):
    """A regular file in a tar: its path without a leading './', and where its bytes are in the tar."""

    name: str
    offset: int
    size: int


def members(path: Path, shown: Path | None = None) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order; messages call it `shown`.

    Raises:  DataError for a damaged or cut tar, a link, device or sparse file, or a name that is absolute or has '..'.
    """
    shown, length = shown or path, path.stat().st_size
    with path.open("rb", buffering=1 << 17) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would remember every member
                    member = _member(info, shown)
                    if info.offset_data + info.size > length:
                        raise DataError(f"{shown} was cut off inside '{info.name}'; copy or make it again")
                    if member is not None:
                        yield member
                _check_end(file, tar.offset, shown)
        except (tarfile.TarError, ValueError, EOFError) as e:  # ValueError: numbers in a damaged header
            raise DataError(f"{shown} is not a whole tar: {e}; copy or make it again") from None


def decompressed(path: Path, folder: Path, limit: int = MAX_SPOOL) -> Path:
    """`path` itself when it is not compressed; else a decompressed copy in `folder`, which gives random access.

    Raises:  DataError for damaged data, or when the copy would pass `limit` bytes or fill the disk.
    """
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        raise DataError(f"{path} is compressed with zstd; decompress it first (zstd -d)")
    opener = next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)
    if opener is None:
        return path
    copy, room = folder / "source.tar", shutil.disk_usage(folder).free
    try:
        with cast(IO[bytes], opener(path, "rb")) as source, copy.open("xb") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
                if target.tell() > min(limit, room):
                    what = (
                        f"the limit of {limit} bytes" if limit < room else f"the {room} bytes free in {folder.parent}"
                    )
                    raise DataError(
                        f"{path} decompresses to more than {what}; decompress it elsewhere and pack the tar"
                    )
    except _DAMAGE as e:
        raise DataError(f"{path} can't be decompressed: {e}; copy or make it again") from None
    return copy


def _member(info: tarfile.TarInfo, path: Path) -> Member | None:
    """None for a folder."""
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if info.name.startswith("/") or ".." in parts:
        raise DataError(f"{path} has a member '{info.name}', expected a name below the tar's own folder; make it again")
    if info.isdir():
        return None
    if not info.isreg() or info.issparse():
        kind = "a link" if info.issym() or info.islnk() else "no regular file"
        raise DataError(f"'{info.name}' in {path} is {kind}; make the tar again with --dereference --hard-dereference")
    return Member("/".join(parts), info.offset_data, info.size)


def _check_end(file: IO[bytes], offset: int, path: Path) -> None:
    file.seek(offset)
    mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} has no end-of-archive mark: it was cut off; copy or make it again")
    if any(mark):
        raise DataError(f"{path} is damaged at byte {offset}: no member starts there; copy or make it again")
    while rest := file.read(1 << 20):
        if any(rest):
            raise DataError(f"{path} goes on after its end-of-archive mark (joined tars?); make it again as one tar")
