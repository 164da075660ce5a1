"""One unit file: arrays to the bytes of a `.zarr.zip` or a tar, and back. The same arrays always give the same bytes."""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from cskd.codecs import Arrays
from cskd.errors import CacheError, CskdError
from cskd.files.read import open_regular
from cskd.store.format import CHUNK_BYTES, FORMAT, ZSTD_LEVEL
from cskd.store.unit_layout import ArrayLayout, frame_size, layout
from cskd.store.unit_tar import pack_tar, unpack_tar

if TYPE_CHECKING:
    import zarr

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first date


def pack_unit(
    fields: Arrays,
    targets: Arrays,
    dimensions: dict[str, tuple[str, ...]],
    attributes: dict[str, Any],
    container: str = "zarr",
) -> bytes:
    """A unit as the bytes of its file.

    Args:    fields, see `format.UNIT_FIELDS`; targets, a codec's arrays; dimensions, names of the axes of both;
             attributes, JSON-able facts for a human who opens the file with stock zarr; container, see `format.CONTAINERS`.
    """
    if container == "webdataset":
        return pack_tar(fields, targets, dimensions, attributes)
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


def read_unit(path: str | Path, data: bytes | Callable[[], bytes] | None = None) -> tuple[Arrays, Arrays]:
    """View fields and targets of a unit file, every checksum checked: 2.5 ms for 8,192 views, where zarr takes 16.

    path: its ending tells the container. data: the bytes of the file, or what reads them, where it is none of this machine.

    Raises:  CacheError naming the file when anything in it is damaged, or is not laid out as `pack_unit` does it.
    """
    try:
        data = data() if callable(data) else data
        with os.fdopen(open_regular(path), "rb") if data is None else io.BytesIO(data) as file:
            found = unpack_tar(file.read()) if str(path).endswith(".tar") else _read_zip(file)
    except CskdError:  # LimitError and StorageError too: no unit is to blame
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


def _read_zip(file: BinaryIO) -> Arrays:
    length = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as z:
        return {a.name: _read(z, a) for a in layout(z, length)}


def _read(archive: zipfile.ZipFile, layout: ArrayLayout) -> NDArray[Any]:
    """One array; zipfile checks the crc32 of each member, this the crc32c and the length of each chunk."""
    # Chunks are whole ones, the last too: its rows past the end are padding.
    out = np.empty((len(layout.chunks) * layout.rows, *layout.shape[1:]), layout.dtype.newbyteorder("<"))
    for i, name in enumerate(layout.chunks):
        data = archive.read(name)
        frame, stored = data[:-4], int.from_bytes(data[-4:], "little")
        if google_crc32c.value(frame) != stored:
            raise ValueError(f"{name} does not match its checksum")
        chunk = out[i * layout.rows : (i + 1) * layout.rows]
        if frame_size(frame) != chunk.nbytes:
            raise ValueError(f"{name} decompresses to {frame_size(frame)} bytes, expected {chunk.nbytes}")
        zstd.decompress(frame, chunk)
    return out[: layout.shape[0]].astype(layout.dtype, copy=False)
