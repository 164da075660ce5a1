"""Whether an inventory can be what it says: a hash proves who wrote it last, not that it is sane. No torch in here."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cskd.dataset.classes import MAX_CLASSES
from cskd.errors import DataError

MAX_IMAGE_BYTES = 1 << 28
ROWS_AT_ONCE = 1 << 16  # rows checked at a time, so that no copy of a column is made
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # pipe:, http: ... which webdataset would run or fetch

MEND = "pack or index again"


def check_header(header: dict[str, Any], path: Path) -> None:
    """Types, ranges and names. Raises DataError naming the first field that is not as expected."""

    def need(ok: bool, what: str, expected: str) -> None:
        if not ok:
            raise DataError(f"{path}: {what}, expected {expected}; {MEND}")

    def whole(value: object, low: int = 0) -> bool:
        return type(value) is int and low <= value < 1 << 62

    for name, kind in (("id", str), ("classes", list), ("blocks", list), ("shards", list), ("made", dict)):
        need(isinstance(header.get(name), kind), f"its '{name}' is no {kind.__name__}", "an inventory's header")
    need(isinstance(header.get("notes"), list), "its 'notes' are no list", "an inventory's header")
    need(all(isinstance(note, str) for note in header["notes"]), "a note is no text", "texts")
    n, classes, blocks = header.get("num_samples"), header["classes"], header["blocks"]
    need(whole(n, 1), f"it has {str(n)[:40]} samples", "at least one")
    need(1 <= len(classes) <= MAX_CLASSES, f"it has {len(classes)} classes", f"1 to {MAX_CLASSES}")
    need(all(isinstance(name, str) for name in classes), "a class name is no text", "texts")
    need(len(blocks) > 1 and all(whole(b) for b in blocks), "its blocks are no numbers", "first samples of blocks")
    rising = all(a < b for a, b in pairwise(blocks))
    need(rising and blocks[0] == 0 and blocks[-1] == n, "its blocks do not rise from 0 to the samples", "that")
    for shard in header["shards"]:
        known = isinstance(shard, dict) and isinstance(shard.get("name"), str) and whole(shard.get("bytes"))
        need(known, f"the shard {str(shard)[:80]} has no name and bytes", "both")
        check_shard_name(shard["name"], path)
    root = header.get("root", "/")
    good_root = isinstance(root, str) and PurePath(root).is_absolute() and ".." not in PurePath(root).parts
    need(good_root and not _CONTROL.search(root), f"its 'root' is {str(root)[:80]!r}", "the path of the shards' folder")
    columns = header.get("columns")
    sound = isinstance(columns, dict) and all(isinstance(c, dict) and "sha256" in c for c in columns.values())
    need(sound, "its 'columns' have no sha256", "one each")


def check_shard_name(name: str, path: Path) -> None:
    """DataError for a name that leads out of the data folder, or that another program could take for a command."""
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or _SCHEME.match(name) or _CONTROL.search(name):
        raise DataError(
            f"{path} names the shard '{name[:200]}', expected a path inside the data folder, without '..', a scheme such as "
            f"pipe: or control characters; {MEND}"
        )


def check_columns(header: dict[str, Any], columns: dict[str, NDArray[Any]], path: Path) -> None:
    """Rows: labels are classes, shards are listed, keys follow one another. DataError naming the first that isn't."""
    n, shards = header["num_samples"], len(header["shards"])
    for first in range(0, n, ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, n))
        label, shard, offset, size = (columns[name][rows] for name in ("label", "shard", "offset", "size"))
        starts = columns["key_offset"][first : rows.stop + 1]
        outside = (label < 0) | (label >= len(header["classes"])) | (shard >= shards)
        outside |= (offset < 0) | (size < 0) | (size > MAX_IMAGE_BYTES) | (np.diff(starts) < 0)
        if outside.any():
            i = first + int(np.argmax(outside))
            raise DataError(
                f"{path}: sample {i} has label {columns['label'][i]}, {columns['size'][i]} bytes at {columns['offset'][i]} of "
                f"shard {columns['shard'][i]}, which is not in its {len(header['classes'])} classes and "
                f"{shards} shards, or its key is none; {MEND}"
            )
    if columns["key_offset"][0] != 0:
        raise DataError(f"{path}: its first key starts at {columns['key_offset'][0]}, expected 0; {MEND}")
