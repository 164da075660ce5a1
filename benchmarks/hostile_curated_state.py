"""Curated state: inventories, manifests, commit records, units, checkpoints and runs, their hashes right, that claim too much."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import hostile_base as b
from benchmarks.hostile_base import Base, Case, sparse, write
from cskd.student import build_student
from cskd.student.checkpoint import load_student
from cskd.student.optim import Optimisation
from cskd.student.resume import ResumeStates
from pipeline.gc import gc
from pipeline.inspect_cache import inspect

Change = Callable[[Any], object]
DEEP = json.loads("[" * 200 + "]" * 200)


def state_cases(base: Base) -> list[Case]:
    return [
        *inventory_cases(base),
        *column_cases(base),
        *record_cases(base),
        *folder_cases(base),
        *unit_cases(base),
        *weight_cases(base),
        *run_cases(base),
    ]


def _set(*path: Any, to: Any) -> Change:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


def inventory_cases(base: Base) -> list[Case]:
    header = json.loads((base.data / "inventory" / "inventory.json").read_bytes())
    shard = lambda name: _set("shards", 0, "name", to=name)  # noqa: E731
    changes: dict[str, Change] = {
        "a shard ../../canary": shard("../../canary"),
        "an absolute shard": shard("/etc/passwd"),
        "a shard pipe:rm": shard("pipe:rm -rf canary"),
        "a shard http://": shard("http://localhost/x.tar"),
        "a shard file:": shard("file:/etc/passwd"),
        "a shard with a zero byte": shard("a\0b"),
        "a shard with an escape sequence": shard("\x1b[2J.tar"),
        "a shard of no name": shard(""),
        "a shard that is a number": shard(7),
        "a shard of a negative length": _set("shards", 0, "bytes", to=-1),
        "a shard of 2^70 bytes": _set("shards", 0, "bytes", to=2**70),
        "shards that are a mapping": _set("shards", to={"name": "x"}),
        "a shard that is text": _set("shards", to=["00000.tar"]),
        "2^62 samples": _set("num_samples", to=2**62),
        "no samples": _set("num_samples", to=0),
        "samples in text": _set("num_samples", to="16"),
        "true samples": _set("num_samples", to=True),
        "blocks that fall": _set("blocks", to=[0, 12, 8, 16]),
        "blocks that end early": _set("blocks", to=[0, 8]),
        "blocks that start late": _set("blocks", to=[1, 8, 16]),
        "blocks of 2^80": _set("blocks", to=[0, 2**80]),
        "blocks in text": _set("blocks", to=["0", "16"]),
        "no blocks": _set("blocks", to=[]),
        "no classes": _set("classes", to=[]),
        "100,000 classes": _set("classes", to=[str(i) for i in range(100_000)]),
        "classes that are numbers": _set("classes", to=[1, 2]),
        "one class of two": _set("classes", to=["a"]),
        "notes that are text": _set("notes", to="note"),
        "no columns": _set("columns", to=None),
        "columns of text": _set("columns", to={"label": "x"}),
        "lists 200 deep": _set("made", "deep", to=DEEP),
        "no id": _set("id", to=None),
        "a later version": _set("version", to=99),
    }
    raw = {
        "nested 100,000 deep": b"[" * 100_000,
        "with a key twice": b'{"format": "cskd inventory", "format": "cskd inventory"}',
        "with a number of 10,000 digits": b'{"version": ' + b"9" * 10_000 + b"}",
        "of no bytes": b"",
        "that is NaN": b"NaN",
        "with half a character": b'{"format": "\\ud800"}',
    }

    def make(work: Path, data: bytes) -> None:
        b.shutil.copytree(base.data, work / "d")
        (work / "d" / "inventory" / "inventory.json").write_bytes(data)

    cases = []
    for name, change in changes.items():
        value = json.loads(json.dumps(header))
        change(value)
        raw[f"with {name}"] = b.seal_inventory(value)
    for name, data in raw.items():
        read = lambda work: b.read_samples(work / "d")  # noqa: E731
        cases.append(Case(f"inventory: {name}", lambda work, data=data: make(work, data), read))
    return cases


def npy(descr: str, shape: str, data: bytes = b"") -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + data


def column_cases(base: Base) -> list[Case]:
    rows = {
        name: np.load(base.data / "inventory" / f"{name}.npy", allow_pickle=False)
        for name in ("label", "shard", "size", "offset", "key_offset")
    }

    def changed(name: str, value: int, row: int = 0) -> bytes:
        array = rows[name].copy()
        array[row] = value
        return npy(f"'{array.dtype.str}'", f"({len(array)},)", array.tobytes())

    columns: dict[str, tuple[str, bytes]] = {
        "2^60 elements": ("size", npy("'<i8'", "(1152921504606846976,)")),
        "a shape of 10^30": ("size", npy("'<i8'", f"({10**30},)")),
        "a negative shape": ("size", npy("'<i8'", "(-1,)")),
        "a shape of 20 dimensions": ("size", npy("'<i8'", str((1,) * 80))),
        "objects": ("size", npy("'|O'", "(16,)", b"\x80\x04cos\nsystem\n.")),
        "a header of code": ("size", npy("__import__('os').system('touch canary')", "(16,)")),
        "a header 5,000 deep": ("size", npy("'<i8'", "(" * 5000)),
        "floats": ("size", npy("'<f8'", "(16,)", bytes(128))),
        "another byte order": ("size", npy("'>i8'", "(16,)", bytes(128))),
        "no bytes": ("size", b""),
        "a zip of arrays": ("size", b.zipped({"size.npy": npy("'<i8'", "(16,)", bytes(128))})),
        "a negative label": ("label", changed("label", -1)),
        "a label of no class": ("label", changed("label", 2)),
        "shard 4 billion": ("shard", changed("shard", 2**32 - 1)),
        "an image of 2^62 bytes": ("size", changed("size", 2**62)),
        "an image of a negative size": ("size", changed("size", -5)),
        "an image before its shard": ("offset", changed("offset", -512)),
        "an image after its shard": ("offset", changed("offset", 2**62)),
        "keys that go back": ("key_offset", changed("key_offset", 10**6, 3)),
        "keys that start later": ("key_offset", changed("key_offset", 1)),
        "keys that end at 2^62": ("key_offset", changed("key_offset", 2**62, -1)),
        "keys that are no UTF-8": (
            "key",
            npy("'|u1'", f"({int(rows['key_offset'][-1])},)", b"\xff" * int(rows["key_offset"][-1])),
        ),
    }

    def make(work: Path, name: str, data: bytes) -> None:
        b.shutil.copytree(base.data, work / "d")
        (work / "d" / "inventory" / f"{name}.npy").write_bytes(data)

    def read(work: Path) -> None:
        inventory = b.open_inventory(work / "d")  # not verified, as training opens it
        reader = b.ShardReader(inventory)
        for i in range(len(inventory)):
            reader.read(i)
            inventory.find(inventory.key(i))

    cases = [
        Case(f"inventory: a column with {what}", lambda work, name=name, data=data: make(work, name, data), read)
        for what, (name, data) in columns.items()
    ]

    def instead(work: Path, name: str, put: Callable[[Path], object]) -> None:
        b.shutil.copytree(base.data, work / "d")
        (work / "d" / name).unlink()
        put(work / "d" / name)

    shard = next(p.name for p in sorted(base.data.glob("*.tar")))
    for what, name, put in (
        ("a header that is a pipe", "inventory/inventory.json", os.mkfifo),
        ("a column that is a pipe", "inventory/size.npy", os.mkfifo),
        ("a header of 1 TB", "inventory/inventory.json", lambda path: sparse(path, 10**12, b"{")),
        ("a header that is a folder", "inventory/inventory.json", Path.mkdir),
        ("a shard that is a pipe", shard, os.mkfifo),
        ("a shard that is a device", shard, lambda path: path.symlink_to("/dev/zero")),
        ("a shard that is a file of others", shard, lambda path: path.symlink_to("/etc/passwd")),
        ("a shard of zeros", shard, lambda path: sparse(path, (base.data / shard).stat().st_size)),
    ):
        cases.append(Case(f"inventory: {what}", lambda work, name=name, put=put: instead(work, name, put), read))
    return cases


def record_cases(base: Base) -> list[Case]:
    manifest = json.loads((base.cache / "manifest.json").read_bytes())
    record = json.loads((base.cache / "commits" / "b00000" / "v0000.json").read_bytes())["commit"]
    manifests: dict[str, Change] = {
        "10^12 views": _set("views", to=10**12),
        "no views": _set("views", to=0),
        "views in text": _set("views", to="3"),
        "infinitely many views": _set("views", to=1e308),
        "a grid of 10^9": _set("identity", "grid", to=[10**9, 10**9]),
        "a grid of one": _set("identity", "grid", to=[1]),
        "a codec that is a path": _set("identity", "codecs", to=["../../canary"]),
        "a codec twice": _set("identity", "codecs", to=["envelope", "envelope"]),
        "no codecs": _set("identity", "codecs", to=[]),
        "a recipe of 10^6 pixels": _set("identity", "recipe", "size", to=10**6),
        "a recipe with an unknown key": _set("identity", "recipe", "__class__", to="x"),
        "a recipe of text": _set("identity", "recipe", to="x"),
        "a recipe without end": _set("identity", "recipe", "randaugment", to="rand-n1000000000"),
        "a teacher that is a list": _set("identity", "teacher", to=[]),
        "no inventory": _set("identity", "inventory", to=None),
        "images of /etc": _set("data", to="/etc"),
        "images of a zero byte": _set("data", to="\0"),
        "images that are a number": _set("data", to=7),
        "a config that is text": _set("config", to="x"),
        "a config of code": _set("config", "teacher", to="x"),
        "versions that are text": _set("versions", to="x"),
        "a probe of text": _set("probe", to="x"),
        "an accuracy of text": _set("clean_top1", to="[bold]"),
        "lists 200 deep": _set("deep", to=DEEP),
        "no identity": lambda value: value.pop("identity"),
        "a format of 99": _set("format", to=99),
    }
    sha = record["files"][0]["sha256"]
    records: dict[str, Change] = {
        "a file ../../canary": _set("files", 0, "path", to="../../canary"),
        "an absolute file": _set("files", 0, "path", to="/etc/passwd"),
        "a file pipe:": _set("files", 0, "path", to="pipe:rm"),
        "a file of another unit": _set("files", 0, "path", to=f"units/b00001/v0000.envelope.{sha[:16]}.zarr.zip"),
        "a file with a zero byte": _set("files", 0, "path", to="a\0b"),
        "a file that is a number": _set("files", 0, "path", to=1),
        "a codec that is a path": _set("files", 0, "codec", to="../x"),
        "a negative size": _set("files", 0, "size", to=-1),
        "a size of 2^70": _set("files", 0, "size", to=2**70),
        "a hash that is a path": _set("files", 0, "sha256", to="../../canary"),
        "no files": _set("files", to=[]),
        "its file twice": lambda value: value["files"].append(value["files"][0]),
        "files that are text": _set("files", to="x"),
        "another block": _set("block", to=1),
        "2^80 samples": _set("samples", to=2**80),
        "counts that do not add up": _set("cached", to=3),
        "fewer samples than there are": lambda value: value.update(samples=4, cached=4),
        "a quarantined sample beyond the block": lambda value: value.update(cached=7, quarantine={"10000000000": "x"}),
        "a quarantined sample of text": lambda value: value.update(cached=7, quarantine={"x": "y"}),
        "a quarantined negative sample": lambda value: value.update(cached=7, quarantine={"-1": "y"}),
        "a quarantine of 5,000 digits": lambda value: value.update(cached=7, quarantine={"9" * 5000: "y"}),
        "a quarantine that is a list": _set("quarantine", to=[0]),
        "a reason that is a list": lambda value: value.update(cached=7, quarantine={"0": []}),
        "a sample quarantined that is there": lambda value: value.update(cached=7, quarantine={"0": "x"}),
        "stats of text": _set("stats", to="x"),
        "another content": _set("content_hash", to="0" * 64),
        "another cache's fingerprint": _set("fingerprint", to="0" * 64),
        "an unknown field": _set("code", to="x"),
        "lists 200 deep": _set("stats", "deep", to=DEEP),
    }

    def make(work: Path, name: str, data: bytes) -> None:
        root = b.copy_cache(base, work / "c")
        for file in (name, "manifest.copy.json") if name == "manifest.json" else (name,):
            (root / file).write_bytes(data)

    def read(work: Path) -> None:
        inspect(work / "c")
        b.read_cache(work / "c")

    cases = []
    for what, name, whole, changes, seal in (
        ("manifest", "manifest.json", manifest, manifests, b.seal_manifest),
        ("commit", "commits/b00000/v0000.json", record, records, b.seal_commit),
    ):
        files = {}
        for title, change in changes.items():
            value = json.loads(json.dumps(whole))
            change(value)
            files[f"with {title}"] = seal(value)
        files |= {"nested 100,000 deep": b"[" * 100_000, "that is a list": b"[]", "that is null": b"null"}
        files |= {"with a key twice": b'{"a": 1, "a": 2}', "with 2 MB of digits": b"9" * 2_000_000}
        for title, data in files.items():
            cases.append(Case(f"{what}: {title}", lambda work, n=name, data=data: make(work, n, data), read))
    return cases


def folder_cases(base: Base) -> list[Case]:
    """What a cache from elsewhere holds instead of its files."""

    def instead(work: Path, name: str, put: Callable[[Path], object]) -> None:
        path = b.copy_cache(base, work / "c") / name
        b.shutil.rmtree(path) if path.is_dir() else path.unlink()
        put(path)

    def linked(work: Path, name: str) -> None:
        root = b.copy_cache(base, work / "c")
        write(work / "precious" / "old.txt", "x")
        os.utime(work / "precious" / "old.txt", (0, 0))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(work / "precious")

    unit = str(next((base.cache / "units" / "b00000").iterdir()).relative_to(base.cache))
    cases = [
        Case(
            f"cache: {what}",
            lambda work, name=name, put=put: instead(work, name, put),
            lambda work: b.read_cache(work / "c"),
        )
        for what, name, put in (
            ("its manifest is a pipe", "manifest.json", os.mkfifo),
            ("its manifest's copy is a pipe", "manifest.copy.json", os.mkfifo),
            ("its config is a pipe", "resolved.yaml", os.mkfifo),
            ("a record is a pipe", "commits/b00000/v0000.json", os.mkfifo),
            ("a record is a device", "commits/b00000/v0000.json", lambda path: path.symlink_to("/dev/zero")),
            ("a unit is a pipe", unit, os.mkfifo),
            ("a unit is a device", unit, lambda path: path.symlink_to("/dev/zero")),
            ("a unit is /etc/passwd", unit, lambda path: path.symlink_to("/etc/passwd")),
            ("a unit is a folder", unit, Path.mkdir),
            ("its inventory is a file", "inventory", lambda path: write(path, "x")),
            ("its manifest is 1 TB", "manifest.json", lambda path: sparse(path, 10**12)),
        )
    ]
    for name in ("units/b99999", "claims", ".inventory.partial.1", "commits/b99999"):
        cases.append(
            Case(
                f"gc: {name} is a link that leads out",
                lambda work, name=name: linked(work, name),
                lambda work: gc(work / "c", older_than=1.0),
                "read",
            )
        )
    return cases


def unit_cases(base: Base) -> list[Case]:
    whole = b.unit_members(base.cache)
    seed = json.loads(whole["seed/zarr.json"])

    def but(**members: bytes) -> bytes:
        return b.zipped({**whole, **{name.replace("__", "/"): data for name, data in members.items()}})

    def array(**changes: Any) -> bytes:
        return b.zipped({**whole, "seed/zarr.json": json.dumps({**seed, **changes}).encode()})

    def frame(size: int, data: bytes = b"") -> bytes:
        return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + data

    grid = lambda n: {"name": "regular", "configuration": {"chunk_shape": [n]}}  # noqa: E731
    codecs = seed["codecs"]
    units: dict[str, bytes] = {
        "an array of 2^60": array(shape=[2**60], chunk_grid=grid(2**60)),
        "an array of 2^60 in small chunks": array(shape=[2**60]),
        "a shape of 2^70": array(shape=[2**70]),
        "a negative shape": array(shape=[-1]),
        "a shape of text": array(shape=["8"]),
        "a shape of 30 dimensions": array(
            shape=[1] * 30, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1] * 30}}
        ),
        "no shape": array(shape=None),
        "chunks of nothing": array(chunk_grid=grid(0)),
        "objects": array(data_type="object"),
        "variable text": array(data_type="string"),
        "a data type that is code": array(data_type={"name": "numpy.object", "configuration": {"codec": "pickle"}}),
        "a pickle codec": array(codecs=[*codecs, {"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]),
        "a pickle filter": array(codecs=[{"name": "numcodecs.pickle"}, *codecs]),
        "a codec by import": array(codecs=[{"name": "os.system", "configuration": {}}]),
        "a codec of json objects": array(codecs=[{"name": "numcodecs.json2"}]),
        "gzip for zstd": array(codecs=[codecs[0], {"name": "gzip", "configuration": {"level": 9}}, codecs[2]]),
        "no codecs": array(codecs=[]),
        "sharding": array(codecs=[{"name": "sharding_indexed", "configuration": {"chunk_shape": [1]}}]),
        "a storage transformer": array(storage_transformers=[{"name": "x"}]),
        "another chunk grid": array(chunk_grid={"name": "rectangular", "configuration": {"chunk_shape": [8]}}),
        "a later zarr": array(zarr_format=4),
        "zarr 2 beside it": but(
            **{"seed__.zarray": b'{"zarr_format": 2, "filters": [{"id": "pickle"}], "dtype": "|O"}'}
        ),
        "consolidated metadata": but(
            **{
                "zarr.json": json.dumps(
                    {**json.loads(whole["zarr.json"]), "consolidated_metadata": {"metadata": {}}}
                ).encode()
            }
        ),
        "metadata nested 100,000 deep": but(**{"seed__zarr.json": b"[" * 100_000}),
        "metadata of 1 MB": but(**{"seed__zarr.json": b" " * 10**6 + whole["seed/zarr.json"]}),
        "metadata that is a list": but(**{"seed__zarr.json": b"[]"}),
        "a frame that says 2^62 bytes": but(seed__c__0=frame(2**62)),
        "a frame that says 64 bytes and has none": but(seed__c__0=frame(64)),
        "a frame of no stated size": but(seed__c__0=b"\x28\xb5\x2f\xfd\x00\x58" + bytes(20)),
        "no frame": but(seed__c__0=b"x" * 40),
        "a chunk too many": but(seed__c__1=whole["seed/c/0"]),
        "a chunk too few": b.zipped({name: data for name, data in whole.items() if name != "seed/c/0"}),
        "a chunk of no array": but(x__c__0=b""),
        "a member ../../canary": b.zipped({**whole, "../../canary": b"dead"}),
        "an absolute member": b.zipped({**whole, "/canary": b"dead"}),
        "a member with an escape sequence": b.zipped({**whole, "\x1b[2J": b"dead"}),
        "an array too many": but(**{"extra__zarr.json": whole["seed/zarr.json"], "extra__c__0": whole["seed/c/0"]}),
        "an array too few": b.zipped({n: d for n, d in whole.items() if not n.startswith("seed/")}),
        "no members": b.zipped({}),
        "deflated members": b.zipped(whole, zipfile.ZIP_DEFLATED),
        "1 GB of deflated zeros": b.zipped({**whole, "seed/c/0": bytes(10**9)}, zipfile.ZIP_DEFLATED),
        "bzip2 members": b.zipped(whole, zipfile.ZIP_BZIP2),
        "200,000 members": b.zipped({f"x{i}/zarr.json": b"" for i in range(110_000)}),
        "a member twice": _twice(whole),
        "another unit's content": next((base.cache / "units" / "b00001").iterdir()).read_bytes(),
        "no bytes": b"",
        "a zip that is cut off": b.zipped(whole)[:-40],
        "a wrong checksum": _flipped(b.zipped(whole)),
        "seeds of zeros": but(seed__c__0=whole["targets/offsets/c/0"] if "targets/offsets/c/0" in whole else bytes(8)),
    }

    def make(work: Path, data: bytes) -> None:
        b.put_unit(b.copy_cache(base, work / "c"), data)

    def read(work: Path) -> None:
        b.read_cache(work / "c")

    return [Case(f"unit: {name}", lambda work, data=data: make(work, data), read) for name, data in units.items()]


def _twice(members: dict[str, bytes]) -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the name
        out = b.io.BytesIO(b.zipped(members))
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr("seed/c/0", members["seed/c/0"])
    return out.getvalue()


def _flipped(data: bytes) -> bytes:
    at = data.index(b"\x28\xb5\x2f\xfd") + 12
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def weight_cases(base: Base) -> list[Case]:
    from benchmarks.hostile_weights import checkpoints

    return [
        Case(
            f"weights: {name}",
            lambda work, n=suffix, make=make: write(work / f"w{n}", make()),
            lambda work, n=suffix: b.read_teacher(work / f"w{n}"),
            how,
        )
        for name, (suffix, make, how) in checkpoints().items()
    ]


def run_cases(base: Base) -> list[Case]:
    facts = json.loads((base.run / "config.json").read_bytes())
    changes: dict[str, Change] = {
        "a checkpoint of its own": _set("model_args", "checkpoint_path", to="canary"),
        "settings of its own": _set("model_args", "pretrained_cfg", to={"file": "canary"}),
        "a model of the hub": _set("architecture", to="hf-hub:x/y"),
        "a model that is a list": _set("architecture", to=[]),
        "10^9 features": _set("model_args", "embed_dim", to=10**9),
        "60,000 features": _set("model_args", "embed_dim", to=60_000),
        "10,000 blocks": _set("model_args", "depth", to=10_000),
        "an MLP 10^9 times as wide": _set("model_args", "mlp_ratio", to=1e9),
        "an image of 10^9 pixels": _set("pretrained_cfg", "input_size", to=[3, 10**9, 10**9]),
        "an image of text": _set("pretrained_cfg", "input_size", to="x"),
        "2^40 classes": _set("num_classes", to=2**40),
        "no classes": _set("num_classes", to=0),
        "names that are no list": _set("label_names", to="ab"),
        "a mean of text": _set("pretrained_cfg", "mean", to=["x", "y", "z"]),
        "a deviation of zero": _set("pretrained_cfg", "std", to=[0.0, 0.0, 0.0]),
        "a crop of zero": _set("pretrained_cfg", "crop_pct", to=0),
        "arguments that are a list": _set("model_args", to=[]),
        "an argument of code": _set("model_args", "act_layer", to="__import__('os')"),
        "patches of zero": _set("model_args", "patch_size", to=0),
        "lists 200 deep": _set("deep", to=DEEP),
    }

    def make(work: Path, data: bytes) -> None:
        b.shutil.copytree(base.run, work / "run")
        (work / "run" / "config.json").write_bytes(data)

    cases = []
    for name, change in changes.items():
        value = json.loads(json.dumps(facts))
        change(value)
        text = json.dumps(value).encode()
        cases.append(
            Case(
                f"run: config.json with {name}",
                lambda work, data=text: make(work, data),
                lambda work: load_student(work / "run"),
            )
        )

    state = next((base.run / "resume").iterdir())

    def resume(work: Path) -> None:
        config = base.config(base.cache, base.run)
        student = build_student(config.student, 2, 32)
        ResumeStates(work / "resume").load(student, Optimisation(student, config.train, 2))

    for name, put in (
        ("a pipe", os.mkfifo),
        ("1 TB of zeros", lambda path: sparse(path, 10**12)),
        ("a header of 2^62 bytes", lambda path: write(path, struct.pack("<Q", 2**62) + b"{}")),
        ("a device", lambda path: path.symlink_to("/dev/zero")),
        ("a pickle", lambda path: torch.save({"a": torch.ones(3)}, path)),
        ("no bytes", lambda path: write(path, b"")),
    ):
        cases.append(
            Case(
                f"run: its state is {name}",
                lambda work, put=put: ((work / "resume").mkdir(), put(work / "resume" / state.name)),
                resume,
            )
        )
    return cases
