"""Stage 1 from the bare forward up, a part at a time: where the time of a batch goes that is not the network's.

Each rung is the one before it and one part more. The last are whole runs of stage 1 with what might win the time back: one
stream for the forwards of all lanes, so that no two of them share the device, and the forward as a CUDA graph, one launch in
place of hundreds, each of which any other thread of Python may hold up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import cskd.pipeline.cache_teacher as spine
import cskd.pipeline.unit_line as unit_line
from benchmarks.gpu.bench import Bench, computing, teacher_keys
from benchmarks.gpu.clocks import seconds_of
from benchmarks.gpu.stage1 import WORKERS, stage1
from cskd.codecs.envelope import EnvelopeCodec
from cskd.config import Config
from cskd.dataset.inventory import open_inventory
from cskd.loading.feed import DeviceBatch
from cskd.loading.stage1 import Chunk, ChunkViews
from cskd.machine.threads import brief_turns
from cskd.pipeline.encoding import Encoded, encoded_view
from cskd.teacher.lanes import Lanes
from cskd.teacher.model import Teacher, load_teacher
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from cskd.views.mixing import CUTMIX, MIXUP

ARITHMETIC = "bf16+fold"
Load = Callable[..., Teacher]


class OneStream(Lanes):
    """Lanes whose forwards run one after the other on a stream of their own; each encodes on its lane's."""

    def __init__(self, device: torch.device, *more: Any) -> None:
        super().__init__(device, *more)
        self._forwards = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        with super().launching():
            if self._forwards is None:
                yield
                return
            own = torch.cuda.current_stream(self._device)
            self._forwards.wait_stream(own)
            with torch.cuda.stream(self._forwards):
                yield
            own.wait_stream(self._forwards)


class Graph:
    """A backbone as one CUDA graph of its first input's shape; for lanes of `OneStream`, whose order keeps its buffers apart."""

    def __init__(self, backbone: Callable[[Tensor], Tensor]) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA graph without CUDA")
        self._backbone, self._graph = backbone, torch.cuda.CUDAGraph()
        self._input: Tensor | None = None
        self._output = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self._input is None or x.shape != self._input.shape:
            if self._input is not None:
                return self._backbone(x)
            self._capture(x)
        assert self._input is not None
        self._input.copy_(x)
        self._graph.replay()
        return self._output.clone()

    def _capture(self, x: Tensor) -> None:
        kind: Any = torch.get_autocast_dtype("cuda")
        # Weights that autocast keeps in its cache would be freed at its end, and are read by the graph.
        uncached = torch.autocast("cuda", kind, torch.is_autocast_enabled("cuda"), cache_enabled=False)
        self._input, aside = x.clone(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), uncached:
            for _ in range(3):
                self._backbone(self._input)
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
                self._output = self._backbone(self._input)
        torch.cuda.current_stream().wait_stream(aside)


def graphed(load: Load) -> Load:
    """`load_teacher`, with the backbone of what it loads as a graph from its first whole batch on."""

    def loaded(*arguments: Any) -> Teacher:
        teacher = load(*arguments)
        plain, whole = teacher.backbone, Graph(teacher.backbone)
        teacher.backbone = lambda x: whole(x) if len(x) == teacher.batch else plain(x)
        return teacher

    return loaded


def rungs(bench: Bench) -> None:
    """Milliseconds of a batch, from the backbone alone to the lanes of stage 1; no loader, nothing is written."""
    torch.set_num_threads(1)
    config = _config(bench, "rungs")
    teacher, batch = _teacher(config, bench), _chunk(config, bench)
    pixels, mixing = batch.pixels[0], _mixing(bench)
    codecs = {"envelope": EnvelopeCodec(teacher.classes, teacher.grid)}
    arguments = (teacher, codecs, batch, mixing, bench.sizes.teacher_batch)
    there = tuple(field.to(bench.device) for field in mixing)
    mixed = mix_pixels(pixels, *there)
    ready = teacher.prepare(mixed)

    def backbone() -> Tensor:
        with computing(ARITHMETIC, bench.device):
            return teacher.backbone(ready)

    with torch.no_grad(), brief_turns(bench.device.type == "cuda"):
        steps: list[tuple[str, Callable[[], object]]] = [
            ("backbone", backbone),
            ("+ normalised", lambda: teacher._features(teacher.backbone, mixed)),
            ("+ head in float32", lambda: teacher.outputs_of(mixed)),
            ("+ mixed", lambda: teacher.outputs_of(mix_pixels(pixels, *there))),
        ]
        bare = 0.0
        for name, job in steps:
            took = 1e3 * seconds_of(job, bench.sizes.calls, bench.device)
            bare = bare or took
            bench.say(name, took, "ms", f"{took / bare:.3f} of the backbone")
        _launches(bench, backbone, codecs["envelope"], teacher, mixed)
        for name, lanes, alone in (
            ("+ encoded", Lanes, True),
            ("lanes", Lanes, False),
            ("lanes, one stream", OneStream, False),
        ):
            bench.attempt(name, _through, bench, name, lanes, arguments, bare, alone)
        bench.attempt("as a graph", _as_graph, bench, backbone, arguments, bare)


