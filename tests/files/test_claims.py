"""Claims: one owner at a time, given back at the end, nobody's when the owner is dead or silent; and work that is shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cskd.files.claims
from cskd.config import to_yaml
from cskd.files.claims import LEASE, Claims, _host, held
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.verify import verify
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

ROOT = Path(__file__).resolve().parent.parent.parent


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        claim = one.take("a")
        assert claim is not None and two.take("a") is None and two.take("b") is not None
        one.release([claim])
        assert two.take("a") is not None
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize(
    ("owner", "age", "free"),
    [
        ("here me", 0.0, False),
        ("here me", LEASE + 5, True),
        ("here 999999999", 0.0, True),  # killed
        ("elsewhere 999999999", 0.0, False),
        ("elsewhere 999999999", LEASE + 5, True),
        ("", 0.0, False),  # being written
        ("", LEASE + 5, True),
    ],
)
def test_a_claim_is_nobody_s_when_its_owner_is_dead_or_silent(
    tmp_path: Path, owner: str, age: float, free: bool
) -> None:
    path = tmp_path / "claims" / "a"
    path.parent.mkdir()
    owner = owner.replace("here", _host()).replace("me", str(os.getpid())) if owner.startswith("here") else owner
    path.write_text(owner + "\n" if owner else "")
    os.utime(path, (time.time() - age,) * 2)
    with Claims(tmp_path) as claims:
        assert (claims.take("a") is not None) == free


@pytest.mark.parametrize("ahead", [-1e6, 1e6])
def test_the_clock_of_this_machine_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """A claim's age is told by the file system, which is the server's for all machines of a network."""
    now = time.time() + ahead
    with Claims(tmp_path) as claims:
        for name, age in (("fresh", 0.0), ("old", LEASE + 5)):
            path = tmp_path / "claims" / name
            path.write_text("elsewhere 1\n")
            os.utime(path, (time.time() - age,) * 2)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now)
            assert claims.take("fresh") is None and claims.take("old") is not None
        (tmp_path / "claims" / "fresh").unlink()
    assert not (tmp_path / "claims").exists()  # no file of the clock's is left


def test_a_process_of_the_same_number_elsewhere_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another container on this host, or before its last boot, a process number says nothing."""
    with Claims(tmp_path) as claims:
        (tmp_path / "claims" / "a").write_text(f"{_host()} 999999999\n".replace(_host(), "this host/another boot"))
        assert claims.take("a") is None
        (tmp_path / "claims" / "a").unlink()


def test_a_full_disk_leaves_no_empty_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> str:
        raise OSError(28, "No space left on device")

    with Claims(tmp_path) as claims:
        with monkeypatch.context() as patch:
            patch.setattr(cskd.files.claims, "_me", full)
            with pytest.raises(OSError, match="No space left"):
                claims.take("a")
        assert claims.take("a") is not None


def test_a_claim_that_is_another_s_by_now_is_not_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        path = claims.take("a")
        assert path is not None
        path.write_text("elsewhere 1\n")  # who took it while this process slept
        claims.release([path])
        assert path.exists() and held(tmp_path) == 1
        path.unlink()


def test_claims_that_are_given_back_while_they_are_counted_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise FileNotFoundError("claims")

    monkeypatch.setattr(Path, "glob", gone)
    assert held(tmp_path) == 0


def test_an_owner_that_lives_keeps_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cskd.files.claims, "BEAT", 0.02)
    with Claims(tmp_path) as claims:
        path = claims.take("a")
        assert path is not None
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > time.time() - 60


def test_processes_on_one_cache_share_the_work(tmp_path: Path) -> None:
    """Each view is made once, by one of them, and the cache is that of a process alone. The other one comes first, and stops
    in its first pass until this one has made another."""
    line = "        return self.body(x)\n"
    stop = '        while cache and list(cache.glob("claims/b*")) and not list(cache.glob("commits/*/*")): time.sleep(0.01)\n'
    assert line in TEACHER
    net = TEACHER.replace(line, stop + line)
    (tmp_path / "net.py").write_text(
        f'import os, pathlib, time\ncache = "STOPS" in os.environ and pathlib.Path(os.environ["STOPS"])\n{net}'
    )
    make_tiny_data(tmp_path / "train", n=60, block=20, shard=10)
    alone = cache_teacher(config(tmp_path, cache={"path": str(tmp_path / "alone"), "views": 9}), quiet=True)
    (tmp_path / "c.yaml").write_text(to_yaml(config(tmp_path, cache={"views": 9})))
    command = [sys.executable, str(ROOT / "cli.py"), "cache-teacher", str(tmp_path / "c.yaml"), "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STOPS": str(tmp_path / "cache")}
    other = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    while not held(tmp_path / "cache"):
        assert other.poll() is None
        time.sleep(0.01)
    mine = cache_teacher(config(tmp_path, cache={"views": 9}), quiet=True)
    its = json.loads(other.communicate(timeout=240)[0])
    assert min(mine.images, its["images"]) > 0 and mine.images + its["images"] == alone.images == 540
    assert mine.content_root == its["content_root"] == alone.content_root
    assert verify(tmp_path / "cache", quiet=True).sound
    assert not (tmp_path / "cache" / "claims").exists()
