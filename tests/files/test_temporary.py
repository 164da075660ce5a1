"""What a killed process leaves among temporary files goes with the next one that needs a folder there; what lives stays."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cskd.files.scratch import clear_scratch, new_scratch
from cskd.files.shared_folder import SharedFolder
from cskd.files.temporary import temporary_folder
from cskd.storage.mirror import Mirror

ROOT = Path(__file__).resolve().parent.parent.parent
HOLDERS = {
    "a copy": "from cskd.files.temporary import temporary_folder as t; held = t('push'); f = held.__enter__()",
    "the tables of a run": (
        "from cskd.files.scratch import new_scratch as n; from cskd.files.shared_folder import SharedFolder as S; "
        "held = S(n(Path('run'))).enter(); f = held.path"
    ),
    "the folder of a run on a store": (
        "from cskd.storage.mirror import Mirror; held = Mirror('s3://bucket/other', 'run', 'x'); held.names = dict; "
        "held.fetch(); f = held.folder"
    ),
}


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temp").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    return tmp_path / "temp"


@pytest.mark.parametrize("what", HOLDERS)
def test_what_a_killed_process_left_goes_with_the_next_and_what_one_holds_stays(
    what: str, tmp_path: Path, temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the next command is about: the killed one may never be given again."""
    code = f"from pathlib import Path; {HOLDERS[what]}; (f / 'big').touch(); print(f, flush=True); input()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temp)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())

    def others() -> None:
        with temporary_folder("pack"):
            pass
        clear_scratch(tmp_path / "temp")  # of another run
        monkeypatch.setattr(Mirror, "names", lambda _: {})
        mirror = Mirror("s3://bucket/mine", "run", "train.output")
        mirror.fetch()
        mirror.clear()

    others()
    assert (left / "big").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    others()
    assert not left.exists() and not [path for path in temp.rglob("*") if path.is_file()]


def test_only_what_is_known_to_be_left_is_removed(tmp_path: Path, temp: Path) -> None:
    (temp / "cskd-mine").mkdir()
    (temp / "cskd-mine" / "work").touch()
    older = new_scratch(tmp_path / "run")  # of a version that held nothing
    elsewhere = temp / "cskd-push-x"
    elsewhere.mkdir()
    (elsewhere / "alive0").write_text("another-machine")
    odd = temp / "cskd-push-odd"  # of a disk that lost power, or a host whose name is no UTF-8
    odd.mkdir()
    (odd / "alive0").write_bytes(b"\xff")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "alive0").write_text(socket.gethostname())
    (temp / "cskd-push-link").symlink_to(tmp_path / "precious")
    half = temp / "cskd-half"  # one rank is gone, the other lives
    half.mkdir()
    (half / "alive0").write_text(socket.gethostname())
    other = SharedFolder(half, 1, 2).enter()
    with temporary_folder("push") as folder:
        assert list(folder.iterdir()) == [] and folder.parent.stat().st_mode & 0o077 == 0
        assert (temp / "cskd-mine" / "work").exists() and older.exists() and elsewhere.exists() and half.exists()
        assert odd.exists()
        assert (tmp_path / "precious" / "alive0").exists()
    assert not folder.parent.exists()
    other.leave()
    with temporary_folder("push"):
        assert not half.exists()


def test_where_there_are_no_locks_a_folder_is_made_and_nothing_swept(
    temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    (temp / "cskd-push-x").mkdir()
    (temp / "cskd-push-x" / "alive0").write_text(socket.gethostname())
    with temporary_folder("push") as folder:
        assert folder.is_dir() and (temp / "cskd-push-x").exists()
    assert not folder.parent.exists()


def test_what_is_copied_or_made_for_a_while_lies_in_such_a_folder() -> None:
    """Else a kill leaves it for good. The others are probes, which hold nothing, and the scratch of a run, which is held later."""
    probes = {"cskd/files/durable.py", "pipeline/outputs.py", "cskd/files/scratch.py", "cskd/files/temporary.py"}
    made = {
        str(path.relative_to(ROOT))
        for folder in ("cskd", "pipeline")
        for path in (ROOT / folder).rglob("*.py")
        if {"mkdtemp(", "TemporaryDirectory("} & {f"{word}(" for word in re.findall(r"\w+(?=\()", path.read_text())}
    }
    assert made == probes
