"""Copies on a local disk: one per machine, whole or not there, and no more than their limit."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cskd.errors import ConfigError, DataError
from cskd.storage.node_cache import Held, InUseError, NodeCache

KB = 1000


@pytest.fixture
def node(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "node", 10 * KB)


def fetch(node: NodeCache, name: str, size: int = 4 * KB, made: list[str] | None = None) -> Held:
    def fill(folder: Path) -> None:
        if made is not None:
            made.append(name)
        (folder / "data").write_bytes(name.encode() * (size // len(name)))

    return node.fetch(name, size, fill, f"s3://b/{name}")


def names(node: NodeCache) -> list[str]:
    return sorted(path.name for path in node.folder.iterdir() if not path.name.startswith(".room"))


def test_a_copy_is_made_once_and_found_again_by_another_process(node: NodeCache) -> None:
    made: list[str] = []
    for _ in range(3):
        with open(fetch(node, "a", made=made).path / "data", "rb") as file:
            assert file.read(3) == b"aaa"
    again = NodeCache(node.folder, node.limit).hold("a")
    assert again is not None and made == ["a"] and node.hold("b") is None


def test_what_was_not_opened_for_longest_goes_and_what_is_read_stays(node: NodeCache) -> None:
    for name in "ab":
        fetch(node, name).close()
        time.sleep(0.01)
    held = node.hold("a")  # so that b is the older one
    fetch(node, "c").close()
    assert names(node) == ["a", "c"]
    fetch(node, "d").close()
    assert names(node) == ["a", "d"] and held is not None  # a is read, though c was opened after it
    other = fetch(node, "d")
    with pytest.raises(InUseError, match=r"node_cache .*: all of its 1e-05 GB are being read"):
        fetch(node, "e")
    held.close()
    fetch(node, "e").close()
    assert names(node) == ["d", "e"]
    other.close()


def test_a_limit_below_one_copy_is_one_line(node: NodeCache) -> None:
    with pytest.raises(
        ConfigError, match=r"data.node_cache_gb is 1e-05, and s3://b/big has 2e-05 GB; set at least 4e-05"
    ):
        fetch(node, "big", 20 * KB)
    assert names(node) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(node: NodeCache, code: int) -> None:
    def fill(folder: Path) -> None:
        (folder / "data").write_bytes(b"half")
        raise OSError(code, os.strerror(code), str(folder / "data"))

    with pytest.raises(
        DataError, match=r"data.node_cache .*node: no copy of s3://b/a can be written: .*data.node_cache=FOLDER"
    ) as e:
        node.fetch("a", KB, fill, "s3://b/a")
    assert names(node) == [] and "\n" not in str(e.value) and len(str(e.value)) <= 300
    fetch(node, "a").close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.node_cache .*file/node: no copy of"):
        fetch(NodeCache(tmp_path / "file" / "node", KB * KB), "a")


def test_those_who_ask_at_the_same_time_wait_for_one_maker(node: NodeCache) -> None:
    made, wanted = list[str](), [f"{i:02d}" for i in range(20)]

    def ask() -> None:
        for name in wanted:
            fetch(node, name, 100, made=made).close()

    asked = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert sorted(made) == wanted


def test_who_waited_for_a_copy_has_it_while_its_maker_reads_it(node: NodeCache) -> None:
    begun, go, held = threading.Event(), threading.Event(), list[Held]()

    def slow(folder: Path) -> None:
        begun.set()
        go.wait(10)

    one = threading.Thread(target=lambda: held.append(node.fetch("a", KB, slow, "a")))
    others = [
        threading.Thread(target=lambda: held.append(node.fetch("a", KB, slow, "a")), daemon=True) for _ in range(3)
    ]
    one.start()
    assert begun.wait(10)
    for thread in others:
        thread.start()
    time.sleep(0.05)
    go.set()
    for thread in (one, *others):
        thread.join(10)
    assert len(held) == 4  # none was closed


def test_a_maker_that_fails_lets_the_next_one_try(node: NodeCache) -> None:
    begun, go = threading.Event(), threading.Event()

    def fails(folder: Path) -> None:
        begun.set()
        go.wait(10)
        raise RuntimeError

    def first() -> None:
        with pytest.raises(RuntimeError):
            node.fetch("a", KB, fails, "a")

    one, two = threading.Thread(target=first), threading.Thread(target=lambda: fetch(node, "a").close())
    one.start()
    assert begun.wait(10)
    two.start()
    time.sleep(0.05)
    assert node.hold("a") is None
    go.set()
    one.join()
    two.join()
    assert names(node) == ["a"]


def test_a_killed_maker_holds_nobody_up(node: NodeCache) -> None:
    script = (
        "import sys, time; from pathlib import Path; from cskd.storage.node_cache import NodeCache\n"
        "def fill(folder):\n"
        "    (folder / 'data').write_bytes(b'half'); print('half', flush=True); time.sleep(60)\n"
        "NodeCache(Path(sys.argv[1]), 10_000).fetch('a', 4_000, fill, 'a')"
    )
    killed = subprocess.Popen([sys.executable, "-c", script, str(node.folder)], stdout=subprocess.PIPE)
    assert killed.stdout is not None and killed.stdout.readline() == b"half\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert names(node) == [".part-a"]
    made: list[str] = []
    held = fetch(node, "a", made=made)
    assert made == ["a"] and (held.path / "data").read_bytes() == b"a" * 4 * KB and names(node) == ["a"]
    (node.folder / ".part-z").mkdir()  # of one that never came back
    (node.folder / ".part-z" / ".lock").write_text("9000")
    fetch(node, "b").close()
    assert names(node) == ["a", "b"]


def test_a_damaged_copy_is_removed_while_others_read_it(node: NodeCache) -> None:
    held = fetch(node, "a")
    with open(held.path / "data", "rb") as file:
        node.drop("a")
        assert node.hold("a") is None and file.read(1) == b"a"
    node.drop("a")
