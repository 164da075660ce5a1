"""Images a second of cskd's stage-2 loader and of timm's, and what the parts of one view cost.

    python -m benchmarks.loader [--rounds R] [--batches N] [--batch B] [--workers W] [--only NAME ...]

ImageNet sample ($CSKD_DATA, else `shared` beside the checkout) at 224 pixels. Each side runs in a process of its own with as
many workers as the other (`benchmarks.loader_sides`), rounds of the two take turns, so that a busy machine slows both, and
the ratio is the median over rounds. Both end with a float32 batch, mixed and normalised, on the device (CPU, one thread in the
main process). cskd replays a cache that it makes first: digests of all views are checked, hard targets of 7x7 cells read.
timm's `create_loader` decodes and augments with Pillow and torchvision as it does; of its two modes (use_prefetcher), with
freed memory kept or not (stage 2 keeps it), the fastest of a short trial counts, from a folder or, where that is faster,
from a tar. Recipe of
both: rand-m9-mstd0.5-inc1, erasing 0.25, mixup 0.8, cutmix 1.0; `crop_flip`: crop and flip only.

    one_view    the original images on both sides
    repeats3    the same with three views of an image a batch (timm decodes an image for every view, whatever its sampler)
    short256    cskd's shards packed with --short-side 256, timm the originals
    equal256    both read the small images
    crop_flip   the mild recipe, the original images

Then, in one process and one thread: reading and decoding a view, augmenting it, and the digest it is checked by. Prints the
machine, a table, and one JSON line last: `ratio_NAME`, images a second, `cpu_us` of processor time an image, all processes
together (which a busy machine changes less), memory in MB (`pss` of main and workers at the end of a round), and
`decode_us`, `augment_us`, `digest_us` a view with `digest_share` of the three together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from numpy.typing import NDArray

from benchmarks.loader_sides import Side
from benchmarks.tiny_teacher import TINY_TEACHER
from cskd.config import RecipeConfig, from_dict
from cskd.dataset.inventory import Sample, open_inventory, write_inventory
from cskd.errors import CskdError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.pack import pack_data
from cskd.seeds import view_seeds
from cskd.views.digest import Recorded, check_view, pixel_crc, view_digest
from cskd.views.maker import ViewMaker
from cskd.views.mixing import NONE, mixing, quads

ROOT = Path(__file__).resolve().parent.parent
DEIT: dict[str, Any] = {"randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
MILD: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0}
VIEWS = 3  # of a cache: as many as the repeats
COPIES = 10
COMPARISONS: dict[str, tuple[dict[str, Any], str, str, int]] = {  # name: recipe, cskd's images, timm's images, repeats
    "one_view": (DEIT, "full", "full", 1),
    "repeats3": (DEIT, "full", "full", 3),
    "short256": (DEIT, "short", "full", 1),
    "equal256": (DEIT, "short", "short", 1),
    "crop_flip": (MILD, "full", "full", 1),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=16, help="of each side in a round")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of each side; default: all cores")
    parser.add_argument("--only", nargs="*", choices=[*COMPARISONS, "parts"], default=[*COMPARISONS, "parts"])
    options = parser.parse_args(arguments)
    source = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared")) / "data" / "imagenet-sample.tar"
    if not source.is_file():
        print(f"benchmarks/loader.py: no {source}; set CSKD_DATA to the folder with data/ in it", file=sys.stderr)
        return 1
    versions = {"python": platform.python_version(), "pillow": PIL.__version__}
    versions |= {m.__name__: m.__version__ for m in (torch, torchvision, timm, np)}
    print(f"{platform.machine()}, {os.cpu_count()} cores, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    result: dict[str, Any] = {"benchmark": "loader", "workers": options.workers, "batch": options.batch}
    try:
        with tempfile.TemporaryDirectory() as folder:
            images = Images(Path(folder), source)
            print(
                f"\n{'':<12}{'cskd images/s':>14}{'timm images/s':>14}{'ratio':>7}{'us an image':>14}{'MB':>12}  timm's way"
            )
            for name in (n for n in COMPARISONS if n in options.only):
                result |= compare(name, images, options)
            if "parts" in options.only:
                result |= parts(images.data("full"), views=100, rounds=11)
    except CskdError as e:
        print(f"benchmarks/loader.py: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result | {"rounds": options.rounds, "versions": versions}))
    return 0


class Images:
    """The same images for both sides: shards and caches for cskd, folders and tars for timm; made when asked for."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        self.ways: dict[tuple[str, str], tuple[Side, dict[str, float]]] = {}  # timm's best, by images and recipe

    def data(self, kind: str) -> Path:
        """Packed shards: 'full', the original files; 'short', re-encoded with a short side of 256.

        Each image stands `COPIES` times in the inventory under as many keys, and once in the shard, so that an epoch is
        long enough for its table to weigh what it does with a large data set.
        """
        out, packed = self.folder / f"{kind}-data", self.folder / f"{kind}-packed"
        if not out.exists():
            pack_data(self.source, packed, short_side=256 if kind == "short" else None, quiet=True)
            once = open_inventory(packed)
            out.mkdir()
            for shard in once.shards:
                os.link(packed / shard.name, out / shard.name)
            columns = (once.label, once.crc32c, once.shard, once.offset, once.size)
            rows = [tuple(int(column[i]) for column in columns) for i in range(len(once))]
            samples = (Sample(f"{copy}-{once.key(i)}", *row) for copy in range(COPIES) for i, row in enumerate(rows))
            write_inventory(out, samples, classes=once.classes, shards=once.shards)
        return out

    def cache(self, kind: str, recipe: dict[str, Any]) -> Path:
        """A cache of `VIEWS` views, by a teacher that costs next to nothing."""
        out = self.folder / f"{kind}-{'mild' if recipe is MILD else 'deit'}-cache"
        if not out.exists():
            data = self.data(kind)
            kwargs = {"classes": len(open_inventory(data).classes), "channels": 4, "patch": 32}
            teacher = {"model": TINY_TEACHER, "kwargs": kwargs, "grid": [7, 7]}
            config: dict[str, dict[str, Any]] = {
                "data": {"train": str(data)},
                "teacher": {**teacher, "input_size": 224, "min_top1": 0.0, "check_images": 8},
                "recipe": recipe,
                "cache": {"path": str(out), "views": VIEWS, "workers": 2, "device": "cpu"},
            }
            cache_teacher(from_dict(config), quiet=True)
        return out

    def files(self, kind: str, packed: bool) -> Path:
        """What timm reads: a folder of class folders, or one tar of it."""
        folder, tar = self.folder / f"{kind}-files", self.folder / f"{kind}-files.tar"
        if not folder.exists():
            self.data(kind)
            inventory = open_inventory(self.folder / f"{kind}-packed")
            maker = ViewMaker(inventory, RecipeConfig())
            for i in range(len(inventory)):
                path = folder / inventory.classes[int(inventory.label[i])] / f"{i:06d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(maker.encoded(i))
            with tarfile.open(tar, "w") as out:
                out.add(folder, arcname=".")
        return tar if packed else folder


