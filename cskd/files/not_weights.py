"""Files that are taken for weights of PyTorch and are none: what each is, and what to do about it, in words that follow its name."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

# First bytes, what they begin, and what to do about it.
_HEADS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes: only weights of PyTorch are read"),
    (b"\x93NUMPY", "a single NumPy array: put the arrays of all names into one dict, and save that by torch.save"),
    (b"GGUF", "a GGUF file: only weights of PyTorch are read"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: run git lfs pull"),
    (b"<?xml", "an XML file: only weights of PyTorch are read"),
    (b"<", "a web page in place of the file: download it again"),
)
# Members of a zip that tell what it is.
_MEMBERS = (
    ("constants.pkl", "a TorchScript program: save torch.jit.load(FILE).state_dict()"),
    ("serialized_exported_program.json", "a program of torch.export: save torch.export.load(FILE).state_dict"),
    ("archive_format", "a program of torch.export: save torch.export.load(FILE).state_dict"),
    ("model.weights.h5", "a model of Keras: only weights of PyTorch are read"),
    ("extern_modules", "a torch.package: load it with torch.package.PackageImporter, and save its state_dict()"),
)
_NPZ = (
    "a .npz of NumPy arrays: timm.create_model(NAME, checkpoint_path=FILE) reads those of Google's ViTs, save its state_dict(); of "
    "others save {name: torch.from_numpy(array)}"
)
_SUFFIXES = (
    *(
        ".onnx",
        ".tflite",
        ".pb",
        ".mlmodel",
        ".index",
        ".keras",
        ".msgpack",
        ".engine",
        ".plan",
        ".params",
        ".pdparams",
    ),
    *(".yaml", ".yml", ".txt", ".csv", ".py", ".png"),
)
_PART = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def not_weights(path: Path, head: bytes) -> str | None:
    """What a file is by its first bytes, else by its suffix; None where it may be a pickle."""
    if not head:
        return "empty: copy or download it again"
    if head[257:262] == b"ustar":
        return "a tar, or of torch.save before 2017: unpack it, or save it again"
    for magic, what in _HEADS:
        if head.lstrip().startswith(magic):
            return what
    return f"a {path.suffix} file: only weights of PyTorch are read" if path.suffix in _SUFFIXES else None


def not_weights_zip(members: Collection[str]) -> str | None:
    """What a zip is by the last names of its members; None where it may be of torch.save."""
    if members and all(name.endswith(".npy") for name in members):
        return _NPZ
    return next((what for name, what in _MEMBERS if name in members), None)


def one_part(path: Path) -> str | None:
    """Of one of several files of a checkpoint, how all are given; None for other files."""
    part = _PART.fullmatch(path.name)
    return (
        part
        and f"it is one of {int(part['count'])} parts: give {part['name']}{part['suffix']}.index.json, next to all of them"
    )
