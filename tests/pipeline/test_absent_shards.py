"""Commands that read images look for every shard first, and say in one line which are not there.

Not in test_shards.py: its worker processes import that file, and would load torch with it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cskd.config import from_dict
from cskd.errors import DataError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.evaluate import evaluate_checkpoint
from cskd.pipeline.train import train
from tests.caches import make_tiny_cache, make_tiny_data


@pytest.mark.parametrize("command", ["cache-teacher", "train", "train --online", "eval"])
@pytest.mark.parametrize("lost", ["one", "all"])
def test_shards_that_are_absent_are_one_line_before_the_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, lost: str
) -> None:
    """One of many would else be found in the middle of it, and a validation shard after an epoch."""

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("begun without the images")

    for name in (
        "setup.load_teacher",
        "online.load_teacher",
        "setup.build_student",
        "evaluate.load_student",
    ):
        monkeypatch.setattr(f"cskd.pipeline.{name}", too_late)
    cache = make_tiny_cache(tmp_path)
    val = make_tiny_data(tmp_path / "val", n=12)
    path, data = {"path": str(cache.root)}, {"train": str(tmp_path / "data"), "val": str(tmp_path / "val")}
    c = from_dict({"data": data, "cache": path, "train": {"output": str(tmp_path / "run"), "global_batch": 8}})
    run = {
        "cache-teacher": lambda: cache_teacher(c, quiet=True),
        "train": lambda: train(c, quiet=True),
        "train --online": lambda: train(c, online=True, quiet=True),
        "eval": lambda: evaluate_checkpoint(tmp_path, tmp_path / "val", 8, 0, None, "cpu", quiet=True),
    }[command]
    for inventory in [cache.inventory] * (command != "eval") + [val] * (command in ("eval", "train")):
        shards = [inventory.shard_path(s) for s in range(len(inventory.shards))][
            slice(1, 2) if lost == "one" else slice(None)
        ]
        for shard in shards:
            shard.rename(shard.with_suffix(".away"))
        expected = (
            r"^(data\.val: )?shard 00001.tar is not in"
            if lost == "one"
            else rf"^(data\.val: )?none of the {len(shards)} image shards .*00000\.tar"
        )
        with pytest.raises(DataError, match=expected) as refused:
            run()
        assert "data.train or data.val in the config, or --data" in str(refused.value) and len(str(refused.value)) < 400
        for shard in shards:
            shard.with_suffix(".away").rename(shard)
