"""Valid files of every kind that cskd reads, and random changes of them: of their bytes, or of what a JSON states."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from benchmarks.hostile import base as base_
from benchmarks.hostile.base import Base, picture, tar, write
from cskd.config import from_dict, load_config, to_dict, to_yaml
from cskd.dataset.classes import parse_classes
from cskd.dataset.images import decode
from cskd.errors import StudentError
from cskd.store.unit import read_unit
from cskd.student import build_student
from cskd.student.checkpoint import load_student
from cskd.student.optim import Optimisation
from cskd.student.resume import ResumeStates

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, "", "x", "0", "../../canary", "/etc/passwd"),
    *("pipe:touch canary", "\0", "\x1b[31m", "[bold]", "9" * 5000, [], {}, [[[]]], {"": None}),
)


@dataclass(frozen=True)
class Kind:
    """Valid files, what changes one, and what reads it: (empty folder, bytes)."""

    valid: list[bytes]
    read: Callable[[Path, bytes], Any]
    change: Callable[[bytes, random.Random], bytes]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes."""
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


def twist(value: Any, rng: random.Random) -> Any:
    """One to three changes of what a JSON states: a value replaced, doubled, renamed, moved or left out."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        places = [(holder, key) for holder in _holders(value) for key in _keys(holder)]
        if not places:
            return rng.choice(ODD)
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1:
                other, there = rng.choice(places)
                if there in _keys(other) and key in _keys(holder):
                    holder[key] = json.loads(json.dumps(other[there]))
            case 2 if isinstance(holder, dict):
                holder[rng.choice(("", "x", "\x1b[2J", "__class__", key + "2"))] = holder[key]
            case _:
                holder[key] = rng.choice(ODD)
    return value


def _holders(value: Any) -> list[Any]:
    found, todo = [], [value]
    while todo:
        if isinstance(here := todo.pop(), dict | list):
            found.append(here)
            todo += here.values() if isinstance(here, dict) else here
    return found


def _keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def make_kinds(base: Base) -> dict[str, Kind]:
    """name -> kind. Those named `... sealed` have their hashes made right again after the change."""
    pictures = [picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")]
    png = pictures[0]
    tree = tar({f"train/{c}/{i}.png": png for c in "ab" for i in range(3)})
    shard = tar({f"{i:04d}.{x}": d for i in range(4) for x, d in (("png", png), ("cls", b"%d" % (i % 2)))})
    labels = tar({f"{i}.{x}": d for i in range(3) for x, d in (("png", png), ("json", b'{"label": %d, "a": [1]}' % i))})
    tensors = {"fc.weight": np.ones((5, 8), np.float32)}
    pickled, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"fc.weight": torch.ones(5, 8)}}, pickled)
    torch.save({"fc.weight": torch.ones(5, 8)}, legacy, _use_new_zipfile_serialization=False)
    config = to_yaml(from_dict({"student": {"model": "deit_tiny_patch16_224"}})).encode()
    column = (base.data / "inventory" / "key_offset.npy").read_bytes()
    header = (base.data / "inventory" / "inventory.json").read_bytes()
    manifest = (base.cache / "manifest.json").read_bytes()
    record = (base.cache / "commits" / "b00000" / "v0000.json").read_bytes()
    unit = next((base.cache / "units" / "b00000").iterdir()).read_bytes()
    state = next((base.run / "resume").iterdir()).read_bytes()
    described = (base.run / "config.json").read_bytes()

    def of_json(seal: Callable[[Any], bytes], inside: str = "") -> Callable[[bytes, random.Random], bytes]:
        def change(data: bytes, rng: random.Random) -> bytes:
            value = json.loads(data)
            twisted = twist(value[inside] if inside else value, rng)
            try:
                return seal(twisted)
            except (KeyError, TypeError, AttributeError):
                return json.dumps(twisted).encode()

        return change

    def in_cache(name: str) -> Callable[[Path, bytes], None]:
        return lambda work, data: _with_file(
            base, "cache", name, data, lambda root: base_.read_cache(root, images=False)
        )

    return {
        "image": Kind(pictures, lambda work, data: decode(data), mutate),
        "tar": Kind([tree], lambda work, data: base_.read_pack(write(work / "s.tar", data), work / "out"), mutate),
        "tar.gz": Kind(
            [gzip.compress(tree)],
            lambda work, data: base_.read_pack(write(work / "src.tar.gz", data), work / "out"),
            mutate,
        ),
        "shard": Kind(
            [shard, labels], lambda work, data: base_.read_index(write(work / "d" / "00000.tar", data).parent), mutate
        ),
        "classes": Kind([b"alpha\nbeta\ngamma\n"], lambda work, data: parse_classes(data, "classes.txt"), mutate),
        "inventory": Kind([column, header], lambda work, data: _inventory(base, work, data), mutate),
        "inventory sealed": Kind(
            [header], lambda work, data: _inventory(base, work, data), of_json(base_.seal_inventory)
        ),
        "manifest": Kind([manifest], in_cache("manifest.json"), mutate),
        "manifest sealed": Kind([manifest], in_cache("manifest.json"), of_json(base_.seal_manifest)),
        "commit": Kind([record], in_cache("commits/b00000/v0000.json"), mutate),
        "commit sealed": Kind([record], in_cache("commits/b00000/v0000.json"), of_json(base_.seal_commit, "commit")),
        "unit": Kind([unit], lambda work, data: read_unit(write(work / "u.zarr.zip", data)), mutate),
        "unit sealed": Kind([unit], lambda work, data: read_unit(write(work / "u.zarr.zip", data)), _in_unit),
        "config": Kind([config], lambda work, data: load_config(write(work / "c.yaml", data)), mutate),
        "config twisted": Kind(
            [json.dumps(to_dict(base.config(base.cache, base.run))).encode()],
            lambda work, data: load_config(write(work / "c.yaml", data)),
            of_json(lambda value: json.dumps(value).encode()),
        ),
        "safetensors": Kind(
            [safetensors.numpy.save(tensors)],
            lambda work, data: base_.read_teacher(write(work / "w.safetensors", data)),
            mutate,
        ),
        "checkpoint": Kind(
            [pickled.getvalue(), legacy.getvalue()],
            lambda work, data: base_.read_teacher(write(work / "w.pt", data)),
            mutate,
        ),
        "resume": Kind([state], lambda work, data: _resume(base, work, data), mutate),
        "resume sealed": Kind([state], lambda work, data: _resume(base, work, data), _in_state),
        "run": Kind([described], lambda work, data: _run(base, work, data), mutate),
        "run twisted": Kind(
            [described], lambda work, data: _run(base, work, data), of_json(lambda value: json.dumps(value).encode())
        ),
    }


def _inventory(base: Base, work: Path, data: bytes) -> None:
    """A data folder in which one file of the inventory is changed; every sample is read."""
    name = "key_offset.npy" if data[:3] == b"\x93NU" else "inventory.json"
    _with_file(base, "data", f"inventory/{name}", data, lambda root: base_.read_samples(root))


def _run(base: Base, work: Path, data: bytes) -> None:
    write(work / "run" / "config.json", data)
    os.link(base.run / "model.safetensors", work / "run" / "model.safetensors")
    load_student(work / "run")


_own: dict[str, Path] = {}


def _with_file(base: Base, which: str, name: str, data: bytes, read: Callable[[Path], None]) -> None:
    """Read this process's own copy of a folder, one file of which is changed, and then is as it was."""
    key = f"{which} {os.getpid()}"
    if key not in _own:
        _own[key] = base.folder.parent / f"{which}-{os.getpid()}"
        shutil.copytree(getattr(base, which), _own[key])
    path = _own[key] / name
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        read(_own[key])
    finally:
        path.write_bytes(before)


