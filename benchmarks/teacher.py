"""Does stage 1 run at the teacher's own speed? cache-teacher beside bare forwards of the same network on ready batches.

    python -m benchmarks.teacher [--rounds R] [--models mobilenetv2_100,regnety_160] [--images N] [--device cpu]

ImageNet sample at 224 pixels with DeiT's full recipe and mixing, three views of an image in a pass. MobileNetV2 with its
weights and 12 views, RegNetY-16GF with random ones, which cost the same, and 3. The bare side is timm's network on one batch
that lies ready, in inference mode, pooled logits only: contiguous and channels_last, float32 and bf16, the fastest of the
four. Stage 1 is the real `cache_teacher`, from the first images that reach it to the last commit (decoding, augmenting,
digests, mixing, dense logits, envelope, files); start-up and the clean check are not counted, and the first chunk of 16 in a
pass (of 6 with RegNetY) was decoded in it. It runs with three settings:

    float32  teacher.precision: float32                        over the fastest bare float32
    bf16     teacher.precision: bf16                        over the fastest bare bf16
    fastest  teacher.precision: auto, teacher.fold: true    over the fastest bare one of all: `ratio_*`

Each round runs every side once, in turns. A ratio is that of medians. About 6 minutes on 2 cores.
Needs $CSKD_DATA (else `shared` beside the checkout). Prints the machine, a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from cskd.config import Config, from_dict
from cskd.errors import CskdError
from cskd.machine.devices import pick_device
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.pack import pack_data
from cskd.teacher.build import build_model

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bf16": {"precision": "bf16"},
    "fastest": {"precision": "auto", "fold": True},
}
MODELS: dict[str, dict[str, Any]] = {
    "mobilenetv2_100": {"kwargs": {"pad_type": "same"}, "batch": 32, "images": 500, "views": 12, "bare": 5},
    "regnety_160": {"kwargs": {}, "batch": 16, "images": 96, "views": 3, "bare": 2},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--images", type=int, default=0, help="at most so many; 0: 500 and 96")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    shared = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared"))
    if not (shared / "data" / "imagenet-sample.tar").is_file():
        print(
            f"benchmarks/teacher.py: no {shared}/data/imagenet-sample.tar; set CSKD_DATA to its folder", file=sys.stderr
        )
        return 1
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, timm {timm.__version__}, Python {platform.python_version()}")
    result: dict[str, Any] = {"benchmark": "teacher", "rounds": options.rounds}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in options.models.split(","):
                result |= measure(name, shared, Path(folder), options.rounds, options.images, options.device)
    except CskdError as e:
        print(f"benchmarks/teacher.py: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


def measure(name: str, shared: Path, folder: Path, rounds: int, most: int, device: str) -> dict[str, Any]:
    """Images a second of every side, and the ratios, under names that end in the model's."""
    facts = MODELS[name]
    images = min(facts["images"], most or facts["images"])
    data, weights = folder / f"data {images}", folder / f"{name}.safetensors"
    if not data.exists():
        pack_data(shared / "data" / "imagenet-sample.tar", data, limit=images, quiet=True)
    if name == "mobilenetv2_100":
        weights = shared / "teachers" / "imagenet_mobilenetv2_100.safetensors"
    else:
        torch.manual_seed(0)
        safetensors.torch.save_file(build_model(name, facts["kwargs"]).state_dict(), str(weights))
    rates: defaultdict[str, list[float]] = defaultdict(list)
    said: dict[str, str] = {}
    bare = Bare(name, facts, weights, device)
    for turn in range(rounds):
        for side, rate in bare.rates(facts["bare"]).items():
            rates[side].append(rate)
        for setting, changes in list(SETTINGS.items())[:: 1 if turn % 2 else -1]:
            cache = folder / f"{name} {setting} {len(rates[setting])}"
            report = cache_teacher(config(name, facts, weights, data, cache, device, changes), quiet=True)
            rates[setting].append(report.images / report.loop_seconds)
            said[setting] = report.bound_by
    middle = {side: statistics.median(found) for side, found in rates.items()}
    print(f"\n{name}, batches of {facts['batch']}, {images} images in {facts['views']} views: images a second")
    for side, rate in middle.items():
        every = " ".join(f"{r:.1f}" for r in rates[side])
        print(f"  {side:<28}{rate:>8.1f}   ({every})" + (f"\n      {said[side]}" if side in said else ""))
    of = {
        kind: max(r for side, r in middle.items() if side.startswith(f"bare {kind}"))
        for kind in ("float32", "bf16", "")
    }
    ratios = {
        f"ratio_{name}": middle["fastest"] / of[""],
        f"ratio_float32_{name}": middle["float32"] / of["float32"],
        f"ratio_bf16_{name}": middle["bf16"] / of["bf16"],
    }
    print("  " + ", ".join(f"{key} {value:.3f}" for key, value in ratios.items()), flush=True)
    return {**ratios, f"images_per_second_{name}": {side: round(rate, 1) for side, rate in middle.items()}}


class Bare:
    """timm's network on batches that lie ready."""

    def __init__(self, name: str, facts: dict[str, Any], weights: Path, device: str) -> None:
        self.device, self.batch = pick_device(device), facts["batch"]
        model: Any = build_model(name, facts["kwargs"])
        state = {
            k: v.float() if v.is_floating_point() else v for k, v in safetensors.torch.load_file(str(weights)).items()
        }
        model.load_state_dict(state)
        model.eval().requires_grad_(False)
        x = torch.randn(self.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        self.model, self.x, self.formats = model.to(self.device), x.to(self.device), formats

    def rates(self, repeats: int) -> dict[str, float]:
        """Images a second of the four ways; one forward of each before the clock starts."""
        found = {}
        for layout, memory_format in self.formats.items():
            model, x = self.model.to(memory_format=memory_format), self.x.contiguous(memory_format=memory_format)
            for kind in ("float32", "bf16"):
                half = torch.autocast(self.device.type, torch.bfloat16, enabled=kind == "bf16")
                with torch.inference_mode(), half:
                    seconds = [self._forward(model, x) for _ in range(1 + repeats)][1:]
                found[f"bare {kind} {layout}"] = self.batch / statistics.median(seconds)
        return found

    def _forward(self, model: torch.nn.Module, x: torch.Tensor) -> float:
        clock = time.perf_counter()
        model(x)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - clock


def config(
    name: str, facts: dict[str, Any], weights: Path, data: Path, cache: Path, device: str, changes: dict[str, Any]
) -> Config:
    """As configs/imagenet_sample.yaml, with DeiT's full recipe; the clean check is short and lets random weights pass."""
    teacher = {"model": name, "kwargs": facts["kwargs"], "weights": str(weights), "batch": facts["batch"]}
    own = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]} if name == "mobilenetv2_100" else {}
    return from_dict(
        {
            "data": {"train": str(data)},
            "teacher": {**teacher, **own, "input_size": 224, "check_images": 8, "min_top1": 0.0, **changes},
            "recipe": {"size": 224, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25},
            "cache": {"path": str(cache), "views": facts["views"], "device": device},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
