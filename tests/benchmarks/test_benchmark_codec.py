"""benchmarks/codec.py: its own statement of the target is right, it runs on any finished cache, and says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import benchmarks.codec
from benchmarks.codec import direct_targets, main
from cskd.codecs import Arrays
from cskd.codecs.base import direct_hard
from cskd.codecs.envelope import EnvelopeCodec
from cskd.config import from_dict
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.store.cache import open_cache
from cskd.store.format import INDEX
from cskd.teacher.build import build_model
from tests.caches import make_tiny_data, random_logits


def test_the_direct_target_is_that_of_exact_arithmetic() -> None:
    dense, image = random_logits(6, 30, (3, 4))
    blends = np.array([0, 1, 9000, 32768, 65535, 65536])
    found = direct_targets(dense.numpy(), image.numpy(), blends)
    for q, blend in enumerate(blends):
        np.testing.assert_array_equal(found[q].reshape(6, 3, 4), direct_hard(dense, image, int(blend)).numpy())


def test_without_cache_and_data_it_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CSKD_DATA", raising=False)
    assert main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "CSKD_DATA" in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, 12 classes, a real teacher's outputs over two views."""
    folder = tmp_path_factory.mktemp("benchmark")
    make_tiny_data(folder / "data", n=22, block=10, shard=10, classes=[f"class {i}" for i in range(12)])
    kwargs = {"channels": [8, 8, 8, 8], "num_classes": 12, "output_stride": 8}
    torch.manual_seed(0)  # random weights, kept in a file: the benchmark builds the teacher again
    save_file(build_model("resnet18", kwargs).state_dict(), folder / "weights.safetensors")
    teacher = {"model": "resnet18", "kwargs": kwargs, "weights": str(folder / "weights.safetensors")}
    raw = {
        "data": {"train": str(folder / "data")},
        "teacher": {**teacher, "min_top1": 0.0, "batch": 8},
        "recipe": {"size": 32},
        "cache": {"path": str(folder / "cache"), "views": 2, "workers": 0, "device": "cpu"},
    }
    cache_teacher(from_dict(raw), quiet=True)
    return folder


def test_it_finds_the_envelope_exact_and_ends_with_one_json_line(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (
        "envelope",
        "int8",
        "topk10",
        "featurespca4",
        "topk12",
        "globaltop12",
    )  # the last two hold more than 11 classes
    monkeypatch.setattr(benchmarks.codec, "CODECS", few)
    monkeypatch.setattr(benchmarks.codec, "OF_IMAGE", ("global8",))
    assert main([str(finished / "cache"), "--blends", "16"]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out.splitlines()[-1])
    assert list(facts) == ["envelope", "int8", "topk10", "featurespca4", "global8", "float16"]
    of_image = facts.pop("global8")
    assert 0 < of_image["kl"] < 1e-4 and of_image["lookups"] == 0
    assert 0 < facts["int8"]["kl"] < facts["featurespca4"]["kl"] and facts["featurespca4"]["table_bytes"] > 0
    assert facts["envelope"]["hard_agreement"] == 1.0 and facts["envelope"]["mismatches"] == 0
    cache = open_cache(finished / "cache")
    assert all(row["lookups"] == 22 * 2 * 16 * np.prod(cache.grid) for row in facts.values())
    assert all(0 < row["bytes_per_view"] < row["unit_bytes_per_view"] for row in facts.values())
    assert "44 of 44" in out
    files = [f for b in range(cache.blocks) for v in range(2) for f in getattr(cache.commit_of(b, v), "files", [])]
    assert facts["envelope"]["unit_bytes_per_view"] * 44 == pytest.approx(sum(f.size for f in files))
    assert facts["envelope"]["bytes_per_view"] * 44 == pytest.approx(sum(f.target_bytes for f in files))


def test_one_wrong_target_fails_the_benchmark(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = EnvelopeCodec.hard

    def wrong(self: EnvelopeCodec, arrays: Arrays, blend: int) -> Any:
        out = right(self, arrays, blend)
        out[0, 0, 0] = (out[0, 0, 0] + (blend == 65536)) % 12
        return out

    monkeypatch.setattr(EnvelopeCodec, "hard", wrong)
    assert main([str(finished / "cache"), "--views", "1", "--blends", "2"]) == 1


def test_an_unfinished_cache_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = next((finished / "cache").glob("commits/b00001/v0001.json"))
    files = (record, finished / "cache" / INDEX)  # which holds the record once more
    hidden = [file.rename(file.with_suffix(".away")) for file in files]
    code = main([str(finished / "cache")])
    for there, file in zip(hidden, files, strict=True):
        there.rename(file)
    assert code == 1 and "misses 1 units" in capsys.readouterr().err
