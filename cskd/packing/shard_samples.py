"""webdataset shards as others made them: the samples of a tar, with nothing dropped that is not listed.

A key is what webdataset takes for one: the path up to the first dot of the base name; the rest is the extension. Two things
are read that webdataset itself would drop or mix up: files of a sample that are not next to each other, and keys with dots
in them, where all that follows one first part would be a single sample (img.0001.jpg, img.0001.cls, img.0002.jpg, ...).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cskd.dataset.look_alikes import look_alike
from cskd.errors import DataError
from cskd.files.read import open_regular, parse_json
from cskd.packing.names import IMAGE_EXTENSIONS, UNREAD_IMAGES, check_path, is_metadata
from cskd.packing.shard_labels import MAX_LABEL_BYTES, ShardLabels, json_labels, may_have_label
from cskd.packing.split_words import some
from cskd.packing.tally import Tally, file_kind, plain_tar_name
from cskd.packing.tars import Member, members

_MAIN_IMAGES = re.compile(r"(input|image|img|rgb|x|0+)\.\w+")  # extensions of the image, where a sample has several
Parts = dict[str, Member]  # of one sample: extension in lower case -> file


class ShardSample(NamedTuple):
    """An image in a shard with its label: `size` bytes at `offset` of the shard's file. `extension`: its last part."""

    key: str
    extension: str
    label: int
    offset: int
    size: int


class Reading(NamedTuple):
    """How a user wants shards to be read. `label_key`: where the label of a sample is: '.id' for KEY.id, else a key of KEY.json,
    'meta.label' for one in another; `key_prefix`: 'shard' puts the shard's path in front of each key, for shards that have equal keys;
    `allow_incomplete`: leave out samples without image or label, and say how many, instead of refusing them."""

    label_key: str | None = None
    key_prefix: str | None = None
    allow_incomplete: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """What differs from the usual, as an inventory records it. DataError for a prefix that there is not."""
        if self.key_prefix not in (None, "shard"):
            raise DataError(f"the key prefix is '{self.key_prefix}', expected 'shard' or none")
        return {name: value for name, value in self._asdict().items() if value}

    def prefix_of(self, shard: Path, data: Path) -> str:
        """What stands in front of the keys of a shard in the folder `data`."""
        path = shard.relative_to(data)
        return (
            f"{path.with_name(plain_tar_name(path.name)).with_suffix('').as_posix().replace('.', '_')}/"
            if self.key_prefix
            else ""
        )


AS_USUAL = Reading()


def is_shard(tar: Path, shown: Path) -> bool:
    """Whether a tar looks like a webdataset shard, not class folders: its first files have a .cls, or a .json label.

    In class folders, texts next to images are somebody's annotations; in a flat shard they are labels.
    """
    with os.fdopen(open_regular(tar), "rb") as file:
        for key, parts in _first_samples(tar, shown):
            if any(extension.rpartition(".")[2] == "cls" for extension in parts):
                return True
            if key is None or _image(parts) is None or not may_have_label(parts):
                continue
            labels = json_labels(_json(file, parts["json"])) if "json" in parts else {}
            if any(type(label) is int for label in labels.values()) or (
                "/" not in key and (labels or "json" not in parts)
            ):
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
            image = _image(parts)
            if key is None or image is None:
                continue
            if "/" in key:
                return f"{shown} holds folders of images ({name}), not labelled samples; give it alone to 'cskd pack'"
            rest = sorted(parts.keys() - {image})
            has = f"it has .{', .'.join(rest[:4])}" if rest else "there is nothing else of that name"
            if "json" in parts and isinstance(facts := _json(file, parts["json"]), dict) and facts:
                has = f'its .json has {some(facts)}, no "label"'
            return (
                f"sample '{key}' in {shown} has no class label ({has}); add {key}.cls with a number from 0, or "
                '"label" to its .json, or sort the images into class folders'
            )
    return f"{shown} holds no samples; expected images with .cls or .json labels"


