"""The labels of ImageNet's validation images as they are downloaded: the development kit, or Kaggle's LOC_val_solution.csv.

The kit has one number per image, and meta.mat says which synset that number is. Of MATLAB's file (version 5, as its documentation
describes it) only arrays of text and of numbers in one struct array are read, with bounds; nothing in it is ever code.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from cskd.errors import DataError
from cskd.packing.labels import Labels
from cskd.packing.listing import Listing
from cskd.packing.places import WHOLE, Place, read_place
from cskd.packing.tars import decompressed, members

VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.(JPEG|jpg|jpeg)")
TEST_IMAGE = re.compile(r"ILSVRC2012_test_\d{8}\.(JPEG|jpg|jpeg)")
TRUTH = re.compile(r"(^|/)ILSVRC\d{4}_(clsloc_)?validation_ground_truth\.txt$")
KITS = ("ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC/devkit", "devkit")
SOLUTION = "LOC_val_solution.csv"
_FOLDERS_ABOVE = 5  # that are looked through for labels: of Kaggle's ILSVRC/Data/CLS-LOC/val it is the fourth
_MAX_FILE = 1 << 24  # bytes of a file of the kit, and of what one may decompress to; meta.mat takes 0.1 MB
_MAX_KIT = 1 << 28  # bytes the kit's tar may decompress to: the real one takes 4 MB
_SYNSET = re.compile(r"n\d{8}")
_AGAIN = "copy or download the development kit again"
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
_MATRIX, _COMPRESSED, _STRUCT, _CHAR = 14, 15, 2, 4


def beside(listing: Listing, src: Path) -> Path | None:
    """The label file that belongs to ImageNet's validation images, where the source is those, in or above the source.

    Raises:  DataError where it is the test images, whose labels nobody has.
    """
    name = listing.name(0)
    if len(set(listing.folder)) == 1 and TEST_IMAGE.fullmatch(name):
        raise DataError(f"{src} holds ImageNet's test images ({name}), whose labels are not public; pack train or val")
    if len(set(listing.folder)) != 1 or not VAL_IMAGE.fullmatch(name):
        return None
    src = src.absolute()
    for folder in [src, *src.parents][: _FOLDERS_ABOVE + 1]:
        for name in (SOLUTION, *KITS):
            if (path := folder / name).is_file() or (path / "data").is_dir():
                return path
    return None


def is_kit(path: Path) -> bool:
    """Whether `--labels` names a development kit: its folder, its tar, or the file of numbers in it."""
    return path.is_dir() or path.name.endswith((".tar", ".tar.gz", ".tgz")) or TRUTH.search(path.name) is not None


def read_kit(path: Path, work: Path) -> Labels:
    """The labels of the 50,000 validation images; classes are the sorted synsets, as train's class folders sort.

    Args:    path: the kit's tar.gz, its folder, the folder data in it, or the file of numbers; work: an empty folder.
    Raises:  DataError for a kit that lacks a file, or is damaged.
    """
    files = _in_tar(path, work) if path.is_file() and not TRUTH.search(path.name) else _in_folder(path)
    truth = next((name for name in sorted(files) if TRUTH.search(name)), None)
    maps = next(
        (name for last in ("map_clsloc.txt", "meta.mat") for name in sorted(files) if name.endswith(last)), None
    )
    if truth is None or maps is None:
        raise DataError(
            f"--labels {path} is no development kit of ImageNet: expected ILSVRC2012_validation_ground_truth.txt and meta.mat "
            "in its folder data; give the kit, or a file of lines PATH,LABEL"
        )
    try:
        data = read_place(files[maps])
        synsets = mat_synsets(data) if maps.endswith("meta.mat") else _clsloc(data)
        numbers = [int(line) for line in read_place(files[truth]).decode("ascii").split()]
    except (ValueError, struct.error, zlib.error) as e:
        raise DataError(f"--labels {path} is damaged: {str(e)[:120]}; {_AGAIN}") from None
    labels = Labels(path.name, names=sorted(synsets.values()))
    for i, number in enumerate(numbers, 1):
        if number not in synsets:
            raise DataError(
                f"{truth} of {path} has the number {number} in line {i}, expected one of the {len(synsets)} in {maps}; {_AGAIN}"
            )
        labels.add(f"ILSVRC2012_val_{i:08d}", synsets[number])
    return labels


def mat_synsets(data: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> WNID of the synsets without children in meta.mat: the classes. Raises ValueError for another file."""
    if len(data) < 128 or data[126:128] != b"IM":
        raise ValueError("meta.mat is no MATLAB file of version 5")
    for kind, body in _elements(data[128:]):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            body = unpacker.decompress(body, _MAX_FILE)
            if not unpacker.eof:
                raise ValueError(f"meta.mat has an array that is cut off, or over {_MAX_FILE} bytes")
            kind, body = next(_elements(body), (0, b""))
        if kind == _MATRIX and (found := _synsets(body)):
            return found
    raise ValueError("meta.mat has no struct array with ILSVRC2012_ID and WNID")


