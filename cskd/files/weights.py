"""Files of weights that others made, the one way they are read: looked at before a library allocates what they ask for.

torch.load with weights_only runs no code, but builds what a few pickled bytes describe: a byte array of any size, a copy of a
tensor that repeats one number. So a checkpoint may name what tensors need and nothing else, its zip may hold no compressed
members, and it may not be many times larger than its model. No timm in here.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cskd.errors import one_line
from cskd.files.read import open_regular, parse_json

FREE_WEIGHT_BYTES = 1 << 28  # any model's file may have these
MAX_TIMES = 16  # the size of its model: weights, averaged weights and an optimiser's state are up to five
MAX_HEADER = 1 << 24  # bytes of a safetensors header; 2,000 tensors take 200 kB
MAX_PICKLE = 1 << 23  # bytes of a checkpoint's own pickle; as above
# Arguments of timm.create_model by which timm would read a file of its own choice.
READ_BY_TIMM = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"),
    *("checkpoint_path", "cache_dir"),
)
# Where training scripts put the weights inside a checkpoint; averaged weights first, as they are the ones published.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_MAX_WRAPPERS = 4  # around one another: a mapping may hold itself
_GLOBALS = re.compile(
    r"(collections (OrderedDict|Counter|defaultdict)"
    r"|torch (\w+Storage|Size|device|u?int\d+|float\d+|bfloat16|bool|long|int|half|float|double)"
    r"|torch\.(_utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)|nn\.parameter Parameter)"
    r"|torch\.storage (UntypedStorage|TypedStorage|_LegacyStorage)"
    r"|argparse Namespace)"
)


class PickledObjectsError(ValueError):
    """A checkpoint that holds more than tensors."""


def read_weights(path: Path, model_bytes: int) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a .safetensors, or in a .pt, .pth or .tar of tensors, on the CPU.

    Args:    model_bytes: of the parameters and buffers of the model that it is for.
    Returns: the tensors, without the prefixes that DataParallel and torch.compile put before all names; the keys of the
             checkpoint that they lay under, from the outermost on.
    Raises:  ValueError: what is wrong with the file, in words that follow its name.
    """
    try:
        check_weight_file(path, model_bytes)
        safe = path.suffix == ".safetensors"
        loaded: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a file that is no checkpoint makes the two readers raise
        objects = type(e).__name__ in ("UnpicklingError", PickledObjectsError.__name__)
        why = "it is damaged, or holds Python objects besides tensors, which are never unpickled here"
        raise ValueError(f"can't be read: {why if objects else one_line(e)}") from None
    keys: list[str] = []
    while isinstance(loaded, Mapping) and len(keys) < _MAX_WRAPPERS:
        key = next((k for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if key is None:
            break
        loaded = loaded[key]
        keys.append(key)
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"holds more than tensors or none: no state dict at its top or under {', '.join(_WRAPPERS)}")
    check_tensors(loaded.values())
    weights = {str(name): tensor for name, tensor in loaded.items()}
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights, keys


def check_weight_file(path: Path, model_bytes: int) -> None:
    """Raises OSError for what is no regular file, ValueError for one that no checkpoint of such a model is.

    Args:    model_bytes: of the parameters and buffers of the model that it is for.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length > FREE_WEIGHT_BYTES + MAX_TIMES * model_bytes:
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
            raise ValueError(f"holds a tensor of layout {tensor.layout} on {tensor.device}, expected plain ones")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"holds a tensor of shape {list(tensor.shape)} that repeats its numbers")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or an infinity; None where all are finite, or hold whole numbers.

    One pass over the values (smallest and largest: NaN spreads to both) and one transfer per device.
    """
    ends: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            t = tensor.detach()
            t = t.float() if t.element_size() == 1 else t  # of float8 there are no smallest and largest
            ends.setdefault(t.device, []).append((name, torch.stack(torch.aminmax(t)).isfinite().all()))
    bad = set()
    for found in ends.values():
        finite = torch.stack([ok for _, ok in found]).tolist()
        bad |= {name for (name, _), ok in zip(found, finite, strict=True) if not ok}
    return next((name for name in tensors if name in bad), None)


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
                        raise ValueError(f"{info.filename} has {info.file_size} bytes, expected {MAX_PICKLE} at most")
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
