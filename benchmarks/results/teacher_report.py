"""What has a teacher to say in its cells? Its facts before any student, one column a config.

    python -m benchmarks.results.teacher_report CONFIG [CONFIG ...] [--set KEY=VALUE ...] [--train-images 5000] [--views 2000]

Clean images, as the teacher wants them (teacher.crop_pct): all of data.val, and up to 5,000 of data.train, spread over the
classes. Views: the recipe's, mixed, from the cache at cache.path where it has some of this teacher's (its `envelope` codec), else
made here, about 0.6 MB each at 224 pixels.

    top1            share of images whose global class is the label, on val and on train
    local_differs   share of cells whose local class (hard target at blend 1) is not the global one; half_differs: at blend 0.5
    local_right     share of cells whose local class is the label
    segments        classes that win at some blend in a cell, the lines of its upper envelope, mean over cells
    field           the receptive field of the cell in the middle (see receptive_field.py), pixels of the teacher's input:
                    theoretical height x width, and the side of the square that holds 68 % and 95 % of the gradient

Prints the machine, a table, and one JSON line last: for each config its facts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.results.receptive_field import ReceptiveField, receptive_field
from cskd.codecs.base import BLEND_ONE
from cskd.codecs.envelope import EnvelopeCodec
from cskd.config import Config, RecipeConfig, load_config
from cskd.dataset.inventory import Inventory, open_inventory
from cskd.errors import ConfigError, CskdError, DataError, ImageError, TeacherError
from cskd.machine.arithmetic import full_precision
from cskd.machine.devices import pick_device
from cskd.method.ckf import hard_targets
from cskd.pipeline.clean_check import spread
from cskd.pipeline.measure_precision import first_views
from cskd.store.cache import Cache, open_cache
from cskd.store.format import MANIFEST
from cskd.teacher.clean import clean_image
from cskd.teacher.model import Teacher, load_teacher
from cskd.views.maker import ViewMaker

HALF = BLEND_ONE // 2
ROWS = 64  # images whose logits are compared at a time: hard targets are computed in float64
FIELD_IMAGES = 16


@dataclass
class CellCounts:
    """Running sums over cells."""

    images: int = 0
    cells: int = 0
    local: int = 0  # whose class at blend 1 is not the global one
    half: int = 0  # at blend 0.5
    segments: int = 0
    right: int = 0  # whose class at blend 1 is the label
    top1: int = 0  # images

    def add(self, dense_BKhw: Tensor, global_BK: Tensor, label_B: Tensor | None = None) -> None:
        """The logits of some images, and their labels where they have one each."""
        codec = EnvelopeCodec(dense_BKhw.shape[1], (dense_BKhw.shape[2], dense_BKhw.shape[3]))
        for i in range(0, len(dense_BKhw), ROWS):
            dense, image = dense_BKhw[i : i + ROWS], global_BK[i : i + ROWS]
            local, whole = hard_targets(dense, image, BLEND_ONE).cpu(), image.argmax(1).cpu()
            half = hard_targets(dense, image, HALF).cpu()
            n_extra = int(codec.encode(dense, image)["n_extra"].sum(dtype=np.int64))
            self.images += len(image)
            self.cells += local.numel()
            self.local += int((local != whole[:, None, None]).sum())
            self.half += int((half != whole[:, None, None]).sum())
            self.segments += n_extra + local.numel()
            if label_B is not None:
                label = label_B[i : i + ROWS]
                self.right += int((local == label[:, None, None]).sum())
                self.top1 += int((whole == label).sum())

    def facts(self, labelled: bool) -> dict[str, Any]:
        """As the module's docstring names them; of images that have a label each, their shares too."""
        cells = max(1, self.cells)
        facts: dict[str, Any] = {
            "images": self.images,
            "local_differs": self.local / cells,
            "half_differs": self.half / cells,
            "segments": self.segments / cells,
        }
        if labelled:
            facts |= {"local_right": self.right / cells, "top1": self.top1 / max(1, self.images)}
        return facts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--train-images", type=int, default=5000)
    parser.add_argument("--views", type=int, default=2000)
    options = parser.parse_args(arguments)
    try:
        if min(options.train_images, options.views) < 1:
            raise ConfigError("--train-images and --views are counts, expected at least 1")
        facts = {
            str(path): report(load_config(path, options.overrides), options.train_images, options.views)
            for path in options.configs
        }
    except CskdError as e:
        print(f"benchmarks/results/teacher_report.py: {e}", file=sys.stderr)
        return 1
    print(f"{platform.platform()}, torch {torch.__version__}")
    render(facts, Console())
    print(json.dumps(facts))
    return 0


