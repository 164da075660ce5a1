"""Does the recipe look like timm's, and what does it cost? Every operation on one image, ours beside timm's.

    python -m benchmarks.augment_grid [augment_grid.png]

Writes a picture with a row for each operation: ours, timm's, and where they differ (white = by one level or more).
Then come whole views: ours and timm's of DeiT's recipe, which are equal in distribution only, and their source. Images
are the ImageNet sample where CSKD_DATA names its folder, else scikit-learn's two photographs. Times are CPU time of one
thread, both sides in turns, decoding left out. About 30 seconds.

Prints the machine, a table, and one JSON line last. Exits 1 when an operation differs by more than a level.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import timm.data.auto_augment as timm_ops
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from timm.data import create_transform

from cskd.config import RecipeConfig
from cskd.views.ops import apply, apply_op
from cskd.views.randaugment import TIMM_OPERATIONS, Op, argument_of
from cskd.views.recipe import describe, sample_params

ROOT = Path(__file__).resolve().parent.parent
RAND = "rand-m9-mstd0.5-inc1"
SIZE, FILL, MAGNITUDE = 224, (124, 116, 104), 9.0
IMAGES, VIEWS = 40, 12  # timed: images, views of each
TIMM_NAMES = dict(
    zip(TIMM_OPERATIONS, timm_ops._RAND_INCREASING_TRANSFORMS, strict=True)
)  # in timm's order, on purpose
Pixels = NDArray[np.uint8]


def sample_images() -> list[Image.Image]:
    """Decoded images: the ImageNet sample where there is one, else two photographs."""
    data = Path(os.environ.get("CSKD_DATA", ROOT.parent / "shared")) / "data" / "imagenet-sample.tar"
    if not data.is_file():
        from sklearn.datasets import load_sample_images

        return [Image.fromarray(photo) for photo in load_sample_images().images]
    images = []
    with tarfile.open(data) as tar:
        for member in tar:
            if member.name.lower().endswith((".jpeg", ".jpg")):
                file = tar.extractfile(member)
                assert file is not None
                images.append(Image.open(io.BytesIO(file.read())).convert("RGB"))
    return images


def timm_transform() -> Callable[[Image.Image], torch.Tensor]:
    """What DeiT trains with."""
    options: dict[str, Any] = {"auto_augment": RAND, "re_prob": 0.25, "re_mode": "pixel", "re_count": 1}
    transform: Any = create_transform(SIZE, is_training=True, color_jitter=0.3, interpolation="bicubic", **options)
    # Pillow 13 refuses to posterize to 0 bits, which RandAugment draws now and then.
    timm_ops.NAME_TO_OP["PosterizeIncreasing"] = _posterize
    for step in transform.transforms:
        for op in getattr(step, "ops", []):
            op.aug_fn = timm_ops.NAME_TO_OP[op.name]
    whole: Callable[[Image.Image], torch.Tensor] = transform
    return whole


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    return timm_ops.posterize(image, bits) if bits else Image.new("RGB", image.size)


def operations(view: Pixels) -> Iterator[tuple[Op, Callable[[], Pixels], Callable[[], Image.Image]]]:
    """Each operation at magnitude 9, with a call that does it here and one that does it in timm."""
    picture = Image.fromarray(view)
    for name in TIMM_OPERATIONS:
        op = Op(name, argument_of(name, MAGNITUDE, negative=False, increasing=True))
        function = timm_ops.NAME_TO_OP[TIMM_NAMES[name]]
        arguments = () if op.argument is None else (op.argument,)
        options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
        yield (
            op,
            lambda op=op: apply_op(view, op, FILL),  # type: ignore[misc]
            lambda f=function, a=arguments, o=options: f(picture, *a, **o),  # type: ignore[misc]
        )


def median_ms(*calls: Callable[[], object], repeats: int = 25) -> list[float]:
    """Median milliseconds of each call, taken in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, of in zip(calls, times, strict=True):
            start = time.thread_time()
            call()
            of.append((time.thread_time() - start) * 1e3)
    return [statistics.median(of) for of in times]