def runs(bench: Bench) -> None:
    """Whole runs of stage 1: as it is, with one stream, and with one stream and a graph."""
    for name, lanes, load in (
        ("as it is", Lanes, load_teacher),
        ("one stream", OneStream, load_teacher),
        ("one stream, graph", OneStream, graphed(load_teacher)),
    ):
        with mock.patch.object(unit_line, "Lanes", lanes), mock.patch.object(spine, "load_teacher", load):
            arguments = (bench, bench.sizes.teacher, ARITHMETIC, WORKERS[ARITHMETIC])
            bench.attempt(name, stage1, *arguments, cache=name, row=f"{name}, stage 1")


def _config(bench: Bench, cache: str) -> Config:
    s = bench.sizes
    return bench.config(s.teacher, s.few, teacher_keys(ARITHMETIC), cache)


def _teacher(config: Config, bench: Bench) -> Teacher:
    classes = open_inventory(bench.data(bench.sizes.few)).classes
    return load_teacher(config.teacher, classes, bench.device, config.recipe.size)


def _chunk(config: Config, bench: Bench) -> ChunkViews:
    """One view of a batch of images, on the device."""
    maker, n = ViewMaker(open_inventory(bench.data(bench.sizes.few)), config.recipe), bench.sizes.teacher_batch
    images = [maker.image(i) for i in range(min(n, bench.sizes.distinct))]
    views = np.stack([maker.view(images[i % len(images)], i) for i in range(n)])
    on_device = DeviceBatch({"pixels": torch.from_numpy(views)[None].to(bench.device)})
    return ChunkViews(Chunk(0, (0,), 0, np.arange(n)), on_device, np.zeros((1, n), np.int64), {})


def _mixing(bench: Bench) -> tuple[Tensor, ...]:
    """Neighbours mixed by MixUp and CutMix in turn: the arguments of `mix_pixels`."""
    n, side = bench.sizes.teacher_batch, bench.sizes.pixels
    box = torch.tensor([side // 4, side // 2, side // 4, side // 2]).expand(n, 4).contiguous()
    mode = torch.where(torch.arange(n) % 4 < 2, MIXUP, CUTMIX).to(torch.uint8)
    return torch.arange(n) ^ 1, mode, torch.full((n,), 40000), box


def _launches(bench: Bench, job: Callable[[], object], codec: Any, teacher: Teacher, mixed: Tensor) -> None:
    """What it takes the interpreter to launch a forward: alone, and next to a thread that encodes without pause."""
    outputs = teacher.outputs_of(mixed)
    stop = threading.Event()

    def encode() -> None:
        with torch.no_grad():
            while not stop.is_set():
                codec.encode_outputs(outputs)

    def launched() -> float:
        spent = []
        for _ in range(bench.sizes.calls):
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter()
            job()
            spent.append(time.perf_counter() - clock)
        return 1e3 * sorted(spent)[len(spent) // 2]

    bench.say("launching the backbone", launched(), "ms", "of the host, the device idle before")
    thread = threading.Thread(target=encode)
    thread.start()
    try:
        bench.say("launching the backbone, next to one that encodes", launched(), "ms")
    finally:
        stop.set()
        thread.join()


def _through(
    bench: Bench, name: str, kind: type[Lanes], arguments: tuple[Any, ...], bare: float, alone: bool = False
) -> None:
    """`encoded_view` of one batch again and again, as stage 1 runs it; alone: the next one waits for it."""
    teacher, codecs, chunk, mixing, n = arguments
    labels, good = torch.zeros(n, 2, dtype=torch.int64), np.arange(n)
    calls, spent = bench.sizes.calls, list[Encoded]()
    with kind(bench.device, teacher.reentrant) as lanes:

        def batches(count: int) -> float:
            clock, jobs = time.perf_counter(), []
            for _ in range(count):
                jobs.append(lanes.submit(encoded_view, teacher, codecs, lanes, chunk, 0, mixing, good, labels))
                if alone:
                    jobs[-1].result()
            spent[:] = [job.result() for job in jobs]
            return time.perf_counter() - clock

        batches(6)
        took = 1e3 * batches(calls) / calls
    parts = [
        1e3 * sum(part) / calls for part in zip(*((e.teacher_seconds, e.encode_seconds) for e in spent), strict=True)
    ]
    bench.say(
        name, took, "ms", f"{took / bare:.3f} of the backbone; {parts[0]:.1f} ms to its logits, {parts[1]:.1f} encoding"
    )


def _as_graph(bench: Bench, backbone: Callable[[], Tensor], arguments: tuple[Any, ...], bare: float) -> None:
    expected = backbone()
    graphed(lambda: arguments[0])()
    same = torch.equal(backbone(), expected)  # the first call captures
    took = 1e3 * seconds_of(backbone, bench.sizes.calls, bench.device)
    words = "the same bits" if same else "OTHER BITS"
    bench.say("backbone as a graph", took, "ms", f"{took / bare:.3f} of the backbone; {words}")
    _through(bench, "lanes, one stream, graph", OneStream, arguments, bare)
