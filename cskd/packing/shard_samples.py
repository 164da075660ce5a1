"""webdataset shards as others made them: the samples of a tar by webdataset's own rules, but with nothing dropped."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cskd.errors import DataError
from cskd.files.read import open_regular, parse_json
from cskd.packing.names import IMAGE_EXTENSIONS, check_path, is_metadata
from cskd.packing.split_words import some
from cskd.packing.tally import Tally
from cskd.packing.tars import Member, members

MAX_LABEL_BYTES = 1 << 20
_AS_NUMBER = 'write the shards again with the number of the class (12, not "12" or a name)'


class ShardSample(NamedTuple):
    """An image in a shard with its label: `size` bytes at `offset` of the shard's file."""

    key: str
    extension: str
    label: int
    offset: int
    size: int


def is_shard(tar: Path, shown: Path) -> bool:
    """Whether a tar looks like a webdataset shard, not class folders: its first files have a .cls, or a .json label."""
    with os.fdopen(open_regular(tar), "rb") as file:
        for key, parts in _first_samples(tar, shown):
            if "cls" in parts:
                return True
            if key and parts.keys() & IMAGE_EXTENSIONS and "json" in parts:
                label = _json(file, parts["json"]).get("label")
                # next to class folders, a text is somebody's annotation; in a flat shard, it is a label of a wrong type
                if type(label) is int or (label is not None and "/" not in key):
                    return True
    return False


def why_no_shard(tar: Path, shown: Path) -> str:
    """What a tar without labels is, and what to do with it, as a line for the user."""
    with os.fdopen(open_regular(tar), "rb") as file:
        for key, parts in _first_samples(tar, shown):
            name = next(iter(parts.values())).name
            if name.lower().endswith(".tar"):
                return (
                    f"{shown} is a tar of tars ({name} for one); unpack it, then each of those into a folder of its own "
                    "name, which is its class, and pack the folder above them"
                )
            images = sorted(parts.keys() & IMAGE_EXTENSIONS)
            if key is None or not images:
                continue
            if "/" in key:
                return f"{shown} holds folders of images ({name}), not labelled samples; give it alone to 'cskd pack'"
            rest = sorted(parts.keys() - {images[0]})
            has = f"it has .{', .'.join(rest[:4])}" if rest else "there is nothing else of that name"
            if "json" in parts and (facts := _json(file, parts["json"])):
                has = f'its .json has {some(facts)}, no "label"'
            return (
                f"sample '{key}' in {shown} has no class label ({has}); add {key}.cls with a number from 0, or "
                '"label" to its .json, or sort the images into class folders'
            )
    return f"{shown} holds no samples; expected images with .cls or .json labels"


def shard_samples(shard: Path, incomplete: Tally | None = None, shown: Path | None = None) -> Iterator[ShardSample]:
    """The samples of a shard, in order: consecutive members of one key, an image and a label.

    A label is KEY.cls (an integer in ASCII) or KEY.json with an integer "label"; other members are left alone.
    Args:    incomplete: counts samples without image or label; without it they are a DataError.
             shown: what messages call the shard.
    Raises:  DataError for a damaged shard, an incomplete sample, two images of one key, or a label that is none.
    """
    with os.fdopen(open_regular(shard), "rb") as file:
        yield from _samples(file, shard, shown or shard, incomplete)


def _samples(file: BinaryIO, path: Path, shard: Path, incomplete: Tally | None) -> Iterator[ShardSample]:
    for key, group in itertools.groupby(members(path, shard), lambda member: _key(member.name)):
        if key is None or is_metadata(key):
            continue
        parts: dict[str, Member] = {}
        for member in group:
            if (twin := parts.setdefault(member.name[len(key) + 1 :].lower(), member)) is not member:
                raise DataError(f"{shard} has {twin.name} and {member.name}, which are one name; keep one")
        images = sorted(parts.keys() & IMAGE_EXTENSIONS)
        check_path(key, str(shard))
        if len(images) > 1:
            raise DataError(f"sample '{key}' in {shard} has two images, .{images[0]} and .{images[1]}; keep one")
        label = _label(file, shard, key, parts)
        if images and label is not None:
            image = parts[images[0]]
            yield ShardSample(key, images[0], label, image.offset, image.size)
        elif incomplete is not None:
            incomplete.add(f"'{key}' in {shard.name}")
        elif _is_apart(path, key):
            raise DataError(
                f"the files of sample '{key}' in {shard} are not next to each other; make the shard again with its files "
                "in the order of their names (tar --sort=name)"
            )
        else:
            missing = 'label (.cls, or .json with "label")' if images else f"image (it has {', '.join(sorted(parts))})"
            raise DataError(f"sample '{key}' in {shard} has no {missing}; mend it, or take it out of the shard")


def _first_samples(tar: Path, shown: Path) -> Iterator[tuple[str | None, dict[str, Member]]]:
    """Key and files by extension of what the first members are."""
    for key, group in itertools.groupby(itertools.islice(members(tar, shown), 64), lambda member: _key(member.name)):
        yield key, {member.name[len(key or "") + 1 :].lower(): member for member in group}


def _is_apart(shard: Path, key: str) -> bool:
    """Whether files of a key are in two places of a shard."""
    return sum(k == key for k, _ in itertools.groupby(members(shard), lambda member: _key(member.name))) > 1


def _key(name: str) -> str | None:
    """The path up to the first dot of its base name; None for a name without one, which webdataset skips."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.partition(".")
    return folder + slash + stem if stem and dot else None


def _label(file: BinaryIO, shard: Path, key: str, parts: dict[str, Member]) -> int | None:
    if "cls" in parts:
        text = _read(file, shard, parts["cls"]).strip()
        if not re.fullmatch(rb"\d{1,9}", text):
            raise DataError(
                f"sample '{key}' in {shard} has the label {text[:40]!r}, expected a number from 0; {_AS_NUMBER}"
            )
        return int(text)
    if "json" not in parts:
        return None
    try:
        label: Any = parse_json(_read(file, shard, parts["json"])).get("label")
    except (ValueError, AttributeError):
        raise DataError(f"{key}.json in {shard} is no JSON object; mend it") from None
    if label is not None and (type(label) is not int or not 0 <= label < 10**9):
        as_text = "as text " if isinstance(label, str) else ""
        raise DataError(
            f"sample '{key}' in {shard} has the label {str(label)[:40]!r} {as_text}in its .json, expected a number from 0; "
            f"{_AS_NUMBER}"
        )
    return label


def _json(file: BinaryIO, member: Member) -> dict[str, Any]:
    """What a sidecar holds; nothing where it is large or no JSON object."""
    if member.size > MAX_LABEL_BYTES:
        return {}
    file.seek(member.offset)
    try:
        value = parse_json(file.read(member.size))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read(file: BinaryIO, shard: Path, member: Member) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise DataError(
            f"{member.name} in {shard} has {member.size} bytes, expected a label of at most {MAX_LABEL_BYTES}"
        )
    file.seek(member.offset)
    return file.read(member.size)
