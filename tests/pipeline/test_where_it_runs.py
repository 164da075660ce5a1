"""The device is no part of a cache, and a run's ranks are those of torchrun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cskd.config import Config, from_dict
from cskd.config.yaml_text import read_yaml
from cskd.errors import ConfigError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.repair import repair
from cskd.pipeline.care.verify import verify
from cskd.pipeline.setup import device_of
from cskd.pipeline.train import train
from cskd.store.manifest import read_manifest, write_manifest, write_resolved
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER
from tests.pipeline.test_pipeline import config as tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("where")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=42, block=20, shard=10)
    make_tiny_data(folder / "val", n=12, block=20, shard=10)
    return folder


def of_another_machine(config: Config) -> Path:
    """The cache of a config as an older version recorded it on a machine with four GPUs, a unit of it lost."""
    root = Path(config.cache.path)
    manifest = read_manifest(root)
    recorded = {**manifest.config}
    for section in ("cache", "train"):
        recorded[section] = {**recorded[section], "device": "cuda:77"}
    manifest = replace(manifest, config=recorded)
    write_manifest(root, manifest)
    write_resolved(root, manifest)
    return root


def test_a_cache_records_no_device_and_is_mended_where_an_older_ones_is_missing(tmp_path: Path, data: Path) -> None:
    config = tiny_config(data, cache={"path": str(tmp_path / "cache"), "device": "cpu"}, train={"device": "cpu"})
    cache_teacher(config, quiet=True)
    recorded = read_manifest(tmp_path / "cache").config
    assert recorded["cache"]["device"] == recorded["train"]["device"] == "auto"

    root = of_another_machine(config)
    assert not verify(root, quiet=True).errors
    next(root.glob("commits/*/*.json")).unlink()
    assert repair(root, quiet=True).rebuilt == 1
    assert verify(root, again=2, quiet=True).sound
    resolved = from_dict(read_yaml((root / "resolved.yaml").read_text(), "resolved.yaml"))
    resolved = replace(resolved, cache=replace(resolved.cache, path=str(root)))
    (note,) = cache_teacher(resolved, quiet=True).notes[:1]
    assert note == f"cache.device cuda:77, which is recorded in {root}, can't be used here: this runs on cpu"
    with pytest.raises(ConfigError, match=r"cache\.device 'cuda:76' is not usable here"):
        device_of(replace(resolved, cache=replace(resolved.cache, device="cuda:76")), "cache")


def test_processes_of_srun_are_no_ranks_and_the_line_with_torchrun_is_named(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NUM_TASKS": "8", "TASKS_PER_NODE": "4(x2)"}.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    config = tiny_config(data, train={"output": str(tmp_path / "run"), "device": "cpu"})
    with pytest.raises(
        ConfigError, match=r"srun started 8 processes.* --nproc-per-node 4 .* --no-python cskd train"
    ) as e:
        train(config, quiet=True)
    assert len(str(e.value)) <= 300
    assert not (tmp_path / "run").exists()
