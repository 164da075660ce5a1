"""Views made by torch operations on the device, as `benchmarks.device_views` compares them with the host's."""

from __future__ import annotations

import os

import torch

from benchmarks.device_views import compare
from benchmarks.gpu.bench import Bench
from cskd.config import RecipeConfig
from cskd.dataset.inventory import open_inventory
from cskd.views.maker import ViewMaker

COMPARED = 1000  # views
BATCH = 250


def device_views(bench: Bench) -> None:
    """Equality, and views per second of planning, upload, make_views and checksums."""
    s = bench.sizes
    tiny = bench.device.type == "cpu"
    maker = ViewMaker(open_inventory(bench.data(s.few)), RecipeConfig())
    images = [maker.image(sample) for sample in range(s.distinct)]
    torch.set_num_threads(1)
    found = compare(images, 8 if tiny else COMPARED, 4 if tiny else BATCH, bench.device, mixed=not tiny)
    bench.say("views that differ", found["different"], f"of {found['views']}", "; ".join(found["which"]))
    for name in ("plan", "upload", "make_views", "pixel_crcs", "apply", "pixel_crc"):
        us = found[f"{name}_us"]
        where = "one core" if name in ("plan", "apply", "pixel_crc") else "the device"
        bench.say(name, 1e6 / max(1e-3, us), "views/s", f"{us} us a view, {where} of {os.cpu_count()} cores")
