"""Decoding: the stated policy for every kind of image, and ImageError, never anything else, for what is none."""

from __future__ import annotations

import io
import struct
import tarfile
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from cskd.dataset.images import MAX_PIXELS, POLICY, _plain_jpeg, as_ppm, decode, decoder_versions, image_size
from cskd.errors import ImageError

RAMP = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP.T.reshape(24, 32)], axis=2)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


JPEG = encoded(Image.fromarray(COLOUR), "JPEG", quality=90)
PNG = encoded(Image.fromarray(COLOUR), "PNG")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    pixels = decode(encoded(Image.fromarray(COLOUR), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, COLOUR)


def test_a_jpeg_gives_what_pillow_gives() -> None:
    np.testing.assert_array_equal(decode(JPEG), np.asarray(Image.open(io.BytesIO(JPEG)).convert("RGB")))
    assert image_size(JPEG) == (32, 24)


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L", "YCbCr", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_of_every_kind_have_pillows_pixels(mode: str, subsampling: int) -> None:
    rng = np.random.default_rng(subsampling)
    settings: list[tuple[int, dict[str, Any]]] = [
        (5, {}),
        (60, {"progressive": True}),
        (95, {"optimize": True, "restart_marker_rows": 1}),
    ]
    for height, width in [(1, 1), (7, 9), (16, 16), (33, 17), (64, 250)]:
        smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height))
        for quality, extra in settings:
            data = encoded(smooth.convert(mode), "JPEG", quality=quality, subsampling=subsampling, **extra)
            pixels = decode(data)
            assert pixels.flags.writeable and pixels.flags.c_contiguous
            np.testing.assert_array_equal(pixels, by_pillow(data))


def test_a_jpeg_that_the_fast_decoder_only_warns_of_is_left_to_pillow() -> None:
    for odd in (JPEG[:-2], JPEG[:-2] + b"\x00\x00\xff\xd9", JPEG + b"rubbish", JPEG.replace(b"JFIF", b"JFXX")):
        try:
            expected = by_pillow(odd)
        except OSError:
            with pytest.raises(ImageError):
                decode(odd)
        else:
            np.testing.assert_array_equal(decode(odd), expected)


def test_jpegs_of_imagenet_have_pillows_pixels(sample_data: Path) -> None:
    with tarfile.open(sample_data / "data" / "imagenet-sample.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".JPEG")]
        fast = 0
        for name in names:
            file = tar.extractfile(name)
            assert file is not None
            data = file.read()
            fast += _plain_jpeg(data, MAX_PIXELS, None) is not None
            np.testing.assert_array_equal(decode(data), by_pillow(data))
    assert fast >= 0.99 * len(names)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode: str) -> None:
    image = Image.fromarray(COLOUR).convert(mode)
    pixels = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg_is_decoded() -> None:
    data = encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(data).astype(int) - COLOUR).mean() < 20


def test_sixteen_bits_keep_the_high_byte() -> None:
    deep = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 85
    expected = np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    pgm = b"P5 32 24 65535\n" + deep.astype(">u2").tobytes()
    for data in (encoded(Image.fromarray(deep), "PNG"), encoded(Image.fromarray(deep), "TIFF"), pgm):
        np.testing.assert_array_equal(decode(data), expected)


def test_pixels_of_32_bits_and_floats_are_refused() -> None:
    for values in (np.full((4, 4), 70000, np.int32), np.full((4, 4), -1, np.int32), np.ones((4, 4), np.float32)):
        with pytest.raises(ImageError, match=r"32-bit integer pixels|pixels of mode F"):
            decode(encoded(Image.fromarray(values), "TIFF"))


def test_alpha_is_dropped() -> None:
    transparent = np.dstack([COLOUR, np.zeros((24, 32), np.uint8)])
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(transparent), "PNG")), COLOUR)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.fromarray(COLOUR), "JPEG", quality=90, exif=exif)).shape == (24, 32, 3)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_one_pixel_is_an_image() -> None:
    assert decode(encoded(Image.new("L", (1, 1), 7), "PNG")).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_a_truncated_image_is_refused_even_where_a_library_allows_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for share in (0.05, 0.5, 0.9):
        with pytest.raises(ImageError):
            decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"no image", b"\x00" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_bytes_that_are_no_image_give_one_reason_every_time(data: bytes) -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(ImageError, match="bytes that are no JPEG, PNG") as caught:
            decode(data)
        reasons.add(str(caught.value))
    assert len(reasons) == 1


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8001, 10_000, 14_000, 60_000])
def test_a_huge_image_is_refused_by_its_header(side: int) -> None:
    for read in (decode, image_size):
        with pytest.raises(ImageError, match=r"pixels"):
            read(png_header(side, side))


def test_the_limit_of_pixels_is_exact() -> None:
    assert decode(PNG, max_pixels=24 * 32).shape == (24, 32, 3)
    with pytest.raises(ImageError, match="32 x 24 pixels, expected at most 767"):
        decode(PNG, max_pixels=24 * 32 - 1)


@given(st.sampled_from([JPEG, PNG]), st.data())
def test_damaged_bytes_give_pixels_or_an_image_error(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 8))):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    try:
        assert decode(bytes(damaged)).ndim == 3
    except ImageError as e:
        assert "\n" not in str(e)


def test_pillows_warnings_neither_leak_nor_turn_into_bad_images() -> None:
    palette = Image.fromarray(COLOUR).convert("P")
    data = encoded(palette, "PNG", transparency=bytes(range(256)))  # Pillow warns on converting these
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode(data)
    assert seen == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).shape == (24, 32, 3)


def test_overlapping_threads_leave_the_warning_filters_as_they_were() -> None:
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [decode(JPEG) for _ in range(40)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_policy_and_versions_can_be_recorded() -> None:
    versions = decoder_versions()
    assert versions["pillow"][0].isdigit() and versions["jpeg"] != "none"
    assert all(isinstance(value, str) and value for value in {**versions, **POLICY}.values())


def test_a_ppm_of_ours_is_read_without_pillow_and_any_other_by_it() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    data = as_ppm(pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    found = decode(data)
    assert np.array_equal(found, pixels) and found.flags.writeable
    assert np.array_equal(decode(data.replace(b"P6\n", b"P6\n# a comment\n")), pixels)
    assert np.array_equal(decode(data + b"\0\0"), pixels)  # Pillow takes what it needs
    with pytest.raises(ImageError):
        decode(data[:-1])
    with pytest.raises(ImageError, match="7 x 5 pixels"):
        decode(data, max_pixels=34)
