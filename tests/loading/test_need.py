"""The memory of the batches under way, which is computed before there are any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cskd.errors import ConfigError
from cskd.loading import need
from cskd.loading.need import prefetch_of, refuse_little_memory, shared_bytes
from cskd.loading.shared import SharedBatch
from cskd.loading.stream import Stream

BATCH = 1024 * 3 * 224**2


def test_batches_ready_are_bounded_over_all_workers_and_are_two_of_each_at_least() -> None:
    assert [prefetch_of(w, 4) for w in (0, 1, 2, 8, 9, 16, 64)] == [4, 4, 4, 4, 3, 2, 2]
    assert prefetch_of(16, 1) == 1 and prefetch_of(2, 100) == 16
    assert shared_bytes(16, 4, BATCH) == 16 * 3 * BATCH


class Shm:
    """A file system for shared memory with so many batches of room in all, and so many free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float, free: float) -> None:
        usage = SimpleNamespace(total=int(total * BATCH), free=int(free * BATCH))
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def test_too_little_shared_memory_is_one_line_with_what_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Shm(monkeypatch, 48, 48)
    refuse_little_memory("train", 16, 4, BATCH, 1, False, tmp_path)
    Shm(monkeypatch, 48, 47)
    with pytest.raises(ConfigError, match=r"expected 7.40 \(16 workers x 3 batches of 154 MB\).* --shm-size=8g.*") as e:
        refuse_little_memory("train", 16, 4, BATCH, 1, False, tmp_path)
    assert str(e.value).endswith("or set train.workers=16 and train.prefetch=1")
    refuse_little_memory("train", 16, 1, BATCH, 1, False, tmp_path)  # and that does fit
    Shm(monkeypatch, 48, 48)
    with pytest.raises(ConfigError, match=r"--shm-size=60g, or set train.workers=3 and train.prefetch=1"):
        refuse_little_memory("train", 16, 4, BATCH, 8, False, tmp_path)
    Shm(monkeypatch, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"or set cache.workers=0$"):
        refuse_little_memory("cache", 2, 4, BATCH, 1, False, tmp_path)
    refuse_little_memory("cache", 0, 4, BATCH, 1, False, tmp_path)


def test_what_stage_1_is_told_to_set_does_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It keeps as many chunks ready as it does, whatever its workers."""
    Shm(monkeypatch, 18, 18)
    with pytest.raises(ConfigError, match=r"or set cache.workers=3$"):
        refuse_little_memory("cache", 8, 4, BATCH, 1, False, tmp_path)
    refuse_little_memory("cache", 3, 4, BATCH, 1, False, tmp_path)


def test_page_locked_batches_are_counted_against_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(need, "_memory", lambda: 47 * BATCH)
    refuse_little_memory("train", 16, 4, BATCH, 1, False, Path("/nowhere"))
    with pytest.raises(ConfigError, match=r"take 7.4 GB of page-locked memory .* has 7.2; set train.workers"):
        refuse_little_memory("train", 16, 4, BATCH, 1, True, Path("/nowhere"))


class Maker:
    def __call__(self, task: int) -> SharedBatch:
        return SharedBatch.empty({"pixels": (np.uint8, (1 << 20,))})


@pytest.mark.skipif(not need.SHM.is_dir(), reason="shared memory is elsewhere here")
def test_a_stream_takes_what_was_computed(tmp_path: Path) -> None:
    """Counted as the shared buffers that the workers have sent, each once."""
    from cskd.loading import shared

    stream = iter(Stream(Maker(), range(200), workers=2, prefetch=3))
    for _ in range(40):
        next(stream)
    (mapped,) = shared._mapped.values()
    assert sum(map(len, mapped.buffers.values())) == shared_bytes(2, 3, 1 << 20)
    stream.close()  # type: ignore[attr-defined]
