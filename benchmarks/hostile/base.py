"""What hostile inputs are made from and read by: a valid data set, its cache and a trained run, and the commands' own readers."""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVarTuple

import numpy as np
from PIL import Image

from benchmarks.tiny_teacher import TINY_TEACHER
from cskd.config import Config, from_dict
from cskd.dataset.inventory import open_inventory
from cskd.dataset.inventory_format import header_bytes, header_hash
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import CacheError
from cskd.files.durable import json_bytes, json_hash
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import verify
from cskd.pipeline.pack import index_data, pack_data
from cskd.pipeline.train import train
from cskd.store.cache import open_cache
from cskd.teacher.build import build

LINEAR = (
    "from torch import nn\ndef build():\n    m = nn.Module()\n    m.fc = nn.Linear(8, 5, bias=False)\n    return m\n"
)
Values = TypeVarTuple("Values")
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@dataclass(frozen=True)
class Base:
    """Folders of valid things: `data` (16 images of 2 classes in 2 shards), `cache` of it (2 blocks, 1 view), `run`."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def config(self, cache: Path, run: Path, data: Path | None = None, /, **changes: dict[str, Any]) -> Config:
        raw: dict[str, dict[str, Any]] = {
            "data": {"train": str(data or self.data)},
            "teacher": {
                "model": TINY_TEACHER,
                "kwargs": {"classes": 2},
                "batch": 8,
                "min_top1": 0.0,
                "check_images": 8,
            },
            "recipe": {"size": 32},
            "cache": {"path": str(cache), "views": 1, "workers": 0, "device": "cpu"},
            "student": {"model": "deit_tiny_distilled_patch16_224", "kwargs": VIT},
            "train": {
                "output": str(run),
                "epochs": 1,
                "warmup_epochs": 0,
                "global_batch": 8,
                "workers": 0,
                "device": "cpu",
            },
        }
        for section, values in changes.items():
            raw[section] |= values
        return from_dict(raw)


@dataclass(frozen=True)
class Case:
    """One curated input. `make` writes it into an empty folder, `read` reads it there.

    expected: 'refused', 'read', or 'either'. writes: beginnings of names in the folder that reading may write.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    expected: str = "refused"
    writes: tuple[str, ...] = ("out", "linear.py", "__pycache__")
    seconds: int | None = None  # on the clock; default: the limit of every reading


def bound(function: Callable[[Path, *Values], object], *values: *Values) -> Callable[[Path], object]:
    """`function` of a folder, with the rest of its arguments as they are now: those of a loop have other values later."""
    return lambda work: function(work, *values)


def make_base(folder: Path) -> Base:
    """Make them, with the program itself."""
    folder.mkdir(parents=True)
    base = Base(folder)
    (folder / "linear.py").write_text(LINEAR)
    for i in range(16):
        write(folder / "images" / "ab"[i % 2] / f"{i:02d}.png", picture("PNG", seed=i))
    pack_data(folder / "images", base.data, shard_size=8, block=8, quiet=True)
    cache_teacher(base.config(base.cache, base.run), quiet=True)
    train(base.config(base.cache, base.run), quiet=True)
    return base


# Reading, as the commands do; each raises CskdError or OSError where the command would exit with 1


def read_pack(source: Path, out: Path, count: int | None = None, **options: Any) -> None:
    """`cskd pack`, then every sample by the new inventory. `count`: how many samples there must be."""
    report = pack_data(source, out, quiet=True, **options)
    read_samples(out)
    if count is not None and report.samples != count:
        raise AssertionError(f"{report.samples} samples packed, expected {count}")


def read_index(shards: Path, count: int | None = None) -> None:
    """`cskd index`, then every sample by the new inventory."""
    report = index_data(shards, quiet=True)
    read_samples(shards)
    if count is not None and report.samples != count:
        raise AssertionError(f"{report.samples} samples listed, expected {count}")


