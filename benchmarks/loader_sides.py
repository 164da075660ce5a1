"""One side of `benchmarks.loader`, in a process of its own: batches of cskd's stage-2 loader, or of timm's.

    python -m benchmarks.loader_sides JSON

Reads commands from standard input, one a line, and answers each with one JSON line: `round` loads so many batches as the
training step gets them (float32, mixed, normalised, on the device, with labels and targets), `memory` says what the main
process and its workers hold. The workers and their queues live from round to round, as in training; the batches that lie
ready when a round begins are taken before its clock starts, and a round ends when new ones lie ready: no side works in the
other's round.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# A worker imports this file, too, as it does the `cskd` script: what only the main process needs is imported where it is used.

PREFETCH = 4  # batches a worker keeps ready, both sides
EPOCHS = 1_000_000  # more than any round reads


@dataclass(frozen=True)
class Side:
    """What a side loads. source: a cache for cskd; a folder of class folders, or a tar of one, for timm."""

    source: str
    recipe: dict[str, Any]
    workers: int
    batch: int
    repeats: int = 1
    mode: str = "cskd"  # or 'timm prefetcher', 'timm plain'
    keep: bool = False  # timm: keep freed memory, as stage 2 does on a CPU: faster, and larger

    def dump(self) -> str:
        return json.dumps(asdict(self))


def cskd_batches(side: Side, scratch: Path) -> Iterator[torch.Tensor]:
    """Inputs of stage 2, replayed from a cache, every view checked against its digest."""
    from cskd.config import LossConfig, TrainConfig
    from cskd.loading.plan import PlanSpec
    from cskd.loading.stage2 import BatchMaker
    from cskd.loading.stream import Stream
    from cskd.loading.targets import CachedTargets, mixed_labels
    from cskd.loading.tasks import RunTasks
    from cskd.machine.devices import pick_device
    from cskd.store.cache import open_cache
    from cskd.views.maker import ViewMaker
    from cskd.views.mix_pixels import InputMaker

    device = pick_device("cpu")
    cache = open_cache(Path(side.source))
    plan = PlanSpec.over(cache, TrainConfig(repeats=side.repeats, global_batch=side.batch))
    targets = CachedTargets(cache, LossConfig(method="cskd-hard"), epochs=300)
    maker = BatchMaker(ViewMaker(cache.inventory, cache.recipe), None, 1.0, cache.recorded())
    inputs = InputMaker(cache.recipe.mean, cache.recipe.std, device)
    with RunTasks(cache, plan, targets.spec, lambda _: [], scratch, 0, EPOCHS * plan.steps) as tasks:
        for step, batch in enumerate(Stream(maker, tasks, side.workers, PREFETCH)):
            labels, taught = mixed_labels(batch, device), targets.of(batch, step // plan.steps, device)
            assert len(labels.label) == side.batch and taught is not None
            yield inputs.mixed(batch)
            if (step + 1) % plan.steps == 0:
                tasks.retire(step // plan.steps)


def timm_batches(side: Side) -> Iterator[torch.Tensor]:
    """Inputs of timm's training loader with the same recipe."""
    import timm.data
    import torch

    from cskd.config import RecipeConfig
    from cskd.machine.devices import keep_freed_memory

    device = torch.device("cpu")
    if side.keep:
        keep_freed_memory()
    mend_posterize()
    recipe = RecipeConfig(**side.recipe)

    class Long(timm.data.ImageDataset):
        """The images over and over: no pause between epochs, which are long with ImageNet."""

        def __len__(self) -> int:
            once: int = super().__len__()
            return 1000 * once

        def __getitem__(self, i: int) -> Any:
            return super().__getitem__(i % super().__len__())

    prefetcher, mixes = side.mode == "timm prefetcher", recipe.mixup > 0 or recipe.cutmix > 0
    settings = {"mixup_alpha": recipe.mixup, "cutmix_alpha": recipe.cutmix, "num_classes": 1000}
    collate = timm.data.FastCollateMixup(**settings) if mixes and prefetcher else None
    mix = timm.data.Mixup(**settings) if mixes and not prefetcher else None
    loader = timm.data.create_loader(
        Long(side.source),
        recipe.size,
        side.batch,
        is_training=True,
        re_prob=recipe.erase,
        re_mode="pixel",
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.randaugment,
        interpolation="bicubic",
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
        num_workers=side.workers,
        collate_fn=collate,
        device=device,
        use_prefetcher=prefetcher,
    )
    (loader.loader if prefetcher else loader).prefetch_factor = PREFETCH
    while True:
        for pixels, target in loader:
            yield mix(pixels, target)[0] if mix else pixels


def mend_posterize() -> None:
    """timm's fails with Pillow 13 where RandAugment draws 0 bits: let it return black there, as Pillow did before."""
    import timm.data.auto_augment as auto_augment
    from PIL import Image

    whole = auto_augment.posterize

    def black(image: Any, bits: int, **_: object) -> Any:
        return whole(image, bits) if bits else Image.new(image.mode, image.size)

    auto_augment.NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeOriginal", "PosterizeIncreasing"), black)


def memory() -> dict[str, float]:
    """MB: `pss` of this process and all below it (shared pages counted once), `rss` summed, `main_peak` of this one."""
    held = [proc_fields(Path(f"/proc/{pid}/smaps_rollup")) for pid in family()]
    found = {name.lower(): sum(fields.get(name, 0) for fields in held) / 1024 for name in ("Pss", "Rss")}
    return found | {"main_peak": proc_fields(Path("/proc/self/status"))["VmHWM"] / 1024}


def processor_seconds() -> float:
    """Seconds of all cores that this process and all below it have used: what a busy machine changes little."""
    ticks = 0
    for pid in family():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def settle() -> None:
    """Wait until the workers have filled their queues: else they would do so in the other side's round."""
    still, before = 0, processor_seconds()
    limit = time.perf_counter() + 10
    while still < 5 and time.perf_counter() < limit:
        time.sleep(0.05)
        now = processor_seconds()
        still, before = (still + 1 if now == before else 0), now


def family() -> list[int]:
    """This process and all below it: workers, and the server that forks them."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [os.getpid()]
    for pid in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def proc_fields(path: Path) -> dict[str, int]:
    """`Name:   123 kB` lines of a file of /proc."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) == 3 and line[2] == "kB"}


def main() -> None:
    import torch

    torch.set_num_threads(1)  # the workers have the cores
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata in ImageNet
    side = Side(**json.loads(sys.argv[1]))
    batches = cskd_batches(side, Path(sys.argv[2])) if side.mode == "cskd" else timm_batches(side)
    next(batches)
    for line in sys.stdin:
        if line.strip() == "memory":
            answer = memory()
        else:
            for _ in range((PREFETCH + 1) * side.workers):
                next(batches)
            count, used, clock = int(line.split()[1]), processor_seconds(), time.perf_counter()
            for _ in range(count):
                pixels = next(batches)
            answer = {"seconds": time.perf_counter() - clock, "images": count * side.batch}
            answer["processor_seconds"] = processor_seconds() - used
            settle()
            assert pixels.shape[0] == side.batch and pixels.shape[1] == 3 and pixels.dtype == torch.float32
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
