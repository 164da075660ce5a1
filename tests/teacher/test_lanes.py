"""Stage 1 works on several batches at once: with the results of one at a time, and with its errors, interrupts and claims."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cskd.teacher.lanes
from cskd.codecs.base import Arrays
from cskd.codecs.envelope import EnvelopeCodec
from cskd.codecs.int8 import Int8Codec
from cskd.dataset.inventory import open_inventory
from cskd.errors import CodecError
from cskd.files.claims import Claims
from cskd.loading.stage1 import Chunk, ChunkMaker, chunks
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.encoding import encoded_view
from cskd.store.cache import Cache, create_cache, open_cache
from cskd.store.commit import read_commit
from cskd.store.unit_builder import UnitBuilder
from cskd.teacher.lanes import Dropped, Lanes, lanes_of
from cskd.teacher.model import load_teacher
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from cskd.views.mixing import quads
from tests.caches import make_tiny_data
from tests.pipeline.test_pipeline import TEACHER, config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lanes")
    (folder / "net.py").write_text(TEACHER)
    make_tiny_data(folder / "train", n=90, block=45, shard=15)  # 12 batches a view, the last of a block short
    return folder


def one_at_a_time(made: Cache, root: Path, base: Path) -> Cache:
    """The cache again, in one thread: load, mix, teacher, encode, write, one batch after the other."""
    c, inventory = config(base), made.inventory
    cache = create_cache(root, made.manifest, inventory)
    teacher = load_teacher(c.teacher, inventory.classes, CPU, c.recipe.size)
    maker = ChunkMaker(ViewMaker(inventory, c.recipe), inventory.id)
    for block in range(cache.blocks):
        first, stop = cache.inventory.block_range(block)
        order = quads(stop - first, c.recipe, inventory.id, block, 0)
        for view in range(cache.views):
            unit = UnitBuilder(inventory, c.recipe, cache.codecs, view, first, order)
            for task in chunks(block, (view,), first, order, c.teacher.batch):
                made_views, n = maker(task), len(task.position)
                mixing = (torch.from_numpy(field) for field in unit.mixing_rows(task.position))
                rows = mix_pixels(made_views.pixels[0], *mixing)
                padded = torch.cat([rows, rows[:1].expand(c.teacher.batch - n, -1, -1, -1)])
                dense, image = (logits[:n] for logits in teacher.forward_dense(padded))
                encoded = {name: codec.encode(dense, image) for name, codec in cache.codecs.items()}
                unit.add(task.position, made_views.crc[0], encoded)
            cache.add_unit(block, view, *unit.finish(), {})
    return cache


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_cache_made_in_several_lanes_is_that_of_one_batch_after_the_other(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    monkeypatch.setattr(cskd.teacher.lanes, "lanes_of", lambda *_: (lanes, 1))
    report = cache_teacher(config(base, cache={"path": str(tmp_path / "cache")}), quiet=True)
    again = one_at_a_time(open_cache(tmp_path / "cache"), tmp_path / "again", base)
    assert report.images == 270
    assert report.content_root == again.content_root()


def test_lanes_share_the_cores_of_a_cpu_and_leave_the_main_threads_as_they_were() -> None:
    assert [lanes_of(CPU, cores) for cores in (1, 2, 3, 8, 64)] == [(1, 1), (2, 1), (3, 1), (8, 1), (8, 1)]
    assert lanes_of(CPU, 4, reentrant=False) == (2, 4)
    before = torch.get_num_threads()
    with Lanes(CPU) as lanes:
        assert lanes.submit(torch.get_num_threads).result() == lanes_of(CPU, before)[1]
        assert not lanes.submit(torch.is_grad_enabled).result()
    assert torch.get_num_threads() == before


HOOKED = """
import time
import torch
from torch import nn

class Hooked(nn.Module):
    \"\"\"Keeps its features on itself, as code often does that takes them from a hook.\"\"\"
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.fc = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 5)
        self.body.register_forward_hook(lambda module, inputs, output: setattr(self, "kept", output))

    def forward_features(self, x):
        self(x)
        time.sleep(0.002)  # where another thread would come in between
        return self.kept

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def build():
    return Hooked()
