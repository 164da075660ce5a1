"""`--labels`: which image has which label, where no folder says it: CSV, TSV, lists and JSON as people have them.

Paths in such a file are names to look images up by: no path in it is ever opened.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cskd.dataset.classes import MAX_CLASSES, parse_classes
from cskd.errors import DataError, counted
from cskd.files.read import parse_json, read_file
from cskd.packing.listing import Listing
from cskd.packing.names import class_file, image_extension, label_names
from cskd.packing.split_words import some

MAX_LABEL_FILE = 1 << 29  # bytes: ImageNet's longest, LOC_train_solution.csv, has 75 MB
MAX_ROWS = 1 << 24
# Names of columns, without regard to case and to what is no letter; the first that a file has counts.
PATHS = "path filepath filename file imagepath imagefile imagename imageid image imgpath imgname img relpath fname name key id"
LABELS = (
    "label labels class classname labelname category categoryname target targets wnid synset species breed y "
    "classid labelid categoryid classindex classidx labelidx predictionstring"
)
_EXPECTED = "expected the columns 'path' and 'label', or lines PATH,LABEL"


@dataclass
class Labels:
    """The rows of a label file."""

    origin: str
    rows: dict[str, str] = field(default_factory=dict)  # path, without its extension where the file has none -> label
    names: list[str] | None = None  # all classes in label order, where the file says them
    notes: list[str] = field(default_factory=list)

    def add(self, path: str, label: str) -> None:
        """One more row. Raises DataError for a path that has another label already, or a row without one of the two."""
        path, label = _clean(path), label.strip()
        if not path or not label:
            what = f"'{path[:80]}' without a label" if path else "a row without a path"
            raise DataError(f"{self.origin} has {what} (after {len(self.rows)} rows); fill it in, or remove the row")
        if (other := self.rows.setdefault(path, label)) != label:
            raise DataError(
                f"{self.origin} gives '{path[:80]}' two labels, '{other[:40]}' and '{label[:40]}'; expected one row per image: "
                "remove one of them"
            )
        if len(self.rows) > MAX_ROWS:
            raise DataError(f"{self.origin} has over {MAX_ROWS} rows, expected one per image; divide it")


def read_labels(path: Path) -> Labels:
    """A file of paths and labels: CSV, TSV, lines PATH LABEL, JSONL, JSON.

    Raises:  DataError for a file without the two columns, a path with two labels, or text that is neither.
    """
    try:
        data = read_file(path, MAX_LABEL_FILE)
    except OSError as e:
        raise DataError(f"--labels {path} can't be read: {e.strerror or e}; {_EXPECTED}") from None
    return parse_labels(data, path.name)


def parse_labels(data: bytes, name: str, below: str = "") -> Labels:
    """The same from bytes; `name` gives the format by its extension, `below` stands in front of every path."""
    labels = Labels(name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text; {_EXPECTED}") from None
    if name.lower().endswith((".json", ".jsonl", ".ndjson")):
        rows = _json_rows(text, labels)
    else:
        rows = _table_rows(text, labels)
    read = 0
    try:
        for path, label in rows:
            labels.add(posixpath.join(below, path) if below else path, label)
            read += 1
    except csv.Error as e:
        raise DataError(f"{name} is no table: {e}; {_EXPECTED}") from None
    if not read:
        raise DataError(f"{name} has no rows; {_EXPECTED}")
    if read > len(labels.rows):
        labels.notes.append(f"{counted(read - len(labels.rows), 'row')} of {name} repeat an image with the same label")
    return labels


def merged(tables: Sequence[Labels]) -> Labels:
    """The rows of several files as those of one."""
    first = tables[0]
    for other in tables[1:]:
        for path, label in other.rows.items():
            first.add(path, label)
        first.notes += other.notes
    return first


def has_label_column(data: bytes, name: str) -> bool:
    """Whether a metadata.csv or .jsonl of Hugging Face has labels, and not captions or boxes only."""
    first = data[: 1 << 16].decode("utf-8-sig", "replace").partition("\n")[0]
    try:
        cells = json.loads(first) if name.endswith(".jsonl") else next(csv.reader([first]), [])
    except (ValueError, csv.Error, RecursionError):
        return False
    return isinstance(cells, dict | list) and "file_name" in cells and column(list(cells), LABELS) is not None


def labels_of(labels: Labels, listing: Listing, src: Path, file: Path | None) -> tuple[list[str], list[str]]:
    """The label of each image as text, and notes.

    A row is looked up by the path from the label file, the path in the source, and the ends of it, down to the name.
    Args:    file: the label file, if its folder says anything about its paths.
    Raises:  DataError for images that are in no row, or a row that could be several images.
    """
    at = [os.path.relpath(src, file.parent).replace(os.sep, "/"), str(src.resolve())] if file else []
    rows, used = labels.rows, dict[str, int]()
    found, without = [], []
    for i in range(len(listing)):
        row = next((row for row in _spellings(listing.path(i), [*at, src.name]) if row in rows), None)
        if row is None:
            without.append(listing.path(i))
            continue
        if (other := used.setdefault(row, i)) != i:
            first, second = sorted((listing.path(other), listing.path(i)))
            raise DataError(
                f"'{row[:60]}' in {labels.origin} may be {first[:60]} or {second[:60]} of {src.name}; write paths as they are "
                "in the source"
            )
        found.append(rows[row])
    if without:
        _refuse_unlabelled(labels, without, len(listing), src)
    notes = [f"labels from {labels.origin}", *labels.notes]
    if rest := len(rows) - len(used):
        first = next(row for row in rows if row not in used)
        verb = "names" if rest == 1 else "name"
        notes.append(f"{counted(rest, 'row')} of {labels.origin} {verb} no image that is there: {first[:80]}")
    return found, notes


def numbered(values: Sequence[str], labels: Labels, classes: Path | None) -> tuple[list[int], list[str], list[str]]:
    """Labels as numbers, class names in their order, and notes.

    The order is that of `classes`, else that of the file, else the sorted labels of all its rows: a class without images, as
    in a validation set, moves no other. Labels that are numbers stay what they are.
    """
    names, origin = (class_file(classes), str(classes)) if classes else (labels.names, labels.origin)
    values = [value.strip() for value in values]
    kinds = Counter(values)
    _refuse_odd(kinds, labels.origin, names or [])
    if names is not None and not kinds.keys() <= set(names) and not _all_numbers(kinds):
        unknown = sorted(kinds.keys() - set(names))
        raise DataError(
            f"{counted(len(unknown), 'label')} of {labels.origin} {'is' if len(unknown) == 1 else 'are'} not in {origin} "
            f"({len(names)} names): {some(unknown)}; add it there, or give another file with --classes"
        )
    notes: list[str] = []
    if names is None or not kinds.keys() <= set(names):
        every = set(labels.rows.values()) | set(values)
        if _all_numbers(kinds):  # of the images that are there: a row of another one makes no names of them
            every = {value for value in every if _all_numbers([value])}
            if max(map(int, every)) >= MAX_CLASSES:
                raise DataError(
                    f"{labels.origin} has the label {max(map(int, every))}, expected one below {MAX_CLASSES}"
                )
            names, notes = label_names(classes, Path(os.devnull), {int(value) for value in every})
            return [int(value) for value in values], names, notes
        _refuse_odd(every, labels.origin, [])
        names = parse_classes("\n".join(sorted(every)).encode(), f"the labels of {labels.origin}, sorted")
    place = {name: label for label, name in enumerate(names)}
    return [place[value] for value in values], names, notes


def _refuse_odd(values: Iterable[str], origin: str, names: Collection[str]) -> None:
    """DataError for a label that is no line of text, and for a number that is no class number: -1, 1.0, nan."""
    for value in values:
        if value in names:
            continue
        if not value or len(value.splitlines()) != 1 or not value.isprintable():
            raise DataError(
                f"{origin} has the label {value[:40]!r}, expected a line of text, or a number from 0; mend it"
            )
        if _ODD_NUMBER.fullmatch(value):
            raise DataError(
                f"{origin} has the label {value[:40]}, expected whole numbers from 0 to {MAX_CLASSES - 1}, or names; write "
                "those, and leave rows without a class out"
            )


def _refuse_unlabelled(labels: Labels, without: list[str], images: int, src: Path) -> None:
    first = min(without)
    if len(without) == images:
        row = next(iter(labels.rows))
        raise DataError(
            f"no image of {src} is in {labels.origin}: images are like {first[:60]}, its rows like '{row[:60]}'; write paths "
            "as they are in the source"
        )
    raise DataError(
        f"{len(without)} of {images} images of {src} are not in {labels.origin}, {first[:80]} for one; add their labels, remove "
        "them, or pick a part with --split"
    )


def _spellings(path: str, at: Iterable[str]) -> Iterator[str]:
    """What a row may call an image: from the label file, from the source, from above it, the ends of its path; each also
    without its extension."""
    every = [posixpath.normpath(f"{folder}/{path}") for folder in at]
    every.insert(1, path)
    while "/" in path:
        path = path.partition("/")[2]
        every.append(path)
    for name in every:
        yield name
        yield name.rpartition(".")[0]


def _clean(path: str) -> str:
    path = path.strip()
    if "\\" in path:
        path = path.replace("\\", "/")
    return posixpath.normpath(path) if path else path


def _all_numbers(values: Iterable[str]) -> bool:
    """Whether all are numbers as one writes them: 7, not 007."""
    return all(re.fullmatch(r"0|[1-9]\d{0,8}", value) for value in values)


# What is a number and no number of a class; 007 is a name.
_ODD_NUMBER = re.compile(r"(?i)[+-]\d+|[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?|[+-]?\d+e[+-]?\d+|nan|[+-]?inf|[1-9]\d{9,}")


def _plain(name: object) -> str:
    return re.sub("[^a-z]", "", str(name).lower())


def column(cells: Sequence[Any], known: str) -> int | None:
    """The place of the column with the first of the known names that occurs; None without any."""
    exact = [re.sub("[^a-z0-9]", "", str(cell).lower()) for cell in cells]
    if (place := next((exact.index(name) for name in known.split() if name in exact), None)) is not None:
        return place
    plain = [_plain(cell) for cell in cells]
    return next((plain.index(name) for name in known.split() if name in plain), None)


def _table_rows(text: str, labels: Labels) -> Iterator[tuple[str, str]]:
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    first = next(lines, "")
    mark = next((mark for mark in "\t,;" if mark in first), None)
    if labels.origin.lower().endswith((".csv", ".tsv")) and mark is None:
        mark = ","
    if mark is None:  # PATH LABEL, as Caffe has it; a path may have blanks
        table: Iterator[list[str]] = ([p.strip() for p in line.rsplit(None, 1)] for line in _chain(first, lines))
    else:
        table = csv.reader(_chain(first, lines), delimiter=mark, strict=True)
    head = next(table, [])
    if len(head) < 2:
        raise DataError(
            f"{labels.origin} has one column ({first[:40]!r}), {_EXPECTED}; a list of class names is for --classes"
        )
    path, label = _columns(head, labels)
    if path is None or label is None:
        path, label = 0, 1
        second = next(table, [])
        header = bool(second) and image_extension(second[0]) is not None and image_extension(head[0]) is None
        table = _chain(second, table) if header else _chain(head, _chain(second, table))
    solution = _plain(head[label]) == "predictionstring"  # 'n01978287 85 1 499 272 n01978287 ...': class and box
    for number, row in enumerate(table, 1):
        if len(row) <= max(path, label):
            if not row:
                continue
            raise DataError(f"{labels.origin}, row {number} has {counted(len(row), 'column')}; {_EXPECTED}; mend it")
        yield row[path], row[label].split()[0] if solution and row[label].strip() else row[label]


def _columns(head: Sequence[str], labels: Labels) -> tuple[int | None, int | None]:
    """The columns of path and label by a header; None, None where the first row is no header."""
    if any(image_extension(cell) for cell in head):
        return None, None
    path, label = column(head, PATHS), column(head, LABELS)
    if len(head) == 2 and ((path is None and label is None) or any(c.isdigit() for c in "".join(head))):
        return None, None  # 'img_0000,dog' is a row
    if len(head) == 2 and path is None and label is not None:
        path = 1 - label
    if path is not None and label in (None, path):
        others = [i for i in range(len(head)) if i != path and head[i].strip()]
        label = others[0] if len(others) == 1 else None
    if path is None or label is None:
        raise DataError(
            f"{labels.origin} has the columns {some([cell[:20] for cell in head], 6)}; expected 'path' and 'label' among them; "
            "rename two"
        )
    if len(head) > 2:
        labels.notes.append(f"{labels.origin}: paths from '{head[path]}', labels from '{head[label]}'")
    return path, label


def _json_rows(text: str, labels: Labels) -> Iterator[tuple[str, str]]:
    try:
        if labels.origin.lower().endswith(".json"):
            value = parse_json(text)
            value = value.get("labels", value) if isinstance(value, dict) else value
            rows: Iterable[Any] = value.items() if isinstance(value, dict) else value if isinstance(value, list) else []
        else:
            rows = (parse_json(line) for line in text.splitlines() if line.strip())
        columns: tuple[Any, Any] | None = None
        for number, row in enumerate(rows, 1):
            pair = row
            if isinstance(row, dict):
                cells = list(row)
                if columns is None:
                    path, label = column(cells, PATHS), column(cells, LABELS)
                    if path is None or label is None:
                        raise DataError(
                            f"{labels.origin} has the keys {some(cells, 6)}; expected 'path' and 'label'; rename two"
                        )
                    columns = cells[path], cells[label]
                pair = [row.get(column, "") for column in columns]
            good = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
            if not good or type(pair[1]) not in (str, int):
                raise DataError(
                    f"{labels.origin}, row {number} is {str(row)[:60]!r}, expected a path and one label; mend it"
                )
            yield pair[0], str(pair[1])
    except ValueError as e:
        raise DataError(
            f"{labels.origin} is no JSON: {str(e)[:80]}; mend it, or write PATH,LABEL to a CSV file"
        ) from None


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
