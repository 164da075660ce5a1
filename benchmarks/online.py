"""Does a student of the cache equal one whose teacher runs beside it? On real images, to the last bit of its weights.

    python -m benchmarks.online [--quick]

1. CIFAR-10, a ResNet-56 teacher in float64, DeiT's full recipe with mixing, repeats 3, several epochs: for each method and
   decay, a small ViT trained from the cache and one trained with `--online`; their weights are hashed.
2. ImageNet sample, MobileNetV2 in float32, the full recipe: the teacher is run again in other batches than stage 1's, and
   each hard target that differs is counted, with its margin.

Needs $CSKD_DATA (else `shared` beside the checkout) with data/ and teachers/. About 12 minutes on 2 cores; `--quick` 2.
Prints one JSON line last. Exits 1 when two students differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cskd.config import Config, from_dict
from cskd.errors import CskdError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.recompute import recompute
from cskd.pipeline.pack import pack_data
from cskd.pipeline.train import train
from cskd.store.cache import open_cache

ROOT = Path(__file__).resolve().parent.parent
DEIT = {"randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
RUNS = (
    ("cskd-hard", "linear"),
    ("cskd-hard", "quadratic"),
    ("cskd-hard", "cosine"),
    ("deit-hard", "linear"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images and epochs")
    quick = parser.parse_args(arguments).quick
    data = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared"))
    missing = [
        p for p in ("data/cifar10-train.tar.gz", "data/imagenet-sample.tar", "teachers") if not (data / p).exists()
    ]
    if missing:
        print(f"benchmarks/online.py: no {data / missing[0]}; set CSKD_DATA to the folder with it", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            pairs = students(data, Path(folder), images=120 if quick else 600, epochs=4 if quick else 6)
            again = float32(data, Path(folder), images=40 if quick else 500, views=40 if quick else 1500)
    except CskdError as e:
        print(f"benchmarks/online.py: {e}", file=sys.stderr)
        return 1
    different = [pair for pair in pairs if pair["cached"] != pair["online"]]
    result = {"benchmark": "online", "pairs": len(pairs), "different": len(different), "students": pairs}
    print(json.dumps(result | {"float32": again, "torch": torch.__version__}))
    return int(bool(different))


def students(data: Path, folder: Path, images: int, epochs: int) -> list[dict[str, Any]]:
    """Hashes of the weights of every pair of students."""
    pack_data(
        data / "data" / "cifar10-train.tar.gz", folder / "cifar", limit=images, block=200, shard_size=100, quiet=True
    )
    cache_teacher(config(data, folder, "cifar", "cskd-hard", "linear", epochs), quiet=True)
    found = []
    print(
        f"{'method':<12}{'decay':<12}{'steps':>6}{'cached s':>10}{'online s':>10}  sha256 of the weights, cached and online"
    )
    for method, decay in RUNS:
        pair: dict[str, Any] = {"method": method, "decay": decay}
        for kind in ("cached", "online"):
            clock = time.perf_counter()
            report = train(config(data, folder, kind, method, decay, epochs), online=kind == "online", quiet=True)
            pair[kind] = hashlib.sha256((Path(report.output) / "model.safetensors").read_bytes()).hexdigest()
            pair |= {f"{kind}_seconds": time.perf_counter() - clock, f"{kind}_teacher_images": report.teacher_forwards}
            pair["steps"] = report.steps
        print(
            f"{method:<12}{decay:<12}{pair['steps']:>6}{pair['cached_seconds']:>10.1f}{pair['online_seconds']:>10.1f}"
            f"  {pair['cached'][:16]} {pair['online'][:16]}",
            flush=True,
        )
        found.append(pair)
    return found


def config(data: Path, folder: Path, name: str, method: str, decay: str, epochs: int) -> Config:
    """CIFAR-10 at 32 pixels; teacher and student meet on 8x8 cells."""
    return from_dict(
        {
            "data": {"train": str(folder / "cifar")},
            "teacher": {
                "model": f"{data / 'teachers' / 'cifar_resnet.py'}:build",
                "weights": str(data / "teachers" / "cifar10_resnet56.safetensors"),
                "mean": [0.4914, 0.4822, 0.4465],
                "std": [0.2023, 0.1994, 0.2010],
                "precision": "float64",
            },
            "recipe": {"size": 32, "crop": "padded", **DEIT},
            "cache": {"path": str(folder / "cache"), "views": 6, "device": "cpu"},
            "student": {
                "model": "deit_tiny_distilled_patch16_224",
                "kwargs": {"patch_size": 4, "depth": 4},
                "drop_path": 0.1,
            },
            "loss": {"method": method, "decay": decay},
            "train": {
                "output": str(folder / f"{name} {method} {decay}"),
                "epochs": epochs,
                "global_batch": 48,
                "repeats": 3,
                "warmup_epochs": 1,
                "device": "cpu",
            },
        }
    )


def float32(data: Path, folder: Path, images: int, views: int) -> dict[str, Any]:
    """The teacher run again on `views` views of a float32 cache."""
    pack_data(data / "data" / "imagenet-sample.tar", folder / "imagenet", limit=images, quiet=True)
    settings = {
        "data": {"train": str(folder / "imagenet")},
        "teacher": {
            "model": "mobilenetv2_100",
            "kwargs": {"pad_type": "same"},
            "weights": str(data / "teachers" / "imagenet_mobilenetv2_100.safetensors"),
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "batch": 32,
        },
        "recipe": {"size": 224, **DEIT},
        "cache": {"path": str(folder / "imagenet cache"), "views": 3, "device": "cpu"},
    }
    cache_teacher(from_dict(settings), quiet=True)
    again = recompute(open_cache(folder / "imagenet cache"), views, "cpu", quiet=True)
    print(
        f"float32 again: {again.differing} of {again.lookups} hard targets differ, margin {again.largest_margin:.2g} at most"
    )
    return asdict(again)


if __name__ == "__main__":
    sys.exit(main())
