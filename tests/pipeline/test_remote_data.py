"""Both stages with data, weights and output on an object store: the numbers are those of local folders, and each shard comes once."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cskd.config import Config, RecipeConfig
from cskd.dataset.inventory import open_inventory
from cskd.dataset.remote_shards import RemoteShards
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import ConfigError, DataError, PathError
from cskd.files.writer import sole_writer
from cskd.loading.plan import PlanSpec, epoch_plan
from cskd.loading.shards_ahead import ahead, all_needs, training_needs
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.pack import pack_data
from cskd.pipeline.train import train
from cskd.storage import join, open_storage
from cskd.storage.fetch import fetched
from cskd.storage.mirror import Mirror
from cskd.storage.node_cache import NodeCache, node_cache, use_node_cache
from tests.caches import make_tiny_data
from tests.data_sources import folder
from tests.dataset.test_remote_shards import upload
from tests.pipeline.test_pipeline import cached_data, config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, cache and a finished run in folders."""
    made = cached_data(tmp_path_factory.mktemp("remote"))
    train(settings(made), quiet=True)
    return made


def settings(base: Path, **sections: dict[str, Any]) -> Config:
    short = {"epochs": 2, "ema": None, **sections.pop("train", {})}
    return config(base, "run", train=short, **sections)


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_both_stages_and_an_evaluation(base: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "val"):
        upload(base / name, join(s3, name))
    data = {"train": join(s3, "train"), "val": join(s3, "val"), "node_cache": str(tmp_path / "node")}
    remote = settings(base, data=data, cache={"path": str(tmp_path / "cache")}, train={"output": str(tmp_path / "run")})
    made, local = cache_teacher(remote, quiet=True), cache_teacher(settings(base), quiet=True)
    assert made.content_root == local.content_root and made.units == 6
    monkeypatch.chdir(tmp_path)  # nothing is made of the address
    train(remote, quiet=True)
    assert weights(tmp_path / "run") == weights(base / "run") and not Path("s3:").exists()
    a = evaluate_checkpoint(tmp_path / "run", Path(data["val"]), 8, 0, None, "cpu", quiet=True)
    b = evaluate_checkpoint(base / "run", base / "val", 8, 0, None, "cpu", quiet=True)
    assert a.heads == b.heads and (a.images, b.images) == (12, 12)