def read_samples(data: Path, verified: bool = True) -> None:
    inventory = open_inventory(data, verify=verified)
    reader = ShardReader(inventory)
    for i in range(len(inventory)):
        reader.read(i)
        inventory.find(inventory.key(i))


def read_cache(root: Path, data: Path | None = None, images: bool = True) -> None:
    """`cskd verify`: unsound is refused. A sound cache's counts must add up."""
    report = verify(root, data=data, images=images, quiet=True)
    if not report.sound:
        raise CacheError((report.errors or [f"{report.missing} units missing"])[0])
    cache = open_cache(root, data=data)
    if report.cached + report.quarantined != cache.views * len(cache.inventory):
        raise AssertionError(f"{report.cached} cached + {report.quarantined} quarantined of {len(cache.inventory)}")


def read_teacher(weights: Path) -> None:
    """A teacher of one linear layer with these weights."""
    code = weights.with_name("linear.py")
    code.write_text(LINEAR)
    build(from_dict({"teacher": {"model": f"{code}:build", "weights": str(weights)}}).teacher)


# Making: hashes are made right again, for they are no secret


def seal_manifest(manifest: dict[str, Any]) -> bytes:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        manifest["fingerprint"] = json_hash(manifest["identity"])
    facts = {k: v for k, v in manifest.items() if k != "sha256"}
    return json_bytes({**facts, "sha256": json_hash(facts)})


def seal_commit(body: Any) -> bytes:
    return json_bytes({"commit": body, "sha256": json_hash(body)})


def seal_inventory(header: Any) -> bytes:
    if isinstance(header, dict):
        header["hash"] = header_hash(header)
    return header_bytes(header)


def copy_with(folder: Path, copy: Path, name: str, content: bytes | Callable[[Path], object]) -> Path:
    """A copy of a folder in which one file or folder is another: of these bytes, or made at the path that is given."""
    shutil.copytree(folder, copy)
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return copy


def copy_cache(base: Base, root: Path) -> Path:
    shutil.copytree(base.cache, root)
    return root


def put_manifest(root: Path, manifest: dict[str, Any]) -> None:
    for name in ("manifest.json", "manifest.copy.json"):
        (root / name).write_bytes(seal_manifest(manifest))


def put_unit(root: Path, data: bytes, block: int = 0, view: int = 0) -> None:
    """Replace a unit by these bytes, its record and file name as if they had been written so."""
    record = root / "commits" / f"b{block:05d}" / f"v{view:04d}.json"
    body = json.loads(record.read_bytes())["commit"]
    file = body["files"][0]
    (root / file["path"]).unlink(missing_ok=True)
    sha = hashlib.sha256(data).hexdigest()
    file |= {"sha256": sha, "size": len(data), "path": f"units/b{block:05d}/v{view:04d}.envelope.{sha[:16]}.zarr.zip"}
    write(root / file["path"], data)
    record.write_bytes(seal_commit(body))


def unit_members(root: Path) -> dict[str, bytes]:
    """The members of a cache's first unit."""
    with zipfile.ZipFile(next((root / "units" / "b00000").iterdir())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def picture(kind: str, size: tuple[int, int] = (14, 12), seed: int = 0, **options: Any) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def bomb(kind: str, megabytes: int = 400) -> bytes:
    """Zeros, as gz, bz2 or xz."""
    gz, zeros = zlib.compressobj(9, zlib.DEFLATED, 31), bytes(10**6)
    packer: Any = {"gz": gz, "bz2": bz2.BZ2Compressor(), "xz": lzma.LZMACompressor(preset=0)}[kind]
    whole: bytes = b"".join(packer.compress(zeros) for _ in range(megabytes)) + packer.flush()
    return whole


def sparse(path: Path, size: int, head: bytes = b"") -> Path:
    """A file of `size` bytes that takes none of the disk."""
    write(path, head)
    os.truncate(path, size)
    return path
