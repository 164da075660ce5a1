"""The headers of a tar, by POSIX (ustar and pax) and GNU's long names; whatever two readers could take in two ways is refused.

Python's tarfile is not used: it reads extended headers of any size into memory, recurses through chains of them, and takes
what it can't parse for the end of the archive.

    byte  0 name, 100    124 size, 12    148 checksum, 8    156 type, 1    257 magic, 8    345 prefix, 155
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = 512
MAX_EXTENDED = 1 << 20  # bytes of one extended header
MAX_CHAIN = 8  # extended headers before one member
MAX_NAME = 4096  # bytes, Linux's own limit of a path
REGULAR, DIRECTORY, LINKS = b"07\0", b"5", b"12"
_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class Header(NamedTuple):
    """One member: name as text (bytes that are no UTF-8 as surrogates), type as a byte, where its `size` bytes are."""

    name: str
    kind: bytes
    offset: int
    size: int


def headers(file: IO[bytes], end: int, begin: int = 0) -> Iterator[Header]:
    """The members of the tar at bytes `begin` to `end`, up to and with its end-of-archive mark, after which only zeros may come.

    Raises:  ValueError with what is wrong, as the second half of a sentence about the file.
    """
    at, names, chain = begin, _Names(), 0
    while True:
        file.seek(at)
        block = file.read(min(BLOCK, end - at))
        if not any(block):
            if len(block) < BLOCK:
                whole = "has no end-of-archive mark" if at > begin else "is not a whole tar"
                raise ValueError(f"{whole}: it was cut off")
            if chain:
                raise ValueError(f"ends at byte {at} with an extended header of nothing")
            return _check_end(file, end)
        if len(block) < BLOCK:
            raise ValueError("is not a whole tar: it was cut off inside a header")
        if not _sum_is_right(block):
            what = f"is damaged at byte {at}" if at > begin else "is not a whole tar"
            raise ValueError(f"{what}: no member starts there")
        kind, size = block[156:157], _number(block[124:136], at)
        start = at + BLOCK
        if kind in b"xgLK":
            chain += 1
            if size > MAX_EXTENDED or chain > MAX_CHAIN:
                raise ValueError(f"has extended headers of {size} bytes or {chain} in a row at byte {at}")
            if start + size > end:
                raise ValueError(f"was cut off inside the extended header at byte {at}")
            names.extend(kind, file.read(size), at)
            at = start + -(-size // BLOCK) * BLOCK
            continue
        name = names.name or _ustar_name(block)
        if names.size is not None:
            if size not in (0, names.size):
                raise ValueError(f"states two sizes for '{name}', {size} and {names.size} bytes")
            size = names.size
        if kind in DIRECTORY and size:
            raise ValueError(f"has a folder '{name}' of {size} bytes")
        if start + size > end:
            raise ValueError(f"was cut off inside '{name}'")
        if kind == b"\0" and name.endswith("/"):  # as tars had it before there was a type for folders
            kind = b"5"
        yield Header(name, kind, start, size)
        at, names, chain = start + -(-size // BLOCK) * BLOCK, _Names(), 0


class _Names:
    """What the extended headers before a member say of it."""

    def __init__(self) -> None:
        self.name = ""
        self.size: int | None = None

    def extend(self, kind: bytes, data: bytes, at: int) -> None:
        if kind == b"L":
            self._set(data.rstrip(b"\0"), at)
        elif kind in b"xg":
            for key, value in _records(data, at):
                if kind == b"g" and key in (b"path", b"size", b"linkpath"):
                    raise ValueError(f"gives one {key.decode()} to all members at byte {at}")
                if key.startswith(b"GNU.sparse"):
                    raise ValueError(f"has a sparse file at byte {at} (no regular file)")
                if key == b"path":
                    self._set(value, at)
                elif key == b"size":
                    if self.size is not None or not re.fullmatch(rb"\d{1,18}", value):
                        raise ValueError(f"states the size {value[:20]!r} at byte {at}")
                    self.size = int(value)

    def _set(self, name: bytes, at: int) -> None:
        if self.name:
            raise ValueError(f"states two long names at byte {at}")
        if not 0 < len(name) <= MAX_NAME or b"\0" in name:
            raise ValueError(f"has a name of {len(name)} bytes at byte {at}, or one with a zero byte")
        self.name = name.decode("utf-8", "surrogateescape")


def _records(data: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """The `LENGTH KEY=VALUE\\n` of a pax header."""
    here, end = 0, len(data.rstrip(b"\0"))
    while here < end:
        match = _RECORD.match(data, here)
        stop = here + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise ValueError(f"has a damaged extended header at byte {at}")
        yield match[2], data[match.end() : stop - 1]
        here = stop


def _ustar_name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _number(field: bytes, at: int) -> int:
    """An octal number, or with the first bit set GNU's binary one. Negative ones are refused."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):
        raise ValueError(f"is damaged at byte {at}: {field!r} is no size")
    return int(text or b"0", 8)


def _sum_is_right(block: bytes) -> bool:
    """Whether the header's bytes add up; some old tars added them as signed ones."""
    text = block[148:156].strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,8}", text):
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    found = sum(rest)
    return int(text, 8) in (found, found - 256 * sum(b > 127 for b in rest))


def _check_end(file: IO[bytes], end: int) -> None:
    while rest := file.read(min(1 << 20, end - file.tell())):
        if any(rest):
            raise ValueError("goes on after its end-of-archive mark (joined tars?)")
