"""The sealed index: every commit record of a sealed cache in one file, so that whoever reads the cache opens one and not 47,100.

`index.jsonl.zst`, one zstd frame with a size and a checksum: a line of JSON (format, fingerprint, views, blocks, content_root,
sha256 of all bytes after that line), then the facts of one record a line, the views of a block after one another, by block.

The records stay what makes a unit exist. The index is a copy for readers, which counts only where it is whole, is of this cache,
and gives the content root that `sealed.json` states: where it is missing, damaged or of another day, the records are read. Who
withdraws a record removes the index first (`cskd.pipeline.care.repair`), and who seals writes it last. So a reader that has an
index may know of a file that has been made again since, under another name: it then reads that unit's record.
docs/decisions/016-sealed-index.md has the reasons.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from numcodecs import zstd

from cskd.files.read import MAX_TEXT, parse_json
from cskd.storage import Place, Storage, join, open_storage
from cskd.store.commit import Commit, parse_facts
from cskd.store.format import INDEX, SEAL

INDEX_FORMAT = 1
LEVEL = 3  # of zstd: half of a record is hashes, which no level makes smaller
MAX_INDEX = 1 << 31  # decoded bytes: 600 in each of 3 million records
_CONTENT = re.compile(rb'"content_hash":"([0-9a-f]{64})"')
_NO_QUARANTINE = b'"quarantine":{}'


class Index:
    """The records of the first `views` views of all blocks, each parsed and checked when it is asked for."""

    def __init__(self, views: int, lines: list[bytes], where: str) -> None:
        self.views, self._lines, self._where = views, lines, where

    def commit(self, block: int, view: int) -> Commit:
        """The record of a unit. CacheError for one that can't be."""
        line = self._lines[block * self.views + view]
        return parse_facts(parse_json(line), f"{self._where}, line {2 + block * self.views + view}", block, view)

    def quarantine(self, block: int, view: int) -> frozenset[int]:
        """Positions in the block that a unit has no rows of."""
        if _NO_QUARANTINE in self._lines[block * self.views + view]:
            return frozenset()
        return frozenset(map(int, self.commit(block, view).quarantine))

    def hashes(self) -> dict[tuple[int, int], str]:
        """(block, view) -> content hash."""
        found = (_CONTENT.search(line) for line in self._lines)
        return {divmod(i, self.views): match[1].decode() for i, match in enumerate(found) if match}


def content_root(
    fingerprint: str,
    tables: Mapping[str, str] | None,
    blocks: int,
    views: int,
    hashes: Mapping[tuple[int, int], str],
) -> str:
    """One hash over the content of every unit that exists, in order: two caches with equal roots hold equal targets."""
    h = hashlib.sha256(fingerprint.encode())
    for name, digest in sorted((tables or {}).items()):  # units mean nothing without
        h.update(f"{name}:{digest};".encode())
    for block in range(blocks):
        for view in range(views):
            h.update(f"{block}:{view}:{hashes.get((block, view))};".encode())
    return h.hexdigest()


def index_bytes(commits: Iterable[Commit], fingerprint: str, blocks: int, views: int, root: str) -> bytes:
    """The file of an index; the same records always give the same bytes. commits: by block, then by view. root: `content_root`."""
    body = b"".join(_line(asdict(commit)) for commit in commits)
    head = {
        "format": INDEX_FORMAT,
        "fingerprint": fingerprint,
        "blocks": blocks,
        "views": views,
        "content_root": root,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return bytes(zstd.compress(_line(head) + body, LEVEL, True))


def read_index(root: Place, fingerprint: str, tables: Mapping[str, str] | None, blocks: int) -> Index | None:
    """The index of a cache, None where it is not one to trust: missing, damaged, or not of what is sealed now."""
    storage = open_storage(root)
    try:
        sealed, data = storage.get_many([SEAL, INDEX])
        seal = parse_json(sealed)["seal"]
        index, stated = _parse(data, storage, fingerprint, blocks)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    found = content_root(fingerprint, tables, blocks, index.views, index.hashes())
    whole = found == stated == seal.get("content_root") and seal.get("views") == index.views
    return index if whole and seal.get("fingerprint") == fingerprint else None


def wrong_index(root: Place, expected: bytes) -> str:
    """What is wrong with a cache's index, in words that follow its name; empty where nothing is."""
    try:
        there = open_storage(root).get(INDEX, limit=2 * len(expected) + MAX_TEXT)
    except FileNotFoundError:
        return ""  # of a cache that an older version sealed
    except OSError as e:
        return f"can't be read ({e.strerror})"
    return "" if there == expected else "does not hold the records that are there"


def _parse(data: bytes, storage: Storage, fingerprint: str, blocks: int) -> tuple[Index, str]:
    """An index and the content root that it states. ValueError, KeyError or TypeError for what is none."""
    text = _decoded(data)
    head, _, body = text.partition(b"\n")
    about = parse_json(head)
    expected = {"format": INDEX_FORMAT, "fingerprint": fingerprint, "blocks": blocks}
    if any(about[name] != value for name, value in expected.items()) or type(about["views"]) is not int:
        raise ValueError("of another cache")
    if hashlib.sha256(body).hexdigest() != about["sha256"]:
        raise ValueError("damaged")
    lines = body.split(b"\n")[:-1]
    if about["views"] < 1 or len(lines) != blocks * about["views"]:
        raise ValueError("other units")
    return Index(about["views"], lines, join(storage.location, INDEX)), about["content_root"]


def _decoded(data: bytes) -> bytes:
    from cskd.store.unit_layout import frame_size

    size = frame_size(data[:18])
    if size is None or size > MAX_INDEX:
        raise ValueError("no zstd frame of a bearable size")
    try:
        return bytes(zstd.decompress(data))
    except RuntimeError as e:
        raise ValueError(str(e)) from None


def _line(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode() + b"\n"
