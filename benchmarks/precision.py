"""How many hard targets does the teacher's arithmetic change? The same weights in each, against IEEE float32.

    python -m benchmarks.precision [configs/imagenet_sample.yaml] [--set KEY=VALUE ...] [--views 500]

The views are those that stage 1 makes first, mixed. What a cache of this config would record is measured on 64 of them. Two
forwards a view for each row of the table.

Prints the machine, a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cskd.config import load_config
from cskd.dataset.inventory import open_inventory
from cskd.errors import CskdError
from cskd.machine.devices import pick_device
from cskd.pipeline.measure_precision import first_views
from cskd.teacher.model import load_teacher
from cskd.teacher.precision import measure
from cskd.views.maker import ViewMaker

ROOT = Path(__file__).resolve().parent.parent
PLAIN: dict[str, Any] = {"precision": "float32", "fold": False, "compile": False}
ROWS: dict[str, dict[str, Any]] = {
    "bf16 backbone": {"precision": "bf16"},
    "bf16 backbone, folded": {"precision": "bf16", "fold": True},
    "float32, folded": {"fold": True},
    "fp16 backbone": {"precision": "fp16"},
    "float64": {"precision": "float64"},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "imagenet_sample.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--views", type=int, default=500)
    options = parser.parse_args(arguments)
    try:
        facts = _measure(load_config(options.config, options.overrides), options.views)
    except CskdError as e:
        print(f"benchmarks/precision.py: {e}", file=sys.stderr)
        return 1
    print(f"{platform.platform()}, torch {torch.__version__}, {facts['bf16 backbone']['views']} views")
    for name, row in facts.items():
        blends = ", ".join(f"{100 * share:.2f} % at blend {blend}" for blend, share in row["by_blend"].items())
        print(f"{name:24}{100 * row['cells_differ']:6.2f} %   {blends}")
    print(json.dumps(facts))
    return 0


def _measure(config: Any, count: int) -> dict[str, dict[str, Any]]:
    """The facts of each row."""
    inventory, device = open_inventory(Path(config.data.train)), pick_device(config.cache.device)
    views = first_views(ViewMaker(inventory, config.recipe), count, 4)
    facts = {}
    plain = load_teacher(replace(config.teacher, **PLAIN), inventory.classes, device, config.recipe.size)
    for name, changes in ROWS.items():
        changed = replace(config.teacher, **(PLAIN | changes))
        teacher = load_teacher(changed, inventory.classes, device, config.recipe.size)
        facts[name] = measure(teacher, plain, views).facts
    return facts


if __name__ == "__main__":
    sys.exit(main())
