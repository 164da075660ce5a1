"""A small data set in the forms a user may have it, for the tests of packing."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any, TypedDict

import webdataset

from cskd.dataset.inventory import Inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.packing.places import read_place
from cskd.packing.sources import Source, open_source


class Sizes(TypedDict):
    """Arguments of `pack`."""

    shard_size: int
    block: int


FILES = {
    f"{name}/{name}_{i:02d}.JPEG": f"{name} {i}".encode() * (i + 1) for name in ("ant", "bee", "cat") for i in range(9)
}
SMALL: Sizes = {"shard_size": 4, "block": 8}


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar(path: Path, files: dict[str, bytes], mode: str = "w", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as out:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def shard(*keys: str) -> dict[str, bytes]:
    """Files of a shard: an image of each key, labels 0 and 1 in turn."""
    return {
        f"{key}.{x}": data
        for n, key in enumerate(keys)
        for x, data in (("jpg", key.encode()), ("cls", b"%d" % (n % 2)))
    }


def contents(inventory: Inventory) -> dict[str, tuple[str, bytes]]:
    """key -> (class, bytes), read by the inventory."""
    reader = ShardReader(inventory)
    return {inventory.key(i): (inventory.classes[inventory.label[i]], reader.read(i)) for i in range(inventory.n)}


def as_webdataset_reads(shard: Path) -> list[dict[str, Any]]:
    """Its samples; webdataset.WebDataset does the same, but leaves the file open."""
    with shard.open("rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": str(shard), "stream": stream}])
        return list(webdataset.tariterators.group_by_keys(files))


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


EXPECTED = {name[:-5]: (name[:3], data) for name, data in FILES.items()}


def prefixed(prefix: str) -> dict[str, bytes]:
    return {prefix + name: data for name, data in reversed(FILES.items())}


def zipped(path: Path, files: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def opened(
    src: Path, work: Path, classes: Path | None = None, split: str | None = None, labels: Path | None = None
) -> tuple[dict[str, tuple[str, bytes]], Source]:
    """key -> (class, bytes) of a source that is opened and read, but not packed; and the source."""
    work.mkdir(exist_ok=True)
    source = open_source(src, classes, work, 1 << 40, None, split, labels)
    listing = source.listing
    images = {
        listing.key(i): (source.classes[source.label(i)], read_place(listing.place(i))) for i in range(len(listing))
    }
    return images, source
