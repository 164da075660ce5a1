"""Encoded bytes to pixels, by a fixed policy, so that both stages and every machine see the same image.

`POLICY` states what is decided here and is recorded with every cache; so are `decoder_versions`, because the bytes a
JPEG decodes to belong to the library. Where torchvision and timm read files in one way, so does this.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, features

from cskd.dataset.image_limits import refuse_bombs
from cskd.errors import ImageError

MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
POLICY = {
    "version": "1",
    "formats": " ".join(FORMATS).lower(),
    "grey, palette, cmyk": "converted to RGB by Pillow",
    "16 bits a channel": "the high byte",  # Pillow's own conversion of 16-bit grey clips at 255: all white
    "alpha": "dropped, as torchvision and timm do",
    "exif orientation": "ignored, as torchvision and timm do",
    "colour profile": "ignored",
    "animation": "first frame",
    "truncated": "refused",
}
_PPM = re.compile(rb"P6\n([1-9]\d{0,7}) ([1-9]\d{0,7})\n255\n")
_MODES = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"])
_MODES_16 = frozenset(["I", "I;16", "I;16L", "I;16B", "I;16N"])


def decode(data: bytes, max_pixels: int = MAX_PIXELS, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Decode one encoded image by `POLICY`.

    Args:    data: a JPEG, PNG, WebP, BMP, PPM, TIFF or GIF; max_pixels: of width * height, checked before decoding;
             buffer: where the pixels of a plain JPEG go, if they have room there.
    Returns: RGB, uint8 [H, W, 3], writable.
    Raises:  ImageError with the reason (the same text every time) for anything that can't be decoded as a whole.
    """
    jpeg = data.startswith(b"\xff\xd8\xff")
    plain = _plain_jpeg(data, max_pixels, buffer) if jpeg else _plain_ppm(data, max_pixels)
    if plain is not None:
        return plain
    with _opened(data, max_pixels) as image:
        return _to_rgb(image)


def decode_into(data: bytes, out_HWC: NDArray[np.uint8]) -> None:
    """`decode` into memory of `decoded_size`: uint8 [H, W, 3], contiguous. Raises ImageError for another size, too."""
    image = decode(data, buffer=out_HWC)
    if image.shape != out_HWC.shape:
        sizes = [" x ".join(map(str, pixels.shape[:2])) for pixels in (image, out_HWC)]
        raise ImageError(f"decodes to {sizes[0]} pixels, its header says {sizes[1]}; replace the file")
    if not np.may_share_memory(image, out_HWC):
        out_HWC[...] = image


def decoded_size(data: bytes) -> tuple[int, int]:
    """Height and width of what `decode` gives, by the header alone. Raises ImageError where `decode` would for the header."""
    if data.startswith(b"\xff\xd8\xff"):
        refuse_bombs(data)
        with contextlib.suppress(ValueError):
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if space in ("YCbCr", "Gray") and height * width <= MAX_PIXELS:
                return height, width
    width, height = image_size(data)
    return height, width


def _plain_jpeg(data: bytes, max_pixels: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8] | None:
    """A colour or grey JPEG in which libjpeg finds nothing odd; None leaves the verdict, and its words, to Pillow. Raises
    ImageError as `refuse_bombs`.

    The same libjpeg-turbo algorithms and so Pillow's pixels, without Pillow's detour over four bytes per pixel: 0.98 ms
    instead of 1.19 for an image of ImageNet, on one core.
    """
    refuse_bombs(data)
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray") or width * height > max_pixels:
            return None
        # A mere warning is an error here.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=True)
    except ValueError:
        return None
    return pixels


def as_ppm(pixels: NDArray[np.uint8]) -> bytes:
    """RGB, uint8 [H, W, 3], as a binary PPM: a line of text, then the pixels."""
    return b"P6\n%d %d\n255\n%b" % (pixels.shape[1], pixels.shape[0], np.ascontiguousarray(pixels).tobytes())


def _plain_ppm(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """A PPM as `as_ppm` writes it: its pixels, copied. None: of another form, for Pillow."""
    head = _PPM.match(data)
    if head is None:
        return None
    width, height = int(head[1]), int(head[2])
    if width * height > max_pixels or len(data) != head.end() + 3 * width * height:
        return None
    return np.frombuffer(data, np.uint8, offset=head.end()).reshape(height, width, 3).copy()


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height by the header alone. Raises ImageError where `decode` would for the header."""
    with _opened(data, max_pixels) as image:
        return image.size


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image behind its header, undecoded; whatever Pillow raises inside becomes an ImageError."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library may have set it: half an image would be taken for a whole one
    try:
        refuse_bombs(data)
        with _quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels, expected at most {max_pixels} in all; make it smaller")
            yield image
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:  # its own text holds a memory address
        raise ImageError(
            f"{len(data)} bytes that are no {', '.join(FORMATS)} (first: {data[:8].hex() or 'none'}); replace the file"
        ) from None
    except Exception as e:  # Pillow's decoders raise a dozen types, from SyntaxError to struct.error, for bad bytes
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ImageError(f"can't be decoded: {reason}; replace the file") from None


def decoder_versions() -> dict[str, str]:
    """Versions of the decoder of plain JPEGs, of Pillow, and of the libraries Pillow decodes with; 'none' where it was
    built without."""
    names = {
        "jpeg": "jpg",
        "jpeg-turbo": "libjpeg_turbo",
        "zlib": "zlib",
        "zlib-ng": "zlib_ng",
        "webp": "webp",
        "tiff": "libtiff",
    }
    with _quiet():  # an older Pillow warns of features it does not know
        found = {name: features.version(feature) or "none" for name, feature in names.items()}
    return {"simplejpeg": simplejpeg.__version__, "pillow": features.version("pil") or "none", **found}


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode in _MODES_16:
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise ImageError("32-bit integer pixels, expected 8 or 16 bits per channel; convert the file")
        return np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode not in _MODES:
        raise ImageError(f"pixels of mode {image.mode}, expected grey, RGB, palette or CMYK; convert the file")
    return np.array(image.convert("RGB"))


_depth = 0
_depth_lock = threading.Lock()
_outer = warnings.catch_warnings()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings (odd metadata, big images) from the user: what matters here is an ImageError.

    warnings.catch_warnings alone is not safe in threads that overlap; here the first one in and the last one out do it.
    """
    global _depth, _outer
    with _depth_lock:
        if _depth == 0:
            _outer = warnings.catch_warnings()
            _outer.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _depth += 1
    try:
        yield
    finally:
        with _depth_lock:
            _depth -= 1
            if _depth == 0:
                _outer.__exit__(None, None, None)
