"""One writer per output folder: the second one is refused by the name of the first, and what a killed one left is nobody's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cskd.files.claims
import cskd.files.writer
from cskd import cli
from cskd.errors import PathError
from cskd.files.claims import LEASE, Claims, _host, owner_of, signed
from cskd.files.writer import LOCK, sole_writer

ROOT = Path(__file__).resolve().parent.parent.parent
HOLD = """
import sys, time
from pathlib import Path
from cskd.files.writer import sole_writer
with sole_writer(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to tmp_path / "out"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def pid_of(lock: Path) -> int:
    owner = owner_of(lock)
    assert owner is not None
    return owner.pid


def take(folder: Path) -> None:
    with sole_writer(folder, "set another one"):
        pass


def test_the_second_writer_is_refused_by_the_name_of_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(PathError) as caught:
        take(tmp_path / "out")
    text = str(caught.value)
    assert f"{tmp_path / 'out'} is being written to by process {holder.pid} on {os.uname().nodename} since 2" in text
    assert text.endswith("; wait for it or end it, or set another one") and len(text) <= 300 + len(str(tmp_path))


def test_a_killed_writer_holds_nobody_up(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Nor one whose parent has not asked how it ended, as under the first process of some containers."""
    holder.kill()
    while "Z" not in Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    clock = time.monotonic()
    take(tmp_path / "out")
    holder.wait()
    assert time.monotonic() - clock < 5


def test_a_stopped_writer_keeps_its_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """It may go on at any time; of this host it is known to live, however long it has been silent."""
    holder.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / "out" / LOCK, (time.time() - 10 * LEASE,) * 2)
    with pytest.raises(PathError, match=f"process {holder.pid}"):
        take(tmp_path / "out")


def test_a_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{_host()} {os.getpid()}\n1 2026-01-01 00:00:00\n")  # started at tick 1
    take(tmp_path)


def test_a_writer_on_another_machine_is_seen_to_live_or_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cskd.files.writer, "LOOK", 0.01)
    lock, told = tmp_path / LOCK, list[str]()
    lock.write_text("elsewhere/boot/pid 7\n55 2026-01-01 00:00:00\n")
    refused = threading.Event()

    def beats() -> None:
        while not refused.wait(0.05):
            os.utime(lock)

    owner = threading.Thread(target=beats)
    owner.start()
    try:
        with pytest.raises(PathError, match="by process 7 on elsewhere since 2026-01-01 00:00:00"):
            take(tmp_path)
    finally:
        refused.set()
        owner.join()
    monkeypatch.setattr(cskd.files.claims, "LEASE", 0.5)
    with sole_writer(tmp_path, "x", tell=told.append):
        assert pid_of(lock) == os.getpid()
    assert len(told) == 1 and "process 7 on elsewhere" in told[0] and not lock.exists()


def test_a_writer_whose_folder_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    with sole_writer(tmp_path, "x") as writer:
        writer.check()
        (tmp_path / LOCK).write_text("elsewhere 7\n55 2026-01-01 00:00:00\n")
        with pytest.raises(PathError, match="taken over by process 7 on elsewhere"):
            writer.check()
    assert pid_of(tmp_path / LOCK) == 7  # left alone


def test_two_that_find_a_dead_writer_at_once_are_not_both_its_heirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has seen that the lock is a dead one's; before it removes that, another has done so, and taken the folder."""
    (tmp_path / LOCK).write_text(f"{_host()} 999999999\n")
    stale = cskd.files.claims._stale

    def late(path: Path) -> bool:
        if (found := stale(path)) and path.name == LOCK:
            monkeypatch.setattr(cskd.files.claims, "_stale", stale)
            path.write_text(f"{_host()} {os.getppid()}\n")
        return found

    monkeypatch.setattr(cskd.files.claims, "_stale", late)
    with Claims(tmp_path, "", signed()) as claims:
        assert claims.take(LOCK) is None
    assert pid_of(tmp_path / LOCK) == os.getppid()


def test_a_folder_that_nothing_was_put_into_is_taken_away_again(tmp_path: Path) -> None:
    take(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    take(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


@pytest.fixture
def refused(tmp_path: Path, holder: subprocess.Popen[str]) -> str:
    """A config with a folder that is written to; what its training is refused with, without the name of the rank."""
    (tmp_path / "c.yaml").write_text(json.dumps({"train": {"output": str(tmp_path / "out"), "device": "cpu"}}))
    return f"cskd: {tmp_path / 'out'} is being written to by process {holder.pid}"


def test_training_into_a_folder_that_is_written_to_is_refused_at_once(
    tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cskd", "train", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capsys.readouterr().err
    assert end.value.code == 1 and err.startswith(refused) and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


@pytest.mark.slow
def test_training_into_a_folder_that_is_written_to_is_refused_on_all_ranks(tmp_path: Path, refused: str) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(ROOT / "cli.py"), "train", str(tmp_path / "c.yaml")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    lines = [line for line in done.stderr.splitlines() if line.startswith("cskd: ")]
    assert done.returncode == 1 and refused in lines[0]
    # The second rank may be ended before it can speak.
    assert len(lines) == 1 or (
        lines[1].startswith("cskd: rank 1") and (lines[0][6:] in lines[1] or "see its line" in lines[1])
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
