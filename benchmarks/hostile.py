"""Mutated inputs: whatever a file holds, the program reads it or refuses it in one line. Nothing hangs, grows or escapes.

    python -m benchmarks.hostile [--count N] [--only KIND ...] [--seed S] [--tally FILE]

Valid small files of every kind that cskd reads are mutated (bits and bytes changed, pieces cut, doubled, moved, lengths
overwritten) and read by the code that the commands use. A reading fails the program when it raises anything but a CskdError
or an OSError, takes over 10 s, leaves over 2 GB in use, or changes a canary file beside its folder. Forked children each read
200 of them, so that a crash of a C library is seen as one.

Prints one JSON line last: `hostile` (inputs read), `hostile_failed`. Exits 1 when one failed.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from PIL import Image

from cskd.config import from_dict, load_config, to_yaml
from cskd.errors import CskdError
from cskd.images import decode
from cskd.inventory import open_inventory
from cskd.packing.index import index
from cskd.packing.pack import pack
from cskd.shards import ShardReader
from cskd.store.unit import pack_unit, read_unit
from cskd.teacher_build import build

LIMIT_SECONDS, LIMIT_MB, BATCH = 10, 2048, 200
CANARY = "the canary lives"


class Hung(BaseException):
    """A reading took longer than LIMIT_SECONDS."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="inputs in all")
    parser.add_argument("--only", nargs="+", help="these kinds")
    parser.add_argument("--seed", type=int, default=None, help="default: the clock")
    parser.add_argument("--tally", type=Path, help="JSON file that counts are added to")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else time.time_ns()
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        kinds = {name: k for name, k in make_kinds(Path(folder)).items() if not options.only or name in options.only}
        (Path(folder) / "canary").write_text(CANARY)
        for name, (valid, read) in kinds.items():
            counts = run_kind(name, valid, read, options.count // len(kinds), seed, Path(folder))
            print(f"{name:<14}" + "  ".join(f"{k} {n}" for k, n in sorted(counts.items())), flush=True)
            total["hostile"] += counts["read"] + counts["refused"] + counts["failed"]
            total["hostile_failed"] += counts["failed"]
    if options.tally:
        total += Counter(json.loads(options.tally.read_text()) if options.tally.exists() else {})
        options.tally.write_text(json.dumps(total) + "\n")
    print(json.dumps({"benchmark": "hostile", "seed": seed, "hostile_failed": 0, **total}))
    return int(total["hostile_failed"] > 0)


def run_kind(
    name: str, valid: list[bytes], read: Callable[[Path, bytes], Any], count: int, seed: int, folder: Path
) -> Counter[str]:
    """Read `count` mutations in children; what they counted, and one failure for each that died."""
    counts: Counter[str] = Counter()
    for first in range(0, count, BATCH):
        out, inputs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(out)
            try:
                found = read_batch(name, valid, read, range(first, min(first + BATCH, count)), seed, folder)
                os.write(inputs, json.dumps(found).encode())
            finally:
                os._exit(0)
        os.close(inputs)
        with os.fdopen(out) as answer:
            text = answer.read()
        os.waitpid(pid, 0)
        counts += Counter(json.loads(text)) if text else Counter(failed=1)
        if not text:
            print(f"{name}: a child died in batch {first} of seed {seed}", file=sys.stderr)
    return counts


def read_batch(
    name: str, valid: list[bytes], read: Callable[[Path, bytes], Any], numbers: range, seed: int, folder: Path
) -> Counter[str]:
    counts: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, _hung)
    for i in numbers:
        rng = random.Random(f"{seed} {name} {i}")
        data = mutate(rng.choice(valid), rng)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            signal.alarm(LIMIT_SECONDS)
            try:
                read(Path(work), data)
                outcome = "read"
            except (CskdError, OSError) as e:
                outcome = "refused" if str(e) and "\n" not in str(e) else "failed"
            except BaseException:
                outcome = "failed"
                print(f"{name} {i} of seed {seed}:\n{traceback.format_exc(limit=-4)}", file=sys.stderr)
            signal.alarm(0)
        if (folder / "canary").read_text() != CANARY:
            outcome = "failed"
            (folder / "canary").write_text(CANARY)
        counts[outcome] += 1
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > LIMIT_MB * 1024:
        counts["failed"] += 1
        print(f"{name}: over {LIMIT_MB} MB in use after batch {numbers.start} of seed {seed}", file=sys.stderr)
    return counts


