"""What this machine offers, row by row: versions, decoder, processes, disk, memory, GPUs; and what to mend."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

import cskd
from cskd.config import Config
from cskd.config.schema import Tracker
from cskd.dataset.inventory import open_inventory
from cskd.errors import CskdError, ImageError, counted, shown
from cskd.files.durable import hard_link_error
from cskd.files.scratch import GB
from cskd.loading.need import shared_bytes
from cskd.machine.cores import usable_cores
from cskd.machine.launch import launched
from cskd.machine.threads import WAITING, Threads, choose_threads, users_count
from cskd.pipeline.combinations import COMBINATIONS
from cskd.pipeline.machine_facts import Facts, gather

if TYPE_CHECKING:
    from cskd.views.maker import ViewMaker

DEIT_TINY = "deit_tiny_distilled_patch16_224"
MOST_IMAGES = 256  # of a step that is measured: enough to fill a GPU
SECONDS = 0.4  # that each speed is measured for
BUSY = 0.5  # processes that want to run, per core: more than the doctor itself on two cores
SOME_IMAGES = 12  # whose decoding is measured
RAW_SIDE = 256  # short side of raw members, pixels, for views of 224
AS_IT_IS = "as it is"
SLOWER = 0.8  # of one thread's speed: less than that is not noise
# cskd's dependencies, and torchvision, which timm needs.
PACKAGES = (
    *("numpy", "torch", "torchvision", "timm", "webdataset", "zarr", "numcodecs", "pcodec", "pillow", "simplejpeg"),
    *("google-crc32c", "safetensors", "pyyaml", "annotated-types", "huggingface-hub", "typer", "rich"),
)
OPTIONAL = {
    "scikit-learn": "cskd demo: pip install 'cskd[demo]'",
    **{name: f"train.trackers: pip install 'cskd[{name}]'" for name in get_args(Tracker)},
}


@dataclass(frozen=True)
class Check:
    """One row. fail: cskd does not work here; warn: it does, but slowly, or not for every use. advice: what to do then, else
    why it matters or nothing."""

    name: str
    value: str
    state: Literal["ok", "warn", "fail"] = "ok"
    advice: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """ok: no row fails; warnings: rows that warn."""

    ok: bool
    warnings: int
    checks: list[Check]


def doctor(config: Config | None = None) -> DoctorReport:
    """Look at this machine; nothing is changed but a temporary file in the current folder. config: of the run that it is for; None:
    DeiT-Ti with the defaults."""
    config = config or Config()
    checks: list[Check] = []
    for name, probe in PROBES.items():
        try:
            checks += probe(config)
        except (ImportError, OSError, RuntimeError) as e:  # a broken installation is what a doctor is for
            text = " ".join(str(e).split())
            checks.append(Check(name, f"{type(e).__name__}: {text}", "fail", "install cskd again in a new environment"))
    states = [c.state for c in checks]
    return DoctorReport("fail" not in states, states.count("warn"), checks)


def render(report: DoctorReport, console: Console) -> None:
    """`doctor()`'s report as a table, the rows to mend marked."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for row in report.checks:
        mark = Text(row.state, {"ok": "green", "warn": "bold yellow", "fail": "bold red"}[row.state])
        table.add_row(mark, Text(row.name), Text(row.value), Text(row.advice))
    console.print(table)


def _row(name: str, value: str, good: bool, advice: str) -> Check:
    """A row that warns, with advice, where what was found is not good."""
    return Check(name, value) if good else Check(name, value, "warn", advice)


