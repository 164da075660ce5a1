"""How the samples of webdataset shards say their class: .cls, a key of a .json, another file, as a number or as a name.

A sample's label is looked for in this order; what the first sample has decides between the lines of the table:

    1  NAME.cls; else .class, .label, .target, .y, and the keys of .json: label, class, target, cls, y, else class_id, ...
    2  NAME.id, .index, .inx, .idx
    3  NAME.txt, .text: one short line

Two of one line that differ are refused, with what there is to choose from by `--label-key`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cskd.dataset.classes import CONTROL, MAX_CLASS_NAME, MAX_CLASSES
from cskd.errors import DataError
from cskd.files.read import parse_json
from cskd.packing.names import (
    IMAGE_EXTENSIONS,
    check_labels,
    check_look_alikes,
    class_file,
    label_names,
    unknown_class,
)
from cskd.packing.split_words import some
from cskd.packing.tars import Member

MAX_LABEL_BYTES = 1 << 20
MAX_LABEL = 10**9
MOST_CAPTION = 64  # characters of a .txt that may be a class name
JSON = ("json", "jsn")
FILES = (("class", "label", "target", "y"), ("id", "index", "inx", "idx"), ("txt", "text"))  # by line of the table
KEYS = (
    frozenset(["label", "class", "target", "cls", "y"]),
    frozenset(
        f"{what}{end}"
        for what in ("class", "label", "category", "target")
        for end in ("_id", "_idx", "_index", "_name", "id", "idx", "index", "name")
    )
    | {"category", "wnid", "synset"},
)
LABEL_FILES = frozenset(["cls", *JSON, *(name for line in FILES for name in line)])
_DIGITS = re.compile(r"\d{1,9}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf(inity)?", re.IGNORECASE)

Read = Callable[[Member], bytes]
Found = dict[str, Any]  # where -> value


class ShardLabels:
    """The label of each sample of a data set of shards, and in the end the names of the classes.

    Names that no class list orders get numbers below 0 until all are known: see `finish`.
    """

    def __init__(self, classes: Path | None, beside: Path, key: str | None = None) -> None:
        """Args:    classes, beside: a class file that the user names, or that may be next to the shards.
                    key: where the label is: '.EXTENSION', else a key of the .json, 'meta.label' for one inside another.
        Raises:  DataError for a class file that is none.
        """
        self.classes, self.beside, self.key = classes, beside, key
        self.origin = classes if classes is not None else beside if beside.is_file() else None
        self.listed = class_file(self.origin) if self.origin else []
        self._place = {name: label for label, name in enumerate(self.listed)}
        self._names: dict[str, int] = {}  # that samples have, where there is no list -> number below 0
        self._examples: dict[str, str] = {}  # 'number' or 'name' -> of which sample
        self._line: int | None = None  # of the table above
        self._json_key = ""
        self._where = ""

    def of(self, sample: str, parts: Mapping[str, Member], read: Read) -> tuple[int, str] | None:
        """The label of a sample and the extension of the file that says it; None where nothing does.

        Args:    sample: what messages call it. parts: its files by extension.
        Raises:  DataError for several labels, or one that is neither a number nor a name.
        """
        lines = iter([(0, self._chosen(sample, parts, read))]) if self.key else self._lines(sample, parts, read)
        for line, found in lines:
            if not found:
                continue
            labels = {where: self._number(sample, where, value) for where, value in found.items()}
            if len(set(labels.values())) > 1:
                values = some([f"{where} = {str(value).strip()[:20]!r}" for where, value in found.items()])
                raise DataError(
                    f"{sample} has {len(found)} labels ({values}); choose with --label-key {_key_of(found)}"
                )
            where = next(iter(labels))
            self._hold(sample, line, where)
            return labels[where], where.removeprefix(".").partition(" ")[0]
        return None

    def reads(self, parts: Mapping[str, Member]) -> bool:
        """Whether one of these files may say a label, as far as the first sample or `--label-key` decided."""
        names = (
            LABEL_FILES
            if self._line is None
            else frozenset([*FILES[self._line], *(("cls", *JSON) if self._line == 0 else ())])
        )
        if self.key:
            names = frozenset([self.key[1:].lower()] if self.key.startswith(".") else JSON)
        return any(extension in names or extension.rpartition(".")[2] in names for extension in parts)

    def finish(self, counts: Mapping[int, int]) -> tuple[list[str], list[str], dict[int, int]]:
        """The names of the classes, notes, and the label for each number that `of` gave and that occurs (-> samples).

        Raises:  DataError where numbers and names occur, names are captions or look alike, there is one class only without a
                 list, or there are fewer names than labels.
        """
        notes = [f"labels from {self._where}"] if self._where not in ("", ".cls", ".json label") else []
        if min(counts) >= 0:
            names, more = label_names(self.classes, self.beside, counts)
            check_labels(counts, named=self.origin is not None)
            return names, notes + more + check_look_alikes(names, str(self.origin)), {label: label for label in counts}
        if max(counts) >= 0:
            raise DataError(
                f"some labels are numbers ({self._examples['number']}) and some are names ({self._examples['name']}); give the "
                "file of all names in label order with --classes, or choose with --label-key"
            )
        by_number = {number: name for name, number in self._names.items()}
        names = sorted(by_number[number] for number in counts)
        total = sum(counts.values())
        if len(names) > max(10, total // 2):
            raise DataError(
                f"the labels of {total} samples are {len(names)} different texts ({some(sorted(names, key=len), 2)}), it seems "
                f"no classes but captions ({self._where}); choose with --label-key, or give the class names with --classes"
            )
        if len(names) == 1:
            raise DataError(
                f"all {total} sample(s) are of the class '{names[0][:80]}' ({self._where}), expected two classes or more; mend the labels, "
                "or, for a part of the classes, give a file of all their names with --classes"
            )
        notes.append(f"{len(names)} class names from the samples, labels in the order of the names")
        notes += check_look_alikes(names, "the shards")
        return names, notes, {number: names.index(by_number[number]) for number in counts}

    def _lines(self, sample: str, parts: Mapping[str, Member], read: Read) -> Iterator[tuple[int, Found]]:
        """What there is, line by line of the table; of the first sample's line only, once there is one."""
        for line, names in enumerate(FILES):
            if self._line not in (None, line):
                continue
            files = (_files(parts, ("cls",)) if line == 0 else {}) or _files(parts, names)
            found: Found = {where: _text(sample, where, read(member)) for where, member in files.items()}
            if line == 0 and not any(where.endswith("cls") for where in found):
                for where, member in _files(parts, JSON).items():
                    value = _json(sample, where, read(member))
                    found |= {f"{where} {key}".rstrip(): v for key, v in _candidates(value)}
            if line == 2:
                found = {where: text for where, text in found.items() if _is_short(text)}
            yield line, found

    def _chosen(self, sample: str, parts: Mapping[str, Member], read: Read) -> Found:
        """What `--label-key` names."""
        key = str(self.key)
        if key.startswith(".") and key[1:].lower() not in JSON:
            member = parts.get(key[1:].lower())
            if member is None or key[1:].lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
                return {}
            return {key.lower(): _text(sample, key, read(member))}
        found: Found = {}
        for where, member in _files(parts, JSON).items():
            value = _json(sample, where, read(member))
            if key == where:
                found |= {f"{where} {path}".rstrip(): v for path, v in _candidates(value)}
                continue
            if isinstance(value, dict) and key in value:
                value = value[key]
            else:
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                found[f"{where} {key}"] = value
        return found

    def _hold(self, sample: str, line: int, where: str) -> None:
        """The first sample decides where labels are."""
        self._where = self._where or where
        self._line = line
        json_key = where.partition(" ")[2]
        if json_key and self._json_key and json_key != self._json_key:
            raise DataError(
                f"{sample} has its label under '{json_key}', those before it under '{self._json_key}'; mend it, or choose with "
                f"--label-key {json_key}"
            )
        self._json_key = self._json_key or json_key

    def _number(self, sample: str, where: str, value: object) -> int:
        """The label that a value stands for. Raises DataError for one that is neither a number nor a name."""
        is_json = " " in where or where.rpartition(".")[2] in JSON
        shown = f"{str(value).strip()[:40]!r}{' as text' if is_json and isinstance(value, str) else ''} in its {where}"
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and 0 <= value < MAX_LABEL:
            self._examples.setdefault("number", f"{sample}: {value}")
            return value
        name = value.strip() if isinstance(value, str) else ""
        if name.isascii() and _DIGITS.fullmatch(name):
            number = int(name)
            if is_json and self._place.get(name, number) != number:
                raise DataError(
                    f"{sample} has the label {shown}: {self.origin} has that name in line {self._place[name] + 1}, and "
                    "another one at that number; write a number for a place, else a name that is none"
                )
            self._examples.setdefault("number", f"{sample}: {number}")
            return number
        if not name or _NUMBER.fullmatch(name) or CONTROL.search(name) or len(name) > MAX_CLASS_NAME:
            raise DataError(f"{sample} has the label {shown}, expected a number from 0 or the name of a class; mend it")
        self._examples.setdefault("name", f"{sample}: {name[:40]}")
        if not self.origin:
            if len(self._names) >= MAX_CLASSES and name not in self._names:
                raise DataError(
                    f"{sample} has class number {MAX_CLASSES + 1}, '{name[:40]}', expected at most {MAX_CLASSES}"
                )
            return self._names.setdefault(name, -1 - len(self._names))
        if name not in self._place:
            raise DataError(f"{sample} has the label {unknown_class(name, self.listed, str(self.origin))}")
        return self._place[name]


