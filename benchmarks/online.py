"""Does a student of the cache equal one whose teacher runs beside it? On real images, to the last bit of its weights.

    python -m benchmarks.online [--quick] [--only students two_caches soft float32]

1. `students`: CIFAR-10, a ResNet-56 teacher in float64, DeiT's full recipe with mixing, repeats 3, several epochs: for each method and
   decay, a small ViT trained from the cache and one trained with `--online`; their weights are hashed.
2. `two_caches`: the same with two teachers, each with a cache of its own: hard terms of both; the students' weights are hashed.
3. `soft`: the same with soft terms and terms of features, from each codec that holds logits: for the same student at every step, each
   hard target and the value of each hard term must be equal, and the largest error of what is decoded is given as a share of
   the one that the codec states.
4. `float32`: ImageNet sample, MobileNetV2 in float32, the full recipe: the teacher is run again in other batches than stage 1's, and
   each hard target that differs is counted, with its margin.

Needs $CSKD_DATA (else `shared` beside the checkout) with data/ and teachers/. The steps of a student are 16, and 2 with
`--quick`.
Prints one JSON line last. Exits 1 when two students differ, a hard term does, or an error is beyond the stated one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.online_terms import Compared, compare
from cskd.config import Config, from_dict
from cskd.errors import CskdError
from cskd.pipeline.cache_teacher import cache_teacher
from cskd.pipeline.care.recompute import recompute
from cskd.pipeline.pack import pack_data
from cskd.pipeline.train import train
from cskd.store.cache import open_cache

PARTS = ("students", "two_caches", "soft", "float32")
ROOT = Path(__file__).resolve().parent.parent
DEIT = {"randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
RUNS = (
    ("cskd-hard", "linear"),
    ("cskd-hard", "quadratic"),
    ("cskd-hard", "cosine"),
    ("deit-hard", "linear"),
)
TWO: list[dict[str, Any]] = [
    {"head": "class", "target": "label", "weight": 0.5, "smoothing": 0.1},
    {"head": "distillation", "target": "global", "weight": 0.5},
    {"head": "patches", "target": "cells", "cache": "second"},
]
HARD: list[dict[str, Any]] = [*TWO[:2], {"head": "patches", "target": "cells"}]
OF_IMAGE: list[dict[str, Any]] = [{"head": "class", "target": "global", "kind": "kl", "tau": 2.0}]
OF_CELLS: list[dict[str, Any]] = [*OF_IMAGE, {"head": "patches", "target": "cells", "kind": "kl"}]
OF_FEATURES: list[dict[str, Any]] = [
    *OF_CELLS,
    {"head": "tokens", "target": "features", "kind": "mse"},
    {"head": "tokens", "target": "pooled", "kind": "smooth_l1", "projection": "orthogonal", "standardise": True},
]
# codec as a config and as a cache names it, levels between the smallest and the largest number (0: no bound is stated), its terms
SOFT = (
    ("features:8", "features8", 255, OF_FEATURES),
    ("features:pca48", "featurespca48", 0, OF_FEATURES),
    ("int8", "int8", 255, OF_CELLS),
    ("topk:5", "topk5", 0, OF_CELLS),
    ("global:8", "global8", 255, OF_IMAGE),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images and epochs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these of the four")
    options = parser.parse_args(arguments)
    quick, parts = options.quick, options.only
    data = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared"))
    missing = [
        p for p in ("data/cifar10-train.tar.gz", "data/imagenet-sample.tar", "teachers") if not (data / p).exists()
    ]
    if missing:
        print(f"benchmarks/online.py: no {data / missing[0]}; set CSKD_DATA to the folder with it", file=sys.stderr)
        return 1
    pairs, soft = list[dict[str, Any]](), dict[str, Compared]()
    result: dict[str, Any] = {"benchmark": "online"}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if {*parts} - {"float32"}:
                source, images = data / "data" / "cifar10-train.tar.gz", 60 if quick else 192
                pack_data(source, folder / "cifar", limit=images, block=64, shard_size=32, quiet=True)
            if "students" in parts:
                pairs += students(data, folder, epochs=2 if quick else 4)
            if "two_caches" in parts:
                pairs.append(two_caches(data, folder, epochs=2 if quick else 4))
            if "soft" in parts:
                soft = soft_terms(data, folder, epochs=2 if quick else 3)
            if "float32" in parts:
                result["float32"] = float32(data, folder, images=40 if quick else 200, views=40 if quick else 600)
    except CskdError as e:
        print(f"benchmarks/online.py: {e}", file=sys.stderr)
        return 1
    different = [pair for pair in pairs if pair["cached"] != pair["online"]]
    wrong = [name for name, found in soft.items() if not found.ok]
    result |= {"pairs": len(pairs), "different": len(different), "students": pairs}
    result |= {"soft": {name: found.facts for name, found in soft.items()}, "soft_wrong": wrong}
    print(json.dumps(result | {"torch": torch.__version__}))
    return int(bool(different or wrong))


def students(data: Path, folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Hashes of the weights of every pair of students."""
    cache_teacher(config(data, folder, "cifar", "cskd-hard", "linear", epochs), quiet=True)
    found = []
    print(
        f"{'method':<12}{'decay':<12}{'steps':>6}{'cached s':>10}{'online s':>10}  sha256 of the weights, cached and online"
    )
    for method, decay in RUNS:
        configs = {kind: config(data, folder, kind, method, decay, epochs) for kind in ("cached", "online")}
        found.append(pair({"method": method, "decay": decay}, configs))
    return found


