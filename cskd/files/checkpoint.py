"""What a file of weights contains, by its first bytes and not by its name: safetensors, torch.save's zip or older form, a pickle
of arrays, or the index of several files. Only names and shapes are read here; the numbers when a tensor is asked for.

What is none of these is refused by the name of what it is.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from cskd.files.folders import called
from cskd.files.inert import Name, NoPickleError, Storage, Stored, Thing, read_pickle
from cskd.files.not_weights import not_weights, not_weights_zip, one_part
from cskd.files.read import open_regular, parse_json
from cskd.near import absent

FREE_WEIGHT_BYTES = 1 << 28  # any model's file may have these
MAX_TIMES = 16  # the size of its model: weights, averaged weights and an optimiser's state are up to five
MAX_HEADER = 1 << 24  # bytes of a safetensors header or of an index; 2,000 tensors take 200 kB
MAX_PICKLE = 1 << 23  # bytes of a checkpoint's own pickle besides arrays; as above
MAX_SHARDS = 1024  # files of an index
_MAX_TENSORS, _MAX_VISITS, _MAX_KEY, _MAX_DEPTH, _MAX_LIST = 1 << 16, 1 << 20, 256, 6, 16
_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 2020
_FOLDER = (
    *("model.safetensors", "pytorch_model.bin"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
)
_DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8},
}
_SAFE = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16},
}
_ARRAYS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, its numbers not yet read."""

    name: str  # the keys that lead to it, and its own name, joined by dots
    home: str  # of that the keys alone, with a dot at the end, or nothing
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: tuple[Any, ...]  # equal ones hold the same numbers
    load: Callable[[], Tensor] = field(compare=False)


@dataclass
class Contents:
    """All tensors of a file, and what else there was."""

    entries: list[Entry] = field(default_factory=list)
    networks: list[tuple[str, str]] = field(default_factory=list)  # whole pickled ones: their keys, their class
    objects: list[str] = field(default_factory=list)  # classes and functions of other objects, none of which was made


def find_file(path: Path) -> tuple[Path, str | None]:
    """The weight file that is meant by a path, and the keys that follow it after a colon.

    Args:    path of a file, of a folder with one by a usual name, or one of these with `:KEY`.
    Raises:  ValueError in words that follow the path.
    """
    key = None
    if not path.exists() and ":" in path.name:
        name, _, key = path.name.rpartition(":")
        path = path.with_name(name)
    if path.is_dir():
        found = next((path / name for name in _FOLDER if (path / name).is_file()), None)
        if found is None:
            sharded = (path / ".metadata").exists() or any(path.glob("*.distcp"))
            parts = any(one_part(part) for part in path.iterdir())
            raise ValueError(
                "is a checkpoint of torch.distributed: convert it with torch.distributed.checkpoint.format_utils"
                if sharded
                else "holds parts of a checkpoint without their index: copy or download that too"
                if parts
                else f"is a folder without {', '.join(_FOLDER[:2])} or an index of such"
            )
        path = found
    if not path.is_file():
        raise ValueError("does not exist" if not path.exists() else "is no regular file")
    return path, key


def given_file(path: Path) -> Path:
    """A path of weights as a config gives it. ValueError, in words that follow the key's name, where `find_file` finds none."""
    path = path.expanduser()
    try:
        find_file(path)
    except ValueError as e:
        if path.is_dir() and (kind := called(path)) is not None:
            raise ValueError(f"{path} is {kind}, which holds no weights") from None
        raise ValueError(f"no file {absent(path)}" if not path.exists() else f"{path} {e}") from None
    return path


def check_size(path: Path, length: int, model_bytes: int) -> None:
    """ValueError for more bytes than any checkpoint of a model of `model_bytes` has."""
    if length > FREE_WEIGHT_BYTES + MAX_TIMES * model_bytes:
        raise ValueError(f"has {length} bytes and the model {model_bytes}: it is of another one")