class Running:
    """A side in its process."""

    def __init__(self, side: Side, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.loader_sides", side.dump(), str(folder)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def round(self, batches: int) -> tuple[float, float]:
        """Images a second of one round, and microseconds of processor time an image."""
        answer = self._ask(f"round {batches}")
        return answer["images"] / answer["seconds"], 1e6 * answer["processor_seconds"] / answer["images"]

    def memory(self) -> dict[str, float]:
        return self._ask("memory")

    def _ask(self, line: str) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise CskdError("a side of the comparison ended early, expected an answer; see its error above")
        found: dict[str, float] = json.loads(answer)
        return found


def compare(name: str, images: Images, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one comparison, in turns."""
    recipe, ours, theirs, repeats = COMPARISONS[name]
    scratch = images.folder / "scratch" / name
    here = Side(str(images.cache(ours, recipe)), recipe, options.workers, options.batch, repeats)
    there, lean = fastest(images, theirs, replace(here, repeats=1), options.batches, scratch)
    speed: dict[str, list[float]] = {"cskd": [], "timm": []}
    used: dict[str, list[float]] = {"cskd": [], "timm": []}
    held: dict[str, list[dict[str, float]]] = {"cskd": [], "timm": []}
    with Running(here, scratch / "cskd") as cskd, Running(there, scratch / "timm") as timm_:
        for _ in range(options.rounds):
            for side, running in (("cskd", cskd), ("timm", timm_)):
                rate, us = running.round(options.batches)
                speed[side].append(rate)
                used[side].append(us)
                held[side].append(running.memory())
    ratio = statistics.median(a / b for a, b in zip(speed["cskd"], speed["timm"], strict=True))
    found: dict[str, Any] = {f"ratio_{name}": round(ratio, 3)}
    for side, rates in speed.items():
        found[f"{name}_{side}_images_s"] = round(statistics.median(rates), 1)
        found[f"{name}_{side}_cpu_us"] = round(statistics.median(used[side]))
        for key in ("pss", "rss", "main_peak"):
            found[f"{name}_{side}_{key}_mb"] = round(max(m[key] for m in held[side]))
    if there.keep:  # timm by itself does not: its size counts without, its speed with
        found |= {f"{name}_timm_{key}_mb": round(size) for key, size in lean.items()}
    way = f"{there.mode.removeprefix('timm ')}, {'tar' if there.source.endswith('.tar') else 'folder'}"
    way += ", memory kept" if there.keep else ""
    found[f"{name}_timm_way"] = way
    line = f"{name:<12}{found[f'{name}_cskd_images_s']:>14.0f}{found[f'{name}_timm_images_s']:>14.0f}{ratio:>7.2f}"
    work, size = (f"{found[f'{name}_cskd_{key}']} / {found[f'{name}_timm_{key}']}" for key in ("cpu_us", "pss_mb"))
    print(f"{line}{work:>14}{size:>12}  {way}", flush=True)
    return found


def fastest(images: Images, kind: str, like: Side, batches: int, scratch: Path) -> tuple[Side, dict[str, float]]:
    """timm's best way to load these images, and what it holds when it keeps no memory. Found once for all comparisons of a
    run with the same images and recipe."""
    key = kind, json.dumps(like.recipe)
    if key not in images.ways:
        folder, tar = (str(images.files(kind, packed)) for packed in (False, True))
        modes = itertools.product(("timm prefetcher", "timm plain"), (False, True))
        trials = [
            Trial.of(replace(like, source=folder, mode=mode, keep=keep), batches, scratch) for mode, keep in modes
        ]
        best = max(trials, key=lambda trial: trial.rate)
        other = Trial.of(replace(best.side, source=tar), batches, scratch)
        best = max(best, other, key=lambda trial: trial.rate)
        lean = best if not best.side.keep else Trial.of(replace(best.side, keep=False), batches, scratch)
        images.ways[key] = best.side, lean.memory
    return images.ways[key]


@dataclass(frozen=True)
class Trial:
    """A side, its images a second in the better of two short rounds, and its memory."""

    side: Side
    rate: float
    memory: dict[str, float]

    @classmethod
    def of(cls, side: Side, batches: int, scratch: Path) -> Trial:
        with Running(side, scratch / "trial") as running:
            return cls(side, max(running.round(max(2, batches // 2))[0] for _ in range(2)), running.memory())


def parts(data: Path, views: int, rounds: int) -> dict[str, float]:
    """Median microseconds a view of each part, in rounds that take turns."""
    recipe = RecipeConfig(**DEIT)
    inventory = open_inventory(data)
    maker = ViewMaker(inventory, recipe)
    views = min(views, len(inventory))
    block = int(inventory.blocks[1])
    seeds = view_seeds(recipe.seed, inventory.id, inventory.key_hash[:block], 0)
    m = mixing(seeds, quads(block, recipe, inventory.id, 0, 0), np.zeros(block, bool), recipe, 0)
    recorded = Recorded(np.zeros(len(inventory), bool), {})
    fields: dict[str, NDArray[Any]] = {"seed": seeds, "mode": m.mode, "lam": m.lam, "box": m.box}
    seconds: dict[str, list[float]] = {"decode": [], "augment": [], "digest": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(rounds):
        clock = time.perf_counter()
        images = [maker.image(i) for i in range(views)]
        seconds["decode"].append(time.perf_counter() - clock)
        clock = time.perf_counter()
        pixels = [maker.view(images[i], int(seeds[i])) for i in range(views)]
        seconds["augment"].append(time.perf_counter() - clock)
        rows: list[dict[str, Any]] = [{name: array[i] for name, array in fields.items()} for i in range(views)]
        for i, row in enumerate(rows):
            partner = int(inventory.key_hash[m.partner[i]]) if row["mode"] != NONE else 0
            row["digest"] = view_digest(pixel_crc(pixels[i]), int(row["mode"]), int(row["lam"]), row["box"], partner)
        clock = time.perf_counter()
        for i, row in enumerate(rows):
            check_view(inventory, recipe, recorded, i, 0, row, int(m.partner[i]), pixel_crc(pixels[i]))
        seconds["digest"].append(time.perf_counter() - clock)
    torch.set_num_threads(threads)
    found = {f"{name}_us": 1e6 * statistics.median(times) / views for name, times in seconds.items()}
    print("\n" + "".join(f"{name:<10}{found[f'{name}_us']:>8.1f} us a view\n" for name in seconds))
    return {**found, "digest_share": found["digest_us"] / sum(found.values()), "views": views}


if __name__ == "__main__":
    sys.exit(main())