def may_have_label(parts: Mapping[str, Member]) -> bool:
    """Whether one of the files of a sample is of a kind that can say its label."""
    return any(extension.rpartition(".")[2] in LABEL_FILES for extension in parts)


def json_labels(value: object) -> Found:
    """The keys of a .json that may be the label, with their values."""
    return dict(_candidates(value))


def _files(parts: Mapping[str, Member], names: tuple[str, ...]) -> dict[str, Member]:
    """Files by '.extension': those of exactly one of the names, else those whose last part is one ('target.cls')."""
    exact = {f".{extension}": member for extension, member in parts.items() if extension in names}
    return exact or {f".{e}": member for e, member in parts.items() if e.rpartition(".")[2] in names}


def _candidates(value: object) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [("", value)] if isinstance(value, int | float | str) else []
    inner = [(f"{k}.{n}", n, v) for k, inside in value.items() if isinstance(inside, dict) for n, v in inside.items()]
    for keys in KEYS:
        top = [(k, v) for k, v in value.items() if k.lower() in keys and v is not None and not isinstance(v, dict)]
        of_dicts = [(p, v) for p, _, v in inner if p.split(".")[0].lower() in keys and isinstance(v, int | float | str)]
        if top or of_dicts:
            return top + of_dicts
        if nested := [(path, v) for path, name, v in inner if name.lower() in keys and v is not None]:
            return nested
    return []


def _key_of(found: Found) -> str:
    """The first of what was found, as `--label-key` names it."""
    first = next(iter(found))
    return first.partition(" ")[2] or first


def _json(sample: str, where: str, data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError as e:
        raise DataError(f"{sample}: its {where} is no JSON ({' '.join(str(e).split())[:80]}); mend it") from None


def _text(sample: str, where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{sample} has the label {data[:20]!r} in its {where}, expected text; mend it") from None


def _is_short(text: str) -> bool:
    return 0 < len(text.strip()) <= MOST_CAPTION and not CONTROL.search(text.strip())