class ShardSamples:
    """Reads the shards of one data set, one after the other, and keeps what a user should know about them."""

    def __init__(self, labels: ShardLabels, allow_incomplete: bool = False) -> None:
        """allow_incomplete: leave out samples without image or label, and count them, instead of refusing them."""
        self.labels = labels
        self.incomplete = Tally() if allow_incomplete else None
        self.ignored, self.apart, self.dotted = Tally(), Tally(), Tally()

    def of(self, shard: Path, shown: Path | None = None, prefix: str = "") -> Iterator[ShardSample]:
        """The samples of a shard, in the order in which they are whole: an image and a label; other files are counted.

        Args:    shown: what messages call the shard. prefix: of the keys.
        Raises:  DataError for a damaged shard, an incomplete sample, two images or labels of one key, or a label that is none.
        """
        shown = shown or shard
        with os.fdopen(open_regular(shard), "rb") as file:
            parted: dict[str, Parts] = {}  # samples that are not whole yet
            whole: set[int] = set()  # hashes of the keys of those that were
            for key, parts in self._groups(shard, shown):
                before = parted.pop(key, {})
                if twice := sorted(parts.keys() & before.keys()):
                    raise _twice(shown, before[twice[0]], parts[twice[0]])
                parts = before | parts
                for name, files in _by_last_dot(key, parts).items():
                    if (sample := self._sample(file, shown, name, files, prefix)) is None:
                        parted[name] = files
                        continue
                    if before:
                        self.apart.add(f"'{name}' in {shown.name}")
                    if name != key:
                        self.dotted.add(f"'{name}' in {shown.name}")
                    whole.add(hash(name))
                    yield sample
            for name in parted:
                self._leave_out(file, shown, name, parted, hash(name) in whole)

    def notes(self) -> list[str]:
        """What a user should know about the shards, one line each."""
        notes = self.ignored.notes("other files", most=12)
        notes += self.incomplete.notes("samples without image or label") if self.incomplete else []
        for tally, what in (
            (
                self.apart,
                "samples whose files are not next to each other; webdataset itself would not put them together",
            ),
            (
                self.dotted,
                "samples whose keys have dots, written as '_': webdataset itself would end keys at the first dot",
            ),
        ):
            notes += [f"{tally.count} {what}: {tally.first}{' ...' * (tally.count > 1)}"] if tally.count else []
        return notes

    def _groups(self, path: Path, shown: Path) -> Iterator[tuple[str, Parts]]:
        """Neighbours of one key, as webdataset groups them; files that belong to no sample are counted."""
        for key, group in itertools.groupby(members(path, shown), lambda member: webdataset_key(member.name)):
            if key is None or is_metadata(key):
                for member in group:
                    kind = file_kind(member.name) if key is None else "__metadata__"
                    self.ignored.add(member.name, "without extension" if kind.startswith(".") else kind)
                continue
            check_path(key, str(shown))
            parts: Parts = {}
            for member in group:
                if (twin := parts.setdefault(member.name[len(key) + 1 :].lower(), member)) is not member:
                    raise _twice(shown, twin, member)
            yield key, parts

    def _sample(self, file: BinaryIO, shard: Path, key: str, parts: Parts, prefix: str) -> ShardSample | None:
        """The sample, None where it lacks its image or label."""
        image = _image(parts, f"sample '{key}' in {shard}")
        if image is None:
            return None
        label = self.labels.of(f"sample '{key}' in {shard}", parts, lambda member: _read(file, shard, member))
        if label is None:
            return None
        for extension in parts.keys() - {image, label[1]}:
            self.ignored.add(f"{key}.{extension}", _kind(extension))
        place = parts[image]
        return ShardSample(prefix + key, image.rpartition(".")[2], label[0], place.offset, place.size)

    def _leave_out(self, file: BinaryIO, shard: Path, key: str, parted: Mapping[str, Parts], again: bool) -> None:
        """Count what is not a whole sample; `again`: one of that key was.

        Raises:  DataError where samples may not be incomplete, with what is wrong and the cure.
        """
        parts, where = parted[key], f"sample '{key}' in {shard}"
        if again and _image(parts) is None and not self.labels.reads(parts):
            for extension in parts:
                self.ignored.add(f"{key}.{extension}", _kind(extension))
            return
        if self.incomplete is not None:
            self.incomplete.add(f"'{key}' in {shard.name}", _kind(min(parts)))
            return
        if again:
            raise DataError(
                f"{where} occurs twice, the second time only as {', '.join(sorted(parts))}; take that out of the shard, or leave "
                "it out with --allow-incomplete"
            )
        cure = "; mend it, or take it out of the shard"
        if alike := look_alike(key, parted):
            cure = f", '{alike[0]}' has {', '.join(sorted(parted[alike[0]]))}: {alike[1]}; give both one name"
        elif self.labels.key:
            cure = f"; --label-key is {self.labels.key}"
        has = f"it has {some(sorted(parts))}"
        if (image := _image(parts)) is None:
            unread = sorted(e for e in parts if e.rpartition(".")[2] in UNREAD_IMAGES)
            what = f"image that is read (.{unread[0]} is not: write JPEG or PNG)" if unread else f"image ({has})"
            raise DataError(f"{where} has no {what}{cure}")
        facts = _json(file, parts["json"]) if "json" in parts else None
        if isinstance(facts, dict) and facts:
            has = f"its .json has {some(facts)}"
        elif len(parts) == 1:
            has = f"it has {image} only"
        raise DataError(f'{where} has no label (.cls, or .json with "label"; {has}){cure}')


