"""One unit file: arrays to the bytes of a `.zarr.zip`, and back. The same arrays always give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from cskd.errors import CacheError
from cskd.store.format import CHUNK_BYTES, FORMAT, ZSTD_LEVEL

if TYPE_CHECKING:
    import zarr

Arrays = dict[str, NDArray[Any]]
MAX_RATIO = (
    256  # of a large array's bytes to its stored ones; teacher outputs shrink to a third, tampered files to nothing
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first date


def pack_unit(
    fields: Arrays, targets: Arrays, dimensions: dict[str, tuple[str, ...]], attributes: dict[str, Any]
) -> bytes:
    """A unit as the bytes of its file.

    Args:    fields, see `format.VIEW_FIELDS`; targets, a codec's arrays; dimensions, names of the axes of both;
             attributes, JSON-able facts for a human who opens the file with stock zarr.
    """
    import zarr  # here, so that training, which only reads, does without
    from zarr.storage import MemoryStore

    memory: dict[str, Any] = {}
    store = MemoryStore(memory)
    root = zarr.create_group(store, attributes={"format": FORMAT, **attributes})
    group = root.create_group("targets")
    for name, array in sorted(fields.items()):
        _write(root, name, array, dimensions[name])
    for name, array in sorted(targets.items()):
        _write(group, name, array, dimensions[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        for name in sorted(memory):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            z.writestr(info, memory[name].to_bytes())
    return out.getvalue()


def read_unit(path: Path) -> tuple[Arrays, Arrays]:
    """View fields and targets of a unit file, every checksum checked: 2.5 ms for 8,192 views, where zarr takes 16.

    Raises:  CacheError naming the file when anything in it is damaged, or is not laid out as `pack_unit` does it.
    """
    try:
        with zipfile.ZipFile(path) as z:
            members = {info.filename: _member(z, info, path) for info in z.infolist()}
        root = json.loads(members["zarr.json"])
        if root["attributes"].get("format") != FORMAT:
            raise CacheError(f"{path} has format {root['attributes'].get('format')!r}, this version reads {FORMAT}")
        arrays = [name.removesuffix("/zarr.json") for name in members if name.endswith("/zarr.json")]
        arrays.remove("targets")  # ValueError where that group is missing
        chunks = Counter(name.partition("/c/")[0] for name in members if "/c/" in name)
        found = {name: _read(members, name, chunks[name]) for name in arrays}
    except CacheError:
        raise
    except Exception as e:  # zipfile, json, numpy and numcodecs each raise their own kinds for damaged bytes
        raise CacheError(f"{path} is damaged ({type(e).__name__}: {' '.join(str(e).split())})") from e
    fields = {name: array for name, array in found.items() if "/" not in name}
    return fields, {name.removeprefix("targets/"): a for name, a in found.items() if name.startswith("targets/")}


def content_hash(fields: Arrays, targets: dict[str, Arrays]) -> str:
    """sha256 over the decoded arrays of a unit, all codecs: names, dtypes, shapes and values, not file bytes."""
    h = hashlib.sha256()
    named = {name: array for name, array in fields.items()}
    named |= {f"{codec}/{name}": array for codec, arrays in targets.items() for name, array in arrays.items()}
    for name, array in sorted(named.items()):
        h.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()


def _write(group: zarr.Group, name: str, array: NDArray[Any], dimensions: tuple[str, ...]) -> None:
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

    rows = max(1, min(array.shape[0], CHUNK_BYTES // max(1, array.itemsize * math.prod(array.shape[1:]))))
    group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(rows, *(max(1, n) for n in array.shape[1:])),
        serializer=BytesCodec(),
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        dimension_names=dimensions,
        config={"write_empty_chunks": True},
    )[...] = array


def _member(z: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> bytes:
    """The bytes of one member, its crc32 checked. Stored ones only: no small file then makes a large array of bytes."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise CacheError(f"{path} is damaged ({info.filename} is compressed, expected a stored member)")
    try:
        return z.read(info)
    except zipfile.BadZipFile:
        raise CacheError(f"{path} is damaged ({info.filename} does not match its checksum)") from None


def _read(members: dict[str, bytes], name: str, present: int) -> NDArray[Any]:
    """One array, from its metadata and its `present` chunks; see `_write` for the layout."""
    about = json.loads(members[f"{name}/zarr.json"])
    shape = tuple(int(n) for n in about["shape"])
    rows, *rest = (int(n) for n in about["chunk_grid"]["configuration"]["chunk_shape"])
    dtype = np.dtype(about["data_type"])
    codecs = [codec["name"] for codec in about["codecs"]]
    endian = about["codecs"][0].get("configuration", {}).get("endian", "little")
    laid_out = (about["node_type"], about["chunk_key_encoding"]["name"], codecs, endian, dtype.kind in "uif", rest)
    expected = ("array", "default", ["bytes", "zstd", "crc32c"], "little", True, [max(1, n) for n in shape[1:]])
    if laid_out != expected:
        raise CacheError(f"array {name} is laid out as {laid_out}, expected {expected}")
    if present != -(-shape[0] // rows):
        raise CacheError(f"array {name} has {present} chunks, expected {-(-shape[0] // rows)}")
    chunks = [members["/".join([name, "c", str(i), *("0" for _ in rest)])] for i in range(present)]
    size, stored = present * rows * math.prod(rest) * dtype.itemsize, sum(map(len, chunks))
    if size > CHUNK_BYTES + MAX_RATIO * stored:
        raise CacheError(f"array {name} would be {size} bytes, from {stored} stored ones")
    # Chunks are whole ones, the last too: its rows past the end are padding.
    out = np.empty((present * rows, *rest), dtype.newbyteorder("<"))
    for i, data in enumerate(chunks):
        frame, checksum = data[:-4], int.from_bytes(data[-4:], "little")
        if google_crc32c.value(frame) != checksum:
            raise CacheError(f"array {name}, chunk {i} does not match its checksum")
        chunk = out[i * rows : (i + 1) * rows]
        if _content_size(frame) != chunk.nbytes:
            raise CacheError(f"array {name}, chunk {i} holds {_content_size(frame)} bytes, expected {chunk.nbytes}")
        zstd.decompress(frame, chunk)
    return out[: shape[0]].reshape(shape).astype(dtype, copy=False)


def _content_size(frame: bytes) -> int:
    """Bytes that a zstd frame says it holds, before anything is allocated for them; -1 where it doesn't say (RFC 8878)."""
    flags = frame[4]
    single = flags >> 5 & 1
    size = (single, 2, 4, 8)[flags >> 6]
    begin = 6 - single + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(frame[begin : begin + size], "little") + 256 * (size == 2) if size else -1
