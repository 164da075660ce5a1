"""benchmarks/train_step.py times the loop of training itself, without its first steps."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.train_step import Stopwatch, extract, peak_mib


class Gpu:
    """A device that has done nothing before somebody waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.waits = 0, list[int]()
        monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
        monkeypatch.setattr("torch.cuda.synchronize", lambda: self.waits.append(self.step))


def test_the_stopwatch_counts_the_steps_after_the_first_and_waits_for_the_device_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, gpu = Stopwatch(warm=2, steps=3), Gpu(monkeypatch)
    with watch("train", 10, start=0, quiet=True) as progress:
        for gpu.step, seconds in enumerate((0.3, 0.3, 0.02, 0.02, 0.02, 0.3)):
            time.sleep(seconds)
            progress.update(gpu.step, loss=lambda: "0.000")
    assert gpu.waits == [1, 4]
    assert 0.02 <= watch.found()["seconds"] < 0.15
    assert watch.found()["peak_mib"] == pytest.approx(peak_mib(), rel=0.2)


def test_images_are_linked_until_there_are_as_many_as_a_run_needs(tmp_path: Path) -> None:
    image = tmp_path / "sample" / "n01" / "a.JPEG"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"jpeg")
    with tarfile.open(tmp_path / "sample.tar", "w") as tar:
        tar.add(tmp_path / "sample", "sample")
    source = extract(tmp_path / "sample.tar", tmp_path / "out", needed=3)
    assert sorted(path.name for path in source.glob("*/*")) == ["a.JPEG", "a_1.JPEG", "a_2.JPEG"]
