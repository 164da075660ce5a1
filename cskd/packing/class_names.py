"""The names of the classes: from a class file, or, for shards, from their labels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from cskd.dataset.classes import MAX_CLASS_BYTES, MAX_CLASSES, parse_classes
from cskd.errors import DataError
from cskd.packing.places import WHOLE, Place, place_size, read_place
from cskd.packing.split_words import some


def label_names(classes: Path | None, beside: Path, labels: Collection[int]) -> tuple[list[str], list[str]]:
    """Names for the labels of shards, and notes: from a class file, else the file `beside` them, else '0', '1', ...

    Args:    labels: those that occur.
    Raises:  DataError when there are fewer names than labels, or a label without names that no codec can hold.
    """
    largest = max(labels)
    notes = ["no sample has the label 0: labels count from 0, are these 1 to the number of classes?"] * (
        min(labels) == 1
    )
    origin = classes
    if classes is None and beside.is_file():
        origin = beside
        notes.append(f"class names from {beside.name}, which is beside the shards")
    if origin is None:
        if largest >= MAX_CLASSES:
            raise DataError(
                f"the largest label is {largest}, expected one below {MAX_CLASSES}; mend the labels of the shards"
            )
        return [str(label) for label in range(largest + 1)], [*notes, "no class names given: named by their numbers"]
    names = class_file(origin)
    if largest >= len(names):
        raise DataError(
            f"{origin} has {len(names)} names, but label {largest} occurs; give the right file with --classes"
        )
    return names, notes


def check_labels(labels: Mapping[int, int], named: bool) -> None:
    """DataError where all samples of shards have one label (label -> samples) and no names say that there are more."""
    if len(labels) == 1 and not named:
        [(label, count)] = labels.items()
        raise DataError(
            f"all {count} sample(s) have the label {label}, expected two classes or more; mend the labels, "
            "or, for a part of the classes, give a file of all their names with --classes"
        )


def classes_held(names: Sequence[str], labels: Iterable[int]) -> list[str]:
    """A note that names the classes without images, if there are any."""
    held = set(labels)
    without = [name for label, name in enumerate(names) if label not in held]
    if not without:
        return []
    return [f"{len(names) - len(without)} of {len(names)} classes have images; none: {some(without)}"]


def class_file(path: Path) -> list[str]:
    """The names in the file that `--classes` gives. Raises DataError where it is none."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file"
        raise DataError(f"{path} is {found}; expected a file of class names in label order; give it with --classes")
    return read_classes(Place(str(path), 0, WHOLE), str(path))


def read_classes(place: Place, origin: str) -> list[str]:
    """The names in a class file; `origin` says where it is. Raises DataError as `parse_classes`."""
    size = place_size(place)
    if size > MAX_CLASS_BYTES:
        raise DataError(f"{origin} has {size} bytes, expected class names, at most {MAX_CLASS_BYTES} bytes of them")
    return parse_classes(read_place(place), origin)
