"""Parquet files, and Arrow data sets, with a column of encoded images and one of labels, as Hugging Face's datasets have them.

The images of the rows are written one after the other into a spool, since a shuffled order would read a row group per image.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cskd.dataset.classes import parse_classes
from cskd.dataset.inventory_checks import MAX_IMAGE_BYTES
from cskd.errors import DataError, one_line
from cskd.files.read import open_regular, parse_json
from cskd.packing.labels import LABELS, Labels, column
from cskd.packing.listing import Listing, PackProgress
from cskd.packing.names import check_path
from cskd.packing.shard_sets import missing_numbers
from cskd.packing.split_words import chosen, in_order, some, words_in, written_word
from cskd.packing.spool import Spool
from cskd.packing.tally import Tally

AT_ONCE = 16  # rows in memory, of at most 256 MB each
_STREAM = b"\xff\xff\xff\xff"  # where an Arrow stream begins
_IMAGES = "image img images picture photo png jpg jpeg bytes"
_AGAIN = "copy or download it again"
_KINDS = (  # extension, offset, bytes there
    ("jpg", 0, b"\xff\xd8\xff"),
    ("png", 0, b"\x89PNG\r\n\x1a\n"),
    ("webp", 8, b"WEBP"),
    ("gif", 0, b"GIF8"),
    ("bmp", 0, b"BM"),
    ("tif", 0, b"II*\0"),
    ("tif", 0, b"MM\0*"),
    ("ppm", 0, b"P6"),
    ("pgm", 0, b"P5"),
)
_UNREAD = (("avif", 4, b"ftypavi"), ("heic", 4, b"ftyp"), ("jxl", 0, b"\xff\x0a"), ("svg", 0, b"<svg"))


@dataclass(frozen=True)
class _Columns:
    """What the columns of a file are."""

    image: str
    label: str
    names: list[str] | None  # of the classes, where the file says them


def is_table(path: Path) -> bool:
    """Whether a file is parquet or Arrow."""
    with os.fdopen(open_regular(path), "rb") as file:
        start = file.read(6)
    return start.startswith(b"PAR1") or start == b"ARROW1" or (start[:4] == _STREAM and path.suffix == ".arrow")


def tables_of_split(root: Path, paths: Collection[str], split: str | None) -> list[Path]:
    """The files of one split in one folder, sorted; the split is a word of their names, else of the nearest folder's.

    Raises:  DataError for several splits where none was asked for, none like `split`, or files of one in several folders.
    """
    groups: dict[str | None, list[str]] = {}
    for path in sorted(paths):
        pure = PurePosixPath(path)
        word = written_word(pure.stem) or next((part for part in reversed(pure.parent.parts) if words_in(part)), None)
        groups.setdefault(word, []).append(path)
    known = {name for name in groups if name is not None}
    shown = some(in_order(known)) or "unnamed"
    if split is None:
        if len(groups) > 1:
            first = in_order(known)[0]
            raise DataError(
                f"{root} holds tables of the splits {shown}; pick one with --split {first}, or give its files alone"
            )
        taken = next(iter(groups.values()))
    else:
        picked = chosen(known, split)
        if len(picked) != 1:
            raise DataError(
                f"{root} holds no tables of a split '{split}' alone; its splits are {shown}; name one of them"
            )
        taken = groups[picked.pop()]
    folders = sorted({path.rpartition("/")[0] or "." for path in taken})
    if len(folders) > 1:
        raise DataError(
            f"{root} holds tables in {len(folders)} folders: {some(folders)}; give the folder of one data set"
        )
    return [root / path for path in taken]


def read_tables(
    paths: list[Path], root: Path, asked: str | None, spool: Spool, progress: PackProgress | None
) -> tuple[Listing, list[str], Labels, list[str]]:
    """The images of tables in a spool, the label of each as text, what is known of the classes, and notes.

    An image's key is the file's path and the number of its row. `asked`: the name of the label column.
    Raises:  DataError where pyarrow is missing, for damaged files, rows without image or label, or columns that are not clear.
    """
    listing, values, tally = Listing([str(spool.path)], [str(root)]), list[str](), Tally()
    columns: _Columns | None = None
    taken = 0
    for number, path in enumerate(paths):
        taken += path.stat().st_size
        shown = path.relative_to(root).as_posix() if path != root else path.name
        check_path(shown, str(root))
        listing.folders.append(shown.rpartition(".")[0])
        rows = _batches(path, asked)
        here = next(rows)
        if columns is not None and here != columns:
            raise DataError(
                f"{shown} and {paths[0].name} in {root} have other columns or class names; pack one data set at a time"
            )
        columns, row = here, 0
        for batch in rows:
            for image, label in zip(*batch, strict=True):
                data = image.as_buffer() if image.is_valid else None
                if data is None or not len(data):
                    raise DataError(
                        f"row {row} of {shown} has no image in '{columns.image}' (only a path?); write the bytes into the table"
                    )
                if len(data) > MAX_IMAGE_BYTES:
                    raise DataError(
                        f"row {row} of {shown} has an image of {len(data)} bytes, expected at most {MAX_IMAGE_BYTES}; remove it"
                    )
                kind, read = _kind(bytes(memoryview(data)[:16]))
                if read:
                    values.append(_label(label.as_py(), columns, f"row {row} of {shown}"))
                    at = spool.add(memoryview(data), taken)
                    listing.add(f"{row:08d}.{kind}", number, 0, at, len(data))
                else:
                    tally.add(f"row {row} of {shown}", kind)
                row += 1
            if progress:
                progress(len(listing), 0)
    if columns is None or not len(listing):
        raise DataError(
            f"{root} holds no rows with images that can be read ({tally.by_kind() or 'no rows'}); expected some"
        )
    labels = Labels(f"column '{columns.label}' of {root.name}", names=columns.names)
    notes = [f"images from column '{columns.image}', labels from '{columns.label}'"]
    return listing, values, labels, notes + missing_numbers(paths) + tally.notes("images of kinds that are not read")


def _batches(path: Path, asked: str | None) -> Iterator[Any]:
    """First what the columns are; then the columns of images and of labels, a few rows at a time."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path} is read with pyarrow, which is not installed: pip install 'cskd[parquet]'") from None
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            start = file.read(6)
        if start.startswith(b"PAR1"):
            with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
                columns = _columns(pa, table.schema_arrow, path, asked)
                yield columns
                pair = [columns.image, columns.label]
                for batch in table.iter_batches(AT_ONCE, columns=pair, use_threads=False):
                    yield _pair(pa, batch, columns)
            return
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source) if start[:4] == _STREAM else pa.ipc.open_file(source)
            columns = _columns(pa, reader.schema, path, asked)
            yield columns
            count = reader.num_record_batches if hasattr(reader, "num_record_batches") else None
            whole = iter(reader) if count is None else (reader.get_batch(i) for i in range(count))
            for batch in whole:
                batch.validate(full=True)
                for at in range(0, batch.num_rows, AT_ONCE):
                    yield _pair(pa, batch.slice(at, AT_ONCE), columns)
    except (pa.ArrowException, OSError, MemoryError) as e:
        raise DataError(f"{path} can't be read as a table: {one_line(e)[:120]}; {_AGAIN}") from None


