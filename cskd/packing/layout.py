"""What the folders of a source say: which are classes and which are splits. What could be taken in two ways is refused.

Names and counts only: nothing here opens a file, and a tar is judged as a folder is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from cskd.errors import DataError
from cskd.packing.names import is_metadata, is_unread_image
from cskd.packing.split_words import in_order, some, split_names, split_of

_SYNSET = re.compile(r"n\d+")  # WordNet's name of a class, as in ImageNet
MANY_CLASSES = 20  # among which one class may be called 'test', if it has about as many images as the others


@dataclass(frozen=True)
class Tree:
    """The folders of a source that hold images."""

    source: str  # as the user named it
    images: Mapping[str, int]  # folder, relative to the source ('' for its own images) -> number of images
    example: Callable[[str], str]  # folder -> path of one of its images
    visible: Collection[str] = ()  # every folder of the source
    others: Mapping[str, str] | None = None  # folder -> one of its files that are no images
    listed: frozenset[str] = frozenset()  # class names of a class file
    archives: frozenset[str] = frozenset()  # those of the folders that are archives in the source
    is_folder: bool = True  # not a tar
    picked: str = ""  # the folder that --split picked; the others are left out above

    @property
    def name(self) -> str:
        return PurePath(self.source).name or self.source


def class_prefix(folders: Collection[str]) -> str:
    """The leading part that the folders above all classes share, up to and with its last '/'."""
    parents = [folder.split("/")[:-1] for folder in folders]
    shared = parents[0]
    for parent in parents:
        same = 0
        while same < min(len(shared), len(parent)) and shared[same] == parent[same]:
            same += 1
        shared = shared[:same]
    return "".join(part + "/" for part in shared)


def check_tree(tree: Tree) -> list[str]:
    """Each folder of images must be one class of one data set. Returns what a user should know about how it was read.

    Raises:  DataError for several splits, a split among the classes, images in no class folder or at different depths,
             a class in two folders or in none, or one class only; each with what picks or mends it.
    """
    prefix = class_prefix(tree.images)
    rest = {folder: folder[len(prefix) :].split("/") for folder in tree.images if folder}
    _refuse_splits(tree, prefix, list(rest.values()))
    _refuse_loose(tree)
    _refuse_nested(tree)
    _refuse_twice(tree)
    _refuse_depths(tree, rest)
    _refuse_one(tree)
    notes = _classes_in_archives(tree) + _split_among_classes(tree)
    for folder in tree.images:
        if is_metadata(f"{folder[len(prefix) :]}/"):
            raise DataError(f"{folder} in {tree.source}: webdataset skips folders named __like this__; rename it")
    if tree.picked:
        notes.append(f"taken from {tree.picked} in {tree.name}, as asked with --split")
    elif any(split_of(part) for part in prefix.split("/")):
        notes.append(f"taken from {prefix.rstrip('/')} in {tree.name}: no other folder of it holds images")
    if (deep := next((parts for parts in rest.values() if len(parts) > 1), None)) and not tree.listed:
        notes.append(f"a class is the innermost folder: '{deep[-1]}' in {'/'.join(deep)}, not '{deep[0]}'")
    return notes + _without_images(tree, prefix, flat=all(len(parts) == 1 for parts in rest.values()))


def check_keys(folders: Collection[str], split: str | None, taken: int, shards: Sequence[Path]) -> None:
    """The samples of shards must be of one split, as far as the folders in their keys tell.

    Raises:  DataError for keys of several splits where none was asked for, or of none like `split`, or no samples.
    """
    where = f"{shards[0]} ({len(shards)} shards)" if len(shards) > 1 else str(shards[0])
    if not folders:
        raise DataError(f"{where} holds no samples; expected images with .cls or .json labels")
    tops = {folder[len(class_prefix(folders)) :].split("/")[0] for folder in folders}
    if split is None and len(tops) > 1 and split_names(tops) == tops:
        names = in_order(tops)
        raise DataError(
            f"the keys in {where} are of the splits {some(names)}; pick one with --split {names[0]}, or make shards of each"
        )
    if not taken:
        raise DataError(f"neither names nor keys of {where} speak of a split '{split}'; omit --split, or give a glob")


def _refuse_splits(tree: Tree, prefix: str, rest: list[list[str]]) -> None:
    for depth in range(max(map(len, rest), default=0)):
        here = {parts[depth] for parts in rest if len(parts) > depth}
        inner = {parts[depth] for parts in rest if len(parts) > depth + 1}
        splits = split_names(here) - tree.listed
        flat = splits == here and (len(here) > 1 or depth > 0)
        if not splits or not (splits & inner or flat):
            continue
        names = in_order(splits)
        if depth:
            example = next("/".join(parts[: depth + 1]) for parts in rest if set(parts[depth : depth + 1]) & splits)
            raise DataError(
                f"{tree.source} holds the splits {some(names)} inside its folders ({prefix}{example}); expected "
                f"SPLIT/CLASS/NAME; give a folder that holds class folders, or move the images"
            )
        where = f" in {prefix.rstrip('/')}" if prefix else ""
        more = f", next to {some(in_order(here - splits))}" if here - splits else ""
        give = f" (or give {tree.name}/{prefix}{names[0]})" if tree.is_folder else ""
        raise DataError(
            f"{tree.source} holds the split{'s' * (len(names) > 1)} {some(names)}{where}{more}; "
            f"pick one with --split {names[0]}{give}"
        )


def _refuse_loose(tree: Tree) -> None:
    if "" not in tree.images:
        return
    first, count = tree.example(""), tree.images[""]
    if len(tree.images) > 1:
        raise DataError(
            f"{first} in {tree.source} is in no class folder ({count} such image(s), next to the folders); "
            f"expected CLASS/{first}; move them into one, or out of there"
        )
    raise DataError(
        f"{tree.source} holds {count} image(s) in no class folder, {first} for one, so that their labels are unknown; "
        f"expected CLASS/{first}; sort them into class folders, give their labels with --labels, or, if it is a class, the "
        "folder above"
    )


def _refuse_nested(tree: Tree) -> None:
    for folder in sorted(tree.images):
        parts = folder.split("/")
        for depth in range(1, len(parts)):
            if (above := "/".join(parts[:depth])) in tree.images:
                raise DataError(
                    f"in {tree.source}, {above} holds images and so does {folder} inside it; a class is one folder: "
                    "move the images of one of them"
                )


def _refuse_twice(tree: Tree) -> None:
    folders = sorted(tree.images)
    leaves = {folder.rpartition("/")[2] for folder in folders}
    if len(folders) > 1 and len(leaves) == 1:
        raise DataError(
            f"the images of every class of {tree.source} are one folder too deep, in '{leaves.pop()}' "
            f"({folders[0]}, {folders[1]}); expected CLASS/NAME; move them up"
        )
    by_name: dict[str, str] = {}
    for folder in folders:
        name = folder.rpartition("/")[2]
        if (other := by_name.setdefault(name, folder)) != folder:
            apart = next(a for a, b in zip(other.split("/"), folder.split("/"), strict=False) if a != b)
            raise DataError(
                f"class '{name}' is in two places of {tree.source}, {other} and {folder}; a class is one folder: "
                f"pick a part with --split {apart}, or move the images"
            )


def _refuse_depths(tree: Tree, rest: Mapping[str, list[str]]) -> None:
    high, deep = (pick(rest, key=lambda folder: (len(rest[folder]), folder)) for pick in (min, max))
    if len(rest[high]) == len(rest[deep]) or {parts[-1] for parts in rest.values()} <= tree.listed:
        return
    raise DataError(
        f"the images of {tree.source} lie at different depths, {tree.example(high)} and {tree.example(deep)}; expected "
        f"the class folders side by side; pick a part with --split {rest[deep][0]}, or name the classes with --classes"
    )


def _refuse_one(tree: Tree) -> None:
    folder, count = next(iter(tree.images.items()))
    name = folder.rpartition("/")[2]
    if len(tree.images) > 1 or name in tree.listed:
        return
    if split_names({name}):
        raise DataError(
            f"{tree.source} holds {count} image(s) in no class folder, only in {folder}, so that their labels are unknown; "
            f"expected {folder}/CLASS/NAME; sort them into class folders, or give their labels with --labels"
        )
    raise DataError(
        f"{tree.source} holds one class, '{name}' with {count} image(s), expected two or more; give the folder above "
        "the class folders, or, for a part of the classes, a file of all their names with --classes"
    )


def _classes_in_archives(tree: Tree) -> list[str]:
    """Each of many tars may be a class, as in ImageNet's own; parts of one download, which are numbered, are none."""
    classes = sorted(tree.archives & tree.images.keys())
    if not classes:
        return []
    names = [PurePath(folder).name for folder in classes]
    if len({re.sub(r"\d+", "#", name) for name in names}) < len(names) and not all(map(_SYNSET.fullmatch, names)):
        raise DataError(
            f"{tree.source} holds numbered archives of images ({some(names)}), which look like parts and not like classes; unpack "
            "them, or give the label of each image with --labels"
        )
    return [f"each archive is a class, as {classes[0]}: {len(classes)} of them"]