def _hung(signum: int, frame: object) -> None:
    raise Hung(f"over {LIMIT_SECONDS} s")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(out)))
        span = rng.randint(1, 64)
        match rng.randrange(7):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del out[at : at + span]
            case 3:
                out[at:at] = out[at : at + span]
            case 4:
                out[at : at + 8] = rng.choice((2**31, 2**63, 2**64 - 1, 0)).to_bytes(8, rng.choice(("little", "big")))
            case 5:
                out[at : at + 4] = rng.choice(
                    (b"../.", b"/tmp", b"9999", b"-1e9", b"null", b"\n- x", b"!!py", b"\0\0\0\0")
                )
            case _:
                out = out[: at + 1]
    return bytes(out)


def make_kinds(folder: Path) -> dict[str, tuple[list[bytes], Callable[[Path, bytes], Any]]]:
    """name -> valid files, and what reads one: (empty folder, bytes)."""
    pictures = {kind: picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")}
    tree = tar({f"train/{c}/{i}.png": pictures["PNG"] for c in "ab" for i in range(3)})
    shard = tar({f"{i:04d}.{x}": d for i in range(4) for x, d in (("png", pictures["PNG"]), ("cls", b"%d" % (i % 2)))})
    (folder / "valid").mkdir()
    (folder / "valid" / "00000.tar").write_bytes(shard)
    index(folder / "valid")
    column = (folder / "valid" / "inventory" / "offset.npy").read_bytes()
    header = (folder / "valid" / "inventory" / "inventory.json").read_bytes()
    rows = {"key_hash": np.arange(4, dtype=np.uint64), "seed": np.arange(4, dtype=np.uint64)}
    unit = pack_unit(rows, {}, {name: ("sample",) for name in rows}, {"codec": "envelope"})
    tensors = {"fc.weight": np.ones((5, 8), np.float32)}
    pickled = io.BytesIO()
    torch.save({"state_dict": {"fc.weight": torch.ones(5, 8)}}, pickled)
    config = to_yaml(from_dict({"student": {"model": "deit_tiny_patch16_224"}})).encode()
    return {
        "image": (list(pictures.values()), lambda work, data: decode(data)),
        "tar": ([tree], lambda work, data: pack(write(work / "src.tar", data), work / "out")),
        "tar.gz": ([gzip.compress(tree)], lambda work, data: pack(write(work / "src.tar.gz", data), work / "out")),
        "shard": ([shard], lambda work, data: index(write(work / "d" / "00000.tar", data).parent)),
        "inventory": ([column, header], lambda work, data: read_inventory(folder / "valid", work, data)),
        "unit": ([unit], lambda work, data: read_unit(write(work / "u.zarr.zip", data))),
        "config": ([config], lambda work, data: load_config(write(work / "c.yaml", data))),
        "safetensors": ([safetensors.numpy.save(tensors)], lambda work, data: weights(work / "w.safetensors", data)),
        "checkpoint": ([pickled.getvalue()], lambda work, data: weights(work / "w.pt", data)),
    }


def read_inventory(valid: Path, work: Path, data: bytes) -> None:
    """A data folder in which one file of the inventory is mutated; every sample is read."""
    for path in sorted(valid.rglob("*")):
        if path.is_file():
            write(work / path.relative_to(valid), path.read_bytes())
    write(work / "inventory" / ("offset.npy" if data[:3] == b"\x93NU" else "inventory.json"), data)
    inventory = open_inventory(work)
    reader = ShardReader(inventory)
    for i in range(len(inventory)):
        reader.read(i)


def weights(path: Path, data: bytes) -> None:
    """A teacher whose weights are the mutated file."""
    code = "from torch import nn\ndef build():\n    m = nn.Module()\n    m.fc = nn.Linear(8, 5, bias=False)\n    return m\n"
    write(path.parent / "net.py", code.encode())
    write(path, data)
    build(from_dict({"teacher": {"model": f"{path.parent / 'net.py'}:build", "weights": str(path)}}).teacher)


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


if __name__ == "__main__":
    sys.exit(main())