def pair(about: dict[str, Any], configs: dict[str, Config]) -> dict[str, Any]:
    """Hashes of the weights of a student of the cache and of one with live teachers."""
    for kind, settings in configs.items():
        clock = time.perf_counter()
        report = train(settings, online=kind == "online", quiet=True)
        about[kind] = hashlib.sha256((Path(report.output) / "model.safetensors").read_bytes()).hexdigest()
        about |= {f"{kind}_seconds": time.perf_counter() - clock, f"{kind}_teacher_images": report.teacher_forwards}
        about["steps"] = report.steps
    print(
        f"{about['method']:<12}{about['decay']:<12}{about['steps']:>6}{about['cached_seconds']:>10.1f}"
        f"{about['online_seconds']:>10.1f}  {about['cached'][:16]} {about['online'][:16]}",
        flush=True,
    )
    return about


def two_caches(data: Path, folder: Path, epochs: int) -> dict[str, Any]:
    """The same of a student with a teacher for the image and another one for the cells."""
    cache_teacher(config(data, folder, "cifar", "cskd-hard", "linear", epochs), quiet=True)
    weights, second = data / "teachers" / "cifar10_resnet56_jpeg.safetensors", folder / "second cache"
    one = config(data, folder, "second", "cskd-hard", "linear", epochs)
    one = replace(one, teacher=replace(one.teacher, weights=str(weights)), cache=replace(one.cache, path=str(second)))
    cache_teacher(one, quiet=True)
    configs = {}
    for kind in ("cached", "online"):
        both = config(data, folder, f"two {kind}", "cskd-hard", "linear", epochs)
        both = replace(both, train=replace(both.train, caches={"second": str(second)}))
        configs[kind] = replace(both, loss=from_dict({"loss": {"method": "terms", "terms": TWO}}).loss)
    return pair({"method": "two caches", "decay": "linear"}, configs)


def soft_terms(data: Path, folder: Path, epochs: int) -> dict[str, Compared]:
    """By codec: what its terms and the hard ones next to them are, from the cache and live."""
    print(
        f"{'codec':<16}{'steps':>6}{'hard targets':>14}{'differ':>8}{'hard losses':>13}{'differ':>8}{'error/stated':>14}"
        f"{'KL':>10}{'measured':>10}  soft losses, largest relative difference"
    )
    found = {}
    for name, stored, levels, terms in SOFT:
        settings = config(data, folder, f"soft {stored}", "cskd-hard", "linear", epochs)
        cache = replace(settings.cache, path=str(folder / f"cache {stored}"), codecs=["envelope", name], views=3)
        loss = from_dict({"loss": {"method": "terms", "terms": HARD + terms}}).loss
        settings = replace(settings, cache=cache, loss=loss)
        cache_teacher(settings, quiet=True)
        one = found[name] = compare(settings, stored, levels)
        share = "-" if one.share_of_stated is None else f"{one.share_of_stated:.4f}"
        print(
            f"{name:<16}{one.steps:>6}{one.hard_targets:>14,}{one.hard_targets_differing:>8}{one.hard_losses:>13}"
            f"{one.hard_losses_differing:>8}{share:>14}{one.kl:>10.2g}{one.kl_stored:>10.2g}  "
            + ", ".join(f"{term} {by:.1g}" for term, by in one.soft_losses.items()),
            flush=True,
        )
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
                "check_images": 16,  # how right this teacher is does not matter here
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
