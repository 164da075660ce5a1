"""Curated inventories, their hashes right: shards that lead elsewhere, counts that can't be, columns of 2^60 elements."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hostile import base as b
from benchmarks.hostile.base import Base, Case, bound, sparse

Change = Callable[[Any], object]
HEADER = "inventory/inventory.json"
DEEP = json.loads("[" * 200 + "]" * 200)


def change_of(*path: Any, to: Any) -> Change:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


def changed(value: Any, change: Change) -> Any:
    """A copy of a JSON value with a change."""
    copy = json.loads(json.dumps(value))
    change(copy)
    return copy


def inventory_cases(base: Base) -> list[Case]:
    header = json.loads((base.data / HEADER).read_bytes())
    shard = lambda name: change_of("shards", 0, "name", to=name)  # noqa: E731
    changes: dict[str, Change] = {
        "a shard ../../canary": shard("../../canary"),
        "an absolute shard": shard("/etc/passwd"),
        "a shard pipe:rm": shard("pipe:rm -rf canary"),
        "a shard http://": shard("http://localhost/x.tar"),
        "a shard file:": shard("file:/etc/passwd"),
        "a shard with a zero byte": shard("a\0b"),
        "a shard with an escape sequence": shard("\x1b[2J.tar"),
        "a shard of no name": shard(""),
        "a shard that is a number": shard(7),
        "a shard of a negative length": change_of("shards", 0, "bytes", to=-1),
        "a shard of 2^70 bytes": change_of("shards", 0, "bytes", to=2**70),
        "shards that are a mapping": change_of("shards", to={"name": "x"}),
        "a shard that is text": change_of("shards", to=["00000.tar"]),
        "2^62 samples": change_of("num_samples", to=2**62),
        "no samples": change_of("num_samples", to=0),
        "samples in text": change_of("num_samples", to="16"),
        "true samples": change_of("num_samples", to=True),
        "blocks that fall": change_of("blocks", to=[0, 12, 8, 16]),
        "blocks that end early": change_of("blocks", to=[0, 8]),
        "blocks that start late": change_of("blocks", to=[1, 8, 16]),
        "blocks of 2^80": change_of("blocks", to=[0, 2**80]),
        "blocks in text": change_of("blocks", to=["0", "16"]),
        "no blocks": change_of("blocks", to=[]),
        "no classes": change_of("classes", to=[]),
        "100,000 classes": change_of("classes", to=[str(i) for i in range(100_000)]),
        "classes that are numbers": change_of("classes", to=[1, 2]),
        "one class of two": change_of("classes", to=["a"]),
        "notes that are text": change_of("notes", to="note"),
        "no columns": change_of("columns", to=None),
        "columns of text": change_of("columns", to={"label": "x"}),
        "lists 200 deep": change_of("made", "deep", to=DEEP),
        "no id": change_of("id", to=None),
        "a later version": change_of("version", to=99),
    }
    raw = {
        "nested 100,000 deep": b"[" * 100_000,
        "with a key twice": b'{"format": "cskd inventory", "format": "cskd inventory"}',
        "with a number of 10,000 digits": b'{"version": ' + b"9" * 10_000 + b"}",
        "of no bytes": b"",
        "that is NaN": b"NaN",
        "with half a character": b'{"format": "\\ud800"}',
    }

    raw |= {f"with {name}": b.seal_inventory(changed(header, change)) for name, change in changes.items()}
    return [
        Case(
            f"inventory: {name}",
            bound(lambda work, data: b.copy_with(base.data, work / "d", HEADER, data), data),
            lambda work: b.read_samples(work / "d"),
        )
        for name, data in raw.items()
    ]


def npy(descr: str, shape: str, data: bytes = b"") -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + data


def column_cases(base: Base) -> list[Case]:
    shard = next(p.name for p in sorted(base.data.glob("*.tar")))
    rows = {
        name: np.load(base.data / "inventory" / f"{name}.npy", allow_pickle=False)
        for name in ("label", "shard", "size", "offset", "key_offset")
    }

    def other(name: str, value: int, row: int = 0) -> bytes:
        array = rows[name].copy()
        array[row] = value
        return npy(f"'{array.dtype.str}'", f"({len(array)},)", array.tobytes())

    columns: dict[str, tuple[str, bytes]] = {
        "2^60 elements": ("size", npy("'<i8'", "(1152921504606846976,)")),
        "a shape of 10^30": ("size", npy("'<i8'", f"({10**30},)")),
        "a negative shape": ("size", npy("'<i8'", "(-1,)")),
        "a shape of 20 dimensions": ("size", npy("'<i8'", str((1,) * 80))),
        "objects": ("size", npy("'|O'", "(16,)", b"\x80\x04cos\nsystem\n.")),
        "a header of code": ("size", npy("__import__('os').system('touch canary')", "(16,)")),
        "a header 5,000 deep": ("size", npy("'<i8'", "(" * 5000)),
        "floats": ("size", npy("'<f8'", "(16,)", bytes(128))),
        "another byte order": ("size", npy("'>i8'", "(16,)", bytes(128))),
        "no bytes": ("size", b""),
        "a zip of arrays": ("size", b.zipped({"size.npy": npy("'<i8'", "(16,)", bytes(128))})),
        "a negative label": ("label", other("label", -1)),
        "a label of no class": ("label", other("label", 2)),
        "shard 4 billion": ("shard", other("shard", 2**32 - 1)),
        "an image of 2^62 bytes": ("size", other("size", 2**62)),
        "an image of a negative size": ("size", other("size", -5)),
        "an image before its shard": ("offset", other("offset", -512)),
        "an image after its shard": ("offset", other("offset", 2**62)),
        "keys that go back": ("key_offset", other("key_offset", 10**6, 3)),
        "keys that start later": ("key_offset", other("key_offset", 1)),
        "keys that end at 2^62": ("key_offset", other("key_offset", 2**62, -1)),
        "keys that are no UTF-8": (
            "key",
            npy("'|u1'", f"({int(rows['key_offset'][-1])},)", b"\xff" * int(rows["key_offset"][-1])),
        ),
    }

    contents: list[tuple[str, str, bytes | Callable[[Path], object]]] = [
        *((f"a column with {what}", f"inventory/{name}.npy", data) for what, (name, data) in columns.items()),
        ("a header that is a pipe", HEADER, os.mkfifo),
        ("a column that is a pipe", "inventory/size.npy", os.mkfifo),
        ("a header of 1 TB", HEADER, lambda path: sparse(path, 10**12, b"{")),
        ("a header that is a folder", HEADER, Path.mkdir),
        ("a shard that is a pipe", shard, os.mkfifo),
        ("a shard that is a device", shard, lambda path: path.symlink_to("/dev/zero")),
        ("a shard that is a file of others", shard, lambda path: path.symlink_to("/etc/passwd")),
        ("a shard of zeros", shard, lambda path: sparse(path, (base.data / shard).stat().st_size)),
    ]
    return [
        Case(
            f"inventory: {what}",
            bound(lambda work, name, content: b.copy_with(base.data, work / "d", name, content), name, content),
            lambda work: b.read_samples(work / "d", verified=False),  # as training opens it
        )
        for what, name, content in contents
    ]
