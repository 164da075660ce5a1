"""The files of a source, in columns of about 60 bytes per image: a folder, a tar, a zip, or archives in a folder or a tar.

An archive is listed as if it were a folder of its name. Nothing is extracted: an image stays where it is until it is read.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cskd.dataset.inventory_checks import MAX_IMAGE_BYTES
from cskd.errors import DataError
from cskd.packing.names import CLASSES_FILE, check_path, image_extension, is_unread_image, sample_key
from cskd.packing.places import WHOLE, Place
from cskd.packing.shard_samples import why_no_shard
from cskd.packing.split_words import chosen
from cskd.packing.tally import Tally, is_hidden
from cskd.packing.tars import Member, members
from cskd.packing.zips import is_zip, zip_members

PackProgress = Callable[[int, int], None]
MAX_FOLDER_DEPTH = 64
METADATA_FILES = frozenset(["metadata.csv", "metadata.jsonl"])  # of Hugging Face's imagefolder


@dataclass
class Listing:
    """The images of a source in columns, in the order in which they were found."""

    files: list[str]  # tars that hold them, or one folder
    shown: list[str]  # the same, as the user knows them
    folders: list[str] = field(default_factory=list)  # relative to the source; '' where names hold the whole path
    prefix: str = ""  # leading part of every folder that is not part of the keys
    zips: set[int] = field(default_factory=set)  # numbers of those files that are zips
    archives: set[str] = field(default_factory=set)  # those folders that are archives inside the source
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

    def name(self, i: int) -> str:
        """The image's name in its folder."""
        return self._name[self._name_end[i] : self._name_end[i + 1]].decode()

    def path(self, i: int) -> str:
        """The image's path in the source."""
        name = self.name(i)
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
        number = self.file[i]
        file = self.files[number]
        if self.size[i] == WHOLE:
            return Place(os.path.join(file, self.path(i)), 0, WHOLE)
        return Place(file, self.offset[i], self.size[i], number in self.zips)

    def origin(self, i: int) -> str:
        """Where the image is, for a message."""
        return f"{self.path(i)} in {self.shown[self.file[i]]}"


@dataclass
class Rest:
    """What lies in a source in addition to its images."""

    ignored: Tally = field(default_factory=Tally)
    class_files: dict[str, Place] = field(default_factory=dict)  # folder -> its classes.txt
    metadata: dict[str, Place] = field(default_factory=dict)  # path -> a file of METADATA_FILES
    archives: dict[str, Place] = field(default_factory=dict)  # path -> a tar or zip
    tables: dict[str, Place] = field(default_factory=dict)  # path -> a parquet or Arrow file
    folders: set[str] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)  # folder -> one of its files that are no images

    def add(self, path: str, place: Place) -> None:
        """A file that is no image, or is hidden."""
        folder, _, name = path.rpartition("/")
        if name == CLASSES_FILE:
            self.class_files[folder] = place
            return
        if name in METADATA_FILES:
            self.metadata[path] = place
        elif name.lower().endswith((".tar", ".zip")) and not is_hidden(path):
            self.archives[path] = place
        elif name.lower().endswith((".parquet", ".arrow")) and not is_hidden(path) and not name.startswith("cache-"):
            self.tables[path] = place
        self.ignored.add_file(path)
        if not is_hidden(path) and (folder not in self.files or is_unread_image(name)):
            self.files[folder] = name

    def notes(self) -> list[str]:
        """What was passed over, by extension; images of kinds that are not read apart from the others."""
        unread, others = Tally(), Tally()
        for kind, (count, first) in self.ignored.kinds.items():
            (unread if is_unread_image(kind) else others).add(first, kind, count)
        cure = "; convert them to JPEG or PNG"
        lines = unread.notes("images of kinds that are not read")
        return [line + cure for line in lines] + others.notes("other files")


