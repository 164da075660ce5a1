"""webdataset shards as others made them: the samples of a tar by webdataset's own rules, but with nothing dropped."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cskd.errors import DataError
from cskd.packing.names import IMAGE_EXTENSIONS, check_path, is_metadata
from cskd.packing.tars import Member, members
from cskd.untrusted import open_regular, parse_json

MAX_LABEL_BYTES = 1 << 20
MAX_BRACES = 16
MAX_SHARDS = 1 << 20  # that braces may stand for
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


class ShardSample(NamedTuple):
    """An image in a shard with its label: `size` bytes at `offset` of the shard's file."""

    key: str
    extension: str
    label: int
    offset: int
    size: int


@dataclass
class Tally:
    """Files that were passed over, counted, with one of them to show."""

    count: int = 0
    first: str = ""

    def add(self, name: str) -> None:
        """One more; the smallest name is shown, so that the order of a folder doesn't matter."""
        self.first = min(self.first, name) if self.count else name
        self.count += 1

    def notes(self, what: str) -> list[str]:
        """A line for the user, or none."""
        more = " ..." if self.count > 1 else ""
        return [f"{self.count} {what} passed over: {self.first}{more}"] if self.count else []


def expand_shards(spec: Path) -> list[Path]:
    """The shards that a folder, a glob, a {000..146} or a {a,b} names, sorted. Raises DataError when there are none."""
    if spec.is_dir():
        found = list(spec.glob("*.tar"))
    else:
        found = [
            Path(name) for text in _braces(str(spec)) for name in (glob.glob(text) if glob.has_magic(text) else [text])
        ]
    if not found:
        raise DataError(f"no .tar files at {spec}; expected webdataset shards (decompressed)")
    for shard in found:
        if not shard.is_file():
            raise DataError(f"no shard at {shard}; expected a folder, glob or {{000..999}} of webdataset shards")
    return sorted(set(found))


def is_shard(tar: Path, shown: Path) -> bool:
    """Whether a tar looks like a webdataset shard, not class folders: its first files have a .cls, or a .json label."""
    with os.fdopen(open_regular(tar), "rb") as file:
        for key, group in itertools.groupby(
            itertools.islice(members(tar, shown), 64), lambda member: _key(member.name)
        ):
            parts = {member.name[len(key or "") + 1 :].lower(): member for member in group}
            if "cls" in parts:
                return True
            if key and parts.keys() & IMAGE_EXTENSIONS:
                with contextlib.suppress(DataError):  # a .json of another kind
                    if _label(file, shown, key, parts) is not None:
                        return True
    return False


def shard_samples(shard: Path, incomplete: Tally | None = None, shown: Path | None = None) -> Iterator[ShardSample]:
    """The samples of a shard, in order: consecutive members of one key, an image and a label.

    A label is KEY.cls (an integer in ASCII) or KEY.json with an integer "label"; other members are left alone.
    Args:    incomplete: counts samples without image or label; without it they are a DataError.
             shown: what messages call the shard.
    Raises:  DataError for a damaged shard, an incomplete sample, two images of one key, or a label that is none.
    """
    with os.fdopen(open_regular(shard), "rb") as file:
        yield from _samples(file, shown or shard, members(shard, shown), incomplete)


def _samples(file: BinaryIO, shard: Path, files: Iterable[Member], incomplete: Tally | None) -> Iterator[ShardSample]:
    for key, group in itertools.groupby(files, lambda member: _key(member.name)):
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
        else:
            missing = 'label (.cls, or .json with "label")' if images else f"image (it has {', '.join(sorted(parts))})"
            raise DataError(f"sample '{key}' in {shard} has no {missing}; mend it, or take it out of the shard")


def _key(name: str) -> str | None:
    """The path up to the first dot of its base name; None for a name without one, which webdataset skips."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.partition(".")
    return folder + slash + stem if stem and dot else None


def _label(file: BinaryIO, shard: Path, key: str, parts: dict[str, Member]) -> int | None:
    if "cls" in parts:
        text = _read(file, shard, parts["cls"]).strip()
        if not re.fullmatch(rb"\d{1,9}", text):
            raise DataError(f"sample '{key}' in {shard} has the label {text[:40]!r}, expected a number from 0")
        return int(text)
    if "json" not in parts:
        return None
    try:
        label: Any = parse_json(_read(file, shard, parts["json"])).get("label")
    except (ValueError, AttributeError):
        raise DataError(f"{key}.json in {shard} is no JSON object; mend it") from None
    if label is not None and (type(label) is not int or not 0 <= label < 10**9):
        raise DataError(f"sample '{key}' in {shard} has the label {label!r} in its .json, expected a number from 0")
    return label


def _read(file: BinaryIO, shard: Path, member: Member) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise DataError(
            f"{member.name} in {shard} has {member.size} bytes, expected a label of at most {MAX_LABEL_BYTES}"
        )
    file.seek(member.offset)
    return file.read(member.size)


def _braces(text: str) -> list[str]:
    """`a{0..2}` is a0, a1, a2 and `a{x,y}` is ax, ay; leading zeros keep the width."""
    _refuse_many(MAX_SHARDS + 1 if text.count("{") > MAX_BRACES else 1, text)
    found = _BRACES.search(text)
    if found is None:
        return [text]
    if bounds := _RANGE.fullmatch(found[1]):
        width = len(bounds[1])
        _refuse_many(int(bounds[2]) - int(bounds[1]) + 1, text)
        options = [f"{number:0{width}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        options = found[1].split(",")
    head, tails = text[: found.start()], _braces(text[found.end() :])
    _refuse_many(len(options) * len(tails), text)
    return [head + option + tail for option in options for tail in tails]


def _refuse_many(count: int, text: str) -> None:
    if count > MAX_SHARDS:
        raise DataError(
            f"{text} stands for {count} shards or more, expected at most {MAX_SHARDS}; name the folder they are in"
        )
