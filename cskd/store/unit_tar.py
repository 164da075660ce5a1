"""A unit's file in the container `webdataset`: a tar that stock webdataset reads as one sample, an array a member.

Its key is b00012-v0003; its members, in the order of their names, are

    b00012-v0003.about.json            format, codec, block, view, inventory, and the names of every array's dimensions
    b00012-v0003.seed.npy.zst          an array of `format.UNIT_FIELDS` as .npy, compressed with zstd, with its checksum
    b00012-v0003.targets.start.npy.zst one of the codec's own

Damage shows in the checksum of a frame, or as a header that is not, byte for byte, what is written here.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from cskd.codecs import Arrays
from cskd.files.durable import json_bytes
from cskd.files.read import parse_json
from cskd.store.format import FORMAT, ZSTD_LEVEL
from cskd.store.tars import read_tar, write_tar
from cskd.store.unit_layout import FLOATS, FREE_UNIT_BYTES, MAX_UNIT_RATIO, TYPES, frame_size

_MEMBER = re.compile(r"[\w-]{1,64}\.(?:(about)\.json|((?:targets\.)?\w{1,64})\.npy\.zst)")
_CHECKED = 1 << 2  # bit of a frame's descriptor: it ends with a checksum of its content (RFC 8878, 3.1.1.1.1)


def pack_tar(
    fields: Arrays, targets: Arrays, dimensions: dict[str, tuple[str, ...]], attributes: dict[str, Any]
) -> bytes:
    """A unit as the bytes of its tar; arguments as those of `cskd.store.unit.pack_unit`."""
    key = f"b{attributes.get('block', 0):05d}-v{attributes.get('view', 0):04d}"
    named = {**fields, **{f"targets.{name}": array for name, array in targets.items()}}
    names = {name: list(dimensions[name.removeprefix("targets.")]) for name in sorted(named)}
    members = {f"{key}.about.json": json_bytes({"format": FORMAT, **attributes, "dimensions": names})}
    members |= {f"{key}.{name}.npy.zst": _packed(array) for name, array in named.items()}
    out = io.BytesIO()
    write_tar(out, sorted(members.items()))
    return out.getvalue()


def unpack_tar(data: bytes) -> Arrays:
    """The arrays of a unit's tar; what is of the codec has names with 'targets/' before them.

    Raises:  ValueError, or RuntimeError of zstd, with what is not as `pack_tar` writes it.
    """
    found: Arrays = {}
    decoded, about = 0, None
    for name, content in read_tar(data):
        match = _MEMBER.fullmatch(name)
        if match is None:
            raise ValueError(f"a member {name[:80]!r}, expected arrays and one about.json")
        if match[1]:
            about = parse_json(bytes(content))
            continue
        array = match[2].replace("targets.", "targets/", 1)
        size = frame_size(bytes(content[:18]))
        decoded += size or 0
        if decoded > max(FREE_UNIT_BYTES, MAX_UNIT_RATIO * len(data)):
            raise ValueError(f"{decoded} bytes of arrays in a file of {len(data)}")
        if array in found or size is None or not content[4] & _CHECKED:
            raise ValueError(f"{name} occurs twice, or is no zstd frame with a size and a checksum")
        found[array] = _unpacked(name, content, size)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"its about.json is missing, or not of format {FORMAT}")
    return found


def _packed(array: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return bytes(zstd.compress(out.getbuffer(), ZSTD_LEVEL, True))


def _unpacked(name: str, content: memoryview, size: int) -> NDArray[Any]:
    raw = np.empty(size, np.uint8)
    zstd.decompress(content, raw)
    head = io.BytesIO(raw[:4096].tobytes())
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError(f"{name} is no .npy of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(head, max_header_size=4096)
    if dtype.name not in TYPES | FLOATS or dtype != np.dtype(dtype.name).newbyteorder("<") or fortran:
        raise ValueError(f"{name} holds {str(dtype)[:40]}, expected plain numbers in C order")
    if size - head.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {size - head.tell()} bytes for the shape {str(shape)[:80]}")
    return raw[head.tell() :].view(dtype).reshape(shape)
