"""Where the time goes: the parts of a view, of a teacher's batch and of a training step, in us of processor time.

    python -m benchmarks.hotspots [view] [batch] [step]

    view    one view of DeiT's full recipe from the original images and from copies with short side 256, as JPEG and raw:
            reading, decoding, each operation (as often as it is drawn), digest
    batch   one view in a lane of stage 1, MobileNetV2: mixing, preparing, network, classifier, envelope; float32, and the
            fastest setting (bf16, folded)
    step    torch's profile of a training step of DeiT-Ti on 16 images, forward, loss, backward and AdamW, in float32 and bf16

One thread and medians of several rounds, the first ones not counted; for `step` all cores and one step, the third. Needs
$CSKD_DATA (else `shared` beside the checkout). About 2 minutes on 2 cores. Prints tables, and one JSON line last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.loader import DEIT
from benchmarks.teacher import MODELS
from benchmarks.teacher import config as teacher_config
from cskd.codecs import get_codec
from cskd.config import LossConfig, RecipeConfig, StudentConfig, TrainConfig
from cskd.dataset.images import decode
from cskd.dataset.inventory import open_inventory
from cskd.errors import CskdError
from cskd.machine.arithmetic import autocast, computing_in
from cskd.machine.devices import pick_device
from cskd.method.losses import DistillationLoss, HardTargets, MixedLabels
from cskd.pipeline.pack import pack_data
from cskd.seeds import view_seeds
from cskd.student import build_student
from cskd.student.optim import Optimisation
from cskd.teacher.lanes import threads_of_a_lane
from cskd.teacher.model import load_teacher
from cskd.views import ops
from cskd.views.digest import pixel_crc
from cskd.views.erasing import erase
from cskd.views.maker import ViewMaker
from cskd.views.mix_pixels import mix_pixels
from cskd.views.recipe import sample_params

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
WARM = 2  # rounds that are not counted


def main(arguments: list[str] | None = None) -> int:
    parts: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"view": views, "batch": batches, "step": steps}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="default: all")
    options = parser.parse_args(arguments)
    for name in set(options.parts) - parts.keys():
        parser.error(f"no part {name!r}, expected some of {', '.join(parts)}")
    shared = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared"))
    source = shared / "data" / "imagenet-sample.tar"
    if not source.is_file():
        print(f"benchmarks/hotspots.py: no {source}; set CSKD_DATA to the folder with data/ in it", file=sys.stderr)
        return 1
    pick_device("cpu")  # which keeps freed memory, as both stages do
    result: dict[str, Any] = {"benchmark": "hotspots"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, side in (("full", None), ("short", 256), ("raw", 256)):
                pack_data(source, Path(folder) / name, short_side=side, raw=name == "raw", quiet=True)
            for name in options.parts or parts:
                result[name] = parts[name](Path(folder), shared)
    except CskdError as e:
        print(f"benchmarks/hotspots.py: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


class Clock:
    """Microseconds of processor time by part, of the calling thread, in rounds."""

    def __init__(self) -> None:
        self._rounds: list[defaultdict[str, float]] = []

    def begin(self) -> None:
        self._rounds.append(defaultdict(float))

    def __call__(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.thread_time()
        result = function(*arguments)
        self._rounds[-1][part] += 1e6 * (time.thread_time() - begun)
        return result

    def medians(self, items: int) -> dict[str, float]:
        """us an item of each part, largest first."""
        counted = self._rounds[WARM:]
        found = {part: statistics.median(r[part] for r in counted) / items for part in counted[0]}
        return {part: round(us, 1) for part, us in sorted(found.items(), key=lambda pair: -pair[1])}


def views(folder: Path, shared: Path) -> dict[str, Any]:
    """us a view of each part, averaged over 500 images."""
    recipe, found = RecipeConfig(**DEIT), {}
    torch.set_num_threads(1)
    for name in ("full", "short", "raw"):
        inventory = open_inventory(folder / name)
        maker, clock = ViewMaker(inventory, recipe), Clock()
        seeds = view_seeds(recipe.seed, inventory.id, inventory.key_hash, 0).tolist()
        for _ in range(WARM + 5):
            clock.begin()
            for i, seed in enumerate(seeds):
                _view(clock, maker, i, seed)
        found[name] = _table(f"a view, {name} images", clock.medians(len(seeds)))
    return found


def _view(clock: Clock, maker: ViewMaker, sample: int, seed: int) -> None:
    """As `ViewMaker.image` and `ops.apply`, part by part."""
    image = clock("decode", decode, clock("read", maker.encoded, sample))
    params = clock("draw", sample_params, seed, *image.shape[:2], maker.recipe)
    out = clock("crop", ops.resized_crop, image, params.crop, params.size)
    if params.flip:
        out = clock("flip", lambda image: torch.from_numpy(image).flip(1).numpy(), out)
    fill = ops.fill_colour(params.mean)
    for op in params.ops:
        out = clock(op.name, ops.apply_op, out, op, fill)
    for erasure in params.erasures:
        clock("erase", erase, out, erasure, params.mean, params.std)
    clock("digest", pixel_crc, out)


def batches(folder: Path, shared: Path) -> dict[str, Any]:
    """us a view of each part of a lane's work."""
    facts = MODELS["mobilenetv2_100"]
    weights = shared / "teachers" / "imagenet_mobilenetv2_100.safetensors"
    classes, n, found = open_inventory(folder / "full").classes, facts["batch"], {}
    mode = torch.tensor([0, 1, 1, 2] * (n // 4), dtype=torch.uint8)
    mixing = torch.arange(n) ^ 1, mode, torch.full((n,), 20000), torch.tensor([[10, 100, 20, 120]] * n)
    pixels = torch.randint(0, 256, (n, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, changes in (("float32", {}), ("fastest", {"precision": "auto", "fold": True})):
        config = teacher_config("mobilenetv2_100", facts, weights, folder / "full", folder / "none", "cpu", changes)
        teacher = load_teacher(config.teacher, classes, CPU, 224)
        codec, clock = get_codec("envelope", teacher.classes, teacher.grid), Clock()
        backbone = computing_in(teacher.precision, CPU)(teacher.backbone)
        with threads_of_a_lane(CPU, reentrant=True), torch.no_grad():
            for _ in range(WARM + 9):
                clock.begin()
                x = clock("prepare", teacher.prepare, clock("mix", mix_pixels, pixels, *mixing))
                features = clock("network", backbone, x)
                dense, image = clock("classifier", teacher.head.dense, features.float())
                clock("envelope", codec.encode, dense, image)
        found[name] = _table(f"a view in a lane, {name}", clock.medians(n))
    return found


def steps(folder: Path, shared: Path) -> dict[str, Any]:
    """us a step of torch's operations that take most."""
    torch.set_num_threads(os.cpu_count() or 1)
    x, labels, found = torch.randn(16, 3, 224, 224), torch.arange(16), {}
    taught = MixedLabels(labels, labels, torch.ones(16)), HardTargets(labels, torch.zeros(16, 7, 7, dtype=torch.int64))
    for name, setting in (("float32", "none"), ("bf16", "bf16")):
        torch.manual_seed(0)
        student = build_student(StudentConfig("deit_tiny_distilled_patch16_224"), 1000, 224).train()
        if setting == "bf16":
            student.unfuse_attention()
        optimisation, loss = Optimisation(student, TrainConfig(), 100), DistillationLoss(LossConfig())
        with contextlib.ExitStack() as stack:
            for turn in range(WARM + 1):
                profiled = stack.enter_context(profile()) if turn == WARM else None
                with autocast(setting, CPU):
                    output = student(x, (7, 7))
                optimisation.update(loss(output, *taught)[0], turn)
        assert profiled is not None
        events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
        us = {e.key.removeprefix("aten::"): round(e.self_cpu_time_total) for e in events}
        found[name] = _table(f"a training step, {name}", {**dict(list(us.items())[:8]), "all": sum(us.values())})
    return found


def _table(title: str, us: dict[str, float]) -> dict[str, float]:
    print(f"\n{title}: us\n" + "\n".join(f"  {part:<60}{value:>10,.0f}" for part, value in us.items()), flush=True)
    return us


if __name__ == "__main__":
    sys.exit(main())
