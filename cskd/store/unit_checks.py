"""What a unit file says it holds, checked before a byte of it is decompressed: stored members, declared sizes, known codecs.

zarr would ask its registry for any codec and any data type that a zarr.json names, and allocate any shape.
"""

from __future__ import annotations

import math
import re
import zipfile
from typing import Any

import numpy as np

from cskd.store.format import CHUNK_BYTES
from cskd.untrusted import parse_json

MAX_RATIO = 200  # decoded bytes from one of the file; units of real teachers take 2 to 20
FREE_BYTES = 1 << 28  # decoded before the ratio counts: tiny teachers give arrays of zeros
MAX_MEMBERS = 100_000
MAX_METADATA = 1 << 16  # bytes of one zarr.json
TYPES = frozenset(["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
FLOATS = frozenset(["float16", "float32", "float64"])
_MEMBER = re.compile(r"(?:zarr\.json|targets/zarr\.json|((?:targets/)?\w{1,64})/(?:zarr\.json|c(?:/\d{1,9}){1,8}))")


def check_members(archive: zipfile.ZipFile, length: int) -> None:
    """Raises ValueError with what is not as in a unit: names, compression, sizes, metadata, the size of each zstd frame."""
    found: dict[str, list[zipfile.ZipInfo]] = {}
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS or sum(info.file_size for info in infos) > length:
        raise ValueError(f"{len(infos)} members, larger together than the file of {length} bytes, or too many")
    if len({info.filename for info in infos}) < len(infos):
        raise ValueError("a member occurs twice")
    for info in infos:
        match = _MEMBER.fullmatch(info.filename)
        if match is None:
            raise ValueError(f"a member {info.filename[:80]!r}, expected zarr.json files and chunks")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is compressed or encrypted, expected stored members")
        if info.filename.endswith("zarr.json"):
            if info.file_size > MAX_METADATA:
                raise ValueError(f"{info.filename} has {info.file_size} bytes, expected at most {MAX_METADATA}")
        elif match[1]:
            found.setdefault(match[1], []).append(info)
    decoded = 0
    for name in sorted(info.filename for info in infos if info.filename.endswith("zarr.json")):
        metadata = parse_json(archive.read(name))
        if not isinstance(metadata, dict) or metadata.get("zarr_format") != 3:
            raise ValueError(f"{name} is no metadata of zarr format 3")
        if name in ("zarr.json", "targets/zarr.json"):
            if metadata.get("node_type") != "group" or metadata.get("consolidated_metadata") is not None:
                raise ValueError(f"{name} is no plain group")
            continue
        array = name.removesuffix("/zarr.json")
        decoded += _check_array(array, metadata, found.pop(array, []), archive)
        if decoded > max(FREE_BYTES, MAX_RATIO * length):
            raise ValueError(f"{decoded} bytes of arrays in a file of {length}")
    if found:
        raise ValueError(f"chunks of {min(found)!r}, which is no array")


def _check_array(name: str, metadata: dict[str, Any], chunks: list[zipfile.ZipInfo], archive: zipfile.ZipFile) -> int:
    """Bytes of an array once it is decoded."""
    try:
        shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        kinds = [metadata["chunk_grid"]["name"], metadata["chunk_key_encoding"]["name"]]
        codecs = [codec["name"] for codec in metadata["codecs"]]
        kind = metadata["data_type"]
        plain = metadata["node_type"] == "array" and not metadata.get("storage_transformers")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"the metadata of array {name} is not that of a unit") from None
    if not plain or kinds != ["regular", "default"] or codecs != ["bytes", "zstd", "crc32c"]:
        raise ValueError(f"array {name} is stored as {str([*kinds, *codecs])[:120]}, expected bytes, zstd and crc32c")
    if not isinstance(kind, str) or kind not in TYPES | FLOATS:
        raise ValueError(f"array {name} has the type {str(kind)[:40]!r}, expected a number's")
    for lengths, low in ((shape, 0), (chunk, 1)):
        if not isinstance(lengths, list) or not 1 <= len(lengths) <= 8:
            raise ValueError(f"array {name} has the shape {str(lengths)[:80]}")
        if not all(type(n) is int and low <= n < 1 << 40 for n in lengths):
            raise ValueError(f"array {name} has the shape {str(lengths)[:80]}")
    item = np.dtype(kind).itemsize
    chunk_bytes = math.prod(chunk) * item
    if len(shape) != len(chunk) or chunk_bytes > CHUNK_BYTES:
        raise ValueError(f"array {name} has chunks of {chunk_bytes} bytes, expected at most {CHUNK_BYTES}")
    expected = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    if len(chunks) != expected:
        raise ValueError(f"array {name} has {len(chunks)} chunks, expected {expected}")
    for info in chunks:
        with archive.open(info) as file:
            size = frame_size(file.read(18))
        if size != chunk_bytes:
            raise ValueError(f"{info.filename} decompresses to {size} bytes, expected {chunk_bytes}")
    return int(expected * chunk_bytes)


def frame_size(head: bytes) -> int | None:
    """The content size that a zstd frame's header states (RFC 8878, 3.1.1.1), None where it states none or is no frame."""
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 5:
        return None
    descriptor = head[4]
    single = descriptor >> 5 & 1
    length = (single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    field = head[start : start + length]
    if not length or len(field) < length:
        return None
    return int.from_bytes(field, "little") + (256 if length == 2 else 0)
