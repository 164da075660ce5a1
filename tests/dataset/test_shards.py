"""Reading by inventory: the bytes that were packed, or what is wrong, in every process and thread."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import google_crc32c
import pytest

import cskd.dataset.shard_reader
from cskd.dataset.inventory import Inventory, Sample, ShardFile, open_inventory, write_inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import DataError, ImageError, ReadError

N, PER_SHARD = 60, 5


def payload(i: int) -> bytes:
    return bytes([i]) * (100 + i) if i else b""  # the first one is empty


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    samples, shards = [], []
    for shard in range(N // PER_SHARD):
        raw = b""
        for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            samples.append(Sample(f"k{i}", 0, google_crc32c.value(payload(i)), shard, len(raw), len(payload(i))))
            raw += payload(i)
        (tmp_path / f"{shard}.tar").write_bytes(raw)
        shards.append(ShardFile(f"{shard}.tar", len(raw)))
    return write_inventory(tmp_path, samples, classes=["a"], shards=shards)


def test_it_reads_every_sample_in_any_order_with_few_files_open(inventory: Inventory) -> None:
    reader = ShardReader(inventory, max_open=3)
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for step in (1, 7, 13):
        for i in range(N):
            assert reader.read(i * step % N) == payload(i * step % N)
    if open_before is not None:
        assert len(os.listdir("/proc/self/fd")) <= open_before + 3
    reader.close()
    assert reader.read(7) == payload(7)


def test_changed_bytes_are_found_naming_sample_and_shard(inventory: Inventory) -> None:
    path = inventory.shard_path(3)
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    reader = ShardReader(inventory)
    with pytest.raises(DataError, match=r"sample 'k15' in .*3.tar: .* not those that were packed") as caught:
        reader.read(15)
    assert not isinstance(caught.value, (ImageError, ReadError))
    assert reader.read(16) == payload(16)


def test_a_shard_of_another_length_or_none_is_named(inventory: Inventory) -> None:
    inventory.shard_path(3).write_bytes(b"cut")
    inventory.shard_path(4).unlink()
    with pytest.raises(DataError, match=r"'k15' in .*3.tar: the shard has 3 bytes, \d+ when it was packed"):
        ShardReader(inventory).read(15)
    with pytest.raises(DataError, match=r"'k20' in .*4.tar: there is no such file.*--data"):
        ShardReader(inventory).read(20)


def test_a_shard_cut_while_it_is_open_is_found(inventory: Inventory) -> None:
    reader = ShardReader(inventory)
    reader.read(15)
    os.truncate(inventory.shard_path(3), 10)
    with pytest.raises(DataError, match="not those that were packed"):
        reader.read(19)


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_an_io_error_is_tried_three_times_then_is_a_read_error(
    inventory: Inventory, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    calls: list[int] = []
    real = os.pread

    def flaky(fd: int, size: int, offset: int) -> bytes:
        calls.append(fd)
        if len(calls) <= failures:
            raise OSError(5, "Input/output error")
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    monkeypatch.setattr(cskd.dataset.shard_reader, "RETRY_WAIT", 0.0)
    reader = ShardReader(inventory)
    if failures < 3:
        assert reader.read(7) == payload(7)
    else:
        with pytest.raises(ReadError, match=r"'k7' in .*1.tar: reading failed 3 times: .*Input/output error") as caught:
            reader.read(7)
        assert not isinstance(caught.value, ImageError)
        assert len(calls) == 3


def test_short_reads_are_completed(inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 30), offset))
    assert ShardReader(inventory).read(9) == payload(9)


def read_all(reader: ShardReader) -> bool:
    return all(reader.read(i) == payload(i) for i in range(N))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)  # Python 3.12, if a test left one
def test_processes_read_with_a_reader_that_is_in_use(inventory: Inventory, method: str) -> None:
    reader = ShardReader(inventory, max_open=3)
    assert reader.read(7) == payload(7)
    if method == "fork":
        process = multiprocessing.get_context("fork").Process(
            target=lambda: os._exit(0 if read_all(reader) else 1), daemon=True
        )
        with reader._lock:  # as if another thread were reading at this moment
            process.start()
        process.join(20)
        assert process.exitcode == 0
    else:
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(read_all, (reader,))
    assert read_all(reader)


def test_threads_may_share_a_reader(inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread

    def slow(fd: int, size: int, offset: int) -> bytes:
        time.sleep(0.0005)  # time for another thread to close the file
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", slow)
    monkeypatch.setattr(cskd.dataset.shard_reader, "TRIES", 1)
    reader, good = ShardReader(inventory, max_open=1), []
    threads = [threading.Thread(target=lambda: good.append(read_all(reader))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 4


def test_it_pickles_without_its_files_and_reads_moved_shards(inventory: Inventory, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for shard in range(len(inventory.shards)):
        inventory.shard_path(shard).rename(moved / f"{shard}.tar")
    reader = ShardReader(open_inventory(tmp_path, data=moved))
    assert reader.read(3) == payload(3)
    assert ForkingPickler.loads(ForkingPickler.dumps(reader)).read(3) == payload(3)