def report(config: Config, train_images: int, views: int) -> dict[str, Any]:
    """The facts of one config's teacher.

    Raises:  ConfigError where data.train or data.val is not set; DataError where they have other classes than each other;
             others where data, teacher or cache can't be read.
    """
    for key in ("train", "val"):
        if not getattr(config.data, key):
            raise ConfigError(f"data.{key} is empty; the report needs images of both, for example --set data.{key}=...")
    train, val = (open_inventory(Path(folder)) for folder in (config.data.train, config.data.val))
    if train.classes != val.classes:
        raise DataError(
            f"{config.data.val} has other classes than {config.data.train}; pack both with one list (--classes)"
        )
    for inventory in (train, val):
        inventory.check_shards()
    device = pick_device(config.cache.device)
    # A program is compiled for one size of batch, and folded convolutions may run where no gradient comes through.
    settings = replace(config.teacher, compile=False, fold=False)
    teacher = load_teacher(settings, train.classes, device, config.recipe.size)
    facts: dict[str, Any] = {
        "model": config.teacher.model,
        "weights": config.teacher.weights,
        "weights_sha256": teacher.fingerprint.weights_sha256,
        "classes": teacher.classes,
        "grid": list(teacher.grid),
        "val": _clean(teacher, val, len(val)),
        "train": _clean(teacher, train, train_images),
    }
    cache = _cache_of(config, teacher)
    facts["views"] = (_cached_views(cache, views) if cache else None) or _live_views(config, train, teacher, views)
    facts["field"] = asdict(_field(teacher, val))
    return facts


def _clean(teacher: Teacher, inventory: Inventory, count: int) -> dict[str, Any]:
    """Facts of at most `count` clean images, spread over the classes; DataError where none can be decoded."""
    counts = CellCounts()
    label = np.asarray(inventory.label, np.int64)
    for pixels, samples in _clean_batches(teacher, inventory, spread(label, count).tolist()):
        dense_BKhw, global_BK = teacher.forward_dense(pixels)
        counts.add(dense_BKhw, global_BK, torch.from_numpy(label[samples]))
    if not counts.images:
        raise DataError(f"no image of {inventory.root} can be decoded; run `cskd pack` again")
    return counts.facts(labelled=True)


def _clean_batches(teacher: Teacher, inventory: Inventory, samples: list[int]) -> Iterator[tuple[Tensor, list[int]]]:
    """Clean images as the teacher wants them, float32 [B, 3, size, size] RGB in 0..255, and which they are."""
    maker = ViewMaker(inventory, RecipeConfig())  # of whole images alone: no recipe is read
    pixels: list[Tensor] = []
    good: list[int] = []
    for sample in samples:
        try:
            pixels.append(clean_image(maker.image(sample), teacher.preprocess))
        except ImageError:
            continue
        good.append(sample)
        if len(good) == teacher.batch:
            yield torch.stack(pixels).float(), good
            pixels, good = [], []
    if good:
        yield torch.stack(pixels).float(), good


def _cache_of(config: Config, teacher: Teacher) -> Cache | None:
    """The cache at cache.path where there is one that holds envelopes of this teacher."""
    if not config.cache.path or not (Path(config.cache.path) / MANIFEST).exists():
        return None
    cache = open_cache(config.cache.path, images=False)
    made_with = cache.identity.teacher
    if any(made_with[name] != teacher.fingerprint.facts[name] for name in ("weights_sha256", "grid", "class_map")):
        raise TeacherError(
            f"{cache.root} was made with another teacher than the config's; set cache.path= to make views here, or the "
            "path of its own cache"
        )
    return cache if "envelope" in cache.codecs else None


