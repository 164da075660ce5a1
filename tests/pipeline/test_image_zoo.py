"""Odd images through pack, both stages and evaluation: seen alike by teacher and student, or left out with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cskd.dataset.inventory import open_inventory
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import verify
from cskd.pipeline.pack import pack_data
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from cskd.views.maker import ViewMaker
from tests.pipeline.test_pipeline import TEACHER, config


def picture(height: int = 40, width: int = 44, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def deep() -> bytes:
    ramp = np.linspace(0, 65535, 40 * 44).reshape(40, 44).astype(np.uint16)
    return encoded(Image.fromarray(ramp), "PNG")


SEEN = {
    "grey.jpg": encoded(picture().convert("L"), "JPEG"),
    "bilevel.png": encoded(picture().convert("1"), "PNG"),
    "cmyk.jpg": encoded(picture().convert("CMYK"), "JPEG"),
    "palette.png": encoded(picture().convert("P"), "PNG"),
    "palette-alpha.png": encoded(picture().convert("P"), "PNG", transparency=3),
    "alpha.png": encoded(picture().convert("RGBA"), "PNG"),
    "grey-alpha.png": encoded(picture().convert("LA"), "PNG"),
    "deep.png": deep(),
    "turned.jpg": turned(),
    "animated.gif": encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]),
    "web.webp": encoded(picture(), "WEBP"),
    "one.png": encoded(picture(1, 1), "PNG"),
    "line.png": encoded(picture(1, 300), "PNG"),
    "huge.jpg": encoded(picture(3000, 4000), "JPEG", quality=30),
}
REFUSED = {
    "bomb.png": header_of(60_000, 60_000),
    "half.jpg": SEEN["grey.jpg"][: len(SEEN["grey.jpg"]) // 2],
    "text.jpg": b"no image at all",
    "float.tiff": encoded(Image.fromarray(np.zeros((40, 40), np.float32)), "TIFF"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "net.py").write_text(TEACHER)
    for i, (name, data) in enumerate({**SEEN, **REFUSED}.items()):
        path = folder / "images" / "abcde"[i % 5] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    pack_data(folder / "images", folder / "train", shard_size=20, block=20, quiet=True)
    return folder


def test_both_stages_see_the_same_or_leave_out_the_same(base: Path) -> None:
    recipe = {"size": 32, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25}
    c = config(base, recipe=recipe, data={"val": str(base / "train")}, cache={"max_quarantine": 0.5})
    report = cache_teacher(c, quiet=True)
    cache = open_cache(base / "cache")
    inventory = cache.inventory
    left_out = {inventory.key(i) for i in np.flatnonzero(cache.quarantined()).tolist()}
    assert report.quarantined == len(REFUSED)
    assert {Path(key).name for key in left_out} == {name.rpartition(".")[0] for name in REFUSED}
    commit = cache.commit_of(0, 0)
    assert commit is not None and all(len(reason) > 20 and "\n" not in reason for reason in commit.quarantine.values())
    assert commit.cached == len(SEEN)

    trained = train(c, quiet=True)  # every view it feeds is checked against the digest of stage 1
    assert trained.steps == 3 * (len(SEEN) // 8)
    assert verify(base / "cache", replay=1000, quiet=True).replayed == 3 * len(SEEN)
    online = train(
        config(base, "online", recipe=recipe, cache={"max_quarantine": 0.5}, data={"val": ""}), online=True, quiet=True
    )
    assert online.steps == trained.steps


def test_the_policy_s_picture_of_each(base: Path) -> None:
    """Shapes by the encoded width and height, grey in three equal channels, orientation and later frames ignored."""
    inventory = open_inventory(base / "train")
    maker = ViewMaker(inventory, config(base).recipe)
    seen = {Path(inventory.key(i)).name: i for i in range(len(inventory))}
    images = {name: maker.image(seen[name.rpartition(".")[0]]) for name in SEEN}
    for name, image in images.items():
        expected = {"one.png": (1, 1), "line.png": (1, 300), "huge.jpg": (3000, 4000)}.get(name, (40, 44))
        assert image.shape == (*expected, 3) and image.dtype == np.uint8, name
    for name in ("grey.jpg", "bilevel.png", "grey-alpha.png", "deep.png"):
        assert (images[name] == images[name][:, :, :1]).all(), name
    assert np.array_equal(images["alpha.png"], np.asarray(picture()))
    assert images["deep.png"].max() == 255 and images["deep.png"].min() == 0 and 120 < images["deep.png"].mean() < 135
    near = np.asarray(picture()).astype(int)
    for name in ("turned.jpg", "web.webp", "animated.gif"):
        assert np.abs(images[name].astype(int) - near).mean() < 12, name


def test_an_evaluation_counts_what_it_can_t_read(base: Path) -> None:
    from cskd.pipeline.evaluate import evaluate_checkpoint

    c = config(
        base, "counted", data={"val": str(base / "train")}, cache={"path": str(base / "cache2"), "max_quarantine": 0.5}
    )
    cache_teacher(c, quiet=True)
    train(c, quiet=True)
    report = evaluate_checkpoint(base / "counted", base / "train", 4, 0, None, "cpu", quiet=True)
    assert (report.images, report.unreadable) == (len(SEEN) + len(REFUSED), len(REFUSED))
    assert all(score.top5 <= 100 * len(SEEN) / report.images for score in report.heads.values())
