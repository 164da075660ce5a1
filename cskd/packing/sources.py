"""What a user gives to `cskd pack`, as columns of about 60 bytes per sample: class folders, a tar of them, or shards.

A class is a folder that holds images; folders above the classes that all of them share are left out of the keys. So a
folder, a tar of it and a tar of the folder it is in have the same samples.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cskd.dataset.inventory import first_duplicate
from cskd.dataset.inventory_checks import MAX_IMAGE_BYTES
from cskd.errors import DataError
from cskd.packing.layout import Tree, check_keys, check_tree, class_prefix
from cskd.packing.names import (
    CLASSES_FILE,
    check_path,
    class_file,
    class_labels,
    image_extension,
    is_unread_image,
    read_classes,
    sample_key,
)
from cskd.packing.no_images import why_no_images
from cskd.packing.places import WHOLE, Place
from cskd.packing.shard_labels import Labels
from cskd.packing.shard_samples import ShardSamples, is_shard, why_no_shard
from cskd.packing.shard_sets import find_shards, is_pattern, missing_numbers
from cskd.packing.split_words import KeySplit, roots_of, some
from cskd.packing.tally import Tally
from cskd.packing.tars import decompressed, members
from cskd.seeds import U64, key_hash

PackProgress = Callable[[int, int], None]
MAX_FOLDER_DEPTH = 64


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
        file = self.files[self.file[i]]
        return Place(os.path.join(file, self.path(i)) if self.size[i] == WHOLE else file, self.offset[i], self.size[i])

    def origin(self, i: int) -> str:
        """Where the image is, for a message."""
        return f"{self.path(i)} in {self.shown[self.file[i]]}"


@dataclass
class _Rest:
    """What lies in a source in addition to its images."""

    ignored: Tally = field(default_factory=Tally)
    class_files: dict[str, Place] = field(default_factory=dict)  # folder -> its classes.txt
    folders: set[str] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)  # folder -> one of its files that are no images

    def add(self, path: str, place: Place) -> None:
        """A file that is no image, or is hidden."""
        folder, _, name = path.rpartition("/")
        if name == CLASSES_FILE:
            self.class_files[folder] = place
            return
        self.ignored.add_file(path)
        if not name.startswith(".") and (folder not in self.files or is_unread_image(name)):
            self.files[folder] = name


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


def open_source(
    src: str | Path,
    classes: Path | None,
    work: Path,
    max_spool: int,
    progress: PackProgress | None,
    split: str | None = None,
) -> Source:
    """List the images of `src` and give each its label and key.

    Args:    src: a folder of class folders; a tar of one, also compressed; webdataset shards: a folder, glob or {a..b}.
             classes: class file; without it the source's own classes.txt, else the sorted names of the class folders.
             work: folder for a decompressed copy of at most `max_spool` bytes.
             split: take that folder of a source, or the shards or keys with that word, and nothing else.
    Raises:  DataError for anything in the source that would change what it means if it were passed over.
    """
    src, rest = Path(src), _Rest()
    if is_pattern(src) or (src.is_dir() and _holds_shards(src, split)):
        return _all_shards(src, classes, split, progress)
    if not src.exists():
        raise DataError(f"nothing at {src}; expected a folder of class folders, a tar of one, or webdataset shards")
    if src.is_dir():
        listing = _list_folder(src, rest, progress, split if _is_below(src, split) else None)
    else:
        tar = decompressed(src, work, max_spool)
        if is_shard(tar, src):
            return _shard_source([tar], [src], classes, src.parent / CLASSES_FILE, progress, split)
        listing = _list_tar(tar, src, rest, progress)
        if listing.folders == [""]:
            raise DataError(why_no_shard(tar, src))
    if not len(listing):
        tar_inside = rest.ignored.kinds.get(".tar", (0, ""))[1]
        if src.is_dir() and tar_inside and is_shard(src / tar_inside, src / tar_inside):
            return _all_shards(src, classes, split, progress)
        raise DataError(why_no_images(src, rest.ignored))
    return _folder_source(listing, classes, src, rest, split)


def _holds_shards(src: Path, split: str | None) -> bool:
    tars = sorted(src.glob("*.tar"))
    if not tars and split and _is_below(src, split):
        tars = sorted((src / split).glob("*.tar"))
    return any(is_shard(tar, tar) for tar in tars[:1])


def _is_below(src: Path, split: str | None) -> bool:
    return bool(split) and split == Path(str(split)).name and (src / str(split)).is_dir()


def _all_shards(src: Path, classes: Path | None, split: str | None, progress: PackProgress | None) -> Source:
    shards, key_split = find_shards(src, split)
    source = _shard_source(shards, shards, classes, shards[0].parent / CLASSES_FILE, progress, key_split)
    source.notes[:0] = missing_numbers(shards)
    return source


def _list_folder(root: Path, rest: _Rest, progress: PackProgress | None, only: str | None) -> Listing:
    """All images below `root`, or below its folder `only`; links to files and folders are followed, each folder once."""
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
            raise DataError(f"{root / folder} is over {MAX_FOLDER_DEPTH} folders deep; pack the folder of the classes")
        number = None
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    rest.ignored.add_file(path)
                elif entry.is_dir():
                    if folder or only is None or entry.name == only:
                        stack.append((path, above | {here}))
                        rest.folders.add(path)
                elif image_extension(entry.name) is None:
                    rest.add(path, Place(entry.path, 0, WHOLE))
                elif only is not None and not folder:
                    continue
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


def _list_tar(tar: Path, shown: Path, rest: _Rest, progress: PackProgress | None) -> Listing:
    listing = Listing([str(tar)], [str(shown)])
    numbers: dict[str, int] = {}
    for member in members(tar, shown, rest.folders):
        folder, _, name = member.name.rpartition("/")
        if member.name.startswith(".") or "/." in member.name:
            rest.ignored.add_file(member.name)
            continue
        if folder:
            rest.folders.add(folder)
        if image_extension(name) is None:
            rest.add(member.name, Place(str(tar), member.offset, member.size))
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


def _folder_source(listing: Listing, classes: Path | None, src: Path, rest: _Rest, split: str | None) -> Source:
    picked = ""
    if split is not None:
        picked = _picked_folder(listing, src, split)
        listing = _below(listing, picked)
        rest.folders = {folder for folder in rest.folders if folder.startswith(f"{picked}/")}
    listing.prefix = class_prefix(listing.folders)
    own = [folder for folder in rest.class_files if listing.prefix.startswith(f"{folder}/" if folder else "")]
    names, notes, origin = None, [], str(src)
    if classes is not None:
        names, origin = class_file(classes), str(classes)
    elif own:
        nearest = max(own, key=len)
        origin = f"{nearest}/{CLASSES_FILE}".lstrip("/") + f" of {src.name}"
        names = read_classes(rest.class_files.pop(nearest), origin)
        notes.append(f"class order from {origin}")
    counts = np.bincount(np.array(listing.folder), minlength=len(listing.folders)).tolist()
    tree = Tree(
        source=str(src),
        images=dict(zip(listing.folders, counts, strict=True)),
        example=lambda folder: listing.path(listing.folder.index(listing.folders.index(folder))),
        visible=rest.folders,
        others=rest.files,
        listed=frozenset(names or ()),
        is_folder=src.is_dir(),
        picked=picked,
    )
    notes += check_tree(tree)
    if names is None:
        names = sorted({folder.rpartition("/")[2] for folder in listing.folders})
    for folder in rest.class_files if classes is None else ():
        rest.ignored.add_file(f"{folder}/{CLASSES_FILE}".lstrip("/"))
    notes += rest.ignored.notes("other files")
    return Source(listing, names, class_labels(listing.folders, names, origin), _key_hashes(listing), notes)


def _picked_folder(listing: Listing, src: Path, split: str) -> str:
    roots = roots_of(listing.folders, split)
    if len(roots) == 1:
        return roots[0]
    if roots:
        raise DataError(
            f"{src} holds {len(roots)} folders that '--split {split}' may mean: {some(roots)}; give the path of one"
        )
    tops = sorted({folder[len(class_prefix(listing.folders)) :].split("/")[0] for folder in listing.folders})
    raise DataError(f"{src} holds no folder of images for '--split {split}'; it holds {some(tops)}; name one of them")


def _below(listing: Listing, root: str) -> Listing:
    """The images in the folder `root` and in those inside it."""
    part = Listing(listing.files, listing.shown)
    numbers: dict[int, int] = {}
    for number, folder in enumerate(listing.folders):
        if f"{folder}/".startswith(f"{root}/"):
            numbers[number] = len(part.folders)
            part.folders.append(folder)
    for i, number in enumerate(listing.folder):
        if number in numbers:
            part.add(listing.name(i), numbers[number], listing.file[i], listing.offset[i], listing.size[i])
    return part


def _shard_source(
    shards: list[Path],
    shown: list[Path],
    classes: Path | None,
    beside: Path,
    progress: PackProgress | None,
    split: str | None = None,
) -> Source:
    listing = Listing([str(shard) for shard in shards], [str(shard) for shard in shown], folders=[""])
    keys, samples = KeySplit(split), ShardSamples(Labels(classes, beside))
    empty = Tally()
    for number, shard in enumerate(shards):
        before = keys.seen
        for key, extension, label, offset, size in samples.of(shard, shown[number]):
            if keys.takes(key):
                listing.add(f"{key}.{extension}", 0, number, offset, size, label)
        if keys.seen == before:
            empty.add(shown[number].name)
        if progress:
            progress(len(listing), 0)
    check_keys(keys.folders, split, len(listing), shown)
    hashes = _key_hashes(listing)
    names, notes, relabel = samples.labels.finish(Counter(listing.label))
    listing.label = array("i", [relabel[number] for number in listing.label])
    return Source(listing, names, None, hashes, [*notes, *empty.notes("shards without samples"), *samples.notes()])


def _key_hashes(listing: Listing) -> U64:
    """uint64 [N]. Raises DataError naming both images when two have the same key."""
    hashes = np.fromiter((key_hash(listing.key(i)) for i in range(len(listing))), np.uint64, len(listing))
    if pair := first_duplicate(hashes):
        first, second = sorted(listing.origin(i) for i in pair)
        cure = "(the path without its extension; dots become '_'); rename or remove one"
        if listing.folders == [""]:
            cure = "; keys must differ over all shards: 'cskd index --key-prefix shard' puts the shard's name in front of each"
        raise DataError(f"{first} and {second} have the same key '{listing.key(pair[0])}' {cure}".replace(" ;", ";"))
    return hashes
