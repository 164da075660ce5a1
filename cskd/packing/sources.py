"""What a user gives to `cskd pack`, as columns of about 60 bytes a sample: class folders, a tar of them, or shards.

A class is a folder that holds images; folders above the classes that all of them share are left out of the keys. So a
folder, a tar of it and a tar of the folder it is in have the same samples.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cskd.class_map import MAX_CLASSES
from cskd.errors import DataError
from cskd.inventory import first_duplicate
from cskd.packing.names import (
    CLASSES_FILE,
    IMAGE_EXTENSIONS,
    MAX_CLASS_BYTES,
    check_path,
    class_labels,
    image_extension,
    is_metadata,
    parse_classes,
    sample_key,
)
from cskd.packing.shard_samples import Tally, expand_shards, is_shard, shard_samples
from cskd.packing.tars import decompressed, members
from cskd.seeds import U64, key_hash
from cskd.untrusted import open_regular

Progress = Callable[[int, int], None]
WHOLE = -1  # size of a place that is a whole file
MAX_IMAGE_BYTES = 1 << 28
MAX_FOLDER_DEPTH = 64


class Place(NamedTuple):
    """Where an encoded image is: `size` bytes at `offset` of the file at `path`, or all of it (WHOLE)."""

    path: str
    offset: int
    size: int


@dataclass
class Listing:
    """The images of a source in columns, in the order in which they were found."""

    files: list[str]  # tars that hold them, or one folder
    shown: list[str]  # the same, as the user knows them
    folders: list[str] = field(default_factory=list)  # relative to the source; '' where names hold the whole path
    prefix: str = ""  # leading part of every folder that is not part of the keys
    _name: bytearray = field(default_factory=bytearray)
    _name_end: array[int] = field(default_factory=lambda: array("q", [0]))
    folder: array[int] = field(default_factory=lambda: array("i"))
    file: array[int] = field(default_factory=lambda: array("i"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    label: array[int] = field(default_factory=lambda: array("i"))  # -1 where the folder says it

    def __len__(self) -> int:
        return len(self.size)

    def add(self, name: str, folder: int, file: int = 0, offset: int = 0, size: int = WHOLE, label: int = -1) -> None:
        """One more image, by its name in a folder."""
        self._name += name.encode()
        self._name_end.append(len(self._name))
        self.folder.append(folder)
        self.file.append(file)
        self.offset.append(offset)
        self.size.append(size)
        self.label.append(label)

    def path(self, i: int) -> str:
        """The image's path in the source."""
        name = self._name[self._name_end[i] : self._name_end[i + 1]].decode()
        folder = self.folders[self.folder[i]]
        return f"{folder}/{name}" if folder else name

    def key(self, i: int) -> str:
        """The image's key; see `sample_key`."""
        return sample_key(self.path(i)[len(self.prefix) :])

    def extension(self, i: int) -> str:
        """The image's extension, without the dot, in lower case."""
        return self.path(i).rpartition(".")[2].lower()

    def place(self, i: int) -> Place:
        """Where the image's bytes are."""
        file = self.files[self.file[i]]
        return Place(os.path.join(file, self.path(i)) if self.size[i] == WHOLE else file, self.offset[i], self.size[i])

    def origin(self, i: int) -> str:
        """Where the image is, for a message."""
        return f"{self.path(i)} in {self.shown[self.file[i]]}"


@dataclass
class Source:
    """A listing with the label of every sample."""

    listing: Listing
    classes: list[str]
    folder_labels: list[int] | None  # label of each folder of the listing; None: the listing has a label a sample
    key_hash: U64
    notes: list[str]

    def label(self, i: int) -> int:
        if self.folder_labels is None:
            return self.listing.label[i]
        return self.folder_labels[self.listing.folder[i]]


