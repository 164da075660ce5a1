"""One unit file: arrays to the bytes of a `.zarr.zip`, and back. The same arrays always give the same bytes."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore, ZipStore

from cskd.errors import CacheError
from cskd.store.format import CHUNK_BYTES, FORMAT, ZSTD_LEVEL

Arrays = dict[str, NDArray[Any]]
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first date


def pack_unit(
    fields: Arrays, targets: Arrays, dimensions: dict[str, tuple[str, ...]], attributes: dict[str, Any]
) -> bytes:
    """A unit as the bytes of its file.

    Args:    fields, see `format.VIEW_FIELDS`; targets, a codec's arrays; dimensions, names of the axes of both;
             attributes, JSON-able facts for a human who opens the file with stock zarr.
    """
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
    """View fields and targets of a unit file. Raises CacheError naming the file when anything in it is damaged."""
    try:
        with zipfile.ZipFile(path) as z:
            chunks = set(z.namelist())
            if damaged := z.testzip():  # here, since zarr's tasks would print a traceback of their own
                raise CacheError(f"{path} is damaged ({damaged} does not match its checksum)")
        store: Store = ZipStore(path, mode="r")
        try:
            root = zarr.open_group(store, mode="r")
            if root.attrs.get("format") != FORMAT:
                raise CacheError(f"{path} has format {root.attrs.get('format')!r}, this version reads {FORMAT}")
            fields = {name: _read(root, name, chunks) for name in root.array_keys()}
            group = root["targets"]
            assert isinstance(group, zarr.Group)
            return fields, {name: _read(group, name, chunks) for name in group.array_keys()}
        finally:
            store.close()
    except CacheError:
        raise
    except Exception as e:  # zipfile, zarr and numcodecs each raise their own kinds for damaged bytes
        raise CacheError(f"{path} is damaged ({type(e).__name__}: {' '.join(str(e).split())})") from e


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


def _read(group: zarr.Group, name: str, chunks: set[str]) -> NDArray[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    present = sum(1 for c in chunks if c.startswith(f"{array.path}/c/"))
    expected = math.prod(-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True))
    if present != expected:
        raise CacheError(f"array {array.path} has {present} chunks, expected {expected}")
    return np.asarray(array[...])