def _pair(pa: Any, batch: Any, columns: _Columns) -> tuple[Any, Any]:
    """The encoded images (binary or null) and the labels of some rows."""
    image, label = (batch.column(batch.schema.get_field_index(name)) for name in (columns.image, columns.label))
    if pa.types.is_struct(image.type):
        image = image.flatten()[image.type.get_field_index("bytes")]
    return image, label


def _columns(pa: Any, schema: Any, path: Path, asked: str | None) -> _Columns:
    features = _features(schema, path)
    types = {name: schema.field(name).type for name in schema.names if schema.names.count(name) == 1}

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field(kind.get_field_index("bytes")).type
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    images = [name for name, kind in types.items() if holds_images(kind)]
    place = 0 if len(images) == 1 else column(images, _IMAGES)
    if place is None:
        raise DataError(
            f"{path} has {len(images)} columns of image bytes ({some(images or schema.names, 5)}), expected one, or one called 'image'; "
            "name it so"
        )
    image = images[place]
    named = [name for name in types if _names(features, name) is not None]
    plain = [n for n, kind in types.items() if pa.types.is_integer(kind) or pa.types.is_string(kind) or n in named]
    if asked is not None:
        label = asked if asked in plain else None
        if label is None:
            raise DataError(
                f"{path} has no column of labels '{asked}'; --labels names one of: {some(plain, 8) or 'none'}"
            )
    elif len(named) == 1 and column([n for n in plain if n not in named], LABELS) is None:
        label = named[0]
    elif named:
        raise DataError(
            f"{path} has several columns of labels: {some([*named, *(n for n in plain if n not in named)], 8)}; pick one with "
            f"--labels {named[0]}"
        )
    else:
        place = column(plain, LABELS)
        if place is None:
            raise DataError(f"{path} has no column 'label', only {some(schema.names, 6)}; name one with --labels")
        label = plain[place]
    names = _names(features, label)
    return _Columns(image, label, _checked(names, path) if names is not None else None)


def _features(schema: Any, path: Path) -> dict[str, Any]:
    """What Hugging Face's datasets say of the columns, in the schema's metadata."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = parse_json(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} has a damaged note of its columns (huggingface, in the schema); {_AGAIN}") from None
    return features if isinstance(features, dict) else {}


def _names(features: dict[str, Any], name: str) -> list[Any] | None:
    feature = features.get(name)
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return names if isinstance(names, list) else None


def _checked(names: list[Any], path: Path) -> list[str]:
    """The class names, each once: a name that two classes share gets their numbers."""
    texts = [str(name) for name in names]
    times = Counter(texts)
    texts = [f"{name} ({i})" if times[name] > 1 else name for i, name in enumerate(texts)]
    checked = parse_classes("\n".join(texts).encode("utf-8", "replace"), f"the classes of {path.name}")
    if len(checked) != len(texts):
        raise DataError(f"a class name of {path} has a line break in it; mend it, or write labels as numbers")
    return checked


def _label(value: Any, columns: _Columns, where: str) -> str:
    """A label as text: the name of its class where the table has names."""
    if value is None or value == "" or (isinstance(value, int) and value < 0):
        raise DataError(
            f"{where} has no label in '{columns.label}' ({value!r}: a test set?); pack a split that has labels"
        )
    if columns.names is None or isinstance(value, str):
        return str(value)
    if value >= len(columns.names):
        raise DataError(
            f"{where} has the label {value}, expected one below {len(columns.names)}, the number of names; mend it"
        )
    return columns.names[int(value)]


def _kind(start: bytes) -> tuple[str, bool]:
    """The extension of an encoded image, and whether such images are read."""
    for known, read in ((_KINDS, True), (_UNREAD, False)):
        for extension, at, magic in known:
            if start[at:].startswith(magic):
                return extension, read
    return "unknown", False
