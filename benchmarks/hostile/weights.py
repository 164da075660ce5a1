"""Checkpoints, made byte by byte, that would run code, take all memory, or name what they do not hold."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable

import torch

from benchmarks.hostile.base import zipped

Checkpoint = tuple[str, Callable[[], bytes], str]  # suffix, bytes, what must come of it


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def saved(value: object, **options: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)  # type: ignore[arg-type]
    return out.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    """A checkpoint with this as its data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"fc.weight": torch.ones(5, 8)}))) as whole, zipfile.ZipFile(out, "w") as new:
        for info in whole.infolist():
            new.writestr(info.filename, pickled if info.filename.endswith("data.pkl") else whole.read(info))
    return out.getvalue()


def deflated(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as whole:
        return zipped({name: whole.read(name) for name in whole.namelist()}, zipfile.ZIP_DEFLATED)


def call(module: str, name: str, argument: bytes) -> bytes:
    """The pickle of module.name(argument)."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def checkpoints() -> dict[str, Checkpoint]:
    one = torch.ones(5, 8)
    fits = {"fc.weight": {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 160]}}
    zeros = bytes(160)
    tensors: dict[str, Callable[[], bytes]] = {
        "a header of 2^63 bytes": lambda: safetensors(fits, zeros, 2**63),
        "a header of 90 MB": lambda: safetensors(b"{" + b" " * 90_000_000 + b"}"),
        "a header longer than the file": lambda: safetensors(fits, zeros, 10_000),
        "a header nested 100,000 deep": lambda: safetensors(b"[" * 100_000),
        "a tensor of 2^60": lambda: safetensors(
            {"fc.weight": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 160]}}, zeros
        ),
        "a tensor of 2^64 squared": lambda: safetensors(
            {"fc.weight": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 160]}}, zeros
        ),
        "offsets that go back": lambda: safetensors(
            {"fc.weight": {"dtype": "F32", "shape": [5, 8], "data_offsets": [160, 0]}}, zeros
        ),
        "offsets beyond the file": lambda: safetensors(
            {"fc.weight": {"dtype": "F32", "shape": [5, 8], "data_offsets": [2**40, 2**40 + 160]}}, zeros
        ),
        "two tensors of the same bytes": lambda: safetensors({**fits, "x": fits["fc.weight"]}, zeros),
        "bytes of no tensor": lambda: safetensors(fits, zeros + bytes(100)),
        "an unknown type": lambda: safetensors(
            {"fc.weight": {"dtype": "OBJ", "shape": [5, 8], "data_offsets": [0, 160]}}, zeros
        ),
        "a name twice": lambda: safetensors(
            b'{"fc.weight":' + json.dumps(fits["fc.weight"]).encode() + b"," + json.dumps(fits)[1:].encode(), zeros
        ),
        "another shape": lambda: safetensors(
            {"fc.weight": {"dtype": "F32", "shape": [8, 5], "data_offsets": [0, 160]}}, zeros
        ),
        "a name with an escape sequence": lambda: safetensors({"\x1b[2J\n": fits["fc.weight"]}, zeros),
        "no tensors": lambda: safetensors({}),
        "300 MB of another model": lambda: safetensors(
            {"x": {"dtype": "U8", "shape": [3 * 10**8], "data_offsets": [0, 3 * 10**8]}}, bytes(3 * 10**8)
        ),
        "no bytes": lambda: b"",
    }
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)  # noqa: E731
    pickles: dict[str, Callable[[], bytes]] = {
        "a call of os.system": lambda: with_pickle(call("os", "system", text("touch canary"))),
        "a call of eval": lambda: with_pickle(call("builtins", "eval", text("open('canary', 'w')"))),
        "a call of open": lambda: with_pickle(call("io", "open", text("canary"))),
        "a call of torch.load": lambda: with_pickle(call("torch", "load", text("canary"))),
        "a call of getattr": lambda: with_pickle(call("builtins", "getattr", text("x"))),
        "a call of subprocess": lambda: with_pickle(call("subprocess", "check_output", text("ls"))),
        "a byte array of 8 GB": lambda: with_pickle(call("builtins", "bytearray", number(8 * 10**9))),
        "a byte array of 8 GB by its old name": lambda: with_pickle(
            call("__builtin__", "bytearray", number(8 * 10**9))
        ),
        "a name from the stack": lambda: with_pickle(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R."),
        "a mapping that holds itself": lambda: with_pickle(b"\x80\x02}q\0" + text("model") + b"h\0s."),
        "a list that holds itself": lambda: with_pickle(b"\x80\x02]q\0h\0a."),
        "100,000 lists in one another": lambda: with_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "a pickle of 9 MB": lambda: with_pickle(b"\x80\x02" + b"N0" * 4_500_000 + b"N."),
        "a pickle without end": lambda: with_pickle(b"\x80\x02" + b"N" * 100),
        "a tensor that is one number 2^40 times": lambda: saved({"fc.weight": torch.ones(1).expand(2**40)}),
        "weights that are one number": lambda: saved({"fc.weight": torch.ones(1).expand(5, 8)}),
        "a sparse tensor": lambda: saved({"fc.weight": torch.ones(5, 8).to_sparse()}),
        "a tensor of no memory": lambda: saved({"fc.weight": torch.ones(5, 8, device="meta")}),
        "complex weights": lambda: saved({"fc.weight": torch.ones(5, 8, dtype=torch.complex64)[:, :7]}),
        "a whole module": lambda: saved(torch.nn.Linear(8, 5)),
        "a number": lambda: saved(7),
        "nothing": lambda: saved({}),
        "numbers for tensors": lambda: saved({"fc.weight": [1, 2, 3]}),
        "keys that are numbers": lambda: saved({1: one}),
        "an old form, of os.system": lambda: call("os", "system", text("touch canary")),
        "an old form, cut off": lambda: saved({"fc.weight": one}, _use_new_zipfile_serialization=False)[:-50],
        "a tar, as in 2016": lambda: b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(1000),
        "deflated members": lambda: deflated(saved({"fc.weight": one})),
        "1 GB of deflated zeros": lambda: zipped(
            {"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(10**9), "a/version": b"3"}, zipfile.ZIP_DEFLATED
        ),
        "a script of torch.jit": lambda: zipped(
            {"a/constants.pkl": b"\x80\x02).", "a/code/x.py": b"import os", "a/data.pkl": b"\x80\x02}."}
        ),
        "members that lead out": lambda: zipped({"../../canary": b"dead", "a/data.pkl": b"\x80\x02}."}),
        "zeros": lambda: bytes(10_000),
        "no bytes": lambda: b"",
    }
    good: dict[str, Checkpoint] = {
        "safetensors as they should be": (".safetensors", lambda: safetensors(fits, zeros), "read"),
        "checkpoint as it should be": (".pt", lambda: saved({"state_dict": {"fc.weight": one}, "epoch": 3}), "read"),
        "checkpoint of the old form": (
            ".pth",
            lambda: saved({"fc.weight": one}, _use_new_zipfile_serialization=False),
            "read",
        ),
        "checkpoint named safetensors": (".safetensors", lambda: saved({"fc.weight": one}), "read"),
        "checkpoint of the old form, of 2^50 numbers": (  # nothing is made by that number
            ".pth",
            lambda: saved({"fc.weight": one}, _use_new_zipfile_serialization=False).replace(
                b"K(", b"\x8a\x07" + b"\0" * 6 + b"\4"
            ),
            "read",
        ),
    }
    found = {f"safetensors with {name}": (".safetensors", make, "refused") for name, make in tensors.items()}
    return good | found | {f"checkpoint with {name}": (".pt", make, "refused") for name, make in pickles.items()}