def _versions(config: Config) -> Iterator[Check]:
    yield Check("cskd", cskd.__version__)
    yield Check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in (*PACKAGES, *OPTIONAL):
        try:
            yield Check(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            needed = name in PACKAGES
            advice = f"pip install {name}" if needed else f"only for {OPTIONAL[name]}"
            yield Check(name, "not installed", "fail" if needed else "ok", advice)


def _decoder(config: Config) -> Iterator[Check]:
    """Two decoders may differ in a pixel's last bit; the digest of each view finds that, but can't mend it."""
    from PIL import features

    turbo = features.version_feature("libjpeg_turbo")
    found = features.version("jpg")
    if turbo:
        yield Check("JPEG decoder", f"libjpeg-turbo {turbo}")
    else:
        # python-pillow/Pillow#6262, #6264: it decodes to other pixels than libjpeg-turbo.
        advice = (
            "Pillow's own wheels bring libjpeg-turbo, several times as fast, and of the pixels that caches made elsewhere are of: "
            "pip install --force-reinstall pillow"
        )
        yield Check("JPEG decoder", f"libjpeg {found}" if found else "none", "warn" if found else "fail", advice)


def _checksum(config: Config) -> Iterator[Check]:
    import google_crc32c

    fast = google_crc32c.implementation == "c"
    advice = "every view is checked with it, and this is slow: pip install --force-reinstall google-crc32c"
    yield _row("crc32c", "C, uses the CPU's instruction" if fast else google_crc32c.implementation, fast, advice)


def _processes(config: Config) -> Iterator[Check]:
    cores, machine = usable_cores(), os.cpu_count() or 1
    yield Check("CPU cores", f"{cores}" if cores.count == machine else f"{cores}, the machine has {machine}")
    if cores.quota is not None:
        short = "less than two cores' time: training takes a core, and its loader another"
        value = f"{cores.quota:g} CPUs, affinity {cores.allowed}"
        yield _row("CPU quota", value, cores.quota >= 2, short)
    methods = multiprocessing.get_all_start_methods()
    slow = "no forkserver: workers take some seconds each to start"
    yield _row("start methods", ", ".join(methods), "forkserver" in methods, slow)


def _images(config: Config) -> Iterator[Check]:
    """Whether the images of a config are there; the rest of it is looked at by `cskd check`."""
    for key, place in (("data.train", config.data.train), ("data.val", config.data.val)):
        try:
            if place:
                inventory = open_inventory(Path(place))
                inventory.check_shards()
                yield Check(key, f"{len(inventory):,} images in {place}")
        except (CskdError, OSError) as e:
            wrong, _, advice = shown(e).partition("; ")
            yield Check(key, wrong, "fail", advice)


def _storage(config: Config) -> Iterator[Check]:
    yield _free("disk, current folder", Path.cwd(), 10 * GB, "caches of ImageNet need about 0.3 GB a view")
    yield _free("disk, temporary files", Path(tempfile.gettempdir()), 1 * GB, "set TMPDIR to a larger disk")
    yield _hard_links(Path.cwd())
    shm = Path("/dev/shm")
    if shm.is_dir():
        batch = _batch_bytes(config)
        workers = _loader_threads(config).workers
        need = shared_bytes(workers, config.train.prefetch, batch)
        advice = (
            f"{workers} workers hand batches over in {need / GB:.1f} GB of it (train.workers, prefetch, global_batch); in a "
            f"container: docker run --shm-size={-(-need // 10**9)}g, else fewer workers"
        )
        yield _free("shared memory", shm, need, advice)
    if sys.platform == "linux":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield Check("memory", f"{memory / GB:.1f} GB")


def _batch_bytes(config: Config) -> int:
    """Bytes of a rank's batch in training; where the device makes the views, of images as large as ImageNet's."""
    from cskd.loading.raw_batches import batch_bytes
    from cskd.pipeline.loader_speed import PHOTO

    share, sent = config.train.global_batch // launched().local_count, config.train.augment == "device"
    return batch_bytes(share, config.train.repeats, config.recipe.size, math.prod(PHOTO) if sent else 0)


def _loader_threads(config: Config) -> Threads:
    """The threads and workers that `cskd train` would have here."""
    import torch

    gpu = torch.cuda.is_available() and not config.train.device.startswith("cpu")
    return choose_threads(config.train.threads, "train.threads", config.train.workers, gpu=gpu)


def _free(name: str, path: Path, enough: float, advice: str) -> Check:
    try:
        usage = shutil.disk_usage(path)
    except OSError as e:
        return Check(name, f"{path}: {e.strerror}", "warn", advice)
    value = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free at {path}"
    return _row(name, value, usage.free >= enough, advice)


def _hard_links(folder: Path) -> Check:
    """A commit record is put in place by a hard link: the one way that lets only the first of several writers count."""
    error = hard_link_error(folder)
    advice = "a cache needs a writable file system with hard links; put cache.path on another disk"
    return _row("hard links", f"no: {error.strerror}" if error else "yes", error is None, advice)


def _devices(config: Config) -> Iterator[Check]:
    import torch

    from cskd.machine.arithmetic import cpu_has_bf16

    yield Check("processor", "bf16" if cpu_has_bf16() else "no AVX512-BF16, no AMX: autocast: auto is float32 on it")
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        bf16 = facts.major >= 8 or bool(torch.version.hip)  # natively; is_bf16_supported also counts emulation
        value = f"{facts.name}, {facts.total_memory / GB:.0f} GB, {'bf16' if bf16 else 'no bf16'}"
        advice = "train.autocast: auto is fp16 here where the GPU gains by it, else float32, which takes longer"
        yield _row(f"GPU {i}", value, bf16, advice)
    if torch.backends.mps.is_available():
        yield Check("GPU", "Apple MPS, used where device: mps says so; nobody has run it yet, and auto is the CPU")
    elif torch.cuda.device_count() == 0:
        advice = "enough for the demo and CIFAR-sized runs; ImageNet takes a GPU with a driver that torch finds"
        yield Check("GPU", "none", "warn", advice)


def _threads(config: Config) -> Iterator[Check]:
    """The threads that a run would compute with, and what they gain and their way of waiting costs right now."""
    from cskd.machine.speed import steps_elsewhere, steps_per_second

    threads = _loader_threads(config)
    user = users_count()
    name = user[0] if user else ""
    advice = f"threads beyond the cores wait for each other: unset {name}, or set it to {threads.share} at most"
    yield _row("threads", str(threads), not user or threads.count <= threads.share, advice)
    load = load_row(threads.cores.count)
    busy = bool(load.advice)
    yield load
    one = steps_per_second(1, SECONDS)
    if threads.count == 1:
        yield Check("speed", f"{one:.0f} steps/s of a small network with 1 thread")
        return
    several = steps_per_second(threads.count, SECONDS)
    spinning = steps_elsewhere(threads.count, SECONDS, {}, without=tuple(WAITING))
    value = f"{one:.0f} steps/s of a small network with 1 thread, {several:.0f} with {threads.count}"
    if spinning is not None:
        value += f", {spinning:.0f} if they spun at barriers"
    when = "next to the other work" if busy else "on this machine"
    advice = f"several threads are slower than one {when}: set train.threads: 1 and cache.threads: 1"
    yield _row("speed", value, several >= SLOWER * one, advice)


def load_row(cores: int) -> Check:
    """That of the processes that want to run now, with advice where they slow down what is measured here."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    advice = "other work runs here now, which slows what is measured" if load > BUSY * cores else ""
    return Check("load", f"{load:.1f}", advice=advice)


def _loader(config: Config) -> Iterator[Check]:
    """Where there is a GPU: whether the cores make views as fast as it takes them."""
    import torch

    from cskd.machine.devices import pick_device
    from cskd.pipeline.loader_speed import images_per_second

    if not torch.cuda.is_available():
        return
    student = config.student if config.student.model else replace(config.student, model=DEIT_TINY)
    threads, device, size = _loader_threads(config), pick_device("auto"), config.recipe.size
    batch = min(config.train.global_batch, MOST_IMAGES)
    try:
        taken = images_per_second(student, size, batch, config.train.autocast, device, SECONDS)
    except torch.OutOfMemoryError:
        value = f"not measured: there is no memory for {batch} images of {student.model} on {device}"
        yield Check("loader", value, "warn", "end what else holds its memory; else set train.micro_batch for a run")
        return
    yield loader_row(student.model, taken, worker_rates(config, SECONDS), threads.share)


def worker_rates(config: Config, seconds: float) -> dict[str, float]:
    """Views per second of a core, of the config's images as they are and, in words, after each thing that makes it faster."""
    from cskd.pipeline.loader_speed import packed_raw, views_per_second

    images, recipe, repeats = _some_images(config), config.recipe, config.train.repeats
    host, side = config.train.augment == "host", RAW_SIDE * config.recipe.size // 224
    raw = packed_raw(images, side)
    rates = {AS_IT_IS: views_per_second(recipe, seconds, images, repeats, host)}
    rates[f"shards packed with --raw --short-side {side}"] = views_per_second(recipe, seconds, raw, repeats, host)
    if host:
        rates["train.augment: device"] = views_per_second(recipe, seconds, images, repeats, augment=False)
    return rates


def _some_images(config: Config) -> list[bytes]:
    """A few images of data.train, from all over it; none where they can't be read, which other rows say."""
    from cskd.views.maker import ViewMaker

    try:
        inventory = open_inventory(Path(config.data.train))
        maker = ViewMaker(inventory, config.recipe)
        return list(_decodable(maker, range(0, len(inventory), max(1, len(inventory) // SOME_IMAGES))))
    except (CskdError, OSError):
        return []


def _decodable(maker: ViewMaker, samples: Iterable[int]) -> Iterator[bytes]:
    """Those of these images, as they are stored, that can be decoded."""
    for sample in samples:
        with contextlib.suppress(ImageError):
            maker.image(sample)
            yield maker.encoded(sample)


def loader_row(model: str, taken: float, rates: Mapping[str, float], cores: int) -> Check:
    """That of images per second that a GPU takes, against the views per second that each core makes (`worker_rates`)."""
    needed = {how: math.ceil(taken / made) for how, made in rates.items()}
    value = (
        f"the GPU takes {taken:,.0f} images/s of {model}, a core makes {rates[AS_IT_IS]:,.0f} views/s: "
        f"{counted(needed[AS_IT_IS], 'core')}, here are {cores}"
    )
    fewer = [f"{how} ({counted(n, 'core')})" for how, n in needed.items() if n < needed[AS_IT_IS]]
    advice = f"training waits for views: {', '.join([*fewer, 'more cores for each GPU'])}, or a larger student"
    return _row("loader", value, cores >= needed[AS_IT_IS], advice)


def _combinations(config: Config) -> list[Check]:
    return combination_rows(gather(config, _loader_threads(config).workers))


def combination_rows(facts: Facts) -> list[Check]:
    """A row for each known bad combination that is here, or one that says that none is."""
    rows = [Check(c.name, found, c.state, f"{c.harm}; {c.remedy}") for c in COMBINATIONS if (found := c.found(facts))]
    return rows or [Check("bad combinations", f"none of the {len(COMBINATIONS)} that are known")]


PROBES: dict[str, Callable[[Config], Iterable[Check]]] = {
    "versions": _versions,
    "bad combinations": _combinations,
    "JPEG decoder": _decoder,
    "crc32c": _checksum,
    "processes": _processes,
    "images": _images,
    "storage": _storage,
    "torch": _devices,
    "threads": _threads,
    "loader": _loader,
}
