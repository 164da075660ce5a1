"""What a unit file says it holds, checked before a byte of it is decompressed: stored members, declared sizes, known codecs.

zarr would ask its registry for any codec and any data type that a zarr.json names, and allocate any shape.
"""

from __future__ import annotations

import math
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from cskd.files.read import parse_json
from cskd.store.format import CHUNK_BYTES, FORMAT

MAX_UNIT_RATIO = 200  # decoded bytes from one of the file; units of real teachers take 2 to 20
FREE_UNIT_BYTES = 1 << 28  # decoded before the ratio counts: tiny teachers give arrays of zeros
MAX_MEMBERS = 100_000
MAX_METADATA = 1 << 16  # bytes of one zarr.json
TYPES = frozenset(["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
FLOATS = frozenset(["float16", "float32", "float64"])
_CODECS = ["bytes", "zstd", "crc32c"]
_MEMBER = re.compile(r"(?:zarr\.json|targets/zarr\.json|((?:targets/)?\w{1,64})/(?:zarr\.json|c(?:/\d{1,9}){1,8}))")


@dataclass(frozen=True)
class ArrayLayout:
    """How one array of a unit lies in the file: `rows` of its first axis a chunk, `chunks` the members, in order."""

    name: str
    shape: tuple[int, ...]
    rows: int
    dtype: np.dtype[Any]
    chunks: list[str]


def layout(archive: zipfile.ZipFile, length: int) -> list[ArrayLayout]:
    """The arrays of a unit file of `length` bytes; what is in the group `targets` has names with 'targets/' before them.

    Raises:  ValueError with what is not as `pack_unit` writes it: names, compression, sizes, metadata, missing chunks.
    """
    members = _members(archive, length)
    arrays: list[ArrayLayout] = []
    decoded = 0
    for name in sorted(name for name in members if name.endswith("zarr.json")):
        metadata = parse_json(archive.read(name))
        if not isinstance(metadata, dict) or metadata.get("zarr_format") != 3:
            raise ValueError(f"{name} is no metadata of zarr format 3")
        if name in ("zarr.json", "targets/zarr.json"):
            _check_group(name, metadata)
            continue
        found = _array(name.removesuffix("/zarr.json"), metadata, members)
        decoded += len(found.chunks) * found.rows * math.prod(found.shape[1:]) * found.dtype.itemsize
        if decoded > max(FREE_UNIT_BYTES, MAX_UNIT_RATIO * length):
            raise ValueError(f"{decoded} bytes of arrays in a file of {length}")
        arrays.append(found)
    expected = {"zarr.json", "targets/zarr.json", *(f"{a.name}/zarr.json" for a in arrays)}
    expected |= {chunk for a in arrays for chunk in a.chunks}
    if strange := sorted(members ^ expected):
        raise ValueError(f"{strange[0]} is {'of no array' if strange[0] in members else 'missing'}")
    return arrays


def _members(archive: zipfile.ZipFile, length: int) -> set[str]:
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise ValueError(f"{len(infos)} members, expected at most {MAX_MEMBERS}")
    if len({info.filename for info in infos}) < len(infos):
        raise ValueError("a member occurs twice")
    for info in infos:
        if not _MEMBER.fullmatch(info.filename):
            raise ValueError(f"a member {info.filename[:80]!r}, expected zarr.json files and chunks")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is compressed or encrypted, expected a stored member")
        if info.filename.endswith("zarr.json") and info.file_size > MAX_METADATA:
            raise ValueError(f"{info.filename} has {info.file_size} bytes, expected at most {MAX_METADATA}")
    if (total := sum(info.file_size for info in infos)) > length:
        raise ValueError(f"members of {total} bytes together in a file of {length}")
    return {info.filename for info in infos}


def _check_group(name: str, metadata: dict[str, Any]) -> None:
    if metadata.get("node_type") != "group" or metadata.get("consolidated_metadata") is not None:
        raise ValueError(f"{name} is no plain group")
    attributes = metadata.get("attributes")
    version = attributes.get("format") if isinstance(attributes, dict) else None
    if name == "zarr.json" and version != FORMAT:
        raise ValueError(f"it has format {str(version)[:40]!r}, this version reads {FORMAT}")


def _array(name: str, metadata: dict[str, Any], members: set[str]) -> ArrayLayout:
    try:
        shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        kinds = [metadata["chunk_grid"]["name"], metadata["chunk_key_encoding"]["name"]]
        codecs = [codec["name"] for codec in metadata["codecs"]]
        endian = metadata["codecs"][0].get("configuration", {}).get("endian", "little")
        kind = metadata["data_type"]
        plain = metadata["node_type"] == "array" and not metadata.get("storage_transformers")
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"the metadata of array {name} is not that of a unit") from None
    if not plain or kinds != ["regular", "default"] or codecs != _CODECS or endian != "little":
        raise ValueError(f"array {name} is stored as {str([*kinds, *codecs])[:120]}, expected bytes, zstd and crc32c")
    if not isinstance(kind, str) or kind not in TYPES | FLOATS:
        raise ValueError(f"array {name} has the type {str(kind)[:40]!r}, expected a number's")
    for lengths, low in ((shape, 0), (chunk, 1)):
        if not isinstance(lengths, list) or not 1 <= len(lengths) <= 8:
            raise ValueError(f"array {name} has the shape {str(lengths)[:80]}")
        if not all(type(n) is int and low <= n < 1 << 40 for n in lengths):
            raise ValueError(f"array {name} has the shape {str(lengths)[:80]}")
    dtype = np.dtype(kind)
    chunk_bytes = math.prod(chunk) * dtype.itemsize
    if chunk[1:] != shape[1:] or chunk_bytes > CHUNK_BYTES:
        raise ValueError(f"array {name} has chunks {str(chunk)[:80]} of {chunk_bytes} bytes, expected whole rows")
    count = -(-shape[0] // chunk[0])
    if count > len(members):
        raise ValueError(f"array {name} has {count} chunks, more than there are members")
    names = ["/".join([name, "c", str(i), *("0" for _ in shape[1:])]) for i in range(count)]
    return ArrayLayout(name, tuple(shape), chunk[0], dtype, names)


def frame_size(frame: bytes) -> int | None:
    """The content size that a zstd frame's header states (RFC 8878, 3.1.1.1), None where it states none or is no frame."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 5:
        return None
    descriptor = frame[4]
    single = descriptor >> 5 & 1
    length = (single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    field = frame[start : start + length]
    if not length or len(field) < length:
        return None
    return int.from_bytes(field, "little") + (256 if length == 2 else 0)
