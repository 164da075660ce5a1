"""Curated data sets: tars whose members lead elsewhere or say two things, bombs, folders of links."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.hostile.base import Base, Case, bomb, bound, picture, read_index, read_pack, sparse, tar, write
from cskd.packing.payloads import Remake, payloads
from cskd.packing.sources import open_source

BLOCK = 512


def data_cases(base: Base) -> list[Case]:
    return tar_cases() + archive_cases() + folder_cases()


# Tars, each as class folders for `pack` and as a shard for `index`


def member(
    name: bytes,
    data: bytes = b"",
    kind: bytes = b"0",
    size: int | None = None,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
) -> bytes:
    """A header and its data, whatever they say."""
    length = len(data) if size is None else size
    number = b"%011o\0" % length if 0 <= length < 8**11 else b"\x80" + (length % 2**88).to_bytes(11, "big")
    head = name.ljust(100, b"\0")[:100] + b"0000644\0" + b"0000000\0" * 2 + number + b"00000000000\0" + b" " * 8
    head += kind + link.ljust(100, b"\0")[:100] + magic
    head = head.ljust(BLOCK, b"\0")
    head = head[:148] + b"%06o\0 " % sum(head) + head[156:]
    return head + data + bytes(-len(data) % BLOCK)


def pax(records: dict[bytes, bytes], kind: bytes = b"x") -> bytes:
    data = b""
    for key, value in records.items():
        length = len(key) + len(value) + 3
        while len(str(length)) + len(key) + len(value) + 3 != length:
            length = len(str(length)) + len(key) + len(value) + 3
        data += b"%d %s=%s\n" % (length, key, value)
    return member(b"pax", data, kind)


def tar_cases() -> list[Case]:
    one, end = picture("PNG"), bytes(2 * BLOCK)
    good = member(b"z/0.png", one) + member(b"z/0.cls", b"1") + member(b"a/0.png", one) + member(b"a/0.cls", b"0")
    odd: dict[str, bytes] = {
        "an absolute name": member(b"/etc/canary.png", one),
        "a name with ..": member(b"a/../../canary.png", one),
        "a name that is ..": member(b"..", one),
        "a name hidden by ./": member(b"./a/./../../canary.png", one),
        "a long name with .. by pax": pax({b"path": b"a/../../canary.png"}) + member(b"a/1.png", one),
        "an absolute long name by pax": pax({b"path": b"/canary.png"}) + member(b"a/1.png", one),
        "a long name with .. by gnu": member(b"././@LongLink", b"a/../../canary.png\0", b"L") + member(b"a/1.png", one),
        "a symbolic link": member(b"a/1.png", kind=b"2", link=b"/etc/passwd"),
        "a symbolic link to its folder": member(b"a", kind=b"2", link=b".."),
        "a hard link": member(b"a/1.png", kind=b"1", link=b"a/0.png"),
        "a hard link outside": member(b"a/1.png", kind=b"1", link=b"/etc/passwd"),
        "a character device": member(b"a/1.png", kind=b"3"),
        "a block device": member(b"a/1.png", kind=b"4"),
        "a pipe": member(b"a/1.png", kind=b"6"),
        "a gnu sparse file": member(b"a/1.png", one, kind=b"S"),
        "a pax sparse file": pax({b"GNU.sparse.major": b"1", b"GNU.sparse.size": b"9" * 12}) + member(b"a/1.png", one),
        "a volume header": member(b"volume", kind=b"V"),
        "a part of another volume": member(b"a/1.png", one, kind=b"M"),
        "an unknown type": member(b"a/1.png", one, kind=b"Z"),
        "a folder with bytes": member(b"a/", one, kind=b"5"),
        "a size over its end": member(b"a/1.png", one, size=10**6),
        "a size of 2^60": member(b"a/1.png", one, size=2**60),
        "a negative size": member(b"a/1.png", one, size=-BLOCK),
        "a size in letters": (lambda m: m[:124] + b"0000000000z\0" + m[136:])(member(b"a/1.png", one)),
        "a wrong checksum": (lambda m: b"b" + m[1:])(member(b"a/1.png", one)),
        "two sizes": pax({b"size": b"%d" % (len(one) - 1)}) + member(b"a/1.png", one),
        "a size of minus one by pax": pax({b"size": b"-1"}) + member(b"a/1.png", one, size=0),
        "two names by pax": pax({b"path": b"a/1.png"}) + pax({b"path": b"b/1.png"}) + member(b"c/1.png", one),
        "a name for all by pax": pax({b"path": b"a/1.png"}, b"g") + member(b"b/1.png", one),
        "a name with a zero byte by pax": pax({b"path": b"a/1.png\0.txt"}) + member(b"b/1.png", one),
        "a pax record without an end": member(b"pax", b"99999 path=a", b"x") + member(b"b/1.png", one),
        "a pax record of no length": member(b"pax", b"0 path=a\n", b"x") + member(b"b/1.png", one),
        "a pax header of 100 GB": member(b"pax", b"", b"x", size=10**11),
        "a pax header of 3 MB": pax({b"comment": b"x" * 3_000_000}) + member(b"b/1.png", one),
        "a long name of 2 MB": member(b"l", b"a" * 2_000_000, b"L") + member(b"b/1.png", one),
        "5,000 pax headers in a row": pax({b"comment": b"x"}) * 5000 + member(b"b/1.png", one),
        "a pax header of nothing": pax({b"path": b"a/1.png"}),
        "a name with an escape sequence": member(b"a/\x1b[2J1.png", one) + member(b"a/\x1b[2J1.cls", b"0"),
        "a name with a new line": member(b"a/x\ny.png", one) + member(b"a/x\ny.cls", b"0"),
        "a name that is no UTF-8": member(b"a/\xff\xfe.png", one) + member(b"a/\xff\xfe.cls", b"0"),
        "a tar after its end": end + member(b"b/1.png", one),
        "garbage after its end": end + b"garbage",
    }
    cases = []
    for name, extra in odd.items():
        cases.append(_tar(f"pack: tar with {name}", good + extra + end))
        cases.append(_tar(f"index: tar with {name}", good + extra + end, shard=True))
    label = lambda text: good + member(b"a/1.png", one) + member(b"a/1.cls", text) + end  # noqa: E731
    of_json = lambda text: good + member(b"a/1.png", one) + member(b"a/1.json", text) + end  # noqa: E731
    shards = {
        "a key twice": good + good + end,
        "two images of one key": good + member(b"a/0.jpg", one) + end,
        "one name in two cases": good + member(b"a/0.PNG", one) + end,
        "no label": member(b"a/0.png", one) + end,
        "no image": member(b"a/0.cls", b"0") + end,
        "a label of 10,000 digits": label(b"9" * 10_000),
        "a negative label": label(b"-1"),
        "a label of text": label(b"__import__('os')"),
        "a label of 2 MB": label(b"0" * 2_000_000),
        "a label over the number of classes": label(b"70000"),
        "a label in nested JSON": of_json(b"[" * 100_000),
        "a label in JSON that occurs twice": of_json(b'{"label": 0, "label": 1}'),
        "a label that is not a number": of_json(b'{"label": NaN}'),
        "a label of 5,000 digits in JSON": of_json(b'{"label": ' + b"9" * 5000 + b"}"),
        "a label that is true": of_json(b'{"label": true}'),
        "nothing in it": end,
        "no bytes": b"",
        "a header cut in half": good[:300],
    }
    cases += [_tar(f"index: shard with {name}", data, shard=True) for name, data in shards.items()]
    programs = b"\x80\x04cos\nsystem\n."
    ignored = good + member(b"a/0.pyd", programs) + member(b"a/0.pickle", programs) + member(b"a/0.pth", programs) + end
    cases.append(_tar("index: shard with pickles beside its images", ignored, shard=True, count=2))
    cases.append(_tar("pack: shard with pickles beside its images", ignored, count=2))
    many = b"".join(member(b"a/%06d.png" % i, one) for i in range(20)) + member(b"b/bad.png", b"no image") + end
    cases.append(_tar("pack: tar with an image that is none", many, count=21))
    return cases


def _tar(name: str, data: bytes, shard: bool = False, count: int | None = None, **options: int) -> Case:
    expected = "refused" if count is None else "read"
    if shard:
        writes = ("d/inventory", "d/.inventory.partial", "d")
        return Case(
            name,
            lambda work: write(work / "d" / "0.tar", data),
            lambda work: read_index(work / "d", count),
            expected,
            writes,
        )
    return Case(
        name,
        lambda work: write(work / "src.tar", data),
        lambda work: read_pack(work / "src.tar", work / "out", count, **options),
        expected,
    )


# Compressed tars


def archive_cases() -> list[Case]:
    tree = tar({f"train/{c}/{i}.png": picture("PNG") for c in "ab" for i in range(3)})
    sized = {
        "gz that is cut off": gzip.compress(tree)[:-20],
        "gz with a wrong checksum": gzip.compress(tree)[:-8] + bytes(8),
        "gz in gz": gzip.compress(gzip.compress(tree)),
        "gz followed by garbage": gzip.compress(tree) + b"garbage",
        "bz2 that is cut off": bz2.compress(tree)[:-20],
        "xz that is cut off": lzma.compress(tree)[:-20],
        "zstd, which is not read": b"\x28\xb5\x2f\xfd" + bytes(100),
        "zip called tar": b"PK\x03\x04" + bytes(1000),
        "parquet called tar": b"PAR1" + bytes(1000) + b"\xff\xff\xff\x7fPAR1",
        "an Arrow file called tar": b"ARROW1\0\0" + bytes(1000) + b"\xff\xff\xff\x7fARROW1",
        "7z called tar": b"7z\xbc\xaf\x27\x1c" + bytes(1000),
    }
    makes: dict[str, Callable[[], bytes]] = {name: partial(bytes, data) for name, data in sized.items()}
    makes |= {f"{kind} of zeros, 400 MB": partial(bomb, kind) for kind in ("gz", "bz2", "xz")}
    makes["gz of 1,000 streams of zeros"] = lambda: gzip.compress(bytes(10**6)) * 1000
    makes["xz that asks for 1.5 GB of memory"] = lambda: _xz_of_dictionary(tree)
    cases = [
        Case(
            f"pack: {name}",
            bound(lambda work, make: write(work / "src.tar", make()), make),
            lambda work: read_pack(work / "src.tar", work / "out"),
        )
        for name, make in makes.items()
    ]
    for kind, data in (("gz", gzip.compress(tree)), ("bz2", bz2.compress(tree)), ("xz", lzma.compress(tree) * 1)):
        cases.append(
            Case(
                f"pack: {kind} as it should be",
                bound(lambda work, data: write(work / "src.tar", data), data),
                lambda work: read_pack(work / "src.tar", work / "out", 6),
                "read",
            )
        )
    return cases


def _xz_of_dictionary(data: bytes) -> bytes:
    """An xz whose header says that it needs 1.5 GB, its checksum right."""
    whole = bytearray(lzma.compress(data, preset=0))
    size = (whole[12] + 1) * 4
    header = whole[12 : 12 + size]
    place = header.index(0x21) + 2  # LZMA2's properties: one byte, the dictionary's size
    header[place] = 37
    header[-4:] = struct.pack("<I", zlib.crc32(bytes(header[:-4])))
    whole[12 : 12 + size] = header
    return bytes(whole)


# Folders


def folder_cases() -> list[Case]:
    one = picture("PNG")

    def classes(work: Path) -> Path:
        for c in "ab":
            write(work / "src" / c / "0.png", one)
        return work / "src"

    def links(work: Path) -> None:
        for level in range(12):
            folder = work / "src" / f"level{level}"
            folder.mkdir(parents=True)
            for i in range(10):
                (folder / f"l{i}").symlink_to(f"../level{level + 1}")
        write(work / "src" / "level12" / "0.png", one)

    def deep(work: Path) -> None:
        write(work / "src" / "/".join("d" * 1 for _ in range(300)) / "0.png", one)

    def many_large(work: Path) -> None:
        first = sparse(work / "src" / "a" / "0.png", 100_000_000, one)
        (work / "src" / "b").mkdir()
        for i in range(1, 30):
            os.link(first, work / "src" / "ab"[i % 2] / f"{i}.png")

    def read_all(work: Path) -> None:
        source = open_source(work / "src", None, work, 0, None)
        for _ in payloads(source.listing, np.arange(30), Remake(), 2):
            pass

    def left_by_a_pack(work: Path) -> None:
        classes(work)
        write(work / "precious.txt", "x")
        write(work / "out" / ".packing" / "publishing", "../precious.txt\n../../canary\n/canary\n")

    def pipe(work: Path) -> None:
        (work / "d").mkdir()
        os.mkfifo(work / "d" / "0.tar")

    makes: dict[str, tuple[Callable[[Path], object], str]] = {
        "links that are ten to the twelfth folders": (links, "refused"),
        "a link to the folder it is in": (lambda w: (classes(w) / "a" / "up").symlink_to(".."), "refused"),
        "a link to nothing": (lambda w: (classes(w) / "a" / "1.png").symlink_to("nowhere"), "refused"),
        "a link to a device": (lambda w: (classes(w) / "a" / "1.png").symlink_to("/dev/zero"), "refused"),
        "a pipe": (lambda w: os.mkfifo(classes(w) / "a" / "1.png"), "refused"),
        "a folder called an image": (lambda w: (classes(w) / "a" / "1.png").mkdir(), "read"),
        "300 folders in one another": (deep, "refused"),
        "an image of 1 TB": (lambda w: sparse(classes(w) / "a" / "1.png", 10**12), "refused"),
        "an escape sequence in a name": (lambda w: write(classes(w) / "a" / "\x1b[2J.png", one), "refused"),
        "a new line in a class": (lambda w: write(classes(w) / "c\nd" / "0.png", one), "refused"),
        "rich markup in names": (lambda w: write(classes(w) / "[bold red]" / "[link=x].png", one), "read"),
        "a name that is no UTF-8": (lambda w: write(classes(w) / "a" / os.fsdecode(b"\xff.png"), one), "refused"),
        "a class that webdataset skips": (lambda w: write(classes(w) / "__a__" / "0.png", one), "refused"),
        "two images of one key": (lambda w: write(classes(w) / "a" / "0.jpg", one), "refused"),
        "a class file of 100 MB": (lambda w: sparse(classes(w) / "classes.txt", 10**8, b"a\nb\n"), "refused"),
        "a class file that is a pipe": (lambda w: os.mkfifo(classes(w) / "classes.txt"), "refused"),
        "a class file of 70,000 names": (
            lambda w: write(classes(w) / "classes.txt", "".join(f"{i}\n" for i in range(70000))),
            "refused",
        ),
        "a class file with a name of 1 MB": (
            lambda w: write(classes(w) / "classes.txt", "a\nb\n" + "c" * 10**6),
            "refused",
        ),
        "a class file with an escape sequence": (
            lambda w: write(classes(w) / "classes.txt", "a\nb\n\x1b]0;x\x07\n"),
            "refused",
        ),
        "a class file in UTF-16": (lambda w: write(classes(w) / "classes.txt", "a\nb\n".encode("utf-16")), "refused"),
        "a class file with a name twice": (lambda w: write(classes(w) / "classes.txt", "a\nb\na\n"), "refused"),
        "a class file of other classes, 60,000": (
            lambda w: write(classes(w) / "classes.txt", "".join(f"{i:0100d}\n" for i in range(60000))),
            "refused",
        ),
        "a list of files to remove": (left_by_a_pack, "read"),
        "nothing in it": (lambda w: (w / "src").mkdir(), "refused"),
    }
    cases = [
        Case(f"pack: folder with {name}", make, lambda work: read_pack(work / "src", work / "out"), expected)
        for name, (make, expected) in makes.items()
    ]

    cases.append(Case("pack: 30 images of 100 MB, all read", many_large, read_all, "read"))

    for name, spec in (
        ("braces for 10^12 shards", "{0..999999999}{0..999}.tar"),
        ("braces in a row", "{a,b}" * 40 + ".tar"),
        ("braces with a number of 5,000 digits", "{0.." + "9" * 200 + "}.tar"),
        ("a pipe: in front", "pipe:touch canary"),
        ("another scheme", "http://localhost/{0..9}.tar"),
    ):
        cases.append(
            Case(
                f"index: {name}",
                lambda work: None,
                bound(lambda work, spec: read_index(work / spec), spec),
                writes=("d",),
            )
        )
    cases.append(
        Case(
            "pack: a pipe as source",
            lambda work: os.mkfifo(work / "src"),
            lambda work: read_pack(work / "src", work / "out"),
        )
    )
    cases.append(
        Case(
            "index: a shard that is a pipe",
            pipe,
            lambda work: read_index(work / "d"),
            writes=("d",),
        )
    )
    return cases