"""


def test_a_teacher_that_keeps_state_on_itself_runs_one_batch_at_a_time(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        HOOKED.replace("        self(x)\n", "").replace("return self.kept", "return self.body(x)")
    )
    (tmp_path / "hooked.py").write_text(HOOKED)
    targets = []
    for name in ("plain", "hooked"):
        teacher = {"model": f"{tmp_path / name}.py:build", "batch": 8, "min_top1": 0.0, "check_images": 8}
        cache_teacher(config(base, teacher=teacher, cache={"path": str(tmp_path / name)}), quiet=True)
        cache = open_cache(tmp_path / name)
        units = [cache.read(b, v, "envelope").targets for b in range(cache.blocks) for v in range(cache.views)]
        targets.append([array.tobytes() for unit in units for _, array in sorted(unit.items())])
    assert targets[0] == targets[1]


def test_a_block_of_which_no_image_can_be_decoded_is_cached_as_such(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "train", n=12, block=1, shard=1, bad=[5])
    (tmp_path / "net.py").write_text(TEACHER)
    report = cache_teacher(config(tmp_path, cache={"max_quarantine": 0.5, "workers": 0}), quiet=True)
    assert (report.quarantined, report.units) == (1, 36)
    cache = open_cache(tmp_path / "cache")
    assert len(cache.read(5, 0, "envelope").position) == 0


@pytest.mark.parametrize("batch", [0, 5, 11])
def test_an_error_of_a_lane_stops_the_stage_with_its_own_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    encode, count = EnvelopeCodec.encode, iter(range(1000))

    def failing(*arguments: Any) -> Arrays:
        if next(count) == batch:
            raise CodecError("dense logits of sample 3 of the batch hold nan")
        return encode(*arguments)

    monkeypatch.setattr(EnvelopeCodec, "encode", failing)
    with pytest.raises(CodecError, match="sample 3 of the batch hold nan"):
        cache_teacher(config(base, cache={"path": str(tmp_path / "cache")}), quiet=True)
    assert not (tmp_path / "cache" / "claims").exists()
    monkeypatch.undo()
    assert cache_teacher(config(base, cache={"path": str(tmp_path / "cache")}), quiet=True).units == 6


def test_an_error_of_the_writer_stops_the_stage_with_its_own_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "unit.tmp")

    monkeypatch.setattr(Cache, "add_unit", full)
    with pytest.raises(OSError, match=r"No space left on device: 'unit\.tmp'"):
        cache_teacher(config(base, cache={"path": str(tmp_path / "cache")}), quiet=True)
    assert not (tmp_path / "cache" / "claims").exists()


def test_a_claim_is_given_back_after_the_commits_of_its_pass(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, given_back = Claims.release, []

    def after(self: Claims, claims: list[Path]) -> None:
        for claim in claims:
            block = int(claim.name[1:6])
            given_back.append(block)
            assert all(read_commit(tmp_path / "cache", block, view) for view in range(3)), "released before its commits"
        release(self, claims)

    monkeypatch.setattr(Claims, "release", after)
    cache_teacher(config(base, cache={"path": str(tmp_path / "cache")}), quiet=True)
    assert given_back == [0, 1]


class Layer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x


@pytest.mark.parametrize("in_turn", [False, True])
def test_an_interrupt_ends_what_is_under_way_at_its_next_layer_and_what_waits_is_never_begun(in_turn: bool) -> None:
    begun, ended = list[int](), list[int]()
    forward = nn.Sequential(*[Layer() for _ in range(2000)])  # 20 s

    def slow(i: int) -> None:
        begun.append(i)
        with lanes.launching():
            forward(torch.zeros(1))
        ended.append(i)

    clock = 0.0
    with pytest.raises(KeyboardInterrupt), Lanes(CPU, reentrant=not in_turn) as lanes:
        jobs = [lanes.submit(slow, i) for i in range(lanes.room)]
        while len(begun) < lanes.count:
            time.sleep(0.01)
        clock = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - clock < 15
    assert (len(begun), ended) == (lanes.count, [])
    assert all(job.cancelled() or isinstance(job.exception(), Dropped) for job in jobs)
    assert nn.Sequential(Layer())(torch.ones(1)) == 1  # no hook is left


def test_a_lane_that_is_dropped_ends_no_forward_of_another_thread() -> None:
    """Two teachers have lanes of their own: those of the second go on when the first one's are dropped."""
    begun, dropped, forward = threading.Event(), threading.Event(), nn.Sequential(Layer(), Layer())

    def of_the_second() -> float:
        assert dropped.wait(60)
        return float(forward(torch.ones(1)))

    def of_the_first() -> None:
        begun.set()
        try:
            while True:
                forward(torch.ones(1))
        except Dropped:
            dropped.set()
            assert job.result(60) == 1.0  # while the first one's lanes are still being dropped
            raise

    with Lanes(CPU) as second:
        job = second.submit(of_the_second)
        with pytest.raises(KeyboardInterrupt), Lanes(CPU) as first:
            of_first = first.submit(of_the_first)
            assert begun.wait(60)
            raise KeyboardInterrupt
    assert isinstance(of_first.exception(), Dropped)