def _by_last_dot(key: str, parts: Parts) -> dict[str, Parts]:
    """One sample, or several whose keys have dots: where two or more have an image and a label of their own."""
    stems: dict[str, Parts] = {}
    for extension, member in parts.items():
        stem, _, last = extension.rpartition(".")
        stems.setdefault(stem, {})[last] = member
    whole = [stem for stem, own in stems.items() if own.keys() & IMAGE_EXTENSIONS and may_have_label(own)]
    if "" in whole or len(whole) < 2:  # its other images are masks and the like
        return {key: parts}
    return {f"{key}.{stem}".rstrip(".").replace(".", "_"): own for stem, own in stems.items()}


def _image(parts: Mapping[str, Member], sample: str = "") -> str | None:
    """The extension of the image: exactly that of a format, else one such as 'input.jpg', else the only 'NAME.jpg'.

    Raises:  DataError for two, where `sample` says what to call it.
    """
    images = sorted(extension for extension in parts if extension.rpartition(".")[2] in IMAGE_EXTENSIONS)
    exact = [extension for extension in images if extension in IMAGE_EXTENSIONS]
    found = exact or [extension for extension in images if _MAIN_IMAGES.fullmatch(extension)] or images
    if sample and len(found) > 1:
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        raise DataError(
            f"{sample} has {'two' if len(found) == 2 else len(found)} images, .{found[0]} and .{found[1]}{more}; keep one"
        )
    return found[0] if found else None


def _twice(shard: Path, one: Member, other: Member) -> DataError:
    what = "twice" if one.name == other.name else f"and {other.name}, which are one name"
    return DataError(f"{shard} has {one.name} {what}; keep one")


def _kind(extension: str) -> str:
    """An extension as it is counted: whole, without parts that count."""
    return f".{extension if not re.search(r'[0-9]{2}', extension) else extension.rpartition('.')[2]}"[:40]


def _first_samples(tar: Path, shown: Path) -> Iterator[tuple[str | None, Parts]]:
    """Key and files by extension of what the first members are."""
    for key, group in itertools.groupby(
        itertools.islice(members(tar, shown), 64), lambda member: webdataset_key(member.name)
    ):
        yield key, {member.name[len(key or "") + 1 :].lower(): member for member in group}


def webdataset_key(name: str) -> str | None:
    """The path up to the first dot of its base name; None for a name without one, which webdataset skips."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.partition(".")
    return folder + slash + stem if stem and dot else None


def _json(file: BinaryIO, member: Member) -> Any:
    """What a sidecar holds; None where it is large or no JSON."""
    if member.size > MAX_LABEL_BYTES:
        return None
    file.seek(member.offset)
    try:
        return parse_json(file.read(member.size))
    except ValueError:
        return None


def _read(file: BinaryIO, shard: Path, member: Member) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise DataError(
            f"{member.name} in {shard} has {member.size} bytes, expected a label of at most {MAX_LABEL_BYTES}"
        )
    file.seek(member.offset)
    return file.read(member.size)
