"""docs/FORMAT.md tells the truth: its code runs on a cache and gives what the program's own reader gives."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd.codecs.base import BLEND_ONE
from cskd.codecs.bits import pack_levels, unpack_levels
from cskd.store.cache import Cache
from cskd.store.format import UNIT_FIELDS
from cskd.teacher.arithmetic import unchanged
from cskd.views.mix_pixels import _mix_batch, _mix_rows
from cskd.views.mixing import CUTMIX, MIXUP, NONE
from tests.caches import make_tiny_cache

TEXT = (Path(__file__).resolve().parent.parent.parent / "docs" / "FORMAT.md").read_text(encoding="utf-8")
OPEN, TARGETS, PACKED, REPLAY, XARRAY = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache at the path that the document names, in the working directory."""
    made = make_tiny_cache(tmp_path, quarantine=[2])
    (tmp_path / "caches").mkdir()
    made.root.rename(tmp_path / "caches" / "imagenet_sample")
    monkeypatch.chdir(tmp_path)
    return Cache(tmp_path / "caches" / "imagenet_sample", made.manifest, made.inventory)


def run(*blocks: str) -> dict[str, Any]:
    """What the blocks, one after the other, leave defined."""
    script = Path("format_doc.py")
    script.write_text("\n".join(blocks), encoding="utf-8")
    return runpy.run_path(str(script))


def test_the_documents_code_reads_what_the_program_reads(cache: Cache) -> None:
    names = run(OPEN, TARGETS)
    unit = cache.read(0, 0, "envelope")
    assert names["fields"].keys() == unit.fields.keys() and names["targets"].keys() == unit.targets.keys()
    for mine, its in ((names["fields"], unit.fields), (names["targets"], unit.targets)):
        for name, array in its.items():
            np.testing.assert_array_equal(mine[name], array)
            assert mine[name].dtype == array.dtype
    codec = cache.codecs["envelope"]
    starts = unit.targets["start"].astype(int)
    for blend in {0, 1, 32768, BLEND_ONE, *starts.tolist(), *(starts + 1).tolist()}:
        np.testing.assert_array_equal(names["hard_targets"](unit.targets, blend), codec.hard(unit.targets, blend))
    assert (names["halfway"] != names["hard_targets"](unit.targets, 0)).any()


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_the_documents_unpacking_gives_the_numbers_that_the_program_gives(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = run("import numpy as np", PACKED)["numbers"]
    packed, low, step = pack_levels(torch.randn(4, 2, 13, generator=torch.Generator().manual_seed(bits)), bits)
    found = numbers(packed.numpy(), low.numpy(), step.numpy(), 13, bits)
    np.testing.assert_array_equal(found, unpack_levels(packed, low, step, 13, bits))
    assert found.dtype == np.float32


def test_the_documents_replay_is_what_the_teacher_saw_to_the_last_bit(cache: Cache) -> None:
    seen = set()
    for block, view in np.ndindex(cache.blocks, cache.views):
        names = run(OPEN.replace("b00000/v0000", f"b{block:05d}/v{view:04d}"), REPLAY)
        fields, own = names["fields"], [names["view"](row) for row in range(len(names["sample"]))]
        position = cache.read(block, view, "envelope").position
        for row, mode in enumerate(fields["mode"].tolist()):
            mate = row if mode == NONE else int(np.flatnonzero(position == fields["partner"][row])[0])
            pair = torch.from_numpy(np.stack([own[row], own[mate]]))
            rows = [torch.from_numpy(np.stack([fields[k][row]] * 2).astype(np.int64)) for k in ("mode", "lam", "box")]
            found = names["teacher_input"](row)
            assert found.dtype == np.float32
            for mix in (_mix_rows, _mix_batch):  # of a CPU, and of other devices
                expected = mix(pair, torch.tensor([1, 0]), *rows)[0].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(found, expected)
            if mode == MIXUP:
                assert (found != found.round()).any()
            seen.add(mode)
    assert seen == {NONE, MIXUP, CUTMIX}


def test_the_documents_tables_list_every_array(cache: Cache) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT, re.MULTILINE))
    assert rows.keys() == UNIT_FIELDS.keys() | cache.codecs["envelope"].fields.keys()
    for name, (dtype, _) in UNIT_FIELDS.items():
        assert rows[name].startswith(np.dtype(dtype).name)


def test_the_document_names_every_fact_of_the_teachers_precision() -> None:
    listed = re.findall(r"^- (`.*?):", TEXT, re.MULTILINE)
    assert {name for line in listed for name in re.findall(r"`(\w+)`", line)} == unchanged().facts.keys()


@pytest.mark.skipif(importlib.util.find_spec("xarray") is None, reason="xarray is not installed")
def test_xarray_opens_both_groups_with_named_dimensions(cache: Cache) -> None:
    names = run(OPEN, XARRAY)
    assert dict(names["rows"].sizes) == {"sample": 4, "edge": 4}
    assert dict(names["envelope"]["n_extra"].sizes) == {"sample": 4, "row": 3, "col": 3}
    assert names["mixed"].sizes["sample"] == int((names["fields"]["mode"] > 0).sum())
    np.testing.assert_array_equal(names["envelope"]["start"], names["targets"]["start"])