class Lister:
    """The images of one source, and the rest of it."""

    def __init__(self, progress: PackProgress | None) -> None:
        self.listing, self.rest, self._progress = Listing([], []), Rest(), progress
        self._numbers: dict[str, int] = {}

    def folder(self, root: Path, only: str | None) -> None:
        """All images below `root`, or below its folder `only`; links to files and folders are followed, each folder once."""
        number = self._file(str(root), str(root))
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
                    f"{root / folder} is over {MAX_FOLDER_DEPTH} folders deep; pack the folder of the classes"
                )
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if is_hidden(entry.name):
                        self.rest.ignored.add_file(path)
                    elif entry.is_dir():
                        if folder or only is None or entry.name == only:
                            stack.append((path, above | {here}))
                            self.rest.folders.add(path)
                    elif image_extension(entry.name) is None:
                        self.rest.add(path, Place(entry.path, 0, WHOLE))
                    elif only is not None and not folder:
                        continue
                    elif not entry.is_file():
                        raise DataError(f"{entry.path} is no regular file, or a link to none; remove or mend it")
                    else:
                        self._image(path, str(root), number, 0, WHOLE)

    def archive(self, place: Place, shown: str, below: str = "") -> None:
        """All images of a tar or a zip, as if it were the folder `below` of the source; messages call it `shown`."""
        zipped = place.size == WHOLE and is_zip(Path(place.path))
        before = "", False, ""  # the last member: its path without extension, whether it is an image, its name
        number = self._file(place.path, shown, zipped)
        folders: set[str] = set()
        for member in self._members(place, shown, zipped, folders):
            path = _joined(below, member.name)
            name = path.rpartition("/")[2]
            if is_hidden(member.name):
                self.rest.ignored.add_file(path)
                continue
            self._above(path)
            stem, is_image = path.partition(".")[0], image_extension(name) is not None
            if below and "/" not in member.name and stem == before[0] and is_image != before[1]:
                raise DataError(_why_no_class(place, shown, before[2] if is_image else name))
            before = stem, is_image, name
            if is_image:
                if member.size > MAX_IMAGE_BYTES:
                    raise DataError(
                        f"{member.name} in {shown} has {member.size} bytes, expected at most {MAX_IMAGE_BYTES}"
                    )
                self._image(path, shown, number, member.offset, member.size)
            else:
                self.rest.add(path, Place(place.path, member.offset, member.size, zipped))
        self.rest.folders |= {_joined(below, folder) for folder in folders if folder and not is_hidden(folder)}

    def archives(self, split: str | None) -> bool:
        """List the archives that were found as folders of their names; with `split` those of that split where one is named so.

        Returns: whether there are any.
        """
        found, self.rest.archives = self.rest.archives, {}
        names = {path: path.rpartition("/")[2].rpartition(".")[0] for path in found}
        taken = chosen(set(names.values()), split) if split else set()
        for path in sorted(found):
            if taken and names[path] not in taken:
                continue
            place = found[path]
            if place.zipped or (place.size != WHOLE and path.lower().endswith(".zip")):
                raise DataError(
                    f"{path} is an archive in a zip, or a zip in a tar; unpack the outer one, and give its folder"
                )
            self.archive(place, place.path if place.size == WHOLE else f"{path} in {Path(place.path).name}", path[:-4])
            self.listing.archives.add(path[:-4])
        return bool(found)

    def _members(self, place: Place, shown: str, zipped: bool, folders: set[str]) -> Iterable[Member]:
        if zipped:
            return zip_members(Path(place.path), folders)
        return members(Path(place.path), shown, folders, None if place.size == WHOLE else (place.offset, place.size))

    def _file(self, file: str, shown: str, zipped: bool = False) -> int:
        self.listing.files.append(file)
        self.listing.shown.append(shown)
        number = len(self.listing.files) - 1
        if zipped:
            self.listing.zips.add(number)
        return number

    def _above(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        if folder:
            self.rest.folders.add(folder)

    def _image(self, path: str, shown: str, file: int, offset: int, size: int) -> None:
        check_path(path, shown)
        folder, _, name = path.rpartition("/")
        if folder not in self._numbers:
            self._numbers[folder] = len(self.listing.folders)
            self.listing.folders.append(folder)
        self.listing.add(name, self._numbers[folder], file, offset, size)
        if self._progress and len(self.listing) % 4096 == 0:
            self._progress(len(self.listing), 0)


def _why_no_class(place: Place, shown: str, name: str) -> str:
    """What an archive inside of a source is that has other files next to its images, which a class has not."""
    if place.size == WHOLE and not is_zip(Path(place.path)) and not name.endswith(".cls"):
        return why_no_shard(Path(place.path), Path(shown))
    return (
        f"{shown} holds samples of several files ({name}), as a webdataset shard, and lies inside of the source; give the folder "
        "of the shards alone, unpacked"
    )


def _joined(below: str, name: str) -> str:
    """The path of an archive's member; a folder in it that has the archive's own name is not doubled."""
    if not below:
        return name
    own, _, rest = name.partition("/")
    return f"{below}/{rest}" if rest and own == below.rpartition("/")[2] else f"{below}/{name}"