def _synsets(body: bytes) -> dict[int, str]:
    parts = _elements(body)
    flags, dims, _ = (next(parts, (0, b""))[1] for _ in range(3))
    if flags[:1] != bytes([_STRUCT]):
        return {}
    count = 1
    for size in struct.unpack(f"<{len(dims) // 4}i", dims[: len(dims) // 4 * 4]):
        count *= size
    width = int.from_bytes(next(parts, (0, b""))[1][:4], "little")
    text = next(parts, (0, b""))[1]
    names = [text[i : i + width].partition(b"\0")[0].decode("latin-1") for i in range(0, len(text), max(1, width))]
    if not {"ILSVRC2012_ID", "WNID"} <= set(names) or not 0 < count * len(names) <= len(body) // 8:
        return {}
    found: dict[int, str] = {}
    for _ in range(count):
        record = {name: _value(next(parts, (0, b""))[1]) for name in names}
        number, synset = record["ILSVRC2012_ID"], record["WNID"]
        if not isinstance(number, float) or not isinstance(synset, str) or not _SYNSET.fullmatch(synset):
            raise ValueError(f"meta.mat has a synset {synset!r:.40} with the number {number!r:.40}")
        if not record.get("num_children"):
            found[int(number)] = synset
    return found


def _value(body: bytes) -> float | str | None:
    """A text, or the one number of an array; None for all else."""
    parts = _elements(body)
    flags, _, _, (kind, data) = (next(parts, (0, b"")) for _ in range(4))
    if flags[1][:1] == bytes([_CHAR]):
        return data.decode(_TEXTS[kind], "replace") if kind in _TEXTS else None
    form = _NUMBERS.get(kind)
    return float(struct.unpack("<" + form, data)[0]) if form and len(data) == struct.calcsize(form) else None


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and bytes of the elements that follow one another in a MATLAB file."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # up to four bytes stand next to their type
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise ValueError("meta.mat is damaged: a short element of over four bytes")
            yield kind, data[at + 4 : at + 4 + size]
            at += 8
            continue
        if at + 8 + size > len(data):
            raise ValueError("meta.mat was cut off")
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size + (-size % 8 if kind != _COMPRESSED else 0)


def _clsloc(data: bytes) -> dict[int, str]:
    """map_clsloc.txt of the kits from 2014 on: lines 'n02119789 1 kit_fox'."""
    lines = [line.split() for line in data.decode("utf-8").splitlines() if line.strip()]
    if not all(len(line) >= 2 and _SYNSET.fullmatch(line[0]) for line in lines):
        raise ValueError("map_clsloc.txt has lines that are not like 'n02119789 1 kit_fox'")
    return {int(line[1]): line[0] for line in lines}


def _in_folder(path: Path) -> dict[str, Place]:
    folder = path.parent if path.is_file() else path
    inside = [*folder.glob("*"), *folder.glob("data/*")]
    files = {file.relative_to(folder).as_posix(): file for file in inside if file.is_file()}
    return {name: Place(str(file), 0, WHOLE) for name, file in files.items()}


def _in_tar(path: Path, work: Path) -> dict[str, Place]:
    work.mkdir()
    tar = decompressed(path, work, _MAX_KIT)
    return {m.name: Place(str(tar), m.offset, m.size) for m in members(tar, path) if m.size <= _MAX_FILE}
