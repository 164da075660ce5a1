"""Curated state: manifests, commit records, units, checkpoints and runs, their hashes right, that claim too much."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.hostile import base as b
from benchmarks.hostile.base import Base, Case, bound, sparse, write
from benchmarks.hostile.curated_inventory import DEEP, Change, change_of, changed
from cskd.pipeline.care.gc import gc
from cskd.pipeline.look.inspect_cache import inspect
from cskd.student import build_student
from cskd.student.checkpoint import load_student
from cskd.student.optim import Optimisation
from cskd.student.resume import ResumeStates


def state_cases(base: Base) -> list[Case]:
    return [
        *record_cases(base),
        *folder_cases(base),
        *unit_cases(base),
        *weight_cases(base),
        *run_cases(base),
    ]


def record_cases(base: Base) -> list[Case]:
    manifest = json.loads((base.cache / "manifest.json").read_bytes())
    record = json.loads((base.cache / "commits" / "b00000" / "v0000.json").read_bytes())["commit"]
    manifests: dict[str, Change] = {
        "10^12 views": change_of("views", to=10**12),
        "no views": change_of("views", to=0),
        "views in text": change_of("views", to="3"),
        "infinitely many views": change_of("views", to=1e308),
        "a grid of 10^9": change_of("identity", "grid", to=[10**9, 10**9]),
        "a grid of one": change_of("identity", "grid", to=[1]),
        "a codec that is a path": change_of("identity", "codecs", to=["../../canary"]),
        "a codec twice": change_of("identity", "codecs", to=["envelope", "envelope"]),
        "no codecs": change_of("identity", "codecs", to=[]),
        "a recipe of 10^6 pixels": change_of("identity", "recipe", "size", to=10**6),
        "a recipe with an unknown key": change_of("identity", "recipe", "__class__", to="x"),
        "a recipe of text": change_of("identity", "recipe", to="x"),
        "a recipe without end": change_of("identity", "recipe", "randaugment", to="rand-n1000000000"),
        "a teacher that is a list": change_of("identity", "teacher", to=[]),
        "no inventory": change_of("identity", "inventory", to=None),
        "images of /etc": change_of("data", to="/etc"),
        "images of a zero byte": change_of("data", to="\0"),
        "images that are a number": change_of("data", to=7),
        "a config that is text": change_of("config", to="x"),
        "a config of code": change_of("config", "teacher", to="x"),
        "versions that are text": change_of("versions", to="x"),
        "a probe of text": change_of("probe", to="x"),
        "an accuracy of text": change_of("clean_top1", to="[bold]"),
        "lists 200 deep": change_of("deep", to=DEEP),
        "no identity": lambda value: value.pop("identity"),
        "a format of 99": change_of("format", to=99),
    }
    sha = record["files"][0]["sha256"]
    records: dict[str, Change] = {
        "a file ../../canary": change_of("files", 0, "path", to="../../canary"),
        "an absolute file": change_of("files", 0, "path", to="/etc/passwd"),
        "a file pipe:": change_of("files", 0, "path", to="pipe:rm"),
        "a file of another unit": change_of("files", 0, "path", to=f"units/b00001/v0000.envelope.{sha[:16]}.zarr.zip"),
        "a file with a zero byte": change_of("files", 0, "path", to="a\0b"),
        "a file that is a number": change_of("files", 0, "path", to=1),
        "a codec that is a path": change_of("files", 0, "codec", to="../x"),
        "a negative size": change_of("files", 0, "size", to=-1),
        "a size of 2^70": change_of("files", 0, "size", to=2**70),
        "a hash that is a path": change_of("files", 0, "sha256", to="../../canary"),
        "no files": change_of("files", to=[]),
        "its file twice": lambda value: value["files"].append(value["files"][0]),
        "files that are text": change_of("files", to="x"),
        "another block": change_of("block", to=1),
        "2^80 samples": change_of("samples", to=2**80),
        "counts that do not add up": change_of("cached", to=3),
        "fewer samples than there are": lambda value: value.update(samples=4, cached=4),
        "a quarantined sample beyond the block": lambda value: value.update(cached=7, quarantine={"10000000000": "x"}),
        "a quarantined sample of text": lambda value: value.update(cached=7, quarantine={"x": "y"}),
        "a quarantined negative sample": lambda value: value.update(cached=7, quarantine={"-1": "y"}),
        "a quarantine of 5,000 digits": lambda value: value.update(cached=7, quarantine={"9" * 5000: "y"}),
        "a quarantine that is a list": change_of("quarantine", to=[0]),
        "a reason that is a list": lambda value: value.update(cached=7, quarantine={"0": []}),
        "a sample quarantined that is there": lambda value: value.update(cached=7, quarantine={"0": "x"}),
        "stats of text": change_of("stats", to="x"),
        "another content": change_of("content_hash", to="0" * 64),
        "another cache's fingerprint": change_of("fingerprint", to="0" * 64),
        "an unknown field": change_of("code", to="x"),
        "lists 200 deep": change_of("stats", "deep", to=DEEP),
    }

    def make(work: Path, name: str, data: bytes) -> None:
        root = b.copy_with(base.cache, work / "c", name, data)
        if name == "manifest.json":
            (root / "manifest.copy.json").write_bytes(data)

    def read(work: Path) -> None:
        inspect(work / "c")
        b.read_cache(work / "c")

    cases = []
    for what, name, whole, changes, seal in (
        ("manifest", "manifest.json", manifest, manifests, b.seal_manifest),
        ("commit", "commits/b00000/v0000.json", record, records, b.seal_commit),
    ):
        files = {f"with {title}": seal(changed(whole, change)) for title, change in changes.items()}
        files |= {"nested 100,000 deep": b"[" * 100_000, "that is a list": b"[]", "that is null": b"null"}
        files |= {"with a key twice": b'{"a": 1, "a": 2}', "with 2 MB of digits": b"9" * 2_000_000}
        for title, data in files.items():
            cases.append(Case(f"{what}: {title}", bound(make, name, data), read))
    return cases


def folder_cases(base: Base) -> list[Case]:
    """What a cache from elsewhere holds instead of its files."""

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
            bound(lambda work, name, put: b.copy_with(base.cache, work / "c", name, put), name, put),
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
                bound(linked, name),
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

    return [
        Case(
            f"unit: {name}",
            bound(lambda work, data: b.put_unit(b.copy_cache(base, work / "c"), data), data),
            lambda work: b.read_cache(work / "c"),
        )
        for name, data in units.items()
    ]


def _twice(members: dict[str, bytes]) -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the name
        out = io.BytesIO(b.zipped(members))
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr("seed/c/0", members["seed/c/0"])
    return out.getvalue()


def _flipped(data: bytes) -> bytes:
    at = data.index(b"\x28\xb5\x2f\xfd") + 12
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def weight_cases(base: Base) -> list[Case]:
    from benchmarks.hostile.weights import checkpoints

    return [
        Case(
            f"weights: {name}",
            bound(lambda work, suffix, make: write(work / f"w{suffix}", make()), suffix, make),
            bound(lambda work, suffix: b.read_teacher(work / f"w{suffix}"), suffix),
            how,
        )
        for name, (suffix, make, how) in checkpoints().items()
    ]


def run_cases(base: Base) -> list[Case]:
    facts = json.loads((base.run / "config.json").read_bytes())
    changes: dict[str, Change] = {
        "a checkpoint of its own": change_of("model_args", "checkpoint_path", to="canary"),
        "settings of its own": change_of("model_args", "pretrained_cfg", to={"file": "canary"}),
        "a model of the hub": change_of("architecture", to="hf-hub:x/y"),
        "a model that is a list": change_of("architecture", to=[]),
        "10^9 features": change_of("model_args", "embed_dim", to=10**9),
        "60,000 features": change_of("model_args", "embed_dim", to=60_000),
        "10,000 blocks": change_of("model_args", "depth", to=10_000),
        "an MLP 10^9 times as wide": change_of("model_args", "mlp_ratio", to=1e9),
        "an image of 10^9 pixels": change_of("pretrained_cfg", "input_size", to=[3, 10**9, 10**9]),
        "an image of text": change_of("pretrained_cfg", "input_size", to="x"),
        "2^40 classes": change_of("num_classes", to=2**40),
        "no classes": change_of("num_classes", to=0),
        "names that are no list": change_of("label_names", to="ab"),
        "a mean of text": change_of("pretrained_cfg", "mean", to=["x", "y", "z"]),
        "a deviation of zero": change_of("pretrained_cfg", "std", to=[0.0, 0.0, 0.0]),
        "a crop of zero": change_of("pretrained_cfg", "crop_pct", to=0),
        "arguments that are a list": change_of("model_args", to=[]),
        "an argument of code": change_of("model_args", "act_layer", to="__import__('os')"),
        "patches of zero": change_of("model_args", "patch_size", to=0),
        "lists 200 deep": change_of("deep", to=DEEP),
    }

    texts = {name: json.dumps(changed(facts, change)).encode() for name, change in changes.items()}
    cases = [
        Case(
            f"run: config.json with {name}",
            bound(lambda work, text: b.copy_with(base.run, work / "run", "config.json", text), text),
            lambda work: load_student(work / "run"),
        )
        for name, text in texts.items()
    ]
    state = next((base.run / "resume").iterdir())

    def resume(work: Path) -> None:
        config = base.config(base.cache, base.run)
        student = build_student(config.student, 2, 32)
        ResumeStates(work / "resume").load(student, Optimisation(student, config.train, 2))

    def make(work: Path, put: Callable[[Path], object]) -> None:
        (work / "resume").mkdir()
        put(work / "resume" / state.name)

    states: list[tuple[str, Callable[[Path], object]]] = [
        ("a pipe", os.mkfifo),
        ("1 TB of zeros", lambda path: sparse(path, 10**12)),
        ("a header of 2^62 bytes", lambda path: write(path, struct.pack("<Q", 2**62) + b"{}")),
        ("a device", lambda path: path.symlink_to("/dev/zero")),
        ("a pickle", lambda path: torch.save({"a": torch.ones(3)}, path)),
        ("no bytes", lambda path: write(path, b"")),
    ]
    for name, put in states:
        cases.append(
            Case(
                f"run: its state is {name}",
                bound(make, put),
                resume,
            )
        )
    return cases
