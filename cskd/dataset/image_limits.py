"""What can be told of an encoded image without decoding it: structures made to cost minutes or gigabytes are refused.

The number of pixels is checked by `cskd.dataset.images` from the header. Here: a header that never ends, thousands of scans over one
image, a tile larger than its picture, a list longer than any picture has use for. A file that is merely damaged passes: to say
so is the decoder's part.
"""

from __future__ import annotations

import re
import struct

from cskd.errors import ImageError

MAX_SEGMENTS = 4096  # of metadata; a colour profile takes up to 255, a big XMP as many
MAX_JUNK = 1 << 16  # bytes between two segments of a JPEG
MAX_SCAN_PIXELS = 640_000_000  # pixels * scans of a JPEG: ten scans (libjpeg's default) of the largest image
MAX_PLAIN = 4_000_000  # pixels of a PPM in text, and bytes of an RLE BMP: Pillow reads both in Python
MAX_TAG_VALUES = 1 << 20  # of one TIFF tag
MAX_BLOCKS = 1 << 20  # of GIF metadata
_PPM = re.compile(
    rb"P[1-7](?:[ \t\r\n\v\f]+|#[^\r\n]{0,4096}[\r\n])+(\d{1,10})(?:[ \t\r\n\v\f]+|#[^\r\n]{0,4096}[\r\n])+(\d{1,10})\s"
)
_FILL = re.compile(rb"\xff*")
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset([0x00, 0x01, *range(0xD0, 0xD9)])  # markers of a JPEG that stand for themselves


def refuse_bombs(data: bytes) -> None:
    """Raises ImageError for an encoded image whose structure alone would cost more than any picture needs."""
    if data[:3] == b"\xff\xd8\xff":
        _jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        _png(data)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _tiff(data)
    elif data[:3] == b"GIF":
        _gif(data)
    elif data[:1] == b"P":
        _ppm(data)
    elif data[:2] == b"BM" and data[30:31] in (b"\1", b"\2") and len(data) > MAX_PLAIN:
        raise ImageError(f"a run-length BMP of {len(data)} bytes, expected at most {MAX_PLAIN}; save it as PNG")


def _jpeg(data: bytes) -> None:
    at, frame = 2, (0, 0, 0, 0)
    for _ in range(MAX_SEGMENTS):
        here = data.find(b"\xff", at)
        if here < 0:
            here = len(data)
        if here - at > MAX_JUNK:
            raise ImageError(f"{here - at} bytes that belong to no segment of this JPEG; save it again")
        end = here + 1
        if data[end : end + 1] == b"\xff" and (filling := _FILL.match(data, end)):
            end = filling.end()
        if end - here > MAX_JUNK:
            raise ImageError(f"{end - here} filling bytes between two segments of this JPEG; save it again")
        if end + 9 > len(data):
            return
        kind = data[end]
        if kind in _SOF:
            frame = (kind, *struct.unpack_from(">HHB", data, end + 4))
        if kind == 0xDA:
            how, height, width, channels = frame
            if how in (0xC0, 0xC1) and data[end + 3] == channels:
                return  # one scan of everything: no decoder looks for another
            scans = data.count(b"\xff\xda")
            if scans > 10 and scans * width * height > MAX_SCAN_PIXELS:
                raise ImageError(f"{scans} scans of {width} x {height} pixels in one JPEG, expected ten; save it again")
            return
        at = end + 1 + (0 if kind in _ALONE else data[end + 1] << 8 | data[end + 2])
    raise ImageError(f"more than {MAX_SEGMENTS} segments of metadata in this JPEG; save it again")


def _png(data: bytes) -> None:
    at, pixels, others = 8, 0, 0
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        if kind == b"IDAT":
            pixels += 1
        else:
            others += 1
        if others > MAX_SEGMENTS or pixels > MAX_SEGMENTS + len(data) // 512:
            raise ImageError(f"more than {others + pixels - 1} chunks in a PNG of {len(data)} bytes; save it again")
        at += 12 + size


def _tiff(data: bytes) -> None:
    order = "<" if data[:1] == b"I" else ">"
    big = b"+" in data[:4]
    try:
        at = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        count = struct.unpack_from(order + ("Q" if big else "H"), data, at)[0]
        entry, first = (order + "HHQQ", at + 8) if big else (order + "HHII", at + 2)
        if count > MAX_SEGMENTS:
            raise ImageError(f"{count} tags in a TIFF, expected at most {MAX_SEGMENTS}; save it again")
        tags = {}
        for i in range(count):
            tag, kind, values, value = struct.unpack_from(entry, data, first + i * struct.calcsize(entry))
            if values > MAX_TAG_VALUES and kind not in (1, 2, 6, 7):  # text and bytes are kept as they are
                raise ImageError(f"{values} values of TIFF tag {tag}, expected at most {MAX_TAG_VALUES}; save it again")
            short = kind == 3 and order == ">"  # a short stands at the front of its field
            tags[tag] = value >> (48 if big else 16) if short else value
    except struct.error:
        return  # cut off: the decoder says so
    width, height, tile = (tags.get(tag, 0) for tag in (256, 257, 322))
    across = tags.get(323, 0)
    if tile * across > max(1 << 22, 4 * width * height):
        raise ImageError(f"tiles of {tile} x {across} pixels in a TIFF of {width} x {height}; save it without tiles")


def _gif(data: bytes) -> None:
    at = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    for _ in range(MAX_BLOCKS):
        if data[at : at + 1] == b"!":
            at += 2
        elif not (size := data[at] if at < len(data) else 0) or size == 0x2C:  # an image, the end, or a terminator
            if at >= len(data) or data[at] != 0:
                return
            at += 1
        else:
            at += 1 + size
    raise ImageError(f"more than {MAX_BLOCKS} blocks of metadata in this GIF; save it again")


def _ppm(data: bytes) -> None:
    header = _PPM.match(data[: 1 << 17])
    if header is None:
        if data[1:2] in b"1234567" and len(data) > 1 << 17:
            raise ImageError("no size in the first 128 kB of this PPM; save it again")
        return
    pixels = int(header[1]) * int(header[2])
    if data[1:2] in b"123" and max(pixels, len(data) // 16) > MAX_PLAIN:
        raise ImageError(f"a PPM in text of {pixels} pixels, expected at most {MAX_PLAIN}; save it as PNG")