def _cached_views(cache: Cache, count: int) -> dict[str, Any] | None:
    """Facts of at least `count` views, whole units from all over the cache; None where no unit is finished."""
    units = [(b, v) for v in range(cache.views) for b in range(cache.blocks) if cache.commit_of(b, v) is not None]
    if not units:
        return None
    counts, codec = CellCounts(), cache.codecs["envelope"]
    order = np.random.default_rng(0).permutation(len(units)).tolist()
    for block, view in (units[i] for i in order):
        arrays = cache.read(block, view, "envelope").targets
        whole = arrays["global_class"][:, None, None]
        n_extra = arrays["n_extra"]
        counts.images += len(whole)
        counts.cells += n_extra.size
        counts.local += int((codec.hard(arrays, BLEND_ONE) != whole).sum())
        counts.half += int((codec.hard(arrays, HALF) != whole).sum())
        counts.segments += int(n_extra.sum(dtype=np.int64)) + n_extra.size
        if counts.images >= count:
            break
    return counts.facts(labelled=False) | {"source": "cache"}


def _live_views(config: Config, train: Inventory, teacher: Teacher, count: int) -> dict[str, Any]:
    """Facts of about `count` views that stage 1 would make first."""
    counts = CellCounts()
    for part in torch.split(first_views(ViewMaker(train, config.recipe), count, 4), teacher.batch):
        counts.add(*teacher.forward_dense(part))
    return counts.facts(labelled=False) | {"source": "live"}


def _field(teacher: Teacher, val: Inventory) -> ReceptiveField:
    """Of the teacher's grid, over a few clean images."""
    samples = spread(np.asarray(val.label, np.int64), FIELD_IMAGES).tolist()
    pixels = torch.cat([part for part, _ in _clean_batches(teacher, val, samples)])

    try:
        with full_precision(teacher.device):
            return receptive_field(partial(cell_features, teacher), teacher.prepare(pixels).to(teacher.dtype))
    except (ValueError, RuntimeError) as e:
        raise TeacherError(
            f"the receptive field of {val.root} images can't be measured: {str(e).splitlines()[0]}"
        ) from e


def cell_features(teacher: Teacher, x: Tensor) -> Tensor:
    """The map that the dense logits of the teacher's grid are made of: [B, C, h, w].

    x is the network's input. A teacher with a forward_dense of its own shows no map: its dense logits take the place.
    """
    head = teacher.head
    if head.kind == "forward_dense":
        map_BChw: Tensor = head.apply(x)[0]
    else:
        map_BChw = head.backbone(x)
        map_BChw = map_BChw.permute(0, 3, 1, 2) if head.nhwc else map_BChw
    return torch.nn.functional.adaptive_avg_pool2d(map_BChw, teacher.grid) if teacher.pools else map_BChw


def render(facts: dict[str, dict[str, Any]], console: Console) -> None:
    """A column for each config."""
    table = Table(title="teachers before any student")
    table.add_column("")
    for name in facts:
        table.add_column(Path(name).stem, justify="right")

    def row(text: str, *keys: str) -> None:
        cells = []
        for of in facts.values():
            value: Any = of
            for key in keys:
                value = value[key]
            cells.append(f"{value:,}" if isinstance(value, int) else f"{100 * value:.2f} %")
        table.add_row(text, *cells)

    for part, text in (("val", "clean, data.val"), ("train", "clean, data.train"), ("views", "mixed views")):
        row(f"{text}: images", part, "images")
        if part != "views":
            row("  top-1", part, "top1")
            row("  cells whose local class is the label", part, "local_right")
        row("  cells whose local class is not the global one", part, "local_differs")
        row("  cells whose class at blend 0.5 is not the global one", part, "half_differs")
        table.add_row("  segments a cell", *(f"{of[part]['segments']:.3f}" for of in facts.values()))
    fields = [of["field"] for of in facts.values()]
    table.add_row("grid", *(_by(of["grid"]) for of in facts.values()))
    table.add_row("input, pixels", *(_by(of["input_size"]) for of in fields))
    table.add_row(
        "receptive field of the middle cell, pixels",
        *(_by(of["theoretical"]) + (" (all)" if of["whole_input"] else "") for of in fields),
    )
    for share in fields[0]["effective"]:
        text = f"  side of the square with {100 * float(share):.0f} % of the gradient"
        table.add_row(text, *(f"{of['effective'][share]:.1f}" for of in fields))
    console.print(table)


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes))


if __name__ == "__main__":
    sys.exit(main())