def machine(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Be another machine from here on: nothing is in its folder of temporary files."""
    folder.mkdir()
    patch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.slow
def test_a_run_on_an_object_store_goes_on_on_another_machine(
    base: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, step = join(s3, "runs/one"), 7
    here = machine(monkeypatch, tmp_path / "first")
    train(settings(base, train={"output": output, "max_steps": step}), quiet=True)
    assert list(here.glob("cskd-work-*/*")) == []  # nothing is left on this machine
    storage = open_storage(output)
    names = {stat.key for stat in storage.list()}
    assert {"resume/step-00000007.safetensors", "metrics.jsonl", "resolved.yaml", ".cskd", "README.md"} <= names
    assert f"output: {output}" in storage.get("resolved.yaml").decode() and ".cskd.writer" not in names
    machine(monkeypatch, tmp_path / "second")
    report = train(settings(base, train={"output": output}), quiet=True)
    assert report.output == output and report.steps == 10 - step
    assert storage.get("model.safetensors") == (base / "run" / "model.safetensors").read_bytes()
    states = [stat.key for stat in storage.list("resume") if "step-" in stat.key]
    assert sorted(states) == ["resume/step-00000007.safetensors", "resume/step-00000010.safetensors"]  # not 5 any more
    # What it left can be evaluated, and started from.
    use_node_cache(str(tmp_path / "node"), None)
    a = evaluate_checkpoint(Path(output), base / "val", 8, 0, None, "cpu", quiet=True)
    b = evaluate_checkpoint(base / "run", base / "val", 8, 0, None, "cpu", quiet=True)
    assert a.heads == b.heads and a.checkpoint == output


@pytest.mark.slow
def test_what_is_lost_of_a_run_is_what_was_not_put_there(
    base: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path / "first")
    settings_ = settings(base, train={"output": s3, "max_steps": 5})
    train(settings_, quiet=True)
    storage, puts = open_storage(s3), []

    def dies(self: Mirror, last: Any = ()) -> None:
        puts.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Mirror, "put", dies)
        train(settings(base, train={"output": s3}), quiet=True)
    assert puts == [1] and {stat.key for stat in storage.list("resume")} == {"resume/step-00000005.safetensors"}
    assert train(settings(base, train={"output": s3}), quiet=True).steps == 5
    assert storage.get("model.safetensors") == (base / "run" / "model.safetensors").read_bytes()


def test_an_address_of_something_else_or_of_another_process_is_refused(s3: str, tmp_path: Path) -> None:
    storage = open_storage(s3)
    storage.put("00000.tar", b"images")
    with pytest.raises(
        PathError, match=r"train.output s3://.* holds 00000.tar of something else than a run; set another"
    ):
        Mirror(s3, "run", "train.output").fetch()
    storage.delete("00000.tar")
    one, two, told = (*(Mirror(s3, "run", "train.output") for _ in range(2)), list[str]())
    for mirror in (one, two):
        mirror.fetch()
        mirror.take(told.append)
    assert len(told) == 1 and "was being written to by process" in told[0]
    (two.folder / "metrics.jsonl").write_text("{}")
    with pytest.raises(PathError, match=r"was taken over by another process; nothing more is put there"):
        one.put()
    two.put()
    assert {stat.key for stat in storage.list()} == {"metrics.jsonl", ".cskd.writer"}
    with sole_writer(two.folder, "wait"):  # what a live run of this machine writes to is not taken from under it
        with pytest.raises(PathError, match=r"train.output s3://.* is being written to by process \d+ .* set another"):
            one.fetch()
        assert (two.folder / "metrics.jsonl").is_file()
    two.end()


def test_each_shard_is_fetched_once_and_before_it_is_asked_for(s3: str, tmp_path: Path) -> None:
    node = use_node_cache(str(tmp_path / "node"), None)
    local = make_tiny_data(tmp_path / "data", n=36, block=12, shard=6)
    upload(local.root, s3)
    inventory, reader = open_inventory(s3), ShardReader(open_inventory(s3), whole=True)
    assert inventory.remote is not None and reader.inventory.remote is not None
    for n, i in enumerate(ahead(range(36), all_needs(inventory, 36))):
        deadline = time.monotonic() + 20
        while len(list(node.folder.glob("*/shard"))) < 6 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert reader.read(i) == ShardReader(local).read(i) and n == i
    counts = inventory.remote.storage.counts
    assert (counts.requests, counts.read) == (6, sum(shard.bytes for shard in local.shards))
    assert reader.inventory.remote.storage.counts.requests == 0  # all were there


def test_a_disk_that_fails_in_the_thread_that_copies_ahead_is_left_to_who_reads(tmp_path: Path) -> None:
    class Full(NodeCache):
        def room(self) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    inventory = make_tiny_data(tmp_path / "data")
    inventory.remote = RemoteShards("s3://b/x", Full(tmp_path / "node"))
    tasks = ahead(range(3), all_needs(inventory, 3))
    assert next(tasks) == 0
    for thread in [one for one in threading.enumerate() if one.name == "shards ahead"]:
        thread.join(60)  # with an error of its own pytest fails this test
    assert list(tasks) == [1, 2]


def test_the_shards_of_an_epoch_come_in_the_order_of_its_plan(tmp_path: Path) -> None:
    inventory = make_tiny_data(tmp_path / "train", n=42, block=20, shard=10)
    plan = PlanSpec(inventory.blocks, np.zeros(42, bool), inventory.id, RecipeConfig(), 3, 1, 0, 8, 1)
    inventory.remote = RemoteShards("s3://b/x", node_cache())  # nothing is asked of it
    needs = list(training_needs(inventory, plan, 1, 10, lambda epoch: (inventory, 3) if epoch else None))
    steps = [epoch_plan(plan, e).sample[8 * first : 8 * 5] for e, first in ((0, 1), (1, 0))]
    assert {n.shard for n in needs if n.place < 4} == set(inventory.shard[steps[0]].tolist())
    for need in needs[:-5]:
        rows = steps[0].reshape(-1, 8)[need.place] if need.place < 4 else steps[1].reshape(-1, 8)[need.place - 4]
        assert need.shard in inventory.shard[rows]
    assert [n.place for n in needs] == sorted(n.place for n in needs) and needs[-1].place == 9 + 2


def test_weights_come_from_a_store(s3: str, tmp_path: Path) -> None:
    node = use_node_cache(str(tmp_path / "node"), None)
    run = folder(tmp_path / "run", {"model.safetensors": b"weights", "config.json": b"{}", "resume/step": b""})
    storage = upload(run, join(s3, "run"))
    copies = [fetched(join(s3, name), "student.init") for name in ("run", "run/", "run/model.safetensors")]
    assert [path.name for path in copies[2:]] == ["model.safetensors"] and copies[0] == copies[1]
    for path in (copies[0] / "model.safetensors", copies[2], copies[2].with_name("config.json")):
        assert path.read_bytes() == (run / path.name).read_bytes() and path.is_relative_to(node.folder)
    assert fetched(join(s3, "run/model.safetensors:a.b"), "x").name == "model.safetensors:a.b"
    for others in (b"others1", b"others2", b"others3"):  # by somebody who trained on; two of them within a second
        storage.put("model.safetensors", others)
        assert fetched(join(s3, "run/model.safetensors"), "student.init").read_bytes() == others
    storage.put("w.index.json", b'{"weight_map": {"a": "one.bin", "b": "two.bin", "c": "../config.json"}}')
    for name in ("one.bin", "two.bin"):
        storage.put(name, b"1")
    index = fetched(join(s3, "run/w.index.json"), "student.init")
    assert {p.name for p in index.parent.iterdir()} == {"w.index.json", "one.bin", "two.bin", "config.json", ".lock"}
    for name in ("nothing", "nothing/x.pt", "run/resume"):
        with pytest.raises(
            PathError, match=r"student.init s3://.*: there is no such object, nor a folder with model.safe"
        ):
            fetched(join(s3, name), "student.init")
    use_node_cache(str(tmp_path / "small"), 1e-9)
    with pytest.raises(ConfigError, match=r"data.node_cache_gb is 1e-09, and s3://.*/run has .*; set at least"):
        fetched(join(s3, "run"), "student.init")


def test_packing_to_a_store(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_node_cache(str(tmp_path / "node"), None)
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, i, ord(name))).save(tmp_path / "src" / name / f"{i}.png")
    there, here = Path(join(s3, "packed")), tmp_path / "here"
    reports = [pack_data(tmp_path / "src", out, quiet=True) for out in (there, here)]
    assert reports[0].inventory == reports[1].inventory and reports[0].folder == join(s3, "packed")
    opened = open_inventory(there)
    opened.check_shards()
    assert [ShardReader(opened).read(i) for i in range(6)] == [
        ShardReader(open_inventory(here)).read(i) for i in range(6)
    ]
    assert any("was here already" in note for note in pack_data(tmp_path / "src", there, quiet=True).notes)
    with pytest.raises(DataError, match=r"s3://.*/packed holds the inventory .* already, not"):
        pack_data(tmp_path / "src", there, limit=4, quiet=True)
    monkeypatch.setattr("cskd.pipeline.pack.pack", lambda *_, **options: pytest.fail("it was packed"))
    with pytest.raises(PathError, match="is on a web server, which is only read"):
        pack_data(tmp_path / "src", Path("http://host/x"), quiet=True)
    for name in ("inventory/inventory.json", "manifest.json"):
        open_storage(join(s3, "cache")).put(name, b"{}")
    with pytest.raises(PathError, match=r"OUT s3://.*/cache holds manifest.json, which is no file of a data set; give"):
        pack_data(tmp_path / "src", Path(join(s3, "cache")), quiet=True)