def open_source(src: str | Path, classes: Path | None, work: Path, max_spool: int, progress: Progress | None) -> Source:
    """List the images of `src` and give each its label and key.

    Args:    src: a folder of class folders; a tar of one, also compressed; webdataset shards: a folder, glob or {a..b}.
             classes: class file; without it the source's own classes.txt, else the sorted names of the class folders.
             work: folder for a decompressed copy of at most `max_spool` bytes.
    Raises:  DataError for anything in the source that would change what it means if it were passed over.
    """
    src = Path(src)
    ignored = Tally()
    class_files: dict[str, Place] = {}
    if src.is_dir() and not any(is_shard(tar, tar) for tar in sorted(src.glob("*.tar"))[:1]):
        listing = _list_folder(src, ignored, class_files, progress)
    elif src.is_dir() or (not src.exists() and set("*?[{") & set(str(src))):
        shards = expand_shards(src)
        return _shard_source(shards, shards, classes, shards[0].parent / CLASSES_FILE, progress)
    elif not src.exists():
        raise DataError(f"nothing at {src}; expected a folder of class folders, a tar of one, or webdataset shards")
    else:
        tar = decompressed(src, work, max_spool)
        if is_shard(tar, src):
            return _shard_source([tar], [src], classes, src.parent / CLASSES_FILE, progress)
        listing = _list_tar(tar, src, ignored, class_files, progress)
    if not len(listing):
        raise DataError(
            f"{src} holds no images in class folders ({ignored.count} other files); "
            f"expected CLASS/NAME with one of {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return _folder_source(listing, classes, src, ignored, class_files)


def _list_folder(root: Path, ignored: Tally, class_files: dict[str, Place], progress: Progress | None) -> Listing:
    """All images below `root`; links to files and folders are followed, each folder once."""
    listing = Listing([str(root)], [str(root)])
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    seen: dict[tuple[int, int], str] = {}
    while stack:
        folder, above = stack.pop()
        status = os.stat(root / folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise DataError(f"{root / folder} is a link to a folder that it is in; remove it")
        if (twin := seen.setdefault(here, folder)) != folder:  # ten links to ten links to ... would never end
            raise DataError(f"{root / folder} and {root / twin} are one folder; remove one of the links")
        if folder.count("/") >= MAX_FOLDER_DEPTH:
            raise DataError(
                f"{root / folder} is more than {MAX_FOLDER_DEPTH} folders deep; pack the folder of the classes"
            )
        number = None
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    ignored.add(path)
                elif entry.is_dir():
                    stack.append((path, above | {here}))
                elif image_extension(entry.name) is None:
                    if entry.name == CLASSES_FILE:
                        class_files[folder] = Place(entry.path, 0, WHOLE)
                    else:
                        ignored.add(path)
                elif not entry.is_file():
                    raise DataError(f"{entry.path} is no regular file, or a link to none; remove or mend it")
                else:
                    check_path(path, str(root))
                    if number is None:
                        number = len(listing.folders)
                        listing.folders.append(folder)
                    listing.add(entry.name, number)
                    if progress and len(listing) % 4096 == 0:
                        progress(len(listing), 0)
    return listing


def _list_tar(
    tar: Path, shown: Path, ignored: Tally, class_files: dict[str, Place], progress: Progress | None
) -> Listing:
    listing = Listing([str(tar)], [str(shown)])
    numbers: dict[str, int] = {}
    for member in members(tar, shown):
        folder, _, name = member.name.rpartition("/")
        if member.name.startswith(".") or "/." in member.name:
            ignored.add(member.name)
        elif image_extension(name) is None:
            if name == CLASSES_FILE:
                class_files[folder] = Place(str(tar), member.offset, member.size)
            else:
                ignored.add(member.name)
        else:
            check_path(member.name, str(shown))
            if member.size > MAX_IMAGE_BYTES:
                raise DataError(f"{member.name} in {shown} has {member.size} bytes, expected at most {MAX_IMAGE_BYTES}")
            if folder not in numbers:
                numbers[folder] = len(listing.folders)
                listing.folders.append(folder)
            listing.add(name, numbers[folder], 0, member.offset, member.size)
            if progress and len(listing) % 4096 == 0:
                progress(len(listing), 0)
    return listing


def _folder_source(
    listing: Listing, classes: Path | None, src: Path, ignored: Tally, class_files: dict[str, Place]
) -> Source:
    listing.prefix = _check_folders(listing, src)
    found = sorted({folder.rpartition("/")[2] for folder in listing.folders})
    own = [folder for folder in class_files if listing.prefix.startswith(f"{folder}/" if folder else "")]
    notes = []
    if classes is not None:
        names, origin = _class_file(classes), str(classes)
    elif own:
        nearest = max(own, key=len)
        origin = f"{nearest}/{CLASSES_FILE}".lstrip("/") + f" of {src.name}"
        names = _read_classes(class_files.pop(nearest), origin)
        notes.append(f"class order from {origin}")
    else:
        names, origin = found, str(src)
    if len(found) < len(names):
        notes.append(f"{len(found)} of {len(names)} classes have images")
    for folder in class_files if classes is None else ():
        ignored.add(f"{folder}/{CLASSES_FILE}".lstrip("/"))
    notes += ignored.notes("other files")
    return Source(listing, names, class_labels(listing.folders, names, origin), _key_hashes(listing), notes)


def _shard_source(
    shards: list[Path], shown: list[Path], classes: Path | None, beside: Path, progress: Progress | None
) -> Source:
    listing = Listing([str(shard) for shard in shards], [str(shard) for shard in shown], folders=[""])
    for number, shard in enumerate(shards):
        for key, extension, label, offset, size in shard_samples(shard, shown=shown[number]):
            listing.add(f"{key}.{extension}", 0, number, offset, size, label)
        if progress:
            progress(len(listing), 0)
    if not len(listing):
        raise DataError(f"{shown[0]} holds no samples; expected images with .cls or .json labels")
    names, notes = label_names(classes, beside, max(listing.label))
    return Source(listing, names, None, _key_hashes(listing), notes)


def label_names(classes: Path | None, beside: Path, largest: int) -> tuple[list[str], list[str]]:
    """Names for the labels of shards, and notes: from a class file, else the file `beside` them, else '0', '1', ...

    Raises:  DataError when there are fewer names than labels, or a label without names that no codec can hold.
    """
    origin, notes = classes, []
    if classes is None and beside.is_file():
        origin = beside
        notes.append(f"class names from {beside.name}, which is beside the shards")
    if origin is None:
        if largest >= MAX_CLASSES:
            raise DataError(
                f"the largest label is {largest}, expected one below {MAX_CLASSES}; mend the labels of the shards"
            )
        return [str(label) for label in range(largest + 1)], ["no class names given: named by their numbers"]
    names = _class_file(origin)
    if largest >= len(names):
        raise DataError(
            f"{origin} has {len(names)} names, but label {largest} occurs; give the right file with --classes"
        )
    return names, notes


def _check_folders(listing: Listing, src: Path) -> str:
    """Each folder of images must be one class. Returns the leading part that all share, up to and with its last '/'."""
    if "" in listing.folders:
        first = listing.path(listing.folder.index(listing.folders.index("")))
        raise DataError(f"{first} in {src} is in no class folder; expected CLASS/{first}")
    known = set(listing.folders)
    by_name: dict[str, str] = {}
    for folder in sorted(listing.folders):
        parts = folder.split("/")
        for depth in range(1, len(parts)):
            if (above := "/".join(parts[:depth])) in known:
                raise DataError(f"in {src}, {above} holds images and so does {folder} inside it; a class is one folder")
        if (other := by_name.setdefault(parts[-1], folder)) != folder:
            raise DataError(
                f"class '{parts[-1]}' is in two places of {src}, {other} and {folder}; pack one of them (train or val?)"
            )
    parents = [folder.split("/")[:-1] for folder in listing.folders]
    shared = parents[0]
    for parent in parents:
        same = 0
        while same < min(len(shared), len(parent)) and shared[same] == parent[same]:
            same += 1
        shared = shared[:same]
    prefix = "".join(part + "/" for part in shared)
    for folder in listing.folders:
        if is_metadata(f"{folder[len(prefix) :]}/"):
            raise DataError(f"{folder} in {src}: webdataset skips folders named __like this__; rename it")
    return prefix


def _key_hashes(listing: Listing) -> U64:
    """uint64 [N]. Raises DataError naming both images when two have the same key."""
    hashes = np.fromiter((key_hash(listing.key(i)) for i in range(len(listing))), np.uint64, len(listing))
    if pair := first_duplicate(hashes):
        first, second = sorted(listing.origin(i) for i in pair)
        raise DataError(
            f"{first} and {second} have the same key '{listing.key(pair[0])}' "
            "(the path without its extension; dots become '_'); rename or remove one"
        )
    return hashes


def place_size(place: Place) -> int:
    """Bytes at a place; 0 where there is no file, which `read_place` will say."""
    if place.size != WHOLE:
        return place.size
    try:
        return os.stat(place.path).st_size
    except OSError:
        return 0


def read_place(place: Place) -> bytes:
    """The encoded image at a place. Raises DataError when it is cut off, too large or can't be read."""
    try:
        fd = open_regular(place.path)
        try:
            size = os.fstat(fd).st_size if place.size == WHOLE else place.size
            if size > MAX_IMAGE_BYTES:
                raise DataError(f"{place.path} has {size} bytes, expected an image of at most {MAX_IMAGE_BYTES}")
            data = _pread(fd, size, place.offset)
        finally:
            os.close(fd)
    except OSError as e:
        raise DataError(
            f"{place.path} can't be read: {e.strerror}; check the file and its disk, then run again"
        ) from None
    if len(data) != size:
        raise DataError(
            f"{place.path} ended after {len(data)} of {size} bytes at {place.offset}; was it changed meanwhile?"
        )
    return data


def _pread(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, or fewer where the file ends; a signal may cut one pread short."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


def _class_file(path: Path) -> list[str]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file"
        raise DataError(f"{path} is {found}; expected a file of class names in label order; give it with --classes")
    return _read_classes(Place(str(path), 0, WHOLE), str(path))


def _read_classes(place: Place, origin: str) -> list[str]:
    size = place_size(place)
    if size > MAX_CLASS_BYTES:
        raise DataError(f"{origin} has {size} bytes, expected class names, at most {MAX_CLASS_BYTES} bytes of them")
    return parse_classes(read_place(place), origin)
