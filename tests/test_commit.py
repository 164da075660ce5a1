"""How a file comes to lie in a cache: everything on disk before its name is, in the order the protocol says."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cskd.errors import CacheError
from cskd.store import commit
from cskd.store.commit import link_whole, make_folder, write_file, write_whole


class Recorded:
    """`os` as `cskd.store.commit` sees it, with what it asks of the disk written down: (call, what it is about)."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[tuple[str, str]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        self._note("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        os.fsync(fd)

    def replace(self, old: Path, new: Path) -> None:
        self._note("rename", str(new))
        os.replace(old, new)

    def link(self, old: Path, new: Path) -> None:
        self._note("link", str(new))
        os.link(old, new)

    def _note(self, call: str, path: str) -> None:
        about = os.path.relpath(path, self.root)
        self.calls.append((call, "temp" if about.endswith(".tmp") else about))


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are read from /proc")
    recorded = Recorded(tmp_path)
    monkeypatch.setattr(commit, "os", recorded)
    return recorded


def test_new_folders_are_on_disk_before_what_is_in_them(recorded: Recorded, tmp_path: Path) -> None:
    link_whole(tmp_path / "commits" / "b00000" / "v0000.json", b"{}")
    assert recorded.calls == [
        ("fsync", "."),
        ("fsync", "commits"),
        ("fsync", "temp"),
        ("link", "commits/b00000/v0000.json"),
        ("fsync", "commits/b00000"),
    ]


def test_bytes_are_on_disk_before_their_name_and_the_name_before_it_is_told_of(
    recorded: Recorded, tmp_path: Path
) -> None:
    make_folder(tmp_path / "units" / "b00000")
    recorded.calls.clear()
    file = write_file(tmp_path, 0, 0, "x", b"123", 0)
    assert recorded.calls == [("fsync", "temp"), ("rename", file.path), ("fsync", "units/b00000")]


@pytest.mark.parametrize("write", [write_whole, link_whole])
def test_what_reads_back_otherwise_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    """As from a disk that says it wrote and did not."""
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"\0\0\0")
    with pytest.raises(CacheError, match=r"read back differs .* check the disk"):
        write(tmp_path / "x", b"123")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_already_stays_and_no_temp_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert link_whole(path, b"one") and not link_whole(path, b"two")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(CacheError, match="no hard links"):
        link_whole(tmp_path / "x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(tmp_path / "x", b"1")
    assert list(tmp_path.iterdir()) == []
