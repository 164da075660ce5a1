"""What a user gives to `cskd pack`, as columns of about 60 bytes per sample: class folders, a tar of them, or shards.

A class is a folder that holds images; folders above the classes that all of them share are left out of the keys. So a
folder, a tar of it and a tar of the folder it is in have the same samples.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np

from cskd.dataset.inventory import first_duplicate
from cskd.errors import DataError
from cskd.files.read import open_regular
from cskd.packing.imagenet import VAL_IMAGE
from cskd.packing.label_files import find_labels
from cskd.packing.labels import Labels, labels_of, numbered
from cskd.packing.layout import Tree, check_keys, check_tree, class_prefix
from cskd.packing.listing import Lister, Listing, PackProgress, Rest
from cskd.packing.names import CLASSES_FILE, check_labels, class_file, class_labels, read_classes
from cskd.packing.no_images import why_no_images
from cskd.packing.places import WHOLE, Place
from cskd.packing.shard_labels import ShardLabels
from cskd.packing.shard_samples import AS_USUAL, Reading, ShardSamples, is_shard, why_no_shard
from cskd.packing.shard_sets import find_shards, is_pattern, missing_numbers
from cskd.packing.split_words import KeySplit, chosen, roots_of, some
from cskd.packing.spool import Spool
from cskd.packing.tables import is_table, read_tables, tables_of_split
from cskd.packing.tally import Tally
from cskd.packing.tars import decompressed
from cskd.packing.zips import is_zip
from cskd.seeds import U64, key_hash


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
    labels: Path | None = None,
    reading: Reading = AS_USUAL,
) -> Source:
    """List the images of `src` and give each its label and key.

    Args:    src: a folder of class folders; a tar, also compressed, or a zip of one; a folder or tar of such archives; parquet
             files or Arrow data sets of Hugging Face; webdataset shards: a folder, glob or {a..b}.
             classes: class file; without it the source's own classes.txt, else the sorted names of the class folders.
             work: folder for a decompressed copy, or the images of tables, of at most `max_spool` bytes.
             split: take that folder of a source, or the shards or keys with that word, and nothing else.
             labels: file of paths and labels, or ImageNet's development kit, in place of class folders; of tables the column.
             reading: of webdataset shards, which a source is where it says something.
    Raises:  DataError for anything in the source that would change what it means if it were passed over.
    """
    src = Path(src)
    option = f"--{min(reading.given).replace('_', '-')}" if reading.given else ""
    if option and labels is not None:
        raise DataError(f"{option} is for webdataset shards, which have no file of --labels; leave one of them out")
    if option and src.is_file() and (is_zip(src) or is_table(src)):
        raise DataError(f"{option} is for webdataset shards, and {src} is none; leave it out")
    if labels is None and (is_pattern(src) or (src.is_dir() and (reading.given or _holds_shards(src, split)))):
        return _all_shards(src, classes, split, reading, progress)
    if not src.exists():
        raise DataError(f"nothing at {src}; expected a folder of class folders, a tar of one, or webdataset shards")
    lister = Lister(progress)
    if src.is_dir():
        lister.folder(src, split if _is_below(src, split) else None)
    elif is_table(src):
        return _table_source([src], src, classes, labels, Spool(work / "images", src, max_spool), progress)
    else:
        file = decompressed(src, work, max_spool)
        if labels is None and not is_zip(src) and (reading.given or is_shard(file, src)):
            return _shard_source([file], [src], classes, src.parent / CLASSES_FILE, reading, progress, split)
        lister.archive(Place(str(file), 0, WHOLE), str(src))
    listing, rest = lister.listing, lister.rest
    if not len(listing) and rest.tables and src.is_dir():
        tables = tables_of_split(src, rest.tables, split)
        return _table_source(tables, src, classes, labels, Spool(work / "images", src, max_spool), progress)
    if not len(listing):
        tar_inside = rest.ignored.kinds.get(".tar", (0, ""))[1]
        if labels is None and src.is_dir() and tar_inside and is_shard(src / tar_inside, src / tar_inside):
            return _all_shards(src, classes, split, reading, progress)
        lister.archives(split) and lister.archives(split)  # archives in a folder, and in those: the tars of ImageNet
    if not len(listing):
        raise DataError(why_no_images(src, rest.ignored))
    return _folder_source(listing, classes, src, rest, split, labels, work)


def _holds_shards(src: Path, split: str | None) -> bool:
    tars = sorted(src.glob("*.tar"))
    if not tars and split and _is_below(src, split):
        tars = sorted((src / split).glob("*.tar"))
    first = next((tar for tar in tars if not _is_empty(tar)), None)
    return first is not None and is_shard(first, first)


def _is_empty(tar: Path) -> bool:
    """Whether it has no member: a tar begins with a block of zeros then."""
    with open(open_regular(tar), "rb") as file:
        return not any(file.read(BLOCKSIZE))


def _is_below(src: Path, split: str | None) -> bool:
    return bool(split) and split == Path(str(split)).name and (src / str(split)).is_dir()


def _all_shards(
    src: Path, classes: Path | None, split: str | None, reading: Reading, progress: PackProgress | None
) -> Source:
    shards, key_split = find_shards(src, split)
    source = _shard_source(shards, shards, classes, shards[0].parent / CLASSES_FILE, reading, progress, key_split)
    source.notes[:0] = missing_numbers(shards)
    return source


def _folder_source(
    listing: Listing,
    classes: Path | None,
    src: Path,
    rest: Rest,
    split: str | None,
    labels: Path | None,
    work: Path,
) -> Source:
    picked = ""
    if split is not None and (picked := _picked_folder(listing, src, split)):
        listing = _below(listing, picked)
        rest.folders = {folder for folder in rest.folders if folder.startswith(f"{picked}/")}
    if found := find_labels(listing, src, rest.metadata, picked, labels, work):
        return _label_source(listing, *found, classes, src, rest)
    if VAL_IMAGE.fullmatch(listing.name(0)):
        raise DataError(
            f"{src} holds ImageNet's validation images, whose labels are elsewhere; put ILSVRC2012_devkit_t12.tar.gz next to it, "
            "or give LOC_val_solution.csv with --labels"
        )
    if listing.folders == [""] and not src.is_dir() and not listing.zips:
        raise DataError(why_no_shard(Path(listing.files[0]), src))
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
        archives=frozenset(listing.archives),
        is_folder=src.is_dir() and not listing.archives,
        picked=picked,
    )
    notes += check_tree(tree)
    if names is None:
        names = sorted({folder.rpartition("/")[2] for folder in listing.folders})
    for folder in rest.class_files if classes is None else ():
        rest.ignored.add_file(f"{folder}/{CLASSES_FILE}".lstrip("/"))
    notes += rest.notes()
    return Source(listing, names, class_labels(listing.folders, names, origin), _key_hashes(listing), notes)


def _label_source(
    listing: Listing, labels: Labels, file: Path | None, classes: Path | None, src: Path, rest: Rest
) -> Source:
    tops = class_prefix([f"{folder}/" for folder in listing.folders])
    listing.prefix = tops.lstrip("/")
    values, notes = labels_of(labels, listing, src, file)
    return _numbered_source(listing, values, labels, classes, notes + rest.notes())


def _table_source(
    tables: list[Path],
    src: Path,
    classes: Path | None,
    labels: Path | None,
    spool: Spool,
    progress: PackProgress | None,
) -> Source:
    with closing(spool):
        listing, values, known, notes = read_tables(tables, src, str(labels) if labels else None, spool, progress)
    listing.prefix = class_prefix(listing.folders)
    return _numbered_source(listing, values, known, classes, notes)


def _numbered_source(
    listing: Listing, values: list[str], known: Labels, classes: Path | None, notes: list[str]
) -> Source:
    numbers, names, more = numbered(values, known, classes)
    listing.label = array("i", numbers)
    check_labels(Counter(numbers), named=bool(classes or known.names) or len(set(known.rows.values())) > 1)
    return Source(listing, names, None, _key_hashes(listing), notes + more)


def _picked_folder(listing: Listing, src: Path, split: str) -> str:
    """The folder of the split; '' where the source as a whole is named so."""
    roots = roots_of(listing.folders, split)
    if not roots and chosen({src.name}, split):
        return ""
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
    part = Listing(listing.files, listing.shown, zips=listing.zips, archives=listing.archives)
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
    reading: Reading,
    progress: PackProgress | None,
    split: str | None = None,
) -> Source:
    listing = Listing([str(shard) for shard in shards], [str(shard) for shard in shown], folders=[""])
    keys, samples = (
        KeySplit(split),
        ShardSamples(ShardLabels(classes, beside, reading.label_key), reading.allow_incomplete),
    )
    empty, data = Tally(), Path(os.path.commonpath([shard.parent for shard in shown]))
    for number, shard in enumerate(shards):
        before, prefix = keys.seen, reading.prefix_of(shown[number], data)
        for key, extension, label, offset, size in samples.of(shard, shown[number], prefix):
            if keys.takes(key.removeprefix(prefix)):
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
        if listing.folders == [""] and listing.file[pair[0]] == listing.file[pair[1]]:
            cure = "; rename one, or take it out"
        elif listing.folders == [""]:
            cure = "; keys must differ over all shards: --key-prefix shard puts the shard's name in front of each"
        raise DataError(f"{first} and {second} have the same key '{listing.key(pair[0])}' {cure}".replace(" ;", ";"))
    return hashes
