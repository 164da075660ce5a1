"""Files of weights that others made, looked at before a library allocates what they ask for. No timm in here.

torch.load with weights_only runs no code, but builds what a few pickled bytes describe: a byte array of any size, a copy of a
tensor that repeats one number. So a checkpoint may name what tensors need and nothing else, its zip may hold no compressed
members, and it may not be many times larger than its model.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cskd.files.read import open_regular, parse_json

FREE_BYTES = 1 << 28  # any model's file may have these
MAX_TIMES = 16  # the size of its model: weights, averaged weights and an optimiser's state are up to five
MAX_HEADER = 1 << 24  # bytes of a safetensors header; 2,000 tensors take 200 kB
MAX_PICKLE = 1 << 23  # bytes of a checkpoint's own pickle; as above
_GLOBALS = re.compile(
    r"(collections (OrderedDict|Counter|defaultdict)"
    r"|torch (\w+Storage|Size|device|u?int\d+|float\d+|bfloat16|bool|long|int|half|float|double)"
    r"|torch\.(_utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)|nn\.parameter Parameter)"
    r"|torch\.storage (UntypedStorage|TypedStorage|_LegacyStorage)"
    r"|argparse Namespace)"
)


class PickledObjectsError(ValueError):
    """A checkpoint that holds more than tensors."""


def check_weight_file(path: Path, model_bytes: int) -> None:
    """Raises OSError for what is no regular file, ValueError for one that no checkpoint of such a model is.

    Args:    model_bytes: of the parameters and buffers of the model that it is for.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length > FREE_BYTES + MAX_TIMES * model_bytes:
            raise ValueError(f"it has {length} bytes and the model {model_bytes}: it is of another one")
        head = file.read(8)
        file.seek(0)
        if path.suffix == ".safetensors":
            if len(head) == 8 and int.from_bytes(head, "little") > min(length, MAX_HEADER):
                raise ValueError(f"its header would have {int.from_bytes(head, 'little')} bytes")
            file.seek(8)
            parse_json(file.read(int.from_bytes(head, "little")))  # a name that occurs twice is refused
        elif head[:4] == b"PK\x03\x04":
            _check_zip(file, length)
        else:
            for _ in range(5):  # as before 2020: a number, a version, facts, the tensors, their keys
                if not _check_pickle(file):
                    break


def check_tensors(tensors: Iterable[Any]) -> None:
    """Raises ValueError for a tensor that is not plain numbers in memory, or whose numbers are fewer than its shape says."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device}, expected plain ones")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {list(tensor.shape)} that repeats its numbers")


def _check_zip(file: IO[bytes], length: int) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            packed = any(i.compress_type != zipfile.ZIP_STORED or i.compress_size != i.file_size for i in infos)
            if packed or sum(info.file_size for info in infos) > length:
                raise ValueError("its members are compressed, or larger together than the file")
            for info in infos:
                if info.filename.endswith(".pkl"):
                    if info.file_size > MAX_PICKLE:
                        raise ValueError(
                            f"{info.filename} in it has {info.file_size} bytes, expected {MAX_PICKLE} at most"
                        )
                    with archive.open(info) as pickled:
                        _check_pickle(pickled)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as e:
        raise ValueError(f"it is a damaged zip: {e}") from None


def _check_pickle(file: IO[bytes]) -> bool:
    """Whether a whole pickle stands there. PickledObjectsError for one that names anything a tensor does not need."""
    start = file.tell()
    try:
        for op, argument, position in pickletools.genops(file):
            if op.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4") or (
                op.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument))
            ):
                raise PickledObjectsError(f"it holds {str(argument)[:80] if argument else 'objects'}")
            if position is not None and position - start > MAX_PICKLE:
                raise ValueError(f"it holds a pickle of more than {MAX_PICKLE} bytes")
    except PickledObjectsError:
        raise
    except (ValueError, UnicodeDecodeError, IndexError, EOFError, OverflowError, MemoryError) as e:
        if "holds a pickle" in str(e):
            raise
        return False  # no pickle, or a damaged one: the reader says so
    return True
