"""Images and folders that are nearly as expected: read as they are meant, and whatever is left out is listed by extension."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from cskd.dataset.images import decode
from tests.data_sources import folder, opened


def encoded(mode: str, form: str) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(np.full((8, 8), 40_000, np.uint16)) if mode == "I;16" else Image.new(mode, (8, 8))
    image.save(out, form)
    return out.getvalue()


def test_images_are_what_their_bytes_say_and_not_their_names(tmp_path: Path) -> None:
    files = {
        "a/png.jpg": encoded("RGB", "PNG"),
        "a/webp.JPEG": encoded("RGB", "WEBP"),
        "b/deep.png": encoded("I;16", "PNG"),
        "b/print.JPG": encoded("CMYK", "JPEG"),
        "b/grey.jpeg": encoded("L", "JPEG"),
    }
    (folder(tmp_path / "src", files) / "a" / "link.jpg").symlink_to(tmp_path / "src" / "b" / "grey.jpeg")
    images, _ = opened(tmp_path / "src", tmp_path / "w")
    assert len(images) == 6
    assert {decode(data).shape for _, data in images.values()} == {(8, 8, 3)}
    assert decode(images["b/deep"][1]).max() == 40_000 >> 8


def test_what_is_left_out_is_listed_by_extension(tmp_path: Path) -> None:
    others = {f"a/{i}.{end}": b"" for i in range(2) for end in ("avif", "heic", "svg")} | {
        "a/0.txt": b"",
        "Thumbs.db": b"",
    }
    _, source = opened(folder(tmp_path / "src", {"a/0.jpg": b"", "b/0.jpg": b"", **others}), tmp_path / "w")
    assert source.notes == [
        "6 images of kinds that are not read passed over (2 .avif, 2 .heic, 2 .svg): a/0.avif ...; convert them to JPEG or PNG",
        "2 other files passed over (1 .db, 1 .txt): Thumbs.db ...",
    ]
