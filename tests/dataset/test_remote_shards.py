"""Images on an object store or a web server are those that were packed, each shard is fetched once, and what is wrong is one line."""

from __future__ import annotations

import functools
import http.server
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

from cskd.dataset.inventory import Inventory, open_inventory
from cskd.dataset.remote_shards import SHARD, RemoteShards
from cskd.dataset.shard_reader import FEW, ShardReader
from cskd.errors import ConfigError, CskdError, DataError, StorageError
from cskd.storage import Storage, join, open_storage
from cskd.storage.node_cache import NodeCache, use_node_cache
from tests.caches import make_tiny_data

N, SHARDS = 36, 3


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    return make_tiny_data(tmp_path_factory.mktemp("remote") / "data", n=N, block=12, shard=N // SHARDS)


@pytest.fixture(params=["s3", "http"])
def remote(request: pytest.FixtureRequest, local: Inventory, tmp_path: Path) -> Iterator[str]:
    """The address of the same images, on a store that can list, and on one that can't."""
    if request.param == "s3":
        address = join(request.getfixturevalue("s3"), "data")
        upload(local.root, address)
        yield address
        return
    with serving(local.root.parent) as address:
        yield address


def test_threads_that_copy_shards_share_one_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = list[str]()

    def slow(location: str, key: str) -> Storage:
        time.sleep(0.05)
        opened.append(location)
        return open_storage(str(tmp_path))

    monkeypatch.setattr("cskd.dataset.remote_shards.open_storage", slow)
    remote = RemoteShards("s3://bucket/data", NodeCache(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        each = list(pool.map(lambda _: remote.storage, range(4)))
    assert opened == ["s3://bucket/data"] and all(one is each[0] for one in each)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a folder's `data` on a web server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    pytest.importorskip("obstore")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/data"
        server.shutdown()


@pytest.fixture(autouse=True)
def node(tmp_path: Path) -> NodeCache:
    return use_node_cache(str(tmp_path / "node"), None)


def upload(folder: Path, address: str) -> Storage:
    storage = open_storage(address)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return storage


def images(reader: ShardReader) -> list[bytes]:
    return [reader.read(i) for i in range(N)]


def counted(inventory: Inventory) -> tuple[int, int]:
    assert inventory.remote is not None
    counts = inventory.remote.storage.counts
    return counts.requests, counts.read


def copies(node: NodeCache) -> list[Path]:
    """The shards that are on this machine."""
    return sorted(node.folder.glob(f"*/{SHARD}"))


def test_every_image_is_read_as_packed_and_each_shard_is_fetched_once(remote: str, local: Inventory) -> None:
    opened = open_inventory(remote.replace("//", "/", 1))  # as a Path has it
    opened.check_shards()
    assert opened.id == local.id and opened.where(1) == f"{remote}/00001.tar"
    before = counted(opened)
    for _ in range(2):
        assert images(ShardReader(opened, whole=True)) == images(ShardReader(local))
    size = sum(shard.bytes for shard in local.shards)
    after = counted(opened)
    assert (after[0] - before[0], after[1] - before[1]) == (SHARDS, size)
    # In another process, and after a restart, nothing is fetched again.
    again = ForkingPickler.loads(ForkingPickler.dumps(opened))
    assert images(ShardReader(again)) == images(ShardReader(local)) and counted(again) == (0, 0)


def test_a_few_images_are_read_without_the_whole_shard(s3: str, local: Inventory, node: NodeCache) -> None:
    upload(local.root, s3)
    reader = ShardReader(open_inventory(s3))
    shard = [reader.read(i) for i in range(FEW)]
    assert shard == [ShardReader(local).read(i) for i in range(FEW)] and copies(node) == []
    assert reader.inventory.remote is not None
    assert counted(reader.inventory) == (FEW, sum(map(len, shard)))
    reader.read(FEW)
    assert len(copies(node)) == 1


def test_a_cache_s_inventory_with_images_elsewhere(s3: str, local: Inventory, tmp_path: Path) -> None:
    upload(local.root, join(s3, "a"))
    opened = open_inventory(local.path, data=join(s3, "a"))
    assert opened.id == local.id
    assert ShardReader(opened).read(5) == ShardReader(local).read(5)
    other = make_tiny_data(tmp_path / "other", n=8)
    upload(other.root, join(s3, "b"))
    with pytest.raises(DataError, match=r"s3://.*/b holds the data set .* but .* is of"):
        open_inventory(local.path, data=join(s3, "b"))


def test_a_damaged_copy_is_fetched_again_and_said(
    s3: str, local: Inventory, node: NodeCache, capfd: pytest.CaptureFixture[str]
) -> None:
    upload(local.root, s3)
    reader = ShardReader(open_inventory(s3), whole=True)
    images(reader)
    raw = bytearray(copies(node)[0].read_bytes())
    for damage in (
        lambda p: p.write_bytes(bytes(len(raw))),
        lambda p: os.truncate(p, 100),
        lambda p: p.write_bytes(b""),
    ):
        for path in copies(node):
            damage(path)
        assert images(reader) == images(ShardReader(local))
        assert images(ShardReader(open_inventory(s3))) == images(ShardReader(local))
        said = capfd.readouterr().err.splitlines()
        assert len(said) == SHARDS and all("in the node cache was damaged" in line for line in said)
    for column in node.folder.glob("*/crc32c.npy"):
        column.write_bytes(column.read_bytes()[:-4] + b"\1\2\3\4")
    assert (
        open_inventory(s3).id == local.id
        and "inventory in the node cache was damaged (crc32c" in capfd.readouterr().err
    )


def test_a_shard_that_is_not_as_it_was_packed(s3: str, local: Inventory) -> None:
    storage = upload(local.root, s3)
    opened = open_inventory(s3)
    raw = storage.get("00001.tar")
    storage.delete("00001.tar")
    with pytest.raises(DataError, match=r"shard 00001.tar is not in s3://.*; restore it, or say where the shards are"):
        opened.check_shards()
    with pytest.raises(DataError, match=r"'image012' in s3://.*/00001.tar: there is no such file"):
        ShardReader(opened, whole=True).read(12)
    storage.put("00001.tar", raw[:-2000])
    with pytest.raises(
        DataError, match=rf"00001.tar has {len(raw) - 2000} bytes, the inventory says {len(raw)}; restore"
    ):
        opened.check_shards()
    # Other bytes in one image of it: the others are still read.
    at = int(local.offset[14]) + 20
    storage.put("00001.tar", raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    opened.check_shards()
    reader = ShardReader(opened, whole=True)
    for i in (13, 15, 16):
        assert reader.read(i) == ShardReader(local).read(i)
    with pytest.raises(DataError, match=r"'image014' in s3://.*/00001.tar: its \d+ bytes at \d+ are not those"):
        reader.read(14)


def test_verifying_looks_at_the_store_and_not_at_the_copy(s3: str, local: Inventory) -> None:
    storage = upload(local.root, s3)
    opened = open_inventory(s3)
    images(ShardReader(opened, whole=True))
    storage.put("00002.tar", bytes(local.shards[2].bytes))
    assert images(ShardReader(opened, whole=True)) == images(ShardReader(local))  # of the copy
    with pytest.raises(DataError, match="are not those that were packed"):
        images(ShardReader(opened, whole=True, fresh=True))


def test_what_else_is_wrong_with_an_address_is_one_line(s3: str, local: Inventory, tmp_path: Path) -> None:
    storage = upload(local.root, s3)
    wrong: list[tuple[str, type[CskdError], str]] = [
        (join(s3, "nothing"), DataError, r"no inventory at s3://.*/nothing; make one"),
        ("s3://no-such-bucket/x", StorageError, "no-such-bucket"),
        ("ftp://host/x", CskdError, "ftp"),
        ("s3://", CskdError, "s3"),
    ]
    for address, kind, text in wrong:
        with pytest.raises(kind, match=text) as caught:
            open_inventory(address)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    use_node_cache(str(tmp_path / "small"), 20e-6)
    opened = open_inventory(s3)
    with pytest.raises(
        ConfigError, match=r"data.node_cache_gb is 2e-05, and s3://.*/00000.tar has .* GB; set at least"
    ):
        ShardReader(opened, whole=True).read(0)
    storage.delete("inventory/label.npy")
    use_node_cache(str(tmp_path / "new"), None)
    with pytest.raises(DataError, match=r"inventory/label.npy is not there; copy the folder inventory again"):
        open_inventory(s3)


def test_a_web_server_without_ranges(local: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python's http.server: pieces can't be had, so objects come whole."""
    monkeypatch.setattr("cskd.storage.fetch.PIECE", 1000)
    with serving(local.root.parent) as address:
        reader = ShardReader(open_inventory(address))
        assert images(reader) == images(ShardReader(local)) and reader.inventory.remote is not None
        assert not reader.inventory.remote.storage.ranges
