"""A folder that processes share: nobody waits for one that is gone, and the last one removes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event

import pytest

from cskd.errors import CacheError, RankError
from cskd.files import shared_folder
from cskd.files.shared_folder import SharedFolder


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SharedFolder]]:
    monkeypatch.setattr(shared_folder, "LOOK", 0.05)
    (tmp_path / "shared").mkdir()
    members = [SharedFolder(tmp_path / "shared", number, 3).enter() for number in range(3)]
    yield members
    for member in members:
        member.leave()


def never() -> bool:
    return False


def test_the_last_one_to_leave_removes_it(three: list[SharedFolder]) -> None:
    for member in three:
        assert member.path.is_dir()
        member.leave()
    assert not three[0].path.exists()


def test_a_process_that_is_killed_is_gone_by_its_lock_and_the_others_stop(three: list[SharedFolder]) -> None:
    assert three[0].gone() == set()
    pid = os.fork()
    if not pid:  # a fourth one, which the kernel takes the lock of
        SharedFolder(three[0].path, 3, 4).enter()
        os._exit(9)
    os.waitpid(pid, 0)
    four = SharedFolder(three[0].path, 0, 4)
    assert four.gone() == {3}
    with pytest.raises(RankError, match="waited for a table with local rank 3, which is gone and left no word"):
        four.wait(never, "a table")


def test_one_that_fails_is_named_with_its_reason(three: list[SharedFolder]) -> None:
    three[2].fail(CacheError("disk full, of tables"))
    with pytest.raises(RankError, match=r"^local rank 0 stops because local rank 2 failed: disk full, of tables$"):
        three[0].wait(never, "a table")


def test_what_is_there_at_last_is_enough_and_a_wait_can_be_ended(three: list[SharedFolder]) -> None:
    (three[0].path / "x").touch()
    ended = Event()
    threading.Timer(0.05, ended.set).start()
    with pytest.raises(CancelledError):
        three[2].wait(never, "x", ended)
    three[1].leave()
    three[0].wait((three[0].path / "x").exists, "x")  # one may have done its part and left


def test_a_folder_that_a_rank_does_not_see_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"can't be shared by the 2 ranks of this machine \(No such file"):
        SharedFolder(tmp_path / "not here", 1, 2).enter()


def test_what_is_in_it_goes_when_all_have_done_with_it(three: list[SharedFolder]) -> None:
    table = three[0].path / "epoch" / "0"
    table.mkdir(parents=True)
    for member in three:
        assert table.is_dir()
        member.discard(table)
        member.discard(three[0].path / "epoch" / "none")
    assert not table.parent.exists()
