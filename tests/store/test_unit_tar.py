"""A unit's tar of a stranger: what cskd would not have written is refused before it costs memory, and nothing is unpickled."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs import zstd
from numpy.typing import NDArray

from cskd.errors import CacheError
from cskd.store.tars import write_tar
from cskd.store.unit import pack_unit, read_unit

ABOUT = ("k.about.json", b'{"format": 1}')


PICKLED = dict.fromkeys(["allow_pickle"], True)  # to write such a file; nothing here reads one


def npy(array: NDArray[Any], **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def member(data: bytes, name: str = "seed", checksum: bool = True) -> tuple[str, bytes]:
    return f"k.{name}.npy.zst", bytes(zstd.compress(data, 1, checksum))


def header(text: str, data: bytes = b"") -> bytes:
    body = text.encode().ljust(118 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + data


ONES = npy(np.ones(3, np.uint64))
LARGE = member(ONES)[1][:4] + bytes([0xE4]) + (1 << 50).to_bytes(8, "little") + b"\x01\x00\x00" + bytes(4)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([member(ONES)], "about.json is missing"),
        ([("k.about.json", b'{"format": 9}'), member(ONES)], "not of format"),
        ([("k.about.json", b'{"a": 1, "a": 2}')], "occurs twice"),
        ([ABOUT, ("../k.seed.npy.zst", member(ONES)[1])], "a member '../k"),
        ([ABOUT, ("k.seed.pkl", b"")], "a member 'k.seed.pkl'"),
        ([ABOUT, member(ONES), member(ONES)], "occurs twice"),
        ([ABOUT, member(ONES, checksum=False)], "no zstd frame with a size and a checksum"),
        ([ABOUT, ("k.seed.npy.zst", LARGE)], "bytes of arrays in a file of"),
        ([ABOUT, ("k.seed.npy.zst", b"")], "no zstd frame"),
        ([ABOUT, member(npy(np.array([{}], object), **PICKLED))], "object, expected plain numbers"),
        ([ABOUT, member(npy(np.ones(2, ">u8")))], "expected plain numbers"),
        ([ABOUT, member(npy(np.ones((2, 2), order="F")))], "expected plain numbers in C order"),
        ([ABOUT, member(npy(np.array(["text"])))], "expected plain numbers"),
        ([ABOUT, member(ONES[:-1])], "has 23 bytes for the shape"),
        ([ABOUT, member(b"no npy at all, but as long as a header")], "damaged"),
        ([ABOUT, member(header("{'descr': '<u8', 'fortran_order': False, 'shape': (-1,)}", bytes(8)))], "damaged"),
        ([ABOUT, member(header("__import__('os').abort()"))], "damaged"),
        ([("x" * 200 + ".about.json", ABOUT[1])], "damaged"),
    ],
)
def test_what_cskd_would_not_write_is_refused(members: list[tuple[str, bytes]], said: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    write_tar(out, members)
    with pytest.raises(CacheError, match="damaged") as caught:
        read_unit(tmp_path / "v0000.tar", out.getvalue())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_arrays_give_the_same_bytes_and_come_back_as_they_were(tmp_path: Path) -> None:
    fields: dict[str, NDArray[Any]] = {"seed": np.arange(7, dtype=np.uint64), "box": np.zeros((7, 4), np.uint16)}
    targets: dict[str, NDArray[Any]] = {"seed": np.ones(3, np.float16), "empty": np.empty((0, 2), np.uint16)}
    names: dict[str, tuple[str, ...]] = {"seed": ("sample",), "box": ("sample", "edge"), "empty": ("segment", "pair")}
    data = pack_unit(fields, targets, names, {"codec": "x"}, "webdataset")
    assert data == pack_unit(dict(reversed(fields.items())), targets, names, {"codec": "x"}, "webdataset")
    for got, expected in zip(read_unit(tmp_path / "unit.tar", data), (fields, targets), strict=True):
        assert got.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array)
            assert (got[name].dtype, got[name].shape, got[name].flags.writeable) == (array.dtype, array.shape, True)