def check_safetensors(path: Path, model_bytes: int) -> None:
    """Raises OSError for what is no regular file, ValueError for one that no safetensors file of such a model is.

    Args:    model_bytes: of the parameters and buffers of the model that it is for.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        length = os.fstat(file.fileno()).st_size
        check_size(path, length, model_bytes)
        head = file.read(8)
        if int.from_bytes(head, "little") > min(length, MAX_HEADER):
            raise ValueError(f"is damaged, or no safetensors file: a header of {int.from_bytes(head, 'little')} bytes")
        try:
            parse_json(file.read(int.from_bytes(head, "little")))  # a name that occurs twice is refused
        except ValueError as e:
            raise ValueError(f"is damaged, or no safetensors file: its header is no JSON ({e})") from None


def contents(path: Path, model_bytes: int, opened: ExitStack) -> Contents:
    """The tensors of a file, or of all files of an index; they can be loaded until `opened` is closed.

    Args:    model_bytes: of the parameters and buffers of the model that it is for.
    Raises:  ValueError, OSError: what is wrong with it.
    """
    file = opened.enter_context(os.fdopen(open_regular(path), "rb"))
    length = os.fstat(file.fileno()).st_size
    check_size(path, length, model_bytes)
    head = file.read(512)
    file.seek(0)
    limit = MAX_PICKLE + 4 * model_bytes
    if head[:4] == b"PK\x03\x04":
        return _of_zip(file, length, limit, opened)
    safe = path.suffix == ".safetensors" and not head.startswith(b"\x80")
    if safe or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= length):
        check_safetensors(path, model_bytes)
        return _of_safetensors(path, opened)
    if head.lstrip()[:1] == b"{":
        return _of_index(path, file, model_bytes, opened)
    if (what := not_weights(path, head)) is not None:
        raise ValueError(f"is {what}")
    return _of_pickles(file, length, limit)


def _of_safetensors(path: Path, opened: ExitStack) -> Contents:
    found = Contents()
    safe = opened.enter_context(safe_open(path, framework="pt"))

    def load(name: str) -> Callable[[], Tensor]:
        return lambda: safe.get_tensor(name)

    for name in safe.keys():  # noqa: SIM118  not a dict
        part = safe.get_slice(name)
        dtype = _SAFE.get(part.get_dtype())
        if dtype is None:
            raise ValueError(f"holds {name[:80]} of the type {part.get_dtype()}, which is no plain number")
        found.entries.append(Entry(name, "", tuple(part.get_shape()), dtype, (path, name), load(name)))
    return found


def _of_index(path: Path, file: IO[bytes], model_bytes: int, opened: ExitStack) -> Contents:
    """The tensors of the files that an index of Hugging Face's names, {"weight_map": {tensor: file}}."""
    try:
        whole = parse_json(file.read(MAX_HEADER))
    except ValueError as e:
        raise ValueError(f"is damaged, or no weight file: JSON with a fault ({e})") from None
    names = whole.get("weight_map") if isinstance(whole, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError("is JSON, and no index of weight files: it has no weight_map")
    shards = sorted({str(name) for name in names.values()})
    if len(shards) > MAX_SHARDS or any(name != os.path.basename(name) or name in ("", "..") for name in shards):
        raise ValueError(f"names more than {MAX_SHARDS} files, or files outside its folder")
    if gone := [name for name in shards if not path.with_name(name).is_file()]:
        raise ValueError(f"names {gone[0][:80]}, which is not next to it: copy or download all {len(shards)} files")
    check_size(path, sum(path.with_name(name).stat().st_size for name in shards), model_bytes)
    found = Contents()
    for name in shards:
        if name.endswith(".json"):
            raise ValueError(f"names {name}, which is no weight file")
        part = contents(path.with_name(name), model_bytes, opened)
        found.entries += [entry for entry in part.entries if names.get(entry.name) == name]
    if missing := names.keys() - {entry.name for entry in found.entries}:
        raise ValueError(f"names {min(missing)[:80]}, which {names[min(missing)][:80]} has not")
    return found


def _of_zip(file: IO[bytes], length: int, limit: int, opened: ExitStack) -> Contents:
    try:
        archive = opened.enter_context(zipfile.ZipFile(file))
        members = {info.filename: info for info in archive.infolist()}
        base = {name.rpartition("/")[2] for name in members}
        if (what := not_weights_zip(base)) is not None:
            raise ValueError(f"is {what}")
        if any(i.compress_type != zipfile.ZIP_STORED or i.compress_size != i.file_size for i in members.values()):
            raise ValueError("is a compressed zip, which torch.save does not write: unpack it")
        if sum(info.file_size for info in members.values()) > length:
            raise ValueError("is a damaged zip: its members are larger together than the file")
        pickled = min((name for name in members if name.rpartition("/")[2] == "data.pkl"), key=len, default=None)
        if pickled is None:
            raise ValueError("is a zip without data.pkl: it is not of torch.save")
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder").strip() == b"big":
            raise ValueError("is of a machine with the other order of bytes: save it again on this one")
        if members[pickled].file_size > limit:
            raise ValueError(f"has a pickle of {members[pickled].file_size} bytes, expected {limit} at most")
        value = read_pickle(io.BytesIO(archive.read(pickled)))
    except NoPickleError as e:
        raise ValueError(f"is a damaged checkpoint: {e}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as e:
        raise ValueError(f"is a damaged zip ({e}): copy or download it again") from None

    def numbers(key: str) -> bytearray:
        info = members.get(f"{root}data/{key}")
        if info is None:
            raise ValueError(f"is damaged: it has no numbers for storage {key[:40]}")
        try:
            member: Any  # whose type does not say that it reads into a buffer
            with archive.open(info) as member:
                buffer = bytearray(info.file_size)
                got = member.readinto(buffer)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as e:
            raise ValueError(f"is a damaged zip: {e}") from None
        if got != len(buffer):
            raise ValueError("is a damaged zip: it ends too early")
        return buffer

    return _of_tree(value, numbers)


def _of_pickles(file: io.BufferedReader, length: int, limit: int) -> Contents:
    """torch.save before 2020: a number, a version, facts, the tensors, their keys, the numbers. Else one pickle of arrays."""
    head = io.BytesIO(file.read(min(length, limit)))
    kinds: dict[str, str] = {}
    try:
        value = read_pickle(head, kinds)
        legacy = value == _MAGIC
        if legacy:
            read_pickle(head)
            facts, value, keys = read_pickle(head), read_pickle(head, kinds), read_pickle(head)
    except NoPickleError as e:
        raise ValueError(f"is no checkpoint, or a damaged one ({e})") from None
    places: dict[str, tuple[int, int]] = {}
    if legacy:
        if isinstance(facts, dict) and facts.get("little_endian") is False:
            raise ValueError("is of a machine with the other order of bytes: save it again on this one")
        at = head.tell()
        for key in keys if isinstance(keys, list) else []:
            dtype = _DTYPES.get(kinds.get(str(key), "").removesuffix("Storage"))
            if dtype is None:
                raise ValueError(f"holds numbers of the unknown type {kinds.get(str(key), '?')[:40]}")
            file.seek(at)
            size = int.from_bytes(file.read(8), "little", signed=True) * dtype.itemsize
            if not 0 <= size <= length - at - 8:
                raise ValueError("is damaged: it ends too early")
            places[str(key)] = at + 8, size
            at += 8 + size

    def numbers(key: str) -> bytearray:
        if key not in places:
            raise ValueError(f"is damaged: it has no numbers for storage {key[:40]}")
        file.seek(places[key][0])
        buffer = bytearray(places[key][1])
        if file.readinto(buffer) != len(buffer):
            raise ValueError("is damaged: it ends too early")
        return buffer

    return _of_tree(value, numbers)


def _of_tree(value: Any, numbers: Callable[[str], bytearray]) -> Contents:
    """The tensors in nested mappings, and in short lists, by the keys that lead to them."""
    found, visits, cache = Contents(), 0, dict[str, bytearray]()

    def storage(key: str) -> bytearray:
        if key not in cache:
            cache[key] = numbers(key)
        return cache[key]

    def walk(value: Any, home: str, depth: int) -> None:
        nonlocal visits
        if isinstance(value, Thing) and value.items:
            value = value.items
        if isinstance(value, list | tuple):
            value = {str(i): v for i, v in enumerate(value[: _MAX_LIST + 1])} if len(value) <= _MAX_LIST else {}
        for key, v in value.items() if isinstance(value, dict) and depth < _MAX_DEPTH else ():
            visits += 1
            if visits > _MAX_VISITS or len(found.entries) > _MAX_TENSORS:
                raise ValueError(f"holds more than {_MAX_TENSORS} tensors, or mappings that hold one another")
            if not isinstance(key, str) or len(key) > _MAX_KEY:
                continue
            if isinstance(v, Stored):
                found.entries.append(_stored(v, home, key, storage))
            elif isinstance(v, Thing) and not v.items:
                _object(v, home, key, found)
            else:
                walk(v, f"{home}{key}.", depth + 1)

    if isinstance(value, Thing) and not value.items:
        _object(value, "", "", found)
    walk(value, "", 0)
    return found


def _object(thing: Thing, home: str, key: str, found: Contents) -> None:
    if isinstance(thing.state, dict) and "_parameters" in thing.state:
        found.networks.append((home + key, thing.name))
    elif (array := _array(thing)) is not None:
        native = array.dtype.newbyteorder("=")
        dtype = torch.from_numpy(np.empty(0, native)).dtype
        load = lambda: torch.from_numpy(array.astype(native))  # noqa: E731  a copy, when it is asked for
        found.entries.append(Entry(home + key, home, tuple(array.shape), dtype, (id(thing),), load))
    elif thing.name not in found.objects and len(found.objects) < 100:
        found.objects.append(thing.name)


def _stored(tensor: Stored, home: str, key: str, storage: Callable[[str], bytearray]) -> Entry:
    of: Storage = tensor.storage
    dtype: Any = getattr(torch, tensor.dtype, None) if tensor.dtype else _DTYPES.get(of.dtype.removesuffix("Storage"))
    offset, size, stride = tensor.offset, tensor.size, tensor.stride
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"holds {key}, a tensor of the unknown type {(tensor.dtype or of.dtype)[:40]}")
    if not (_whole([offset, of.start]) and _whole(size) and _whole(stride) and len(size) == len(stride)):
        raise ValueError(f"is damaged: {key} has no shape")
    offset += of.start

    def load() -> Tensor:
        buffer = storage(of.key)
        if prod(size) * dtype.itemsize > len(buffer):
            raise ValueError(f"holds {key} of shape {list(size)}, which repeats its numbers or lacks some")
        if prod(size) == 0:
            return torch.empty(size, dtype=dtype)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if (last + 1) * dtype.itemsize > len(buffer):
            raise ValueError(f"is damaged: {key} of shape {list(size)} lacks numbers")
        return torch.frombuffer(buffer, dtype=dtype, count=last + 1).as_strided(size, stride, offset)

    return Entry(home + key, home, tuple(size), dtype, (of.key, offset, tuple(size), tuple(stride)), load)


def _whole(numbers: Iterable[Any]) -> bool:
    return isinstance(numbers, list | tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)


def _array(thing: Thing) -> np.ndarray[Any, Any] | None:
    """A NumPy array of plain numbers, as NumPy pickles one; None for other objects."""
    name = thing.name.rpartition(".")[2]
    if not thing.name.startswith("numpy."):
        return None
    if name == "_reconstruct" and isinstance(thing.state, tuple) and len(thing.state) == 5:
        _, shape, dtype, fortran, data = thing.state
    elif name == "_frombuffer" and len(thing.args) == 4:
        data, dtype, shape, order = thing.args
        fortran = order == "F"
    else:
        return None
    kind = dtype.args[0] if isinstance(dtype, Thing) and dtype.args else None
    if isinstance(dtype, Name | str) or kind not in _ARRAYS or not isinstance(data, bytes | bytearray):
        return None
    if isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",):
        kind = f">{kind}"
    count = prod(shape) if _whole(shape) else -1
    if count * np.dtype(kind).itemsize != len(data):
        return None
    return np.frombuffer(data, np.dtype(kind)).reshape(shape, order="F" if fortran else "C")
