"""Which files are images, what their keys are, and the names of classes: in a class file, as folders, as labels of shards."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from cskd.dataset.classes import CONTROL, MAX_CLASS_BYTES, MAX_CLASSES, parse_classes
from cskd.dataset.look_alikes import difference, look_alike, look_alikes, same_form
from cskd.errors import DataError
from cskd.near import nearest
from cskd.packing.places import WHOLE, Place, place_size, read_place
from cskd.packing.split_words import some

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif"])
UNREAD_IMAGES = frozenset(["avif", "heic", "heif", "jxl", "jp2", "j2k", "jfif", "jpe", "psd", "svg"])
CLASSES_FILE = "classes.txt"
_SYNSET_LINE = re.compile(r"n\d{8}\s")  # of Kaggle's LOC_synset_mapping.txt
_RESERVED = re.compile(r"__[^/]*__/")


def image_extension(name: str) -> str | None:
    """The extension of an image file's name in lower case, without the dot; None for other files."""
    extension = name.rpartition(".")[2].lower()
    return extension if extension in IMAGE_EXTENSIONS else None


def is_unread_image(name: str) -> bool:
    """Whether a file looks like an image of a kind that is not read."""
    return name.rpartition(".")[2].lower() in UNREAD_IMAGES


def sample_key(path: str) -> str:
    """The key of the image at `path` (relative to the source): the path without its extension.

    webdataset ends a key at the first dot of the base name, so further dots there become underscores.
    """
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.rpartition(".")[0].replace(".", "_")


def check_path(path: str, origin: str) -> None:
    """Raises DataError for a path that can't become a key; `origin` says where it is from."""
    if CONTROL.search(path):
        raise DataError(f"{path!r} in {origin} has a control character in its name; rename it")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path!r} in {origin} has a name that is not UTF-8; rename it") from None


def is_metadata(key: str) -> bool:
    """Whether webdataset takes a file with this key for metadata and skips it."""
    return bool(_RESERVED.match(key))


def class_labels(folders: list[str], names: list[str], origin: str) -> list[int]:
    """The label of each class folder: the place of its last part in `names`.

    Raises:  DataError for a folder that is not among the names, with the nearest one, or names in two Unicode forms.
    """
    place = {name: label for label, name in enumerate(names)}
    check_look_alikes(names, origin)
    labels = []
    for folder in folders:
        name = PurePosixPath(folder).name
        if name not in place:
            what = unknown_class(name, names, origin)
            raise DataError(f"class folder {f'{folder}: ' if folder != name else ''}{what}")
        labels.append(place[name])
    return labels


def unknown_class(name: str, names: Sequence[str], origin: str) -> str:
    """What is wrong with a class that is not among the names of `origin`, from its name on: the nearest, or the one alike."""
    if alike := look_alike(name, names):
        return f"'{name[:80]}', which is not in {origin}; '{alike[0][:80]}' is: {alike[1]}; mend one of them"
    # Of 1,000 names at most: all 65,535 would take a minute.
    near = nearest(name, names[:1000], 0.0)
    hint = f", the nearest is '{near}'" if near else ""
    return f"'{name[:200]}' is not in {origin} ({len(names)} names{hint}); add it there, or give another file with --classes"


def check_look_alikes(names: Iterable[str], origin: str) -> list[str]:
    """A note for class names that look alike. Raises DataError where they are one text in two Unicode forms."""
    pairs = look_alikes(names)
    for one, other in pairs:
        if same_form(one, other):
            raise DataError(
                f"{origin} has two classes '{one[:40]}', and {difference(one, other)}; write one of them only"
            )
    if not pairs:
        return []
    more = f" (and {len(pairs) - 1} more pairs)" if len(pairs) > 1 else ""
    return [f"classes '{pairs[0][0]}' and '{pairs[0][1]}' are two, but {difference(*pairs[0])}{more}"]


def label_names(classes: Path | None, beside: Path, labels: Collection[int]) -> tuple[list[str], list[str]]:
    """Names for the labels of shards, and notes: from a class file, else the file `beside` them, else '0', '1', ...

    Args:    labels: those that occur.
    Raises:  DataError when there are fewer names than labels, or a label without names that no codec can hold.
    """
    largest = max(labels)
    from_one = "no sample has the label 0: labels count from 0, are these 1 to the number of classes?"
    notes = [from_one] if min(labels) == 1 else []
    origin = classes
    if classes is None and beside.is_file():
        origin = beside
        notes.append(f"class names from {beside.name}, which is next to the shards")
    if origin is None:
        if largest >= MAX_CLASSES:
            raise DataError(
                f"the largest label is {largest}, expected one below {MAX_CLASSES}; mend the shards' labels"
            )
        return [str(label) for label in range(largest + 1)], [*notes, "no class names given: named by their numbers"]
    names = class_file(origin)
    if largest >= len(names):
        raise DataError(f"{origin} has {len(names)} names, but label {largest} occurs; give another with --classes")
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
    """The names in the file that `--classes` gives; of lines 'n01440764 tench, Tinca tinca' the synset.

    Raises:  DataError where it is none.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file"
        raise DataError(f"{path} is {found}; expected a file of class names in label order; give it with --classes")
    names = read_classes(Place(str(path), 0, WHOLE), str(path))
    return [name.split()[0] for name in names] if all(_SYNSET_LINE.match(name) for name in names) else names


def read_classes(place: Place, origin: str) -> list[str]:
    """The names in a class file; `origin` says where it is. Raises DataError as `parse_classes`."""
    size = place_size(place)
    if size > MAX_CLASS_BYTES:
        raise DataError(f"{origin} has {size} bytes, expected class names, at most {MAX_CLASS_BYTES} bytes of them")
    return parse_classes(read_place(place), origin)