def test_a_lane_that_is_dropped_does_not_wait_for_the_turns_of_another_teacher() -> None:
    turn, held, dropped = threading.Lock(), threading.Event(), threading.Event()

    def of_the_second() -> None:
        with second.launching():
            held.set()
            assert dropped.wait(20)

    def of_the_first() -> None:
        begun.set()
        with first.launching():
            raise AssertionError("it is not wanted any more")

    with Lanes(CPU, False, turn) as second:
        job, begun = second.submit(of_the_second), threading.Event()
        assert held.wait(60)
        with pytest.raises(KeyboardInterrupt), Lanes(CPU, False, turn) as first:
            of_first = first.submit(of_the_first)
            assert begun.wait(60)
            raise KeyboardInterrupt
        dropped.set()
        job.result(60)
    assert isinstance(of_first.exception(), Dropped)


def test_an_interrupt_in_a_pass_leaves_whole_units_only(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, count = EnvelopeCodec.encode, iter(range(1000))

    def interrupted(*arguments: Any) -> Arrays:
        if next(count) == 25:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(EnvelopeCodec, "encode", interrupted)
    path = {"path": str(tmp_path / "cache")}
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config(base, cache=path), quiet=True)
    cache = open_cache(tmp_path / "cache")
    assert len(cache.missing()) >= 3
    monkeypatch.undo()
    report = cache_teacher(config(base, cache=path), quiet=True)
    whole = cache_teacher(config(base, cache={"path": str(tmp_path / "whole")}), quiet=True)
    assert report.content_root == whole.content_root
    assert np.all(~open_cache(tmp_path / "cache").quarantined())


def test_a_lane_has_its_device_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: dict[int, torch.device] = {}  # by thread
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.update({threading.get_ident(): device}))
    monkeypatch.setattr(Lanes, "_stream", lambda _: contextlib.nullcontext())
    with Lanes(torch.device("cuda", 1)) as lanes:
        assert lanes.submit(lambda: current[threading.get_ident()]).result() == torch.device("cuda", 1)
    assert threading.get_ident() not in current


@pytest.mark.parametrize("precision", ["tf32", "float32"])
def test_where_forwards_are_in_tf32_errors_are_measured_between_them(
    base: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    c = config(base)
    inventory = open_inventory(base / "train")
    teacher = replace(load_teacher(c.teacher, inventory.classes, CPU, c.recipe.size), precision=precision)
    maker, inside, seen = ChunkMaker(ViewMaker(inventory, c.recipe), inventory.id), [0], list[int]()

    class Watched(Lanes):
        @contextlib.contextmanager
        def launching(self) -> Iterator[None]:
            inside[0] += 1
            yield
            inside[0] -= 1

    monkeypatch.setattr("cskd.pipeline.encoding.measure", lambda *_: seen.append(inside[0]))
    chunk = maker(Chunk(0, (0,), 0, np.arange(4)))
    mixing = (torch.arange(4), torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4))
    codecs = {"int8": Int8Codec(teacher.classes, teacher.grid)}
    with Watched(CPU) as lanes:
        encoded_view(teacher, codecs, lanes, chunk, 0, mixing, np.arange(4), torch.zeros(4, 2, dtype=torch.int64))
    assert seen == [int(precision == "tf32")]
