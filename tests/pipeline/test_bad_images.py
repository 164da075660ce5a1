"""Which images are bad: `cskd verify DATA --images` before stage 1, `cskd inspect CACHE --quarantined` after it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cskd.errors import DataError, PathError
from cskd.pipeline.care.verify_images import is_data, render, verify_images
from cskd.pipeline.look.quarantined import list_quarantined, render_list
from cskd.storage import open_storage
from cskd.storage.node_cache import use_node_cache
from tests.caches import make_tiny_cache, make_tiny_data


def test_every_image_that_does_not_decode_is_listed_with_its_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_tiny_data(tmp_path / "data", n=70, shard=40, bad=[3, 41, 69]).root
    report = verify_images(data)
    assert [(one.key, Path(one.shard).name) for one in report.bad] == [
        ("image003", "00000.tar"),
        ("image041", "00001.tar"),
        ("image069", "00001.tar"),
    ]
    assert all("can't be decoded" in one.reason for one in report.bad)
    assert (report.read, report.unread, report.sound) == (70, 0, False)
    assert "images: 70 images in " in capsys.readouterr().err
    out = io.StringIO()
    render(report, Console(file=out, width=60))
    assert len(out.getvalue().splitlines()) == 4 and "70 of 70 images read, 3 bad images; replace" in out.getvalue()
    with (data / "00001.tar").open("ab") as shard:
        shard.write(b"\0")
    report = verify_images(data, quiet=True)
    assert (report.read, report.unread, len(report.lost)) == (40, 30, 1)
    assert [one.key for one in report.bad] == ["image003"]
    (data / "00000.tar").unlink()
    with pytest.raises(DataError, match="none of the 2 image shards is there"):
        verify_images(data, quiet=True)


def test_a_sound_data_folder_is_told_from_a_cache_also_on_a_store(tmp_path: Path, s3: str) -> None:
    cache = make_tiny_cache(tmp_path, quarantine=[4, 7])
    data = cache.inventory.root
    assert is_data(data) and not is_data(cache.root)
    assert verify_images(data, quiet=True).sound
    for folder in (data, cache.root):
        storage = open_storage(f"{s3}/{folder.name}")
        for path in folder.rglob("*.*"):
            if path.is_file():
                storage.put(path.relative_to(folder).as_posix(), path.read_bytes())
    there = Path(f"{s3}/data")
    assert is_data(there) and is_data(there / "inventory") and not is_data(Path(f"{s3}/cache"), images=True)
    use_node_cache(str(tmp_path / "node"), None)
    assert verify_images(there, quiet=True) == replace(verify_images(data, quiet=True), data=f"{s3}/data")
    assert list_quarantined(Path(f"{s3}/cache")).cache == f"{s3}/cache"
    with pytest.raises(PathError, match=r"is a packed data set, not a cache; 'cskd verify .* --images'"):
        verify_images(data, images=False)
    found = list_quarantined(cache.root)
    assert [(one.key, one.shard, one.reason) for one in found.quarantined] == [
        ("image004", "00000.tar", "not an image"),
        ("image007", "00001.tar", "not an image"),
    ]
    out = io.StringIO()
    render_list(found, Console(file=out, width=40))
    assert out.getvalue().splitlines()[-1].endswith("2 of 10 samples are quarantined")
