"""How a file comes to lie in a cache: everything on disk before its name is, in the order the protocol says."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cskd.files import durable
from cskd.files.durable import make_folder, put
from cskd.store.commit import write_file


class Recorded:
    """`os` as `cskd.files.durable` sees it, with what it asks of the disk written down: (call, what it is about)."""

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
    monkeypatch.setattr(durable, "os", recorded)
    return recorded


def test_new_folders_are_on_disk_before_what_is_in_them(recorded: Recorded, tmp_path: Path) -> None:
    put(tmp_path / "commits" / "b00000" / "v0000.json", b"{}", first=True)
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


@pytest.mark.parametrize("first", [False, True])
def test_what_reads_back_otherwise_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """As from a disk that says it wrote and did not."""
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"\0\0\0")
    with pytest.raises(OSError, match=r"read back differs .* check the disk"):
        put(tmp_path / "x", b"123", first=first)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_already_stays_and_no_temp_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert put(path, b"one", first=True) and not put(path, b"two", first=True)
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="no hard links"):
        put(tmp_path / "x", b"1", first=True)
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"):
        put(tmp_path / "x", b"1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [None, b"old"])
def test_a_writer_that_fails_half_way_leaves_what_was_there(tmp_path: Path, kept: bytes | None) -> None:
    def write(temp: Path) -> None:
        temp.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x"
    if kept is not None:
        path.write_bytes(kept)
    with pytest.raises(OSError, match="No space left"):
        put(path, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if kept is None else {"x": kept})


def test_a_writer_of_files_that_only_their_owner_can_read_gives_one_like_any_other(tmp_path: Path) -> None:
    def write(temp: Path) -> None:
        temp.unlink()
        os.close(os.open(temp, os.O_CREAT | os.O_WRONLY, 0o600))

    put(tmp_path / "x", write)
    put(tmp_path / "y", b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode
