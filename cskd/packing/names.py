"""Which files are images, what their keys are, and how class names become labels."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import PurePosixPath

from cskd.dataset.classes import CONTROL, MAX_CLASS_NAME
from cskd.errors import DataError

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif"])
UNREAD_IMAGES = frozenset(["avif", "heic", "heif", "jxl", "jp2", "j2k", "jfif", "jpe", "psd", "svg"])
CLASSES_FILE = "classes.txt"
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

    Raises:  DataError for a folder that is not among the names, with the nearest one.
    """
    place = {name: label for label, name in enumerate(names)}
    labels = []
    for folder in folders:
        name = PurePosixPath(folder).name
        if name not in place:
            raise DataError(
                f"class folder '{folder}' is not in {origin} ({len(names)} names{_nearest(name, names)}); "
                "add it there, or give another file with --classes"
            )
        labels.append(place[name])
    return labels


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name[:MAX_CLASS_NAME], list(names)[:1000], n=1, cutoff=0.0)  # 65,535 take a minute
    return f", the nearest is '{near[0]}'" if near else ""