def drop_own() -> None:
    """Remove this process's copies."""
    for path in _own.values():
        shutil.rmtree(path, ignore_errors=True)


def _in_unit(data: bytes, rng: random.Random) -> bytes:
    """A unit with one member changed and the checksums of its zip right."""
    out = io.BytesIO(data)
    members = {}
    with zipfile.ZipFile(out) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    if name.endswith(".json") and rng.random() < 0.8:
        members[name] = json.dumps(twist(json.loads(members[name]), rng)).encode()
    else:
        members[name] = mutate(members[name], rng)
    if rng.random() < 0.1:
        members[rng.choice(("x/c/0", "targets/c/0", "../canary", "c/0", "seed/c/1"))] = members.pop(name)
    return base_.zipped(members)


def _in_state(data: bytes, rng: random.Random) -> bytes:
    """A resume state whose JSON is twisted and whose digest is right."""
    from cskd.student.resume import digest

    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = safetensors.deserialize(data)
    body = json.dumps(twist(json.loads(header["__metadata__"]["cskd"]), rng), sort_keys=True)
    loaded = {name: _tensor(about) for name, about in tensors}
    header["__metadata__"] = {"cskd": body, "sha256": digest(loaded, body)}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _tensor(about: dict[str, Any]) -> torch.Tensor:
    dtype = {"F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}[about["dtype"]]
    return torch.frombuffer(bytearray(about["data"]), dtype=dtype).reshape(about["shape"])


def _resume(base: Base, work: Path, data: bytes) -> None:
    """The newest state of a run, which has no earlier one."""
    config = base.config(base.cache, base.run)
    student = build_student(config.student, 2, 32)
    write(work / "resume" / next((base.run / "resume").iterdir()).name, data)
    if ResumeStates(work / "resume").load(student, Optimisation(student, config.train, 2)) is None:
        raise StudentError("no state was found, expected one")