def compare_operations(view: Pixels, sheet: Sheet) -> dict[str, dict[str, float]]:
    rows = {}
    print(f"{'operation':<14}{'argument':>9}{'ours ms':>10}{'timm ms':>10}{'levels':>8}{'pixels':>10}")
    for op, ours, timms in operations(view):
        found, expected = ours(), np.asarray(timms())
        wrong = np.abs(found.astype(int) - expected)
        ours_ms, timm_ms = median_ms(ours, timms)
        rows[op.name] = {"ours_ms": ours_ms, "timm_ms": timm_ms, "levels": int(wrong.max())}
        argument = "" if op.argument is None else f"{op.argument:.3g}"
        share = f"{np.mean(wrong > 0):.4%}"
        print(f"{op.name:<14}{argument:>9}{ours_ms:>10.3f}{timm_ms:>10.3f}{wrong.max():>8}{share:>10}")
        sheet.row(f"{op.name} {argument}", [found, expected, ((wrong > 0) * 255).astype(np.uint8)])
    return rows


def compare_views(images: list[Image.Image], recipe: RecipeConfig, sheet: Sheet) -> dict[str, float]:
    """Whole views, from a decoded image to what a loader gives away: uint8 here, a normalised float tensor in timm."""
    transform = timm_transform()
    mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
    times: dict[str, list[float]] = {"ours": [], "timm": []}
    for n, image in enumerate(images[:IMAGES]):
        pixels = np.array(image)
        for v in range(VIEWS):
            start = time.thread_time()
            params = sample_params(n * VIEWS + v, pixels.shape[0], pixels.shape[1], recipe)
            ours = apply(pixels, params)
            middle = time.thread_time()
            timms = transform(image)
            times["ours"].append((middle - start) * 1e3)
            times["timm"].append((time.thread_time() - middle) * 1e3)
            if v == 0 and n < 10:
                shown = (timms.permute(1, 2, 0).numpy() * std + mean) * 255
                source = np.array(image.resize((SIZE, SIZE)))
                sheet.row(describe(params), [ours, np.clip(shown.round(), 0, 255).astype(np.uint8), source])
    return {f"{side}_ms": statistics.fmean(of) for side, of in times.items()}


class Sheet:
    """A picture of captioned rows of three."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, list[Pixels]]] = []

    def row(self, caption: str, panels: list[Pixels]) -> None:
        self._rows.append((caption, panels))

    def save(self, path: Path) -> None:
        """Two rows of the sheet side by side, so that it is not a ribbon."""
        across, gap, line = 2, 8, 18
        width, height = 3 * (SIZE + gap) + 3 * gap, SIZE + line + gap
        down = (len(self._rows) + across - 1) // across
        sheet = Image.new("RGB", (across * width, line + down * height), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((gap, 2), "left: cskd, middle: timm, right: where they differ, or the source", fill="black")
        for i, (caption, panels) in enumerate(self._rows):
            left, top = i // down * width + gap, line + i % down * height
            draw.text((left, top + 2), caption, fill="black")
            for k, panel in enumerate(panels):
                sheet.paste(Image.fromarray(panel), (left + k * (SIZE + gap), top + line))
        sheet.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", nargs="?", type=Path, default=Path("augment_grid.png"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"pillow": PIL.__version__, "timm": timm.__version__}
    print(f"{platform.machine()}, {os.cpu_count()} cores, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    images, sheet = sample_images(), Sheet()
    first = np.array(images[0])
    view = apply(
        first, sample_params(0, first.shape[0], first.shape[1], RecipeConfig(size=SIZE, crop="center", flip=0.0))
    )
    rows = compare_operations(view, sheet)
    mean_ours, mean_timm = (statistics.fmean(row[f"{s}_ms"] for row in rows.values()) for s in ("ours", "timm"))
    recipe = RecipeConfig(size=SIZE, randaugment=RAND, color_jitter=0.3, erase=0.25)
    views = compare_views(images, recipe, sheet)
    sheet.save(out)
    print(
        f"one operation: ours {mean_ours:.3f} ms, timm {mean_timm:.3f} ms; "
        f"one view: ours {views['ours_ms']:.3f} ms, timm {views['timm_ms']:.3f} ms; picture in {out}"
    )
    worst = max(row["levels"] for row in rows.values())
    result = {"benchmark": "augment_grid", "versions": versions, "operations": rows, "views": views}
    print(json.dumps(result | {"operation_ms": {"ours": mean_ours, "timm": mean_timm}, "levels": worst}))
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
