"""Curated images: made to cost memory or time, to say what they are not, or as large as is allowed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

from benchmarks.hostile.base import Case, bound, picture, write
from cskd.dataset.images import decode


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, extra: bytes = b"", data: bytes | None = None, depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG of zeros, its rows compressed one after the other; `extra` chunks come before the pixels."""
    if data is None:
        row = bytes(1 + -(-width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth // 8))
        packer = zlib.compressobj(1)
        data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(tags: list[tuple[int, int, int, int]], rest: bytes = b"", order: str = "<") -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    entries = b"".join(struct.pack(order + "HHII", *tag) for tag in tags)
    return head + struct.pack(order + "H", len(tags)) + entries + bytes(4) + rest


def tiff_of(side: int, *more: tuple[int, int, int, int]) -> bytes:
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 256)]
    tags = [tag for tag in tags if tag[0] not in {m[0] for m in more}] + list(more)
    return tiff(sorted(tags)).ljust(256, b"\0") + bytes(side * side)


def scans(side: int, count: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (9, 8, 7)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def solid(kind: str, side: int, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, kind, **options)
    return out.getvalue()


def image_cases() -> list[Case]:
    jpeg, gif, webp, bmp = (picture(kind) for kind in ("JPEG", "GIF", "WEBP", "BMP"))
    sof = jpeg.index(b"\xff\xc0") + 5
    gif_colours = 13 + (3 << ((gif[10] & 7) + 1))
    text = b"k\0\0"
    refused: dict[str, Callable[[], bytes]] = {
        "png over 64 megapixels": lambda: png(8001, 8000, data=b""),
        "png of 2^31 - 1 squared": lambda: png(2**31 - 1, 2**31 - 1, data=b""),
        "png one pixel high, 2^31 wide": lambda: png(2**31 - 1, 1, data=b""),
        "png of no width": lambda: png(0, 5, data=b""),
        "png with pixels that end early": lambda: png(5000, 5000, data=zlib.compress(b"\0" * 100)),
        "png with text that blows up": lambda: png(8, 8, chunk(b"zTXt", text + zlib.compress(bytes(10**8)))),
        "png with a profile that blows up": lambda: png(8, 8, chunk(b"iCCP", text + zlib.compress(bytes(10**8)))),
        "png with international text that blows up": lambda: png(
            8, 8, chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(10**8)))
        ),
        "png with 500,000 chunks": lambda: png(8, 8, chunk(b"abCd", b"") * 500_000),
        "png with 500,000 empty pieces of pixels": lambda: png(8, 8, chunk(b"IDAT", b"") * 500_000),
        "png of an unknown colour type": lambda: png(8, 8, data=b"").replace(b"\x08\x02\0\0\0", b"\x08\x05\0\0\0"),
        "jpeg that says 65,500 squared": lambda: jpeg[:sof] + struct.pack(">HH", 65500, 65500) + jpeg[sof + 4 :],
        "jpeg of 60 scans of 64 megapixels": lambda: scans(8000, 50),
        "jpeg of 3,000 scans": lambda: scans(1000, 3000),
        "jpeg with 2,000,000 segments": lambda: jpeg[:2] + b"\xff\xe1\x00\x04ab" * 2_000_000 + jpeg[2:],
        "jpeg with 10 MB of filling": lambda: jpeg[:2] + b"\xff" * 10_000_000 + jpeg[2:],
        "jpeg with 30 MB between segments": lambda: jpeg[:4] + b"\0\2" + bytes(30_000_000) + jpeg[2:],
        "jpeg of nothing but its mark": lambda: b"\xff\xd8\xff\xd9",
        "gif that says 65,535 squared": lambda: gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "gif whose frame is larger than its screen": lambda: gif.replace(
            gif[gif.index(b"\x2c\0\0\0\0") :][:9], b"\x2c\0\0\0\0\xff\xff\xff\xff", 1
        ),
        "gif with 600,000 comments": lambda: gif[:gif_colours] + b"!\xfe\1a\0" * 600_000 + gif[gif_colours:],
        "webp of 16,384 squared": lambda: b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f\xff\xff\xff\x0f" + bytes(15),
        "webp cut in half": lambda: webp[: len(webp) // 2],
        "webp whose canvas is 2^24 squared": lambda: (
            b"RIFF\x26\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xff\xff\xff\xff\xff\xff" + webp[12:]
        ),
        "bmp that says 2^31 - 1 squared": lambda: bmp[:18] + b"\xff\xff\xff\x7f" * 2 + bmp[26:],
        "bmp of 100,000 squared": lambda: bmp[:18] + struct.pack("<ii", 100_000, 100_000) + bmp[26:],
        "bmp of 20 MB of runs": lambda: bmp[:28] + b"\x08\0\1\0\0\0" + bmp[34:] + b"\1\1" * 10_000_000,
        "tiff with tiles of 24,576 squared": lambda: tiff_of(
            10, (259, 3, 1, 8), (322, 4, 1, 24576), (323, 4, 1, 24576), (324, 4, 1, 256), (325, 4, 1, 100)
        ),
        "tiff that says 100,000 squared": lambda: tiff_of(10, (256, 4, 1, 100_000), (257, 4, 1, 100_000)),
        "tiff with 2^32 - 1 strips": lambda: tiff_of(10, (273, 4, 2**32 - 1, 8)),
        "tiff with 2^30 tags of one kind": lambda: tiff_of(10, (320, 3, 2**30, 8)),
        "tiff whose directory is itself": lambda: b"II*\0\0\0\0\0",
        "tiff of 65,535 channels": lambda: tiff_of(10, (277, 3, 1, 65535)),
        "big tiff of 2^62 tags": lambda: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**62) + bytes(100),
        "ppm over 64 megapixels": lambda: b"P6 100000 100000 255\n" + bytes(100),
        "ppm with an endless comment": lambda: b"P6 #" + b"x" * 20_000_000 + b"\n10 10 255\n" + bytes(300),
        "ppm with a number of 10,000 digits": lambda: b"P6 " + b"9" * 10_000 + b" 10 255\n" + bytes(300),
        "ppm in text of 16 megapixels": lambda: b"P3 4000 4000 255\n" + b"0 " * 1000,
        "ppm in text of 80 MB": lambda: b"P3 10 10 255\n" + b"0 " * 40_000_000,
        "ppm of a negative size": lambda: b"P6 -5 10 255\n" + bytes(300),
        "svg, which loads what it names": lambda: (
            b'<svg xmlns:xlink="x"><image xlink:href="file:///etc/passwd"/></svg>'
        ),
        "postscript, which is a program": lambda: (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file\n"
        ),
        "icon, whose frames are files": lambda: b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0\xff\xff\xff\x7f\x16\0\0\0" + png(4, 4),
        "pickle called an image": lambda: b"\x80\x04cos\nsystem\n(X\x05\0\0\0touchtR.",
        "jpeg 2000, which is not read": lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
        "no bytes": lambda: b"",
        "one byte": lambda: b"\xff",
    }
    read: dict[str, Callable[[], bytes]] = {
        "png of 64 megapixels, exactly the limit": lambda: png(8000, 8000),
        "png of 64 megapixels of 16 bits and alpha": lambda: png(8000, 8000, depth=16, colour=6),
        "jpeg of 64 megapixels": lambda: solid("JPEG", 8000),
        "progressive jpeg of 64 megapixels": lambda: solid("JPEG", 8000, progressive=True),
        "gif of 64 megapixels": lambda: solid("GIF", 8000, "P"),
        "webp of 64 megapixels": lambda: solid("WEBP", 8000, lossless=True, method=0, quality=0),
        "tiff of 64 megapixels, lzw": lambda: solid("TIFF", 8000, compression="tiff_lzw"),
        "cmyk jpeg of 64 megapixels": lambda: solid("JPEG", 8000, "CMYK"),
        "image behind 1 MB of comment": lambda: (
            picture("JPEG")[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 16 + picture("JPEG")[2:]
        ),
        "png with bytes after its end": lambda: png(8, 8) + bytes(1_000_000),
    }
    return [
        Case(
            f"image: {name}",
            bound(lambda work, make: write(work / "i", make()), make),
            lambda work: decode((work / "i").read_bytes()),
            how,
        )
        for how, cases in (("refused", refused), ("read", read))
        for name, make in cases.items()
    ]