def _split_among_classes(tree: Tree) -> list[str]:
    """A class may be called 'train' (CIFAR-100 has one) or 'test'; a split that lies among the classes is refused."""
    notes = []
    for folder in sorted(tree.images):
        name = folder.rpartition("/")[2]
        if split_of(name) is None or name in tree.listed:
            continue
        counts = [tree.images[other] for other in tree.images if other != folder]
        alike = len(counts) >= MANY_CLASSES and min(counts) / 2 <= tree.images[folder] <= 2 * max(counts)
        if not alike and (name.lower() != "train" or len(counts) < 2):
            raise DataError(
                f"{folder} in {tree.source} has the name of a split and lies among the class folders; "
                "move it out, or, if it is a class, list all classes in a file, one a line, and give it with --classes"
            )
        notes.append(f"'{name}' is taken for a class like the folders next to it, not for a split")
    return notes


def _without_images(tree: Tree, prefix: str, flat: bool) -> list[str]:
    """Class folders without any image would shift the labels of those after them; other folders are named."""
    holding = {above for folder in tree.images for above in _and_above(folder)}
    bare = sorted(f for f in tree.visible if f not in holding and f.rpartition("/")[0] in holding | {""})
    files = {
        above: file
        for folder, file in (tree.others or {}).items()
        if not is_unread_image(file)
        for above in _and_above(folder)
    }
    empty = [f for f in bare if f not in files and flat and f"{f.rpartition('/')[0]}/".lstrip("/") == prefix]
    empty = [f for f in empty if f.rpartition("/")[2] not in tree.listed]
    if empty and not tree.listed:
        raise DataError(
            f"{len(empty)} class folder(s) of {tree.source} hold no images that can be read: {some(empty, 3)}; fill or remove them, or "
            "list all classes in a file, one a line, and give it with --classes"
        )
    named = [f"{f} ({PurePath(files[f]).name})" if f in files else f for f in bare]
    return [f"{len(bare)} folder(s) without images passed over: {some(named, 3)}"] if bare else []


def _and_above(folder: str) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]
