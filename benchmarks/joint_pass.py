"""What one pass for two teachers saves: `cskd cache-teacher A.yaml B.yaml` against one after the other, where the views cost most.

    python -m benchmarks.joint_pass [--images 192] [--views 24]

Images of the ImageNet sample at 224 pixels by DeiT's recipe, two tiny teachers, no workers: so the processor's seconds of this
process are all there are, and other load on the machine does not show. The content of both pairs of caches is compared.
Needs $CSKD_DATA. Prints one JSON line last; exits 1 where a cache differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tiny_teacher import TINY_TEACHER
from cskd.config import Config, from_dict
from cskd.pipeline.cache_teacher import cache_teachers
from cskd.pipeline.pack import pack_data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--views", type=int, default=24)
    options = parser.parse_args()
    source = os.environ.get("CSKD_DATA")
    if source is None:
        print("benchmarks/joint_pass.py: set CSKD_DATA to the folder with data/imagenet-sample.tar", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack_data(Path(source) / "data" / "imagenet-sample.tar", folder / "data", limit=options.images, quiet=True)
        cache_teachers([_config(folder, "warm up", 6, 1)], quiet=True)
        seconds, roots = dict[str, float](), dict[str, list[str]]()
        for kind in ("apart", "joint"):
            configs = [_config(folder, f"{kind} {channels}", channels, options.views) for channels in (6, 8)]
            clock = time.process_time()
            parts = [configs] if kind == "joint" else [[config] for config in configs]
            reports = [report for part in parts for report in cache_teachers(part, quiet=True)]
            seconds[kind] = time.process_time() - clock
            roots[kind] = [report.content_root for report in reports]
    same = roots["apart"] == roots["joint"]
    print(
        f"{options.images} images, {options.views} views, 2 teachers: {seconds['apart']:.1f} s one after the other, {seconds['joint']:.1f} s in "
        f"one pass ({seconds['apart'] / seconds['joint']:.2f} times); content {'equal' if same else 'DIFFERS'}"
    )
    print(json.dumps({"benchmark": "joint_pass", "seconds": seconds, "equal": same}))
    return int(not same)


def _config(folder: Path, name: str, channels: int, views: int) -> Config:
    return from_dict(
        {
            "data": {"train": str(folder / "data")},
            "teacher": {
                "model": TINY_TEACHER,
                "kwargs": {"classes": 1000, "channels": channels, "patch": 32},
                "min_top1": 0.0,
                "check_images": 4,
                "batch": 16,
            },
            "recipe": {"size": 224, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0},
            "cache": {
                "path": str(folder / name),
                "views": views,
                "device": "cpu",
                "workers": 0,
                "codecs": ["global:top10"],
            },
        }
    )


if __name__ == "__main__":
    sys.exit(main())
